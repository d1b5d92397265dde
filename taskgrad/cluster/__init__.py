"""All code that depends on Dask's internals. Each file says first which processes run it."""
