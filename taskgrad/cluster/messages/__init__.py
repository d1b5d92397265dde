"""What processes tell each other beside Dask's own messages."""
