"""How a training step scales: simulated from 2 to 1,024 workers, its fixed cost measured up to 16.

The simulation runs the schedules on their timelines (`taskgrad.plan.schedule.Timeline`): one stage
a worker, two microbatches for each worker, F, B and W of 10 ms each, and activations of 8 MiB at
every cut, which take as long as a published link speed says: Ethernet of 10 and 100 Gbit/s with
30 us, and NVLink 4, 450 GB/s one way, with 5 us. `step_` is the time from one step to the next, in
seconds; its part in which a worker waits is `bubble_`. `tapes_` is the most that a worker holds.
`bubble_..._64_microbatches` is that of 64 microbatches, however many workers there are, at 100
Gbit/s. Nothing of it was measured.

What is measured is what a step costs besides its arithmetic, on real workers of one thread: two
tiny linear layers for each and 8 microbatches. `cost_step_` is the wall time of a step,
`cost_driver_` the processor time of the process that has the driver and the scheduler.
`driver_growth_16_vs_2` is that of 16 workers over that of 2: 8 or less means that it grows no
faster than the number of workers.
"""

from __future__ import annotations

import functools
import gc
import time

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._report import Report, arguments

WORKERS = (2, 4, 16, 64, 256, 1024)
FIXED = 64  # microbatches
SCHEDULES = ("1f1b", "zb_h1", "zb_h2")
SECONDS = 0.01  # of F, of B, of W
BYTES = 8 << 20
LINKS = {
    "10gbit": (10e9 / 8, 30e-6),
    "100gbit": (100e9 / 8, 30e-6),
    "nvlink4": (450e9, 5e-6),
}
ROWS = ("simulated", "measured")
MEASURED = (2, 4, 8, 16)
ROUNDS = 5
STEPS = 20


def simulate(report: Report) -> None:
    """Step times and bubbles on paper."""
    from taskgrad.plan.rules import schedule
    from taskgrad.plan.schedule import Costs, Pipeline

    gc.disable()  # millions of actions, and no cycles
    for workers in WORKERS:
        for name in SCHEDULES:
            made = schedule(name, Pipeline.line(workers), 2 * workers)
            report.value(f"tapes_{name}_{workers}", max(made.peak_tapes()), "")
            costs = {
                link: Costs.uniform(workers, SECONDS, SECONDS, SECONDS, BYTES / speed + delay)
                for link, (speed, delay) in LINKS.items()
            }
            for link in LINKS:
                timeline = made.timeline(costs[link])
                key = f"{name}_{link}_{workers}"
                report.value(f"step_{key}", timeline.period, "s")
                report.value(f"bubble_{key}", timeline.bubble(), "")
                del timeline
            fixed = schedule(name, Pipeline.line(workers), FIXED)
            key = f"bubble_{name}_100gbit_{workers}_{FIXED}_microbatches"
            report.value(key, fixed.bubble(costs["100gbit"]), "")
            del made, fixed
            schedule.cache_clear()  # those of many workers are large
            report.show()
    gc.enable()


class Ours:
    """A trainer on a cluster of its own."""

    def __init__(self, workers: int) -> None:
        import taskgrad as tg

        self.client = tg.local_cluster(n_workers=workers, dashboard_address=":0")
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2 * workers)))
        placement = [i // 2 for i in range(2 * workers)]
        chain = tg.GraphChain(model, client=self.client, placement=placement)
        sgd = functools.partial(torch.optim.SGD, lr=0.01)
        self.trainer = tg.Trainer(chain, F.cross_entropy, sgd, microbatches=8)
        self.x, self.y = torch.randn(16, 8), torch.randint(8, (16,))

    def steps(self, count: int) -> tuple[float, float]:
        """Wall time and processor time of this process, for each of so many steps."""
        began, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.trainer.step(self.x, self.y)
        self.trainer.wait()
        return (time.perf_counter() - began) / count, (time.process_time() - used) / count


def measure(report: Report) -> None:
    """What a step of nothing costs."""
    sides = {workers: Ours(workers) for workers in MEASURED}
    walls: dict[int, list[float]] = {workers: [] for workers in MEASURED}
    used: dict[int, list[float]] = {workers: [] for workers in MEASURED}
    for round_ in range(ROUNDS + 1):
        for workers, side in sides.items():
            wall, processor = side.steps(STEPS)
            if round_:  # the first is to warm up
                walls[workers].append(wall)
                used[workers].append(processor)
    for workers, side in sides.items():
        report.figure(f"cost_step_{workers}", walls[workers])
        report.figure(f"cost_driver_{workers}", used[workers])
        side.client.close()
    report.ratio("driver_growth_16_vs_2", used[16], used[2])


def main() -> None:
    """Simulate, measure, print, write."""
    options = arguments("scale", __doc__, rows=ROWS)
    report = Report("scale")
    if "simulated" in options.rows:
        simulate(report)
    if "measured" in options.rows:
        measure(report)
    report.finish(options.json)


if __name__ == "__main__":
    main()
