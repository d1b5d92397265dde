"""The functions that our Dask tasks call, inside a worker."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from distributed import get_worker

from taskgrad.cluster.plugins import store_of
from taskgrad.cluster.travel import refuse_untravelable
from taskgrad.worker.store import Store


def _store() -> Store:
    return store_of(get_worker())


def run_action(payload: bytes, *values: Any) -> Any:
    """Run an action on this worker's store.

    The payload is the action, how many inputs it takes and, by position, those that came with it;
    the values are the others, then whatever the task had to wait for. It is pickled before Dask
    pickles the graph, so that the scheduler passes it on unopened.
    """
    action, total, literals = pickle.loads(payload)
    given = iter(values)
    store = _store()
    with store.at_work():
        result = action.run(
            store, *[literals[i] if i in literals else next(given) for i in range(total)]
        )
    refuse_untravelable(result)
    return result


def introduce(dask_worker: Any = None) -> tuple[str, int]:
    """Which store a worker has, and how many threads torch uses there: for ``client.run``."""
    return store_of(dask_worker).id, torch.get_num_threads()


def held(dask_worker: Any = None) -> dict[str, int]:
    """What a worker's store holds now: for ``client.run(taskgrad.cluster.tasks.held)``."""
    return store_of(dask_worker).held()
