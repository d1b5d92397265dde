"""Random numbers that depend on what is computed, not on where or when.

In a training step every layer draws from a stream of its own, fixed by (seed, step, microbatch,
layer). So dropout gives the same bits whatever the placement, the schedule, or the number of
threads, and again when a forward is recomputed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# torch has one default generator a device for all threads of a process.
_one_at_a_time = threading.RLock()

_DRAWING = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_may_draw: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def stream_seed(seed: int, step: int, microbatch: int, layer: str) -> int:
    """The seed of one stream, below 2**63."""
    words = f"{seed}/{step}/{microbatch}/{layer}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) >> 1


@contextmanager
def random_stream(seed: int, step: int, microbatch: int, layer: str) -> Iterator[None]:
    """Have torch's default generators draw from the stream that a `Trainer` gives this layer.

    To repeat in plain torch what a layer did on a worker. What the generators were before comes
    back at the end. Meanwhile no other thread can enter one of these.

    Parameters
    ----------
    seed
        The trainer's seed.
    step
        Counted from 0: how many batches the trainer took before.
    microbatch
        Counted from 0.
    layer
        The layer's name, as in ``chain.placement``.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> with tg.random_stream(0, step=3, microbatch=1, layer="drop"):
    ...     a = torch.rand(2)
    >>> with tg.random_stream(0, step=3, microbatch=1, layer="drop"):
    ...     bool((torch.rand(2) == a).all())
    True
    """
    start = stream_seed(seed, step, microbatch, layer)
    with _one_at_a_time:
        generators = [torch.default_generator]
        if torch.cuda.is_initialized():
            generators += torch.cuda.default_generators
        before = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(start)
        try:
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


def may_draw(fn: Any) -> bool:
    """Whether a layer may draw random numbers: all do but those modules of torch that cannot."""
    if not isinstance(fn, nn.Module):
        return True
    if fn not in _may_draw:
        _may_draw[fn] = any(
            not type(m).__module__.startswith("torch.nn.modules.")
            or isinstance(m, _DRAWING)
            or bool(m._forward_hooks or m._forward_pre_hooks)
            for m in fn.modules()
        )
    return _may_draw[fn]
