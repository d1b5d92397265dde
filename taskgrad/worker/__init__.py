"""What happens inside a worker process: shards, tapes, actions. Torch, no Dask."""
