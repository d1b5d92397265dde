"""The sides of the benchmark on a GPU, each in processes of its own.

`python -m benchmarks._gpu_sides KIND CASE DEVICE ...` is one such process. It reads lines of
[what, steps]: with "" it takes so many steps and answers with the seconds of one; with "peak" it
answers with the most bytes that were in use at once, of the device, or of the process without one;
with "traffic" with the bytes between host and device in a step, computed.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._cases import Tokens
from benchmarks._models import resnet

MICROBATCHES = 4  # over two workers
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class GpuCase:
    """Layers in a row, the first one of the second worker, and a batch in the host's memory."""

    layers: list[nn.Module]
    cut: int
    x: torch.Tensor
    y: torch.Tensor
    optimizer: Callable[..., torch.optim.Optimizer]

    @property
    def parts(self) -> list[nn.Sequential]:
        """What each of two workers has."""
        return [nn.Sequential(*self.layers[: self.cut]), nn.Sequential(*self.layers[self.cut :])]


def make(name: str) -> GpuCase:
    """The same one in every process: "resnet50" or "gpt2", or "resnet_small" or "gpt_small"."""
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    adamw = functools.partial(torch.optim.AdamW, lr=1e-4)
    match name:
        case "resnet50":
            layers = list(_in_a_row(resnet(50, n_classes=1000)))
            x, y = torch.randn(64, 3, 224, 224), torch.randint(1000, (64,))
            return GpuCase(layers, 12, x, y, sgd)
        case "resnet_small":
            layers = list(_in_a_row(resnet(14, n_classes=10)))
            return GpuCase(layers, 5, torch.randn(8, 3, 64, 64), torch.randint(10, (8,)), sgd)
        case "gpt2":
            return _gpt(12, 768, 12, 50257, 1024, 8, adamw)
        case "gpt_small":
            return _gpt(2, 64, 4, 500, 64, 8, adamw)
    raise ValueError(name)


def _gpt(
    blocks: int, width: int, heads: int, vocabulary: int, length: int, batch: int, optimizer: Any
) -> GpuCase:
    layers = [
        Tokens(vocabulary, width, length),
        *(Block(width, heads) for _ in range(blocks)),
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)),
    ]
    tokens = torch.randint(vocabulary, (batch, length + 1))
    return GpuCase(layers, 1 + blocks // 2, tokens[:, :-1], tokens[:, 1:], optimizer)


class Block(nn.Module):
    """One block of GPT-2: causal attention, then two linear layers, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) to the same."""
        n, length, width = x.shape
        split = self.qkv(self.before(x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.inner(x)


def loss_of(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of all samples, or of all tokens."""
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())


# -- in the processes ----------------------------------------------------------------------------


def serve_plain(name: str, device: str) -> None:
    """Plain torch, the whole batch at once, which comes from pinned memory."""
    case = make(name)
    model = nn.Sequential(*case.layers).to(device).train()
    optimizer = case.optimizer(model.parameters())
    x, y = (t.pin_memory() if device == "cuda" else t for t in (case.x, case.y))

    def run(steps: int) -> None:
        for _ in range(steps):
            here, target = (t.to(device, non_blocking=True) for t in (x, y))
            with torch.autocast(device, DTYPE):
                loss = loss_of(model(here), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize()

    _serve(run, peak, lambda: case.x.nbytes + case.y.nbytes)


def serve_ours(name: str, device: str, workers: int) -> None:
    """The Trainer over so many workers, all on one GPU."""
    import taskgrad as tg

    case = make(name)
    model = nn.Sequential(*case.layers)
    client = tg.local_cluster(n_workers=workers, dashboard_address=":0")
    placement = [int(workers > 1 and i >= case.cut) for i in range(len(case.layers))]
    if any(isinstance(layer, nn.Sequential) for layer in case.layers):  # they count one by one
        placement = [
            at
            for at, layer in zip(placement, case.layers, strict=True)
            for _ in range(len(list(_in_a_row(layer))))
        ]
    chain = tg.GraphChain(model, client=client, placement=placement, device=device)
    microbatches = MICROBATCHES if workers > 1 else 1
    trainer = tg.Trainer(chain, loss_of, case.optimizer, microbatches=microbatches, amp="bf16")

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step(case.x, case.y)
        trainer.wait()
        client.run(synchronize)

    def traffic() -> int:
        total = case.x.nbytes + case.y.nbytes
        if workers > 1:  # forward and back, from the device and to the other one
            with torch.no_grad(), torch.autocast("cpu", DTYPE):
                total += 4 * case.parts[0](case.x[:1]).nbytes * len(case.x)
        return total

    _serve(run, lambda: sum(client.run(peak).values()), traffic)
    client.close()


def serve_rank(name: str, device: str, rank: int, address: str) -> None:
    """One of two processes of torch.distributed.pipelining: each with a GPU of its own."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=2)
    case = make(name)
    part = case.parts[rank].to(here).train()
    schedule = Schedule1F1B(PipelineStage(part, rank, 2, here), MICROBATCHES, loss_fn=loss_of)
    optimizer = case.optimizer(part.parameters())
    x, y = case.x.to(here), case.y.to(here)

    def run(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device, DTYPE):
                if rank == 0:
                    schedule.step(x)
                else:
                    schedule.step(target=y, losses=[])
            optimizer.step()
            optimizer.zero_grad()
        synchronize()

    _serve(run, peak, lambda: 0)
    dist.destroy_process_group()


def synchronize() -> None:
    """Wait for the kernels of this process."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak() -> int:
    """The most bytes of tensors on the device at once; of this process where it uses none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(run: Callable[[int], None], peak: Any, traffic: Any) -> None:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, steps = json.loads(line)
        if what:
            answer: float = {"peak": peak, "traffic": traffic}[what]()
        else:
            start = time.perf_counter()
            run(steps)
            answer = (time.perf_counter() - start) / steps
        print(json.dumps(answer), flush=True)


def _in_a_row(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _in_a_row(child)
    else:
        yield module


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["plain", name, device]:
            serve_plain(name, device)
        case ["ours", name, device, workers]:
            serve_ours(name, device, int(workers))
        case ["rank", name, device, rank, address]:
            serve_rank(name, device, int(rank), address)
