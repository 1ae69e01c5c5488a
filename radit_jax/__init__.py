"""RA-DIT: retrieval-augmented dual instruction tuning in JAX."""
