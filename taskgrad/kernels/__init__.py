"""Elementwise functions, reductions and scans compiled from scalar Python, with gradients."""
