"""Scalar functions as data: tracing, expressions in SSA form, types, derivatives. No Numba."""
