"""What a hop costs: a chain of 100 tasks that do nothing, each waiting for the one before it.

The tasks are plain Dask tasks, the same on both clusters; one cluster is as Dask starts it, on the
other a client uses taskgrad. A thousand independent tasks show what sending each message
at once costs where collecting messages would be cheaper.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import dask
from dask import delayed
from distributed import Client, LocalCluster

from benchmarks._report import Report, arguments
from taskgrad.cluster.session import session

HOPS, FAN, ROUNDS = 100, 1000, 15


def nothing(*values: Any) -> None:
    """A task."""


def hops(workers: list[str]) -> Any:
    """A chain over these workers in turns."""
    name, task = uuid.uuid4().hex, delayed(None)
    for i in range(HOPS):
        with dask.annotate(workers=[workers[i % len(workers)]]):
            task = delayed(nothing)(task, dask_key_name=f"hop{i}-{name}")
    return task


def fan(workers: list[str]) -> Any:
    """Independent tasks, and one that depends on all of them."""
    name = uuid.uuid4().hex
    tasks = [delayed(nothing)(i, dask_key_name=f"fan{i}-{name}") for i in range(FAN)]
    return delayed(nothing)(tasks, dask_key_name=f"end-{name}")


def timed(client: Client, graph: Any) -> float:
    """Seconds from submission until the result is here."""
    start = time.perf_counter()
    client.compute(graph, optimize_graph=False).result()
    return time.perf_counter() - start


def main() -> None:
    """Measure and report."""
    args, report = arguments("hop", __doc__), Report("hop")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with (
        LocalCluster(**options) as a,
        LocalCluster(**options) as b,
        Client(a, set_as_default=False) as stock,
        Client(b, set_as_default=False) as ours,
    ):
        session(ours)
        clients = {"taskgrad": ours, "stock": stock}
        workers = {k: sorted(c.nthreads()) for k, c in clients.items()}
        kinds: dict[str, Callable[[list[str]], Any]] = {
            "same_worker": lambda names: hops(names[:1]),
            "alternating": hops,
            "fan_out": fan,
        }
        for kind, graph in kinds.items():
            seconds: dict[str, list[float]] = {name: [] for name in clients}
            for turn in range(ROUNDS + 2):
                for name, client in clients.items():
                    taken = timed(client, graph(workers[name]))
                    if turn >= 2:
                        seconds[name].append(taken)
            per_task = FAN if kind == "fan_out" else HOPS
            for name, taken_by in seconds.items():
                report.figure(f"{kind}, a task, {name}", [s / per_task for s in taken_by])
            report.ratio(kind, seconds["taskgrad"], seconds["stock"])
    report.finish(args.json)


if __name__ == "__main__":
    main()
