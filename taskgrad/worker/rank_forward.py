"""Ranks of a parallel call as actions of a resident program, which runs them again and again.

What calls have in common is sent once, with the program: the function and its settings. Of each
call the program gets a specification of its own (keys, random seed) and the inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from taskgrad.graph.calls import CallSpec
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.worker.forward import Forward
from taskgrad.worker.parts import KeepOutput
from taskgrad.worker.rank_threads import RankJob, join_all, run_together
from taskgrad.worker.store import Store, buffers_key

# How long ranks run before their worker may run another task meanwhile.
_KEEP_THREAD_S = 0.25


@dataclass(frozen=True)
class KeptInput:
    """An input of a program that its worker keeps for later calls, under this number.

    It has a `value` when it is sent, and None when the worker has it.
    """

    number: int
    value: Any = None


@dataclass(frozen=True)
class RankForward:
    """Run one rank; it leaves no tape. What it gives may be kept in the worker's store."""

    title: str
    function: bytes
    template: bytes
    keeps: bool = False

    @staticmethod
    def keys(inputs: Sequence[Any]) -> list[str]:
        """The keys of the ranks that run with these inputs."""
        return [inputs[0].key]

    def run(self, store: Store, call: CallSpec, *values: Any) -> Any:
        """The output, and the function's buffers: those that it changed, if the call has any.

        Of an output that is kept its description.
        """
        call = call._replace(function=self.function, template=self.template)
        forward = Forward(call, taped=False, give_buffers=bool(call.buffers))
        try:
            action = KeepOutput(forward) if self.keeps else forward
            output = action.run(store, *values)
            return output, store.pop(buffers_key(call.key)) if call.buffers else None
        finally:
            store.discard([buffers_key(call.key)])


@dataclass(frozen=True)
class RankBlock:
    """Run several ranks, each in a thread.

    `slots` has for each rank which of the values are its inputs.
    """

    title: str
    ranks: tuple[RankForward, ...]
    settings: TorchSettings
    slots: tuple[tuple[int, ...], ...]

    @staticmethod
    def keys(inputs: Sequence[Any]) -> list[str]:
        """The keys of the ranks that run with these inputs."""
        return [call.key for call in inputs[0]]

    def run(self, store: Store, calls: Sequence[CallSpec], *values: Any) -> list[Any]:
        """For each rank what `RankForward` gives. Raises the error of the first one that failed."""
        jobs = [
            RankJob(partial(rank.run, store, call, *(values[i] for i in slots)), self.settings)
            for rank, call, slots in zip(self.ranks, calls, self.slots, strict=True)
        ]

        def wait(threads: list[threading.Thread]) -> None:
            threads[0].join(_KEEP_THREAD_S)
            if any(thread.is_alive() for thread in threads):
                store.give_thread_back()
            join_all(threads)

        results, error = run_together(jobs, store.worker, wait)
        if error is not None:
            raise error
        return results


RANKS = (RankForward, RankBlock)
"""The actions that run ranks."""
