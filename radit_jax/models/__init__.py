"""Language model and encoder, their weights' import, and attention."""
