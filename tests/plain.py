"""What a Trainer has to equal: plain torch in one process, the same microbatches in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.worker.shard import ResidentShard


class ConvNet(nn.Sequential):
    """Convolutions, batch norm, dropout; takes (n, 1, 8, 8)."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.1), nn.Linear(512, 10)),
        )


class Embed(nn.Module):
    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.1)

    def forward(self, x):
        return F.dropout(self.token(x) + self.place[: x.shape[1]], 0.1, self.training)


class Block(nn.Module):
    """Causal attention and a feed-forward part; draws in several places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        h = self.before(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + F.dropout(self.inner(self.between(x)), 0.1, self.training)


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return F.linear(x, self.weight)


def transformer(*, tied: bool = False) -> nn.Sequential:
    """A small language model of tokens (n, 6) below 11; with `tied`, first and last layer share."""
    torch.manual_seed(0)
    embed = Embed(11, 8, 6)
    head = Head(embed.token.weight if tied else nn.Parameter(torch.randn(11, 8) * 0.1))
    return nn.Sequential(embed, Block(8), Block(8), head)


def next_token(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), tokens.flatten())


def images(steps: int, size: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 1, 8, 8), torch.randint(10, (size,))) for _ in range(steps)]


def tokens(steps: int, size: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    found = [torch.randint(11, (size, 7)) for _ in range(steps)]
    return [(t[:, :-1], t[:, 1:]) for t in found]


class PlainTrainer:
    """The loop that a user of plain torch would write; `train` gives its losses."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., torch.Tensor],
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        microbatches: int = 1,
        lr_scheduler: Callable[..., Any] | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        scaler: Any = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.model = model.to(device).train()
        self.device = torch.device(device)
        self.loss_fn = loss_fn
        self.optimizer = optimizer(model.parameters())
        self.scheduler = lr_scheduler(self.optimizer) if lr_scheduler else None
        self.microbatches = microbatches
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.autocast = autocast
        self.scaler = scaler
        self.draw = [seed, 0, 0]
        self.steps = 0
        for name, layer in model.named_children():
            _draw_from_streams(layer, name, self.draw)

    def train(self, batches: list[Any]) -> list[float]:
        return [self._step(x, y) for x, y in batches]

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        total = 0.0
        pieces = zip(
            x.tensor_split(self.microbatches), y.tensor_split(self.microbatches), strict=True
        )
        for m, (part, target) in enumerate(pieces):
            self.draw[1:] = [self.steps, m]
            part, target = part.to(self.device), target.to(self.device)
            dtype = self.autocast or torch.bfloat16
            region = torch.autocast(self.device.type, dtype, bool(self.autocast))
            with region:
                loss = self.loss_fn(self.model(part), target)
            weight = len(part) / len(x)
            weighted = loss * (weight / self.accumulate)
            (self.scaler.scale(weighted) if self.scaler else weighted).backward()
            total = total + loss.detach() * weight
        self.steps += 1
        if self.steps % self.accumulate == 0:
            self._update()
        return float(total)

    def _update(self) -> None:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.optimizer.zero_grad()


def _draw_from_streams(layer: nn.Module, name: str, draw: list[int]) -> None:
    forward = layer.forward

    def drawn(*args: Any, **kwargs: Any) -> Any:
        with tg.random_stream(draw[0], draw[1], draw[2], name):
            return forward(*args, **kwargs)

    layer.forward = drawn  # type: ignore[method-assign]


def assert_same_training(chain: tg.GraphChain, plain: PlainTrainer, client: Any) -> None:
    """Parameters, buffers and optimizer state, bit for bit."""
    ours, theirs = chain.state_dict(), plain.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.cpu()), name
    kept = optimizer_state(client, chain)
    for name, parameter in plain.model.named_parameters():
        expected = plain.optimizer.state.get(parameter, {})
        assert kept.get(name, {}).keys() == expected.keys(), name
        for key, value in expected.items():
            found, wanted = torch.as_tensor(kept[name][key]), torch.as_tensor(value)
            assert torch.equal(found.cpu(), wanted.cpu()), (name, key)


def optimizer_state(client: Any, chain: tg.GraphChain) -> dict[str, dict[str, Any]]:
    """What the chain's optimizers keep on the workers, by parameter."""
    tokens = {stage.token for stage in chain.layout.shards}
    found: dict[str, dict[str, Any]] = {}
    for states in client.run(_optimizer_state, tokens).values():
        found |= states
    return found


def _optimizer_state(tokens: set[str], dask_worker: Any) -> dict[str, dict[str, Any]]:
    return {
        name: dict(stage.optimizer.state[stage.parameters[name]])
        for token, stage in store_of(dask_worker).entries().items()
        if token in tokens and isinstance(stage, ResidentShard) and stage.optimizer is not None
        for name in stage.parameters
        if stage.parameters[name] in stage.optimizer.state
    }
