"""The functions that our Dask tasks call, inside a worker."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from distributed import get_worker

from taskgrad.cluster import internals
from taskgrad.cluster.nested import give_thread_back
from taskgrad.cluster.tuning import malloc
from taskgrad.cluster.wire.picklable import check_picklable
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.remote_errors import RemoteError
from taskgrad.worker.actions import OnShard
from taskgrad.worker.failures import exit_error
from taskgrad.worker.settings import applied
from taskgrad.worker.store import Store

T = TypeVar("T")

# Where Dask's nanny restarts a worker, by default.
_TERMINATE = 0.95


def _store() -> Store:
    return store_of(get_worker())


def contained(what: str, run: Callable[..., T], *args: Any) -> T:
    """``run(*args)`` in a task; any exception becomes an error of this task.

    Dask would end the worker on SystemExit and KeyboardInterrupt, and send many other exceptions as
    a bare Exception. Messages say that `what` raised.
    """
    try:
        return run(*args)
    except Exception as error:
        failed = RemoteError(error)
    except BaseException as error:
        failed = RemoteError(exit_error(error, get_worker().address, what))
    raise failed  # here it has no context, whose frames would keep tensors alive


def run_action(payload: bytes, *values: Any) -> Any:
    """Run an action on this worker's store.

    The payload is the action, the settings of torch to run it with, how many inputs it takes and,
    by position, those that came with it; the values are the others, then whatever the task had to
    wait for. It is pickled before Dask pickles the graph, so that the scheduler passes it on
    unopened.
    """
    action, settings, total, literals = contained("the unpickling of a call", pickle.loads, payload)
    given = iter(values)
    inputs = [literals[i] if i in literals else next(given) for i in range(total)]
    return contained(_title(action), _run, action, settings, inputs)


def _run(action: Any, settings: TorchSettings | None, inputs: list[Any]) -> Any:
    store = _store()
    with nullcontext() if settings is None else applied(settings, store.address, give_thread_back):
        result = action.run(store, *inputs)
    check_picklable(result)
    return result


def _title(action: Any) -> str:
    """What an action runs, for messages."""
    if isinstance(action, OnShard):
        return f"{action.function.__name__!r} of {action.token.partition('-')[0]!r}"
    called = getattr(action, "work", action)
    return repr(getattr(called, "title", type(action).__name__))


def worker_info(dask_worker: Any = None) -> tuple[str, int]:
    """Which store a worker has, and how many threads torch uses there: for ``client.run``."""
    return store_of(dask_worker).id, torch.get_num_threads()


def torch_threads() -> int:
    """How many threads torch uses in this process: a question that needs taskgrad and torch."""
    return torch.get_num_threads()


def memory(dask_worker: Any = None) -> tuple[int, int] | None:
    """Bytes that a worker's process uses, and may use: for ``client.run``.

    What an optimizer loads with it, which is more than 100 MB, is loaded first; memory that is free
    and kept is given back. None for a worker without a limit.
    """
    import torch._dynamo  # noqa: F401

    limit = internals.memory_limit(dask_worker)
    malloc.give_back()
    used = internals.memory_used(dask_worker)
    if limit is None or used is None:
        return None
    fraction = min(internals.pause_fraction(dask_worker) or _TERMINATE, _TERMINATE)
    return used, int(fraction * limit)


def held(dask_worker: Any = None) -> dict[str, int]:
    """What a worker's store holds now: for ``client.run(taskgrad.cluster.tasks.held)``."""
    return store_of(dask_worker).held()


def mail(dask_worker: Any = None) -> dict[str, int]:
    """How many mailboxes and messages of ranks a worker has now: for ``client.run``."""
    return store_of(dask_worker).mail.held()
