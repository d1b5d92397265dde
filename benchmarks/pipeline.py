"""A training step over two workers: taskgrad's Trainer against torch.distributed.pipelining.

Both cut the same model at the same layer, over two processes of one thread, and take each batch in
four microbatches; torch's processes communicate over gloo, and the better of GPipe and 1F1B counts.
Plain torch does the same batch at once, in one process with one thread and with two. A step is
forward, loss, backward and SGD with momentum. All take turns within one run.

The `mlp_` rows show where we lose: eight linear layers, with sizes for steps of about so long. What
a step costs us besides its arithmetic, for the graph and for each hop through the scheduler, is
the same for all of them.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._models import resnet
from benchmarks._report import Report, arguments

MICROBATCHES = 4
ROUNDS = 7
OPTIMIZER = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)

# Linear layers of a width, and a batch, for steps of about so long on two cores.
MLPS = {
    "10ms": (512, 48),
    "30ms": (512, 144),
    "100ms": (1024, 128),
    "300ms": (1024, 384),
    "1s": (2048, 320),
    "3s": (2048, 960),
}


class Tokens(nn.Module):
    """Embeddings of tokens and of their places."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.zeros(length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length) integers to (n, length, width)."""
        return self.token(x) + self.place


class LastToken(nn.Module):
    """Scores of the token after the last one."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) to (n, vocabulary)."""
        return self.linear(x[:, -1])


@dataclass(frozen=True)
class Case:
    """A model as layers in a row, where it is cut, and a batch."""

    layers: list[nn.Module]
    cut: int
    x: torch.Tensor
    y: torch.Tensor
    steps: int

    @property
    def model(self) -> nn.Sequential:
        return nn.Sequential(*self.layers)


def make(name: str) -> Case:
    """The same one in every process."""
    torch.manual_seed(0)
    if name == "resnet50":
        layers = list(_in_a_row(resnet(50, n_classes=10)))
        return Case(layers, 12, torch.randn(16, 3, 128, 128), torch.randint(10, (16,)), steps=2)
    if name == "transformer":
        block = functools.partial(
            nn.TransformerEncoderLayer, 512, 8, 2048, dropout=0.0, batch_first=True
        )
        layers = [Tokens(1000, 512, 256), *(block() for _ in range(12)), LastToken(512, 1000)]
        return Case(layers, 7, torch.randint(1000, (8, 256)), torch.randint(1000, (8,)), steps=1)
    width, size = MLPS[name.removeprefix("mlp_")]
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(8)]
    steps = {"10ms": 40, "30ms": 20, "100ms": 8, "300ms": 4}.get(name.removeprefix("mlp_"), 1)
    return Case(layers, 4, torch.randn(size, width), torch.randint(width, (size,)), steps)


def _in_a_row(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _in_a_row(child)
    else:
        yield module


# -- the sides, each in processes of its own ----------------------------------------------------


def serve_ours() -> None:
    """The Trainer, on a cluster of two workers."""
    import taskgrad as tg

    client = tg.local_cluster(n_workers=2, dashboard_address=":0")

    def prepare(name: str) -> Callable[[int], None]:
        case = make(name)
        placement = [0 if i < case.cut else 1 for i in range(len(list(_in_a_row(case.model))))]
        if name.startswith("mlp"):  # each of its layers is two in a row
            placement = [0 if i < 2 * case.cut else 1 for i in range(2 * len(case.layers))]
        chain = tg.GraphChain(case.model, client=client, placement=placement)
        trainer = tg.Trainer(chain, F.cross_entropy, OPTIMIZER, microbatches=MICROBATCHES)

        def run(steps: int) -> None:
            for _ in range(steps):
                trainer.step(case.x, case.y)
            trainer.wait()

        return run

    _serve(prepare)
    client.close()


def serve_rank(rank: int, port: int) -> None:
    """One of the two processes of torch.distributed.pipelining."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    schedules = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}

    def prepare(name: str) -> Callable[[int], None]:
        name, _, kind = name.partition("/")
        case = make(name)
        part = nn.Sequential(*(case.layers[case.cut :] if rank else case.layers[: case.cut]))
        stage = PipelineStage(part, rank, 2, torch.device("cpu"))
        schedule = schedules[kind](stage, MICROBATCHES, loss_fn=F.cross_entropy)
        optimizer = OPTIMIZER(part.parameters())

        def run(steps: int) -> None:
            for _ in range(steps):
                if rank:
                    schedule.step(target=case.y, losses=[])
                else:
                    schedule.step(case.x)
                optimizer.step()
                optimizer.zero_grad()
            dist.barrier()

        return run

    _serve(prepare)
    dist.destroy_process_group()


def serve_plain(threads: int) -> None:
    """One process of torch."""
    torch.set_num_threads(threads)

    def prepare(name: str) -> Callable[[int], None]:
        case = make(name)
        model = case.model.train()
        optimizer = OPTIMIZER(model.parameters())

        def run(steps: int) -> None:
            for _ in range(steps):
                F.cross_entropy(model(case.x), case.y).backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    _serve(prepare)


def _serve(prepare: Callable[[str], Callable[[int], None]]) -> None:
    """Answer each line of ["name", steps] with the seconds of a step; None ends it."""
    name, run = None, None
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked, steps = json.loads(line)
        if asked != name:
            run = None  # the one before may be large
            name, run = asked, prepare(asked)
        assert run is not None
        start = time.perf_counter()
        run(steps)
        print(json.dumps((time.perf_counter() - start) / steps), flush=True)


class Side:
    """Processes that run `_serve`, asked together."""

    def __init__(self, *commands: list[str], threads: int = 1) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.pipeline", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for command in commands
        ]
        self._answers()

    def step(self, name: str, steps: int) -> float:
        """Seconds of a step, as the slowest of the processes has it."""
        for process in self.processes:
            assert process.stdin is not None
            print(json.dumps([name, steps]), file=process.stdin, flush=True)
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
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """Measure, print, write."""
    options = arguments("pipeline", __doc__)
    report = Report("pipeline")
    port = str(_free_port())
    sides = {
        "ours": Side(["--serve", "ours"]),
        "torch": Side(["--serve", "rank", "0", port], ["--serve", "rank", "1", port]),
        "one_thread": Side(["--serve", "plain", "1"]),
        "two_threads": Side(["--serve", "plain", "2"], threads=2),
    }
    try:
        for name in ("resnet50", "transformer", *(f"mlp_{length}" for length in MLPS)):
            _measure(report, sides, name)
    finally:
        for side in sides.values():
            side.close()
    report.finish(options.json)


def _measure(report: Report, sides: dict[str, Side], name: str) -> None:
    ways = [("ours", name)]
    ways += [("torch", f"{name}/{kind}") for kind in ("1f1b", "gpipe")]
    if not name.startswith("mlp"):
        ways += [("one_thread", name), ("two_threads", name)]
    steps = make(name).steps
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        for side, what in ways:
            # Torch's two schedules share its processes: each is warmed up anew.
            if side == "torch":
                sides[side].step(what, 1)
            seconds = sides[side].step(what, steps)
            if round_:  # the first is to warm up
                found[side, what].append(seconds)
    ours = found["ours", name]
    pipelines = [found["torch", f"{name}/{kind}"] for kind in ("1f1b", "gpipe")]
    best = min(pipelines, key=lambda times: sorted(times)[len(times) // 2])
    report.figure(f"{name}_ours", ours)
    report.figure(f"{name}_torch_1f1b", pipelines[0])
    report.figure(f"{name}_torch_gpipe", pipelines[1])
    report.ratio(f"{name}_vs_torch_pipelining", ours, best)
    for threads in ("one_thread", "two_threads"):
        if (threads, name) in found:
            report.figure(f"{name}_{threads}", found[threads, name])
            report.ratio(f"{name}_vs_{threads}", ours, found[threads, name])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", "ours"]:
            serve_ours()
        case ["--serve", "rank", rank, port]:
            serve_rank(int(rank), int(port))
        case ["--serve", "plain", threads]:
            serve_plain(int(threads))
        case _:
            main()
