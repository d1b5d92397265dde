"""Source text of kernels for Numba, and the intrinsics and functions that it calls."""
