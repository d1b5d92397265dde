"""Comparing chains with plain torch, where hooks and attributes have a say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from helpers import assert_same


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert_same(ours[name], value, name)


def assert_backward_equals_torch(
    make: Callable[[], nn.Module], x: torch.Tensor, *, placement: Any, repeat: int = 1
) -> None:
    """Gradients of `Thunk.backward`, of a collected value and of `vjp`; state, and module back."""
    plain, chain = make(), tg.GraphChain(make(), placement=placement)
    for _ in range(repeat):
        plain(x).square().sum().backward()
        tg.spawn(torch.sum, torch.square(chain(x))).backward()
        assert_same_grads(chain, plain)
    assert_same_state(chain.state_dict(), plain.state_dict())
    assert_same_state(chain.to_module().state_dict(), plain.state_dict())

    plain, chain = make(), tg.GraphChain(make(), placement=placement)
    tg.collect(chain(x)).sum().backward()
    plain(x).sum().backward()
    assert_same_grads(chain, plain)

    plain, chain = make(), tg.GraphChain(make(), placement=placement)
    out = plain(x)
    grads, _ = tg.vjp(chain, x)[1](torch.ones_like(out))
    named = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(out.sum(), list(named.values()))
    for (name, grad), theirs in zip(tg.collect(grads).items(), expected, strict=True):
        assert_same(grad, theirs, name)


def assert_same_grads(chain: tg.GraphChain, plain: nn.Module) -> None:
    """Accumulated gradients, bit for bit."""
    found = tg.collect(chain.grads())
    assert list(found) == [n for n, p in plain.named_parameters() if p.requires_grad]
    for name, grad in found.items():
        theirs = plain.get_parameter(name).grad
        assert_same(*(g.to_dense() if g is not None else None for g in (grad, theirs)), name)


def assert_trains_as_torch(
    make: Callable[[], nn.Module],
    x: torch.Tensor,
    optimizer: Callable[..., torch.optim.Optimizer],
    *,
    placement: Any,
) -> None:
    """Two steps of a `Trainer` with two microbatches and clipping."""
    plain, chain = make().train(), tg.GraphChain(make(), placement=placement)
    target = torch.ones_like(make()(x))
    trainer = tg.Trainer(chain, F.mse_loss, optimizer, microbatches=2, clip_norm=1.0)
    theirs = optimizer(plain.parameters())
    for _ in range(2):
        for part, wanted in zip(x.tensor_split(2), target.tensor_split(2), strict=True):
            (F.mse_loss(plain(part), wanted) * (len(part) / len(x))).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step(), theirs.zero_grad()
        trainer.step(x, target)
    trainer.wait()
    assert_same_state(chain.state_dict(), plain.state_dict())
