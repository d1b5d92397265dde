"""Checkpoints of a trainer: files from which it goes on in another process."""
