"""What kept memory gains: training steps of ResNet-50 over two workers of one thread each.

Two clusters with the same chain; on one the allocator is left as Dask's nanny starts it. All else
is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import dask
import torch
import torch.nn.functional as F
from distributed import Client

import taskgrad as tg
from benchmarks._models import resnet
from benchmarks._report import Report, arguments

BATCH, ROUNDS = 4, 12


def trainer(client: Client) -> Callable[[], float]:
    """A model on the cluster, and a step of its training that returns the seconds it took."""
    torch.manual_seed(0)
    chain = tg.GraphChain(resnet(50, 1000), client=client)
    optimizer = tg.Optimizer(chain, partial(torch.optim.SGD, lr=0.01))
    x, target = torch.randn(BATCH, 3, 224, 224), torch.randint(0, 1000, (BATCH,))

    def step() -> float:
        start = time.perf_counter()
        tg.spawn(F.cross_entropy, chain(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Measure and report."""
    args, report = arguments("allocator", __doc__), Report("allocator")
    clients, steps = [], {}
    for name, enabled in {"kept": True, "as the nanny starts it": False}.items():
        with dask.config.set({"taskgrad.allocator.enabled": enabled}):
            clients.append(tg.local_cluster(n_workers=2, dashboard_address=":0"))
            steps[name] = trainer(clients[-1])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 2):
        for name, step in steps.items():
            taken = step()
            if turn >= 2:
                seconds[name].append(taken)
    for name, taken_by in seconds.items():
        report.figure(f"a step, {name}", taken_by)
    report.ratio("resnet50_step", *seconds.values())
    report.finish(args.json)
    for client in clients:
        client.close()


if __name__ == "__main__":
    main()
