"""What happens inside a worker process: stages, tapes, actions. Torch, no Dask."""
