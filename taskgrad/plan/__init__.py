"""What shall happen where: costs and placement. Pure functions."""
