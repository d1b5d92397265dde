"""One rank of a parallel call as the action of a resident program, which runs it again and again.

What calls have in common is sent once, with the program: the function and its settings. Of each
call the program gets a specification of its own (keys, random seed) and the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taskgrad.graph.calls import CallSpec
from taskgrad.worker.forward import Forward
from taskgrad.worker.store import Store, buffers_key


@dataclass(frozen=True)
class KeptInput:
    """An input of a program that its worker keeps for later calls, under this number.

    It has a `value` when it is sent, and None when the worker has it.
    """

    number: int
    value: Any = None


@dataclass(frozen=True)
class RankForward:
    """Run one rank; it leaves no tape."""

    title: str
    function: bytes
    template: bytes

    def run(self, store: Store, call: CallSpec, *values: Any) -> Any:
        """The output, and the function's buffers: those that it changed, if the call has any."""
        call = call._replace(function=self.function, template=self.template)
        forward = Forward(call, taped=False, give_buffers=bool(call.buffers))
        try:
            output = forward.run(store, *values)
            return output, store.pop(buffers_key(call.key)) if call.buffers else None
        finally:
            store.discard([buffers_key(call.key)])
