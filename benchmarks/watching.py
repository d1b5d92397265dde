"""What it costs to see what the programs of a training step do, as a part of the step.

Every action, send and receive is timed on its worker; the times go to the driver with the step's
results, become `loss.report`, and are shown in Dask's task stream. The ratio is processor time of
that over all processor time of the driver, the scheduler and two workers in the same steps. In the
driver and scheduler the functions that do it are measured where they run (but for the message to
the scheduler, sent twice a second); on the workers, where it is two calls of a clock and one of a
list for each row, a loop of the same calls stands for them.

`main_job` is the network of `make train`, `mlp_10ms` the shortest step of `pipeline`, `resnet50` as
there.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from typing import Any

import psutil
import torch.nn.functional as F

import taskgrad as tg
from benchmarks._cases import make
from benchmarks._report import Report, arguments
from benchmarks._sides import OPTIMIZER, ROUNDS
from taskgrad.cluster import internals
from taskgrad.executors.task_stream import TaskStream

ROWS = ("resnet50", "main_job", "mlp_10ms")
STEPS = {"resnet50": 4, "main_job": 40, "mlp_10ms": 100}


class Meter:
    """Processor time, in this process, of functions that it has wrapped, and the rows they got."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rows = 0

    def wrap(self, owner: Any, name: str) -> None:
        """Have calls of this function measured from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            start, before = time.thread_time(), self.seconds
            result = function(*args, **kwargs)
            self.seconds = before + time.thread_time() - start  # calls inside count once
            if name == "add":
                self.rows += len(result)
            return result

        setattr(owner, name, measured)


def seconds_of_a_row(count: int = 100_000) -> float:
    """Processor time of timing one row on a worker; run there."""
    timings, now = array("d"), time.time
    begin = time.thread_time()
    for i in range(count):
        start = now()
        timings.extend((i, start, now()))
    timed = time.thread_time() - begin
    begin = time.thread_time()
    for _ in range(count):
        pass
    return (timed - (time.thread_time() - begin)) / count


def processor_time(processes: list[psutil.Process]) -> float:
    """Seconds that these have used."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Measure, print, write."""
    options = arguments("watching", __doc__, rows=ROWS, rounds=ROUNDS)
    report, meter = Report("watching"), Meter()
    for name in ("add", "show"):
        meter.wrap(TaskStream, name)
    meter.wrap(internals, "show_in_task_stream")
    # The scheduler runs in this process.
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    pids = [os.getpid(), *client.run(os.getpid).values()]
    processes = [psutil.Process(pid) for pid in pids]
    of_a_row = max(client.run(seconds_of_a_row).values())
    report.figure("row_on_a_worker", [of_a_row])
    for row in options.rows:
        case, steps = make(row), STEPS[row]
        chain = tg.GraphChain(case.model, client=client, placement=case.placement)
        trainer = tg.Trainer(chain, F.cross_entropy, OPTIMIZER, microbatches=case.microbatches)
        watching, all_ = [], []
        for round_ in range(options.rounds + 1):
            meter.seconds, meter.rows, before = 0.0, 0, processor_time(processes)
            for _ in range(steps):
                trainer.step(case.x, case.y)
            trainer.wait()
            if round_:
                watching.append((meter.seconds + meter.rows * of_a_row) / steps)
                all_.append((processor_time(processes) - before) / steps)
        report.figure(f"{row}_watching", watching)
        report.figure(f"{row}_processor_time", all_)
        report.ratio(f"{row}_watching_of_processor_time", watching, all_)
        report.show()
    client.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
