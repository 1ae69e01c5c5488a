"""Scoring and generation with trained models."""
