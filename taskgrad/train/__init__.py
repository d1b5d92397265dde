"""Training on the workers."""
