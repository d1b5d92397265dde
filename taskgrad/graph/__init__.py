"""What the model is: layers, the graph of calls, its adjoint. Pure: no Dask, runs nothing."""
