"""Kernels in torch's autograd, `torch.func` and `torch.compile`."""
