"""Comparing with plain torch; parameters that are marked."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from distributed import Client, Future
from torch import nn

import taskgrad as tg
from taskgrad.cluster.session import session
from taskgrad.cluster.worker_plugin import NAME
from taskgrad.executors import rank_groups, rank_links
from taskgrad.executors.registry import executor_of


def long(*values: Any) -> list[Any]:
    """Values of a parameter whose tests take long."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def long_rows(*rows: tuple[Any, ...]) -> list[Any]:
    """The same for several parameters at once."""
    return [pytest.param(*row, marks=pytest.mark.long) for row in rows]


def end_rank_programs(client: Client) -> None:
    """End what earlier calls of `tg.pmap` have left for later ones; then nothing refers to it."""
    rank_groups._groups.pop(client, None)
    rank_links._links.pop(client, None)
    gc.collect()


def known_to_scheduler(client: Client) -> set[str]:
    """Keys of tasks, but for those that run programs, and what it knows that workers hold."""

    def keys(dask_scheduler: Any) -> set[str]:
        plugin = dask_scheduler.plugins.get(NAME)
        held = () if plugin is None else plugin._held.values()
        return {str(key) for key in dask_scheduler.tasks}.union(*held)

    found: set[str] = client.run_on_scheduler(keys)
    return {key for key in found if not key.startswith(("pmap-", "train-"))}


def reference(model: nn.Module, *xs: torch.Tensor, cotangent: Any = None) -> tuple[Any, dict, list]:
    """Output, parameter gradients and input gradients of plain torch; the model is not changed."""
    model = copy.deepcopy(model)
    model.zero_grad()
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in xs]
    out = model(*leaves)
    out.backward(torch.ones_like(out) if cotangent is None else cotangent)
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return out.detach(), grads, [x.grad for x in leaves]


def assert_same(ours: Any, theirs: Any, what: str = "") -> None:
    """Bit for bit."""
    if theirs is None or ours is None:
        assert ours is None, what
        assert theirs is None, what
        return
    assert ours.dtype == theirs.dtype, what
    assert torch.equal(ours, theirs), f"{what}: differs by {(ours - theirs).abs().max()}"


def assert_vjp_equals_torch(chain: tg.GraphChain, model: nn.Module, *xs: torch.Tensor) -> None:
    """Output, parameter gradients, input gradients and buffers of a chain: plain torch's bits."""
    out, grads, input_grads = reference(model, *xs)
    y, back = tg.vjp(chain, *xs)
    ours, *gxs = back(torch.ones_like(out))
    value, ours, gxs = tg.collect((y, ours, gxs))
    assert_same(value.detach(), out, "output")
    assert set(ours) == set(grads)
    for name, grad in grads.items():
        assert_same(ours[name], grad, name)
    for gx, theirs in zip(gxs, input_grads, strict=True):
        assert_same(gx, theirs, "input")


def future_of(node: Any, client: Client) -> Future:
    """The future that keeps what came of a node, or the layers of a shard."""
    return executor_of(session(client)).table.futures[node]
