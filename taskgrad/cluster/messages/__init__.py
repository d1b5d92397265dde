"""Messages between processes in addition to Dask's own."""
