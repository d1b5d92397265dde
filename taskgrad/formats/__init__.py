"""The files of weights and checkpoints."""
