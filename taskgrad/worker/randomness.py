"""Random numbers that depend on what is computed, not on where or when.

In a training step every layer draws from a stream of its own, fixed by (seed, step, microbatch,
layer). So dropout has the same bits whatever the placement, the schedule, or the number of
threads, and again when a forward is recomputed.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from taskgrad.arguments import shown, whole


class _StreamLock:
    """A reentrant lock, held by the streams of a thread and not by the thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: list[_Stream] | None = None
        self._depth = 0

    def acquire(self, holder: list[_Stream]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._holder is None or self._holder is holder)
            self._holder = holder
            self._depth += 1

    def release(self) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._holder = None
                self._changed.notify()


# torch has one default generator a device for all threads of a process.
_one_at_a_time = _StreamLock()

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
_entered = threading.local()  # the streams that its thread draws from, the innermost last


class _Stream:
    """A random stream for the code inside the context; its state is kept between uses."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own: list[torch.Tensor] = []  # none before the first use
        self._before: list[torch.Tensor] = []

    def enter(self) -> None:
        """Make torch's default generators draw from this stream; other threads wait meanwhile."""
        _one_at_a_time.acquire(streams_here())
        generators = _generators()
        self._before = [generator.get_state() for generator in generators]
        for generator in generators[len(self._own) :]:
            generator.manual_seed(self._seed)
        _set(generators, self._own)
        if _cuda_is_to_come():
            torch.cuda.manual_seed_all(self._seed)

    def leave(self) -> None:
        """Restore the generators' states from before `enter`."""
        generators = _generators()
        self._own = [generator.get_state() for generator in generators]
        _set(generators, self._before)
        # Devices that the stream was the first to use, or that are to come, as torch seeds them.
        for generator in generators[len(self._before) :]:
            generator.manual_seed(torch.initial_seed())
        if _cuda_is_to_come():
            torch.cuda.manual_seed_all(torch.initial_seed())
        _one_at_a_time.release()


def _generators() -> list[torch.Generator]:
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda]


def _cuda_is_to_come() -> bool:
    """True if the code in a stream may be the first to use CUDA: torch then seeds it as told."""
    return not torch.cuda.is_initialized() and _has_cuda()


@functools.cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _set(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    # A device that was used for the first time since has no state to go back to.
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)


def stream_seed(seed: int, step: int, microbatch: int, layer: str) -> int:
    """The seed of one stream, below 2**63."""
    words = f"{seed}/{step}/{microbatch}/{layer}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) >> 1


@contextmanager
def random_stream(seed: int, step: int, microbatch: int, layer: str) -> Iterator[None]:
    """Make torch's default generators draw from the stream that a `Trainer` uses for this layer.

    Use it to repeat in plain torch what a layer did on a worker. The generators' states are
    restored at the end; until then no other thread can enter a random stream.

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

    Raises
    ------
    TypeError
        A number is not a whole number: 1.0 would be another stream than 1.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> with tg.random_stream(0, step=3, microbatch=1, layer="drop"):
    ...     a = torch.rand(2)
    >>> with tg.random_stream(0, step=3, microbatch=1, layer="drop"):
    ...     bool((torch.rand(2) == a).all())
    True
    """
    seed, step = whole("seed", seed), whole("step", step)
    microbatch = whole("microbatch", microbatch)
    if not isinstance(layer, str):
        raise TypeError(f"layer is a layer's name; got {shown(layer)}")
    stream = _Stream(stream_seed(seed, step, microbatch, layer))
    streams = streams_here()
    stream.enter()
    streams.append(stream)
    try:
        yield
    finally:
        streams.remove(stream)
        stream.leave()


@contextmanager
def paused() -> Iterator[None]:
    """Leave this thread's streams in the block, so that other threads can draw from theirs."""
    streams = streams_here()
    for stream in reversed(streams):
        stream.leave()
    try:
        yield
    finally:
        for stream in streams:
            stream.enter()


@contextmanager
def drawing_from(streams: list[_Stream]) -> Iterator[None]:
    """Have this thread act for the one with these streams, which waits for it."""
    own = streams_here()
    _entered.streams = streams
    try:
        yield
    finally:
        _entered.streams = own


def streams_here() -> list[_Stream]:
    """The streams that this thread draws from: always the same list, the innermost last."""
    found: list[_Stream] = vars(_entered).setdefault("streams", [])
    return found


def may_draw(fn: Any) -> bool:
    """False for modules of torch that cannot draw random numbers, True for all other layers."""
    if not isinstance(fn, nn.Module):
        return True
    known = _may_draw.get(fn)
    if known is None:
        known = _may_draw[fn] = any(
            not type(m).__module__.startswith("torch.nn.modules.")
            or isinstance(m, _DRAWING)
            or bool(m._forward_hooks or m._forward_pre_hooks)
            for m in fn.modules()
        )
    return known
