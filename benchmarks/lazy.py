"""What a lazy call costs: building the thunk of a chain of 1,000 layers, with nothing submitted.

Its rival builds the same 1,000 calls with ``dask.delayed``. The layers alternate between two
workers, as otherwise taskgrad makes one call of them all; that one is measured, too.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from dask import delayed
from torch import nn

import taskgrad as tg
from benchmarks._report import Report, arguments

LAYERS, ROUNDS = 1000, 20


def timed(build: Callable[[], Any]) -> float:
    """Seconds for building it; not for throwing it away."""
    gc.collect()
    start = time.perf_counter()
    built = build()
    taken = time.perf_counter() - start
    del built
    return taken


def main() -> None:
    """Measure and report."""
    args, report = arguments("lazy", __doc__), Report("lazy")
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    layers = [nn.ReLU() for _ in range(LAYERS)]
    x = torch.ones(2)
    chain = tg.GraphChain(nn.Sequential(*layers), placement="round_robin")
    joined = tg.GraphChain(nn.Sequential(*layers))

    # Made beforehand, as the chain has its layers, too: only the calls count.
    delayed_layers = [delayed(layer, traverse=False, pure=False) for layer in layers]

    def with_dask() -> Any:
        value = x
        for layer in delayed_layers:
            value = layer(value)
        return value

    builders = {
        "taskgrad": lambda: chain(x),
        "taskgrad, 2 calls": lambda: joined(x),
        "dask.delayed": with_dask,
    }
    held = client.run_on_scheduler(_tasks)
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    for turn in range(ROUNDS + 2):
        for name, build in builders.items():
            taken = timed(build)
            if turn >= 2:
                seconds[name].append(taken)
    for name, taken_by in seconds.items():
        report.figure(f"1000 layers, {name}", taken_by)
    report.value("build_1000", statistics.median(seconds["taskgrad"]) * 1e3, "ms")
    report.value("tasks submitted by building", client.run_on_scheduler(_tasks) - held, "tasks")
    report.ratio("build_1000", seconds["taskgrad"], seconds["dask.delayed"])
    report.finish(args.json)
    client.close()


def _tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


if __name__ == "__main__":
    main()
