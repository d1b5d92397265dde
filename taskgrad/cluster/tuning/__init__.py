"""Settings of Dask's processes that suit torch: memory, intervals, limits."""
