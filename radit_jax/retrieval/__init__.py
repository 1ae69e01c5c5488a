"""Passage embeddings and the indexes that search them."""
