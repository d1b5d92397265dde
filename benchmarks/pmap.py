"""A sum over two ranks: `tg.psum` inside a `tg.pmap`, against torch.distributed's gloo all_reduce.

Two Dask workers on one side, two processes of a gloo group on the other, all of one thread, take
turns. What is measured is one sum of many in a row, on the slower rank. gloo writes the sum into
its input; `psum` makes a new tensor, and so do both here. gloo runs on ports of its own and has
nothing else to do; `psum` travels over Dask's connections, through the event loops of the workers,
each of which has one message to send and one to answer.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import taskgrad as tg
from benchmarks._report import Report, arguments

SIZES = {"8mb": (2_000_000, 20), "1kb": (250, 200)}
ROUNDS = 7


def ours(x: torch.Tensor, repeats: int) -> float:
    """Seconds a psum, in a rank."""
    for _ in range(3):
        tg.psum(x, "i")
    start = time.perf_counter()
    for _ in range(repeats):
        tg.psum(x, "i")
    return (time.perf_counter() - start) / repeats


def theirs(rank: int, port: int, orders: Connection) -> None:
    """A gloo process: measures what is requested until no more requests come."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    while (order := orders.recv()) is not None:
        count, repeats = order
        x = torch.ones(count)
        for _ in range(3):
            dist.all_reduce(x.clone())
        start = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(x.clone())
        orders.send((time.perf_counter() - start) / repeats)
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, write."""
    options = arguments("pmap", __doc__)
    report = Report("pmap")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=theirs, args=(rank, port, pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()

    def gloo(order: Any) -> float:
        for pipe, _ in pipes:
            pipe.send(order)
        return max(pipe.recv() for pipe, _ in pipes)

    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    step = tg.pmap(ours, "i", in_axes=(0, None), client=client)
    for name, (count, repeats) in SIZES.items():
        x = torch.ones(2, count)
        with torch.no_grad():
            step(x, repeats)
        gloo((count, repeats))
        mine, rival = [], []
        for _ in range(ROUNDS):
            rival.append(gloo((count, repeats)))
            with torch.no_grad():
                mine.append(float(step(x, repeats).max()))
        report.figure(f"gloo_{name}", rival)
        report.figure(f"psum_{name}", mine)
        report.ratio(f"psum_{name}_vs_gloo", mine, rival)
    for pipe, _ in pipes:
        pipe.send(None)
    for process in processes:
        process.join(30)
    client.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
