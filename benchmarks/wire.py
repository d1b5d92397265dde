"""Tensors from worker to worker as task results: taskgrad's wire against Dask's own.

Two clusters of two worker processes, one as Dask starts it and one with taskgrad attached, take
turns. A float32 tensor goes to and fro between the two workers of one as the result of a chain of
tasks that do nothing: what is measured is a hop, the scheduler's part in it included. The chain is
submitted as one graph, as taskgrad submits; so each tensor goes as soon as the next one is there.

Then a worker's result that the driver fetches, once it is there.

Stock here means stock but for the true sizes of tensors, which Dask takes from taskgrad wherever it
is installed.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import uuid
from typing import Any

import dask
import torch
from dask import delayed
from distributed import Client, LocalCluster

from benchmarks._report import Report, arguments

SIZES = {"0_1mb": 25_000, "1mb": 250_000, "8mb": 2_000_000, "32mb": 8_000_000}
HOPS = 10
ROUNDS = 15
WARM_UP = 3


def make(count: int) -> torch.Tensor:
    """A tensor in memory that has been written."""
    return torch.ones(count)


def same(t: torch.Tensor) -> torch.Tensor:
    """The tensor that came."""
    return t


def hop(client: Client, workers: list[str], count: int) -> float:
    """Seconds a hop, over a chain of them that starts with the tensor in place."""
    start = client.submit(make, count, workers=[workers[0]], pure=False)
    _wait(client, start)
    name, task = uuid.uuid4().hex, start
    for i in range(HOPS):
        with dask.annotate(workers=[workers[(i + 1) % 2]]):
            task = delayed(same)(task, dask_key_name=f"hop{i}-{name}")
    began = time.perf_counter()
    end = client.compute(task, optimize_graph=False)
    _wait(client, end)
    return (time.perf_counter() - began) / HOPS


def home(client: Client, workers: list[str], count: int, ours: bool) -> float:
    """Seconds until the driver has a tensor that is stored on a worker."""
    future = client.submit(make, count, workers=[workers[0]], pure=False)
    _wait(client, future)
    began = time.perf_counter()
    if ours:
        from taskgrad.cluster.wire.gather import gather_values

        pending = gather_values(client, [future], [workers[0]])
        if not pending.done(60):
            raise TimeoutError("the tensor did not come")
        (value,) = pending.result()
    else:
        value = client.gather(future)
    seconds = time.perf_counter() - began
    if value[-1] != 1:
        raise ValueError("another tensor came")
    return seconds


def _registered() -> bool:
    return "taskgrad.cluster.wire.serialize" in sys.modules


def _wait(client: Client, future: Any) -> None:
    client.sync(future._state.wait)


def _serve(ours: bool) -> None:
    """In a process of its own: measures what it is told on its standard input.

    Of its own, because taskgrad's family, once registered, holds for the whole process: client and
    scheduler of the stock cluster must not have it.
    """
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        if ours:
            from taskgrad.cluster.session import session

            session(client)
        elif any([_registered(), *client.run(_registered).values()]):
            raise RuntimeError("the stock cluster must not know taskgrad's family")
        workers = sorted(client.nthreads())
        print("ready", flush=True)
        for line in sys.stdin:
            way, count = line.split()
            args = client, workers, int(count)
            print(json.dumps(home(*args, ours) if way == "home" else hop(*args)), flush=True)


class _Cluster:
    """A process that runs `_serve`."""

    def __init__(self, side: str) -> None:
        command = [sys.executable, "-m", "benchmarks.wire", f"--serve={side}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def seconds(self, way: str, count: int) -> float:
        """Of a "hop" or of the way "home"."""
        assert self.process.stdin is not None
        print(way, count, file=self.process.stdin, flush=True)
        return float(json.loads(self._answer()))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a cluster of the benchmark ended before its time")
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    """Measure, print, write."""
    options = arguments("wire")
    report = Report("wire")
    stock, ours = _Cluster("stock"), _Cluster("ours")
    try:
        for way, name in itertools.product(("hop", "home"), SIZES):
            count, key = SIZES[name], f"{'tensor' if way == 'hop' else way}_{name}"
            for _ in range(WARM_UP):
                stock.seconds(way, count)
                ours.seconds(way, count)
            theirs, mine = [], []
            for _ in range(ROUNDS):
                theirs.append(stock.seconds(way, count))
                mine.append(ours.seconds(way, count))
            report.figure(f"{key}_stock", theirs)
            report.figure(key, mine)
            report.figure(f"{key}_gb_s", [4e-9 * count / s for s in mine], "GB/s")
            report.figure(f"{key}_stock_gb_s", [4e-9 * count / s for s in theirs], "GB/s")
            report.ratio(key, mine, theirs)
    finally:
        stock.close()
        ours.close()
    report.finish(options.json)


if __name__ == "__main__":
    if sys.argv[1:] in (["--serve=stock"], ["--serve=ours"]):
        _serve(ours=sys.argv[1] == "--serve=ours")
    else:
        main()
