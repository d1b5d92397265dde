"""Calls of kernels on CPU tensors: compiling, planning, threads, memory. No gradients."""
