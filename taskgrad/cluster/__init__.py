"""All that knows the insides of Dask."""
