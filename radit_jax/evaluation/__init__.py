"""Metrics, intervals and the report; numpy only."""
