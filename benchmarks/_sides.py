"""The sides of the pipeline benchmarks, each in processes of its own, and how they take turns.

`python -m benchmarks._sides KIND CASE ...` is one such process. It reads lines of
[way, steps], takes so many steps, and answers with the seconds of a step. A way is a schedule, with
a number of microbatches if that is another than the case's: "zb_h2" or "zb_h2 of 3". No process
waits for the others but where the training needs it: there is no barrier between the steps.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._cases import Case, make
from benchmarks._heap import keep_freed_memory
from benchmarks._report import Report

OURS = ("1f1b", "zb_h1", "zb_h2")
"""The Trainer's schedules; the one with the shortest step counts."""
THEIRS = ("1f1b", "gpipe")
"""Those of torch.distributed.pipelining, of which the same holds."""
ROUNDS = 5

OPTIMIZER = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)

Run = Callable[[int], None]
"""Takes so many steps."""


# -- in the processes ----------------------------------------------------------------------------


def serve_ours(name: str, scheduler: str = "") -> None:
    """The Trainer: on a cluster of this machine, or where workers "host0", "host1", ... are."""
    from distributed import Client

    import taskgrad as tg

    case = make(name)
    count = len(case.parts)
    if scheduler:
        client = Client(scheduler)
        client.wait_for_workers(count, timeout=60)
    else:
        client = tg.local_cluster(n_workers=count, dashboard_address=":0")
    placement = [f"host{i}" if scheduler else i for i in case.placement]

    def prepare(way: str) -> Run:
        schedule, microbatches = _schedule_of(way, case)
        chain = tg.GraphChain(case.model, client=client, placement=placement)
        trainer = tg.Trainer(
            chain, F.cross_entropy, OPTIMIZER, microbatches=microbatches, schedule=schedule
        )
        return _our_steps(trainer, case)

    _serve(prepare)
    client.close()


def serve_rank(name: str, rank: int, address: str, *, keep_memory: bool) -> None:
    """One process of torch.distributed.pipelining."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    case = make(name)
    last = len(case.parts) - 1
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=last + 1)
    schedules = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}

    def prepare(way: str) -> Run:
        kind, microbatches = _schedule_of(way, case)
        part = make(name).parts[rank]
        stage = PipelineStage(part, rank, last + 1, torch.device("cpu"))
        schedule = schedules[kind](stage, microbatches, loss_fn=F.cross_entropy)
        optimizer = OPTIMIZER(part.parameters())

        def run(steps: int) -> None:
            for _ in range(steps):
                if rank == 0:
                    schedule.step(case.x)
                elif rank == last:
                    schedule.step(target=case.y, losses=[])
                else:
                    schedule.step()
                optimizer.step()
                optimizer.zero_grad()

        return run

    _serve(prepare)
    dist.destroy_process_group()


def serve_replicas(name: str) -> None:
    """The Trainer with two replicas of one stage; a way is "replicated" or "sharded" optimizers."""
    import taskgrad as tg

    case = make(name)
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")

    def prepare(way: str) -> Run:
        chain = tg.GraphChain(case.model, client=client, placement=case.placement)
        trainer = tg.Trainer(
            chain,
            F.cross_entropy,
            OPTIMIZER,
            microbatches=case.microbatches,
            replicas=2,
            shard_optimizer=way == "sharded",
        )
        return _our_steps(trainer, case)

    _serve(prepare)
    client.close()


def serve_data_parallel(name: str, rank: int, address: str, *, keep_memory: bool) -> None:
    """One of two processes of DistributedDataParallel, each with its half of the batch."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    case = make(name)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    batch = case.x.tensor_split(2)[rank], case.y.tensor_split(2)[rank]
    model = DistributedDataParallel(case.model.train())
    _serve(lambda _: _plain_steps(model, *batch))
    dist.destroy_process_group()


def serve_plain(name: str, threads: int, *, keep_memory: bool) -> None:
    """One process of torch, which takes the whole batch at once."""
    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(threads)
    case = make(name)
    model = case.model.train()
    _serve(lambda _: _plain_steps(model, case.x, case.y))


def _our_steps(trainer: Any, case: Case) -> Run:
    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step(case.x, case.y)
        trainer.wait()

    return run


def _plain_steps(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Run:
    optimizer = OPTIMIZER(model.parameters())

    def run(steps: int) -> None:
        for _ in range(steps):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _schedule_of(way: str, case: Case) -> tuple[str, int]:
    """The name of the schedule, and the number of microbatches."""
    schedule, _, count = way.partition(" of ")
    return schedule, int(count) if count else case.microbatches


def _serve(prepare: Callable[[str], Run]) -> None:
    """Answer each line of [way, steps] with the seconds of a step, until there are no more."""
    prepare = functools.cache(prepare)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        way, steps = json.loads(line)
        run = prepare(way)
        start = time.perf_counter()
        run(steps)
        print(json.dumps((time.perf_counter() - start) / steps), flush=True)


# -- in the process that asks them ---------------------------------------------------------------


class Side:
    """Processes that are asked together.

    Parameters
    ----------
    commands
        Of each process what comes after the interpreter, from `ours`, `rank` or `plain`.
    prefixes
        For each process what comes before it: a command that starts another.
    threads
        Of torch, in each process.
    environment
        Variables besides those of this process.
    module
        What the interpreter runs.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        prefixes: Sequence[Sequence[str]] | None = None,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        module: str = "benchmarks._sides",
    ) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        self.processes = [
            subprocess.Popen(
                [*prefix, sys.executable, "-m", module, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=variables,
            )
            for prefix, command in zip(prefixes or [()] * len(commands), commands, strict=True)
        ]

    def ready(self) -> None:
        """Wait until all processes are."""
        self._answers()

    def step(self, way: str, steps: int) -> float:
        """Seconds of a step, as the slowest of the processes has it."""
        for process in self.processes:
            assert process.stdin is not None
            print(json.dumps([way, steps]), file=process.stdin, flush=True)
        return max(self._answers())

    def _answers(self) -> list[Any]:
        found = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("a process of the benchmark ended before its time")
            found.append(json.loads(line))
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ours(name: str, scheduler: str = "") -> list[list[str]]:
    """The process of `serve_ours`, for a `Side`."""
    return [["ours", name, scheduler]]


def ranks(name: str, host: str, port: int, *, keep_memory: bool) -> list[list[str]]:
    """The processes of `serve_rank`, the first of which listens at this address."""
    kind = "torch_our_allocator" if keep_memory else "torch"
    address = f"tcp://{host}:{port}"
    return [[kind, name, str(i), address] for i in range(len(make(name).parts))]


def replicas(name: str) -> list[list[str]]:
    """The process of `serve_replicas`."""
    return [["replicas", name]]


def data_parallel(name: str, port: int, *, keep_memory: bool) -> list[list[str]]:
    """The processes of `serve_data_parallel`."""
    kind = "ddp_our_allocator" if keep_memory else "ddp"
    return [[kind, name, str(i), f"tcp://127.0.0.1:{port}"] for i in range(2)]


def plain(name: str, threads: int, *, keep_memory: bool = False) -> list[list[str]]:
    """The process of `serve_plain`."""
    return [["plain_our_allocator" if keep_memory else "plain", name, str(threads)]]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def opened(sides: dict[str, Side]) -> Iterator[dict[str, Side]]:
    """Sides that are ready, and closed at the end."""
    try:
        for side in sides.values():
            side.ready()
        yield sides
    finally:
        for side in sides.values():
            side.close()


def _with_counts(schedules: Sequence[str], case: Case, *, even: bool = False) -> tuple[str, ...]:
    """These schedules, and the last of ours or the first of theirs with other counts.

    If `even`, counts that do not divide the batch are left out: torch.distributed.pipelining needs
    microbatches of one size.
    """
    chosen = schedules[0] if even else schedules[-1]
    counts = [n for n in case.other_counts if not (even and len(case.x) % n)]
    return (*schedules, *(f"{chosen} of {n}" for n in counts))


def measure(report: Report, row: str, case: Case, sides: dict[str, Side], rounds: int) -> None:
    """Let the sides of a row take turns; report, and print, the seconds of a step and ratios.

    A turn is a step that does not count, and then those of the case. Every other round has the
    reverse order.
    """
    steps, theirs = case.steps, _with_counts(THEIRS, case, even=True)
    kinds_of = {
        "ours": _with_counts(OURS, case),
        "torch": theirs,
        "torch_our_allocator": theirs,
    }
    ways = [(side, kind) for side in sides for kind in kinds_of.get(side, ("",))]
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for side, kind in ways:
        sides[side].step(kind, 2)
    for round_ in range(rounds):
        for side, kind in reversed(ways) if round_ % 2 else ways:
            sides[side].step(kind, 1)
            found[side, kind].append(sides[side].step(kind, steps))
    best = {}
    for side in sides:
        kinds = kinds_of.get(side, ("",))
        best[side] = min(kinds, key=lambda kind: statistics.median(found[side, kind]))
        for kind in kinds:
            report.figure("_".join(filter(None, (row, side, *kind.split()))), found[side, kind])
    names = {
        "torch": "torch_pipelining",
        "torch_our_allocator": "torch_pipelining_our_allocator",
    }
    for side in [side for side in sides if side != "ours"]:
        report.ratio(
            f"{row}_vs_{names.get(side, side)}",
            found["ours", best["ours"]],
            found[side, best[side]],
            of=" against ".join(filter(None, (best["ours"], best[side] or "all at once"))),
        )
    report.show()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", name, scheduler]:
            serve_ours(name, scheduler)
        case ["torch" | "torch_our_allocator" as kind, name, rank, address]:
            serve_rank(name, int(rank), address, keep_memory=kind != "torch")
        case ["replicas", name]:
            serve_replicas(name)
        case ["ddp" | "ddp_our_allocator" as kind, name, rank, address]:
            serve_data_parallel(name, int(rank), address, keep_memory=kind != "ddp")
        case ["plain" | "plain_our_allocator" as kind, name, threads]:
            serve_plain(name, int(threads), keep_memory=kind != "plain")
