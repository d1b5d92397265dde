"""Dask's processes made fit for torch: memory, intervals, limits."""
