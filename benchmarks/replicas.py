"""Two replicas of a model that fits one worker: the Trainer against DistributedDataParallel.

Both train ResNet-18 on batches of 16 images of 224 by 224, over two processes of one thread: each
process takes half of a batch. DistributedDataParallel communicates over gloo and is measured as a
user runs it, and once more with our workers' settings of the allocator. The Trainer has one stage,
two replicas and two microbatches; `replicated` and `sharded` say where the optimizer's state is
(`shard_optimizer`), and the shorter of the two counts. A step is forward, loss, backward, mean of
the gradients, and SGD with momentum. All take turns within one run.
"""

from __future__ import annotations

import statistics

from benchmarks._cases import make
from benchmarks._report import Report, arguments
from benchmarks._sides import ROUNDS, Side, data_parallel, free_port, opened, replicas

ROW = "resnet18"
WAYS = ("replicated", "sharded")


def main() -> None:
    """Measure, print, write."""
    options = arguments("replicas", __doc__, rounds=ROUNDS)
    report = Report("replicas")
    steps = make(ROW).steps
    rivals = {"ddp": False, "ddp_our_allocator": True}
    sides = {"ours": Side(replicas(ROW))}
    for side, keep in rivals.items():
        sides[side] = Side(data_parallel(ROW, free_port(), keep_memory=keep))
    ways = [*(("ours", way) for way in WAYS), *((side, "") for side in rivals)]
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    with opened(sides):
        for side, way in ways:
            sides[side].step(way, 2)
        for round_ in range(options.rounds):
            for side, way in reversed(ways) if round_ % 2 else ways:
                sides[side].step(way, 1)
                found[side, way].append(sides[side].step(way, steps))
    for (side, way), seconds in found.items():
        report.figure("_".join(filter(None, (ROW, side, way))), seconds)
    best = min(WAYS, key=lambda way: statistics.median(found["ours", way]))
    for side in rivals:
        report.ratio(f"{ROW}_vs_{side}", found["ours", best], found[side, ""], of=best)
    report.finish(options.json)


if __name__ == "__main__":
    main()
