"""What a hop costs: a chain of 100 tasks that do nothing, each waiting for the one before it.

The tasks are plain Dask tasks, the same on both clusters; one cluster is as Dask starts it, on the
other a client uses taskgrad. A thousand independent tasks show what sending each message
at once costs where collecting messages would be cheaper.

`compiled` has no tasks: the hops are those of a training step, through 51 layers that do nothing,
alternately on two workers, forward and back with one microbatch. Only one worker has something to
do at a time, so what a step takes beyond what the workers report as computing is its 100 hops: from
one worker's program to the next one's, and the driver's part of the step. The ratio is to Dask's
alternating hop. `compiled_with_layers` is the same with the computing: the whole step.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import dask
import torch
import torch.nn.functional as F
from dask import delayed
from distributed import Client, LocalCluster

import taskgrad as tg
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


def trainer(client: Client) -> tg.Trainer:
    """Of a chain whose layers do nothing, but at its ends, which have a parameter each."""
    layers = [torch.nn.Identity() for _ in range(HOPS // 2 + 1)]
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), *layers[1:-1], torch.nn.Linear(1, 1))
    placement = [i % 2 for i in range(len(model))]
    chain = tg.GraphChain(model, client=client, placement=placement)
    return tg.Trainer(chain, F.mse_loss, partial(torch.optim.SGD, lr=0.01))


def step(trainer: tg.Trainer) -> tuple[float, float]:
    """Seconds from submission until the loss is here; without what the workers computed."""
    x = torch.ones(1, 1)
    start = time.perf_counter()
    report = trainer.step(x, x).report
    taken = time.perf_counter() - start
    return taken, taken - sum(report["busy"].values())


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
        training = trainer(ours)
        pairs = [
            (*step(training), timed(stock, hops(workers["stock"]))) for _ in range(ROUNDS + 5)
        ][5:]
        whole, between, dask_hops = zip(*pairs, strict=True)
        report.figure("compiled, a hop", [s / HOPS for s in between])
        report.figure("compiled, a hop and its layer", [s / HOPS for s in whole])
        report.ratio("compiled", between, dask_hops)
        report.ratio("compiled_with_layers", whole, dask_hops)
    report.finish(args.json)


if __name__ == "__main__":
    main()
