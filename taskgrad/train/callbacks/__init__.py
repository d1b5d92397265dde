"""What runs on the driver at points of a training: the base of callbacks, and ready ones."""
