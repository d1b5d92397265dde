"""A pass of a reduction over memory, and a fast path for repeated reductions to one number.

`choose_direction` decides from which end a pass reads its operand.
"""

from __future__ import annotations

import os
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import get_num_threads

from taskgrad.kernels.codegen.reduce_source import SCRATCH
from taskgrad.kernels.codegen.work_stealing import BACKWARDS, CALL, call_descriptor, reset
from taskgrad.kernels.runtime import thread_team
from taskgrad.kernels.runtime.kernel_cache import Kernel
from taskgrad.kernels.runtime.memory import aligned_buffer, unreadable
from taskgrad.kernels.runtime.thread_team import CallStats

_RESULTS = 16  # in a batch
_X, _OUT = len(CALL), len(CALL) + 1

# Seconds for which the start of memory that was read backwards is assumed to be in the caches: too
# short for reading much other memory.
_CACHED_FOR = 1e-3
# The address of the memory that was last read backwards, and until when that counts.
_read_backwards, _until = 0, 0.0


def choose_direction(address: int) -> bool:
    """True to read this memory backwards, because its end is more likely to be in the caches.

    Its last reader or writer went forwards, so of memory larger than the caches the end is left;
    unless that reader was a reduction that went backwards.
    """
    global _read_backwards
    backwards = address != _read_backwards or perf_counter() > _until
    _read_backwards = address if backwards else 0
    return backwards


def direction_done() -> None:
    """Note that the memory has just been read."""
    global _until
    _until = perf_counter() + _CACHED_FOR


@dataclass(frozen=True)
class Pass:
    """One call of a kernel that reduces or scans."""

    kernel: Kernel
    meta: torch.Tensor  # the kernel's parameters
    items: int
    one_thread: bool
    shared: int = 0  # bytes of memory for segments that the kernel itself combines
    bidirectional: bool = False  # may also read backwards

    def run(self, *tensors: torch.Tensor, nbytes: int) -> CallStats:
        """Call the kernel with these operands, of `nbytes` bytes in all."""
        start = perf_counter()
        try:
            addresses = [t.data_ptr() for t in tensors]
        except RuntimeError as error:
            raise unreadable(self.kernel.name, tensors) from error
        if 0 in addresses:
            raise unreadable(self.kernel.name, tensors)
        count = thread_team.run(
            self.kernel,
            self.items,
            addresses,
            meta=self.meta.data_ptr(),
            scratch=SCRATCH,
            shared=self.shared,
            backwards=self.bidirectional and choose_direction(addresses[0]),
            threads=1 if self.one_thread else get_num_threads(),
        )
        seconds = perf_counter() - start
        if self.bidirectional:
            direction_done()
        return CallStats(count, self.items, nbytes, seconds)


def make_pass(kernel: Kernel, parameters: Sequence[int], items: int, elements: int) -> Pass:
    """A pass over this number of elements."""
    one_thread = items <= 1 or elements <= thread_team.ONE_THREAD
    return Pass(kernel, torch.tensor(parameters, dtype=torch.int64), items, one_thread)


@dataclass(frozen=True)
class Step:
    """A pass of a reduction that can be repeated, on tensors of one layout."""

    only: Pass
    shape: Sequence[int]  # of the result
    dtype: torch.dtype
    nbytes: int  # of the tensor and the result
    part: str  # the key in `last` of a call's statistics
    last: dict[str, CallStats]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The result."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.last[self.part] = self.only.run(x, out, nbytes=self.nbytes)
        return out


class _Call(NamedTuple):
    """A call that can be repeated: descriptor, callable, statistics, and its scratch memory."""

    descriptor: array[int]
    run: Callable[[], None]
    stats: CallStats
    scratch: torch.Tensor


class FullReduce:
    """A step that reduces a whole tensor to one element, by a kernel that cannot fail.

    Around the kernel a call runs Python and torch's dispatcher. A large tensor evicts their data
    from the caches, so on the next call they take 0.2 ms, where ten million elements take 1 ms. So
    the call descriptor and scratch memory are kept, and results are allocated in batches.
    """

    def __init__(self, step: Step) -> None:
        self._step, self._one_thread = step, step.only.one_thread
        self._part, self._last = step.part, step.last
        # By the number of threads: calls that are not running, as many as ran at the same time.
        self._calls: dict[int, list[_Call]] = {}
        self._results: list[torch.Tensor] = []
        _all.add(self)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """As `Step.run`."""
        global _read_backwards, _until
        start = perf_counter()
        address = x.data_ptr()
        if not address:
            raise unreadable(self._step.only.kernel.name, [x])
        count = 1 if self._one_thread else get_num_threads()
        try:
            call = self._calls[count].pop()
        except (KeyError, IndexError):
            call = self._new_call(count)
        try:
            out = self._results.pop()
        except IndexError:
            out, *self._results = [torch.empty((), dtype=self._step.dtype) for _ in range(_RESULTS)]
        descriptor, run, stats, _ = call
        backwards = address != _read_backwards or start > _until  # `choose_direction`, inlined
        _read_backwards = address if backwards else 0
        reset(descriptor)
        descriptor[BACKWARDS] = backwards
        descriptor[_X] = address
        descriptor[_OUT] = out.data_ptr()
        run()
        self._calls[count].append(call)
        self._last[self._part] = stats
        end = perf_counter()
        stats.seconds, _until = end - start, end + _CACHED_FOR
        return out

    def _new_call(self, count: int) -> _Call:
        self._calls.setdefault(count, [])
        only = self._step.only
        count = min(count, only.items)
        scratch, address = aligned_buffer(SCRATCH * count + only.shared)
        descriptor = call_descriptor(
            only.items,
            (0, 0),
            meta=only.meta.data_ptr(),
            scratch=address,
            scratch_size=SCRATCH,
            threads=count,
            thread_id=thread_team.thread_id_function(),
            chunked=True,
        )
        run = thread_team.prepare(only.kernel, descriptor.buffer_info()[0], count)
        return _Call(descriptor, run, CallStats(count, only.items, self._step.nbytes, 0.0), scratch)

    def clear(self) -> None:
        """Drop all prepared calls; in a forked child their threads do not exist."""
        self._calls.clear()


_all: weakref.WeakSet[FullReduce] = weakref.WeakSet()


def _after_fork() -> None:
    for reduction in list(_all):
        reduction.clear()


os.register_at_fork(after_in_child=_after_fork)
