"""Worker: the functions that our Dask tasks and ``client.run`` call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from distributed import get_worker

from taskgrad.cluster import internals
from taskgrad.cluster.actions import run_on, title_of
from taskgrad.cluster.tuning import malloc
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.graph import pack
from taskgrad.remote_errors import RemoteError
from taskgrad.worker.failures import exit_error
from taskgrad.worker.store import Store

T = TypeVar("T")

# The fraction of its memory limit at which Dask's nanny restarts a worker, by default.
_TERMINATE = 0.95


def _store() -> Store:
    return store_of(get_worker())


def contained(what: str, run: Callable[..., T], *args: Any) -> T:
    """``run(*args)`` in a task; any exception becomes this task's error.

    On SystemExit and KeyboardInterrupt Dask would close the worker; many other exceptions it would
    send as a bare Exception. Messages say that `what` raised.
    """
    try:
        return run(*args)
    except Exception as error:
        failed = RemoteError(error)
    except BaseException as error:
        failed = RemoteError(exit_error(error, _store().worker, what))
    raise failed  # outside of except: a context's frames would keep tensors alive


def run_action(payload: bytes, *values: Any) -> Any:
    """Run an action on this worker's store.

    The payload is a pickle of the action, the torch settings to run it with, the number of its
    inputs, and literal inputs by position. The values are the other inputs, then results that the
    task only depends on. The payload is pickled before Dask pickles the graph, so that the
    scheduler does not unpickle it.
    """
    action, settings, total, literals = contained(
        "the unpickling of a call", pack.loads_plain, payload
    )
    given = iter(values)
    inputs = [literals[i] if i in literals else next(given) for i in range(total)]
    return contained(title_of(action), run_on, _store(), action, settings, inputs)


def worker_info(dask_worker: Any = None) -> tuple[str, int]:
    """The id of a worker's store, and torch's number of threads: for ``client.run``."""
    return store_of(dask_worker).id, torch.get_num_threads()


def torch_threads() -> int:
    """The number of torch's threads; fails where taskgrad or torch cannot be imported."""
    return torch.get_num_threads()


def memory(dask_worker: Any = None) -> tuple[int, int] | None:
    """Bytes that a worker's process uses, and may use: for ``client.run``.

    Modules that an optimizer imports, more than 100 MB, are imported first, and free memory is
    returned to the system. None for a worker without a limit.
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
    """Counts of what a worker's store holds: for ``client.run(taskgrad.cluster.tasks.held)``."""
    return store_of(dask_worker).held()


def mailboxes(dask_worker: Any = None) -> dict[str, int]:
    """Counts of a worker's mailboxes and messages of ranks: for ``client.run``."""
    return store_of(dask_worker).mailboxes.held()
