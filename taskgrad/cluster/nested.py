"""Worker: tasks that wait for other tasks.

A waiting task occupies a thread of its worker that the other task may need. So it secedes, and Dask
starts another task in its place. That is not enough for a layer, which also holds its shard's lock
until it returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import distributed
from dask.context import thread_state

from taskgrad.errors import TaskgradError
from taskgrad.worker.settings import settings_released
from taskgrad.worker.shard_lock import is_using_shard


def refuse_deadlock() -> None:
    """Raise TaskgradError if waiting for tasks might never end; called before they are submitted.

    It might in a layer, a loss or an optimizer, and in a thread of a map that runs in a task.
    """
    if is_using_shard():
        raise TaskgradError(
            "a layer, a loss or an optimizer waits for tasks here (tg.collect, backward, a chain "
            "or trainer that is made or run): its shard is held until it returns, so this might "
            "wait forever. Call the function itself, or tg.map, which runs it where the layer is; "
            "or collect before, and give the value to the chain as an argument"
        )
    if not _in_task_thread() and current_worker() is not None:
        raise TaskgradError(
            "a thread of a map in a task waits for tasks here (tg.collect, say): the task cannot "
            "give its own thread back meanwhile, so this might wait forever. Map over processes, "
            "or call the function itself"
        )


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Give up a task's thread, random stream and settings while it waits for other tasks."""
    if not _in_task_thread():
        yield
        return
    give_thread_back()
    with settings_released():
        yield


def give_thread_back() -> None:
    """Have the task in this thread secede, if there is one: the worker starts another."""
    if _in_task_thread():
        with contextlib.suppress(KeyError):  # it has seceded before, or was released
            distributed.secede()


def _in_task_thread() -> bool:
    return getattr(thread_state, "key", None) is not None


def current_worker() -> distributed.Worker | None:
    """The worker in whose task this runs; None outside of tasks."""
    try:
        return distributed.get_worker()
    except ValueError:
        return None
