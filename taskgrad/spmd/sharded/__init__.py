"""Tensors whose parts stay on workers: `ShardedTensor`, and what makes one."""
