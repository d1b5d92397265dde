"""`tg.pmap`: sums over two ranks, a call, and a loop of steps.

- ``allreduce_*_vs_gloo``: `tg.psum` against torch.distributed's gloo all_reduce. Two Dask workers
  on one side, two processes of a gloo group on the other, all of one thread, take turns. What is
  measured is one sum of many in a row, on the slower rank. gloo writes the sum into its input;
  `psum` makes a new tensor, and so do both here.
- ``allreduce_1kb_eight_ranks``: the same sum of eight ranks on the two workers, each a thread.
- ``call_staying``: a call on two workers whose result stays there, beside one whose result comes
  home.
- ``call_two_workers``, ``call_eight_workers``: a call of a function that returns its argument, one
  number a rank, on two or on all of eight workers. They share the machine's cores.
- ``regression_vs_jax``: a step of JAX's tutorial on pmap, the regression of a line on two ranks:
  `value_and_grad`, a mean over the ranks, an update. Against jax.pmap on two CPU devices of one
  process, which is compiled, and where nothing leaves the process. Here parameters come home and go
  out again with every step.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from distributed import Client

import taskgrad as tg
from benchmarks._report import Report, arguments

ROWS = ("allreduce", "call", "regression")
SIZES = {"1kb": (250, 300), "1mb": (250_000, 50), "100mb": (25_000_000, 3)}
ROUNDS = 7
CALLS = 50
STEPS = 50
RATE = 0.005


def main() -> None:
    """Measure, print, write."""
    options = arguments("pmap", __doc__, rows=ROWS)
    torch.set_num_threads(1)
    report = Report("pmap")
    for row in options.rows:
        {"allreduce": allreduce, "call": call, "regression": regression}[row](report)
        report.show()
    report.finish(options.json)


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """A cluster for one row."""
    client = tg.local_cluster(n_workers=workers, dashboard_address=":0")
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def processes(*sides: tuple[Callable[..., None], Any]) -> Iterator[Callable[[Any], Any]]:
    """Processes that run ``side(argument, orders)``; a function that gives them one order each.

    It returns the largest of their answers.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in sides]
    started = [
        context.Process(target=side, args=(argument, pipe[1]), daemon=True)
        for (side, argument), pipe in zip(sides, pipes, strict=True)
    ]
    for process in started:
        process.start()

    def give(order: Any) -> Any:
        for pipe, _ in pipes:
            pipe.send(order)
        return max(pipe.recv() for pipe, _ in pipes)

    yield give
    for pipe, _ in pipes:
        pipe.send(None)
    for process in started:
        process.join(30)


# -- sums ----------------------------------------------------------------------------------------


def allreduce(report: Report) -> None:
    """Sums of each size, ours and gloo's in turns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sides = [(gloo_rank, (rank, port)) for rank in range(2)]
    with processes(*sides) as gloo, cluster(2) as client:
        measure = tg.pmap(sums, "i", in_axes=(0, None, None), client=client)
        for name, (count, repeats) in SIZES.items():
            ranks = torch.zeros(2)
            measure(ranks, count, repeats)
            gloo((count, repeats))
            mine, rival = [], []
            for _ in range(ROUNDS):
                rival.append(gloo((count, repeats)))
                mine.append(float(measure(ranks, count, repeats).max()))
            report.figure(f"gloo_{name}", rival)
            report.figure(f"allreduce_{name}", mine)
            report.ratio(f"allreduce_{name}_vs_gloo", mine, rival)
        eight, (count, repeats) = torch.zeros(8), SIZES["1kb"]
        found = [float(measure(eight, count, repeats).max()) for _ in range(1 + ROUNDS)]
        report.figure("allreduce_1kb_eight_ranks", found[1:])


def sums(_: torch.Tensor, count: int, repeats: int) -> float:
    """Seconds a psum, in a rank."""
    x = torch.ones(count)
    for _ in range(3):
        tg.psum(x, "i")
    start = time.perf_counter()
    for _ in range(repeats):
        tg.psum(x, "i")
    return (time.perf_counter() - start) / repeats


def gloo_rank(about: tuple[int, int], orders: Connection) -> None:
    """A process of a gloo group: seconds a sum, until no more orders come."""
    rank, port = about
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


# -- calls ---------------------------------------------------------------------------------------


def call(report: Report) -> None:
    """A call on two workers and on eight, in turns."""
    with cluster(8) as client:
        same = tg.pmap(lambda x: x, client=client)
        found: dict[int, list[float]] = {2: [], 8: []}
        for size in found:
            seconds_a_call(same, size)
        for _ in range(ROUNDS):
            for size, seconds in found.items():
                seconds.append(seconds_a_call(same, size))
    with cluster(2) as client:
        home = tg.pmap(lambda x: x, client=client)
        stays = tg.pmap(lambda x: x, gather=False, client=client)
        pairs = [(seconds_a_call(stays, 2), seconds_a_call(home, 2)) for _ in range(1 + ROUNDS)]
        staying, coming = map(list, zip(*pairs[1:], strict=True))
    report.figure("call_staying", staying)
    report.ratio("call_staying_vs_home", staying, coming, of="a result that stays to one at home")
    report.figure("call_two_workers", found[2])
    report.figure("call_eight_workers", found[8])
    report.ratio("call_eight_vs_two", found[8], found[2], of="eight workers to two")


def seconds_a_call(mapped: Callable[..., Any], size: int) -> float:
    """The median over some calls."""
    x, found = torch.arange(float(size)), []
    for _ in range(CALLS):
        start = time.perf_counter()
        mapped(x)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


# -- a loop of steps -----------------------------------------------------------------------------


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """Points near a line, half of them for each of two ranks."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 1)
    return x, 3 * x - 1 + 0.5 * torch.randn(2, 64, 1)


def regression(report: Report) -> None:
    """Steps of the tutorial, ours and JAX's in turns; they have to come to the same line."""
    x, y = points()
    with processes((jax_regression, None)) as jax, cluster(2) as client:
        step = tg.pmap(update, "i", client=client)

        def ours() -> tuple[float, list[float]]:
            state = torch.zeros(2), torch.zeros(2)
            start = time.perf_counter()
            for _ in range(STEPS):
                state, _ = step(state, x, y)
            seconds = (time.perf_counter() - start) / STEPS
            return seconds, [float(part[0]) for part in state]

        ours()
        jax(STEPS)
        mine, rival = [], []
        for _ in range(ROUNDS):
            seconds, line = jax(STEPS)
            rival.append(seconds)
            seconds, found = ours()
            mine.append(seconds)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(line))
    report.figure("jax_regression_step", rival)
    report.figure("regression_step", mine)
    report.ratio("regression_vs_jax", mine, rival)


def loss(state: tuple[Any, Any], x: Any, y: Any) -> Any:
    """The mean squared error of a line: for torch and for JAX."""
    weight, bias = state
    return ((weight * x + bias - y) ** 2).mean()


def update(state: tuple[Any, Any], x: torch.Tensor, y: torch.Tensor) -> Any:
    """One step of one rank."""
    grads, value = torch.func.grad_and_value(loss)(state, x, y)
    grads, value = tg.pmean((grads, value), "i")
    return tuple(part - RATE * grad for part, grad in zip(state, grads, strict=True)), value


def jax_regression(_: None, orders: Connection) -> None:
    """A process with JAX: seconds a step and the line, until no more orders come."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    def step(state: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state, x, y)
        grads, value = jax.lax.pmean((grads, value), "i")
        return tuple(part - RATE * grad for part, grad in zip(state, grads, strict=True)), value

    mapped = jax.pmap(step, "i")
    x, y = (jnp.asarray(part.numpy()) for part in points())
    while (steps := orders.recv()) is not None:
        state = jnp.zeros(2), jnp.zeros(2)
        start = time.perf_counter()
        for _ in range(steps):
            state, _ = mapped(state, x, y)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - start) / steps
        orders.send((seconds, [float(part[0]) for part in state]))


if __name__ == "__main__":
    main()
