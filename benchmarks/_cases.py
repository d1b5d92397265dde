"""What the pipeline benchmarks train: a model in parts, one for each worker, and a batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks._models import resnet, resnet18

# Linear layers of a width, and a batch, for steps of about so long on two cores; steps in a turn.
MLPS = {
    "mlp_10ms": (512, 48, 40),
    "mlp_30ms": (512, 144, 20),
    "mlp_100ms": (1024, 128, 10),
    "mlp_300ms": (1024, 384, 5),
    "mlp_1s": (2048, 320, 5),
}


@dataclass(frozen=True)
class Case:
    """A model as layers in a row, where they are cut, and a batch; `steps` are taken in a turn.

    `other_counts` are numbers of microbatches that are tried besides, with one schedule each.
    """

    layers: list[nn.Module]
    cuts: tuple[int, ...]
    x: torch.Tensor
    y: torch.Tensor
    steps: int
    microbatches: int = 4
    other_counts: tuple[int, ...] = ()

    @property
    def parts(self) -> list[nn.Sequential]:
        """What each worker has."""
        ends = itertools.pairwise((0, *self.cuts, len(self.layers)))
        return [nn.Sequential(*self.layers[start:stop]) for start, stop in ends]

    @property
    def model(self) -> nn.Sequential:
        return nn.Sequential(*self.layers)

    @property
    def placement(self) -> list[int]:
        """The worker of each layer, where those of nested containers count one by one."""
        return [i for i, part in enumerate(self.parts) for _ in _in_a_row(part)]


def make(name: str) -> Case:
    """The same one in every process."""
    torch.manual_seed(0)
    layers: list[nn.Module]
    match name:
        case "resnet50":
            return _resnet50(16, 128, (2, 3))
        case "resnet50_batch_32":
            return _resnet50(32, 128, (2, 3))
        case "resnet50_small":
            return _resnet50(8, 96)
        case "resnet18":
            layers = list(resnet18(n_classes=10))
            x, y = torch.randn(16, 3, 224, 224), torch.randint(10, (16,))
            return Case(layers, (), x, y, steps=3, microbatches=2)
        case "main_job":
            layers = list(
                _in_a_row(resnet(14, n_classes=10, in_channels=1, width=16, small_images=True))
            )
            x, y = torch.randn(128, 1, 8, 8), torch.randint(10, (128,))
            return Case(layers, (5,), x, y, steps=10)
        case "transformer":
            return _transformer(12, 512, 8)
        case "transformer_small":
            return _transformer(6, 256, 16)
        case "empty_8_workers":
            layers = [nn.Linear(8, 8) for _ in range(16)]
            x, y = torch.randn(16, 8), torch.randint(8, (16,))
            return Case(layers, tuple(range(2, 16, 2)), x, y, steps=10, microbatches=8)
    width, size, steps = MLPS[name]
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(8)]
    return Case(layers, (4,), torch.randn(size, width), torch.randint(width, (size,)), steps)


def _resnet50(batch: int, pixels: int, other_counts: tuple[int, ...] = ()) -> Case:
    layers = list(_in_a_row(resnet(50, n_classes=10)))
    x, y = torch.randn(batch, 3, pixels, pixels), torch.randint(10, (batch,))
    return Case(layers, (12,), x, y, steps=5, other_counts=other_counts)


def _transformer(blocks: int, width: int, batch: int) -> Case:
    """Over 256 tokens of 1000."""
    block = functools.partial(
        nn.TransformerEncoderLayer, width, 8, 4 * width, dropout=0.0, batch_first=True
    )
    layers = [Tokens(1000, width, 256), *(block() for _ in range(blocks)), LastToken(width, 1000)]
    x, y = torch.randint(1000, (batch, 256)), torch.randint(1000, (batch,))
    return Case(layers, (1 + blocks // 2,), x, y, steps=5)


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


def _in_a_row(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _in_a_row(child)
    else:
        yield module
