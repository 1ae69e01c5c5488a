"""What a compiled program needs of a TPU slice that is not attached, and why."""
