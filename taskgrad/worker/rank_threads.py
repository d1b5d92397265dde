"""Several ranks of one call on one worker, at the same time: each in a thread of its own."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.worker.rank_channels import having
from taskgrad.worker.settings import applied, settings_released
from taskgrad.worker_names import WorkerName


class RankJob(NamedTuple):
    """What one thread does: a function without arguments, with the torch settings of its call."""

    run: Callable[[], Any]
    settings: TorchSettings


def run_together(
    jobs: Sequence[RankJob],
    worker: WorkerName,
    wait: Callable[[list[threading.Thread]], None],
) -> tuple[list[Any], BaseException | None]:
    """The results of all jobs, and the error of the first one that failed, if any has.

    `wait` returns when the threads have ended. This thread holds no settings of torch meanwhile.
    """
    results: list[Any] = [None] * len(jobs)
    errors: dict[int, BaseException] = {}

    def work(at: int) -> None:
        try:
            with applied(jobs[at].settings, worker, lambda: None), having(None):
                results[at] = jobs[at].run()
        except BaseException as error:
            errors[at] = error

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(work, at), daemon=True)
        for at in range(len(jobs))
    ]
    with settings_released():
        for thread in threads:
            thread.start()
        wait(threads)
    return results, errors[min(errors)] if errors else None


def join_all(threads: Sequence[threading.Thread]) -> None:
    """Wait until all of them have ended."""
    for thread in threads:
        thread.join()
