"""A reduction of a whole tensor that is one call of machine code, kept ready to be made again.

Beside its loop a call is Python and torch's dispatcher: numbers are put together, a result is made.
Where a large tensor has just gone through the caches, all that has to come out of memory again, and
takes a fifth of a millisecond where ten million elements take one. So what stays the same is kept
as it is, and results are made some at a time.
"""

from __future__ import annotations

import os
import weakref
from array import array
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch
from torch import get_num_threads

from taskgrad.kernels.codegen.work_stealing import CALL, FROM_END, begin_again, row_of
from taskgrad.kernels.runtime import thread_team
from taskgrad.kernels.runtime.kernel_cache import Kernel
from taskgrad.kernels.runtime.memory import unreadable
from taskgrad.kernels.runtime.thread_team import LastCall

_RESULTS = 16  # made at a time
_X, _OUT = len(CALL), len(CALL) + 1

# For so many seconds what was read from its end is taken for what is in the caches: until then few
# others can have gone through as much memory as they hold.
_HOLDS = 1e-3
# The address of what was last read from its end, and until when that counts.
_ended, _until = 0, 0.0


def from_end(address: int) -> bool:
    """Whether to begin at the end of this memory, as more of that will be in the caches.

    Whoever wrote or read it before did so from the start, unless it was us just now, the other way.
    Where it is larger than the last cache, only what was gone through last is still there.
    """
    global _ended
    is_so = address != _ended or perf_counter() > _until
    _ended = address if is_so else 0
    return is_so


def done_from_end() -> None:
    """It was read just now."""
    global _until
    _until = perf_counter() + _HOLDS


class _Call(NamedTuple):
    """The numbers of a call, what makes it, what it did, and the memory that it works in."""

    numbers: array[int]
    make: Callable[[], None]
    done: LastCall
    memory: torch.Tensor


class Repeated:
    """A reduction to one element, with a kernel that cannot fail.

    Parameters
    ----------
    last, part : dict, str
        Where to say what was done, for `explain`, and under which name.
    kernel, items, meta
        As in `taskgrad.kernels.runtime.thread_team.run`; the tensor of the numbers.
    dtype : torch.dtype
        Of the result.
    nbytes : int
        Of the tensor and the result.
    alone : bool
        Whether one thread does it.
    scratch, shared : int
        Bytes of memory that each thread needs, and that they need together.
    """

    def __init__(
        self,
        last: dict[str, LastCall],
        part: str,
        kernel: Kernel,
        items: int,
        meta: torch.Tensor,
        dtype: torch.dtype,
        nbytes: int,
        *,
        alone: bool,
        scratch: int,
        shared: int,
    ) -> None:
        self._last, self._part = last, part
        self._kernel, self._items, self._meta = kernel, items, meta
        self._dtype, self._nbytes = dtype, nbytes
        self._alone, self._scratch, self._shared = alone, scratch, shared
        # Whoever calls takes one and gives it back: as many as there are calls at a time.
        self._calls: dict[int, list[_Call]] = {}
        self._results: list[torch.Tensor] = []
        _all.add(self)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The result; what was done is under `part` of `last` then."""
        global _ended, _until
        start = perf_counter()
        place = x.data_ptr()
        if not place:
            raise unreadable(self._kernel.name, [x])
        count = 1 if self._alone else get_num_threads()
        try:
            call = self._calls[count].pop()
        except (KeyError, IndexError):
            call = self._call(count)
        try:
            out = self._results.pop()
        except IndexError:
            out, *self._results = [torch.empty((), dtype=self._dtype) for _ in range(_RESULTS)]
        numbers, make, done, _ = call
        is_from_end = place != _ended or start > _until  # as in `from_end`, without its call
        _ended = place if is_from_end else 0
        begin_again(numbers)
        numbers[FROM_END] = is_from_end
        numbers[_X] = place
        numbers[_OUT] = out.data_ptr()
        make()
        self._calls[count].append(call)
        self._last[self._part] = done
        end = perf_counter()
        done.seconds, _until = end - start, end + _HOLDS
        return out

    def _call(self, count: int) -> _Call:
        self._calls.setdefault(count, [])
        count = min(count, self._items)
        memory = torch.empty(self._scratch * count + self._shared + 64, dtype=torch.uint8)
        numbers = row_of(
            self._items,
            (0, 0),
            meta=self._meta.data_ptr(),
            place=-(-memory.data_ptr() // 64) * 64,
            scratch=self._scratch,
            threads=count,
            who=thread_team.who(),
            turns=True,
        )
        make = thread_team.start_of(self._kernel, numbers.buffer_info()[0], count)
        return _Call(numbers, make, LastCall(count, self._items, self._nbytes, 0.0), memory)

    def forget(self) -> None:
        """Make all calls anew: the threads of before are not there any more."""
        self._calls.clear()


_all: weakref.WeakSet[Repeated] = weakref.WeakSet()


def _after_fork() -> None:
    for repeated in list(_all):
        repeated.forget()


os.register_at_fork(after_in_child=_after_fork)
