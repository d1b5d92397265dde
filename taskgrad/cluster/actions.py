"""Worker: run one action on the worker's store, with torch's settings of when it was made."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from taskgrad.cluster.nested import give_thread_back
from taskgrad.cluster.wire.picklable import check_picklable
from taskgrad.graph.parts import StoredPart
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.worker import parts
from taskgrad.worker.actions import OnShard
from taskgrad.worker.settings import applied
from taskgrad.worker.store import Store


def run_on(store: Store, action: Any, settings: TorchSettings | None, inputs: list[Any]) -> Any:
    """The action's result, which can be sent to another worker; TravelError if it cannot.

    Inputs that are parts of sharded tensors are read in the store.
    """
    inputs = [parts.read(store, i) if type(i) is StoredPart else i for i in inputs]
    with nullcontext() if settings is None else applied(settings, store.worker, give_thread_back):
        result = action.run(store, *inputs)
    check_picklable(result)
    return result


def title_of(action: Any) -> str:
    """The name of what an action runs, for messages."""
    if isinstance(action, OnShard):
        return f"{action.function.__name__!r} of {action.token.partition('-')[0]!r}"
    called = getattr(action, "work", action)
    return repr(getattr(called, "title", type(action).__name__))
