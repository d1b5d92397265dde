"""What a map with gradients gains: 64 items of a 3-layer net, about 20 ms each, on two workers.

The rival is a loop over the same items in one process with as many threads as a worker has: one.
`_vs_two_loops` is against what the machine has to give: two processes that loop over half the items
each, which they hold already, do not communicate, and keep freed memory as workers do.
Then what travels in a backward, for 16 items and for 64: the gradients of the parameters once a
worker, and cotangents, which are the same for all losses of a sum.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable

import torch
from torch import nn

import taskgrad as tg
from benchmarks._heap import keep_freed_memory
from benchmarks._report import Report, arguments

ITEMS, ROUNDS, WARM, ITEM_SECONDS = 64, 11, 3, 0.02
INPUTS, WIDTH = 16, 256


def make_model() -> nn.Sequential:
    """Three layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()),
        nn.Linear(WIDTH, 1),
    )


def rows_for(model: nn.Sequential) -> int:
    """How many rows an item needs to take `ITEM_SECONDS` in the loop, forward and backward."""
    rows = 512
    for _ in range(4):
        xs = [torch.randn(rows, INPUTS) for _ in range(8)]
        seconds = min(
            timed(lambda xs=xs: sum(loss_of(model, x) for x in xs), model)[0] for _ in range(4)
        )
        rows = max(1, round(rows * ITEM_SECONDS * len(xs) / seconds))
    return rows


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What is mapped."""
    return (model(x) ** 2).mean()


def timed(step: Callable[[], torch.Tensor], model: nn.Module) -> tuple[float, list[torch.Tensor]]:
    """Seconds of one loss and its backward, and the gradients."""
    model.zero_grad()
    start = time.perf_counter()
    step().backward()
    seconds = time.perf_counter() - start
    return seconds, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def half_a_loop(rows: int) -> None:
    """In a process of its own: the loop over half the items, and its backward."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model, xs = _half(rows)
    timed(lambda: sum((loss_of(model, x) for x in xs), torch.zeros(())), model)


@functools.cache
def _half(rows: int) -> tuple[nn.Sequential, list[torch.Tensor]]:
    return make_model(), [torch.randn(rows, INPUTS) for _ in range(ITEMS // 2)]


def sent(dask_worker) -> int:  # type: ignore[no-untyped-def]
    """Bytes that a worker has sent as results so far."""
    return int(dask_worker.transfer_outgoing_bytes_total)


def main() -> None:
    """Measure and report."""
    args, report = arguments("gradient_map", __doc__), Report("gradient_map")
    torch.set_num_threads(1)
    model = make_model()
    rows = rows_for(model)
    xs = [torch.randn(rows, INPUTS) for _ in range(ITEMS)]
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")

    loss = functools.partial(loss_of, model)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "a loop": lambda: sum(map(loss, xs), torch.zeros(())),
        "processes": lambda: sum(tg.map(loss, xs, client=client), torch.zeros(())),
        "threads": lambda: sum(tg.map(loss, xs, over="threads"), torch.zeros(())),
    }
    pool = multiprocessing.get_context("spawn").Pool(2)
    taken: dict[str, list[float]] = {name: [] for name in (*ways, "two loops at once")}
    for turn in range(ROUNDS + WARM):
        grads = {}
        start = time.perf_counter()
        pool.map(half_a_loop, [rows] * 2, chunksize=1)
        if turn >= WARM:
            taken["two loops at once"].append(time.perf_counter() - start)
        for name, step in ways.items():
            seconds, grads[name] = timed(step, model)
            if turn >= WARM:
                taken[name].append(seconds)
        for name in ("processes", "threads"):
            for ours, theirs in zip(grads[name], grads["a loop"], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    report.figure("an item, a loop", [s / ITEMS for s in taken["a loop"]])
    for name, seconds_taken in taken.items():
        report.figure(f"{ITEMS} items, {name}", seconds_taken)
    report.ratio("gradient_map_64_items_vs_serial", taken["processes"], taken["a loop"])
    report.ratio("gradient_map_64_items_threads_vs_serial", taken["threads"], taken["a loop"])
    report.ratio(
        "gradient_map_64_items_vs_two_loops", taken["processes"], taken["two loops at once"]
    )
    pool.terminate()
    for count in (ITEMS // 4, ITEMS):
        found = tg.map(loss, xs[:count], eager_grad=False, client=client)
        before = sum(client.run(sent).values())
        sum(found).backward()
        sent_bytes = sum(client.run(sent).values()) - before
        report.value(f"sent to the driver by a backward of {count} items", sent_bytes, "bytes")
    report.finish(args.json)
    client.close()


if __name__ == "__main__":
    main()
