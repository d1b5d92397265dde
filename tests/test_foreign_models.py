"""Models of other libraries over several workers, beside the same models in plain torch.

All operations are the same, and so are the bits of outputs and buffers. Where a value is used in
several stages the sum of its gradients is taken in another order than torch has it, as each stage
adds up its own first; so gradients may be rounded in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distributed import Client
from torch import nn

import taskgrad as tg
from foreign_models import MODELS, Arguments, made
from taskgrad.graph.pytree import flatten

ROUNDING = 1e-6
"""How far gradients may be apart, relative to the largest of a parameter's or of any's at all."""


def rows(quick: bool) -> list[Any]:
    return [
        pytest.param(name, marks=() if quick and found.quick else pytest.mark.long)
        for name, found in MODELS.items()
    ]


@pytest.mark.parametrize("name", rows(quick=True))
def test_two_workers(client: Client, name: str) -> None:
    model, calls = made(name)
    count = len(tg.GraphChain(model, **MODELS[name].options))
    half = max(1, count // 2)
    placement = [0] * half + [1] * (count - half)
    check(tg.GraphChain(model, placement=placement, **MODELS[name].options), model, calls)


@pytest.mark.parametrize("name", rows(quick=False))
def test_three_workers(four: Client, name: str) -> None:
    model, calls = made(name)
    options: dict[str, Any] = {**MODELS[name].options, "example_inputs": calls[0], "client": four}
    count = len(tg.GraphChain(model, **options))
    placement = [3 * layer // count for layer in range(count)]
    check(tg.GraphChain(model, placement=placement, **options), model, calls)


@pytest.mark.long
def test_hooks_for_old_names_leave_a_model_cut(client: Client) -> None:
    model, _ = made("mamba")
    assert "backbone.layers.1" in [row.layer for row in tg.GraphChain(model).placement]


def test_a_model_in_one_layer_captures_its_outputs_on_its_worker(client: Client) -> None:
    """transformers knows which outputs there are where a model was constructed: not there."""
    model, [(_, given), _] = made("gpt2")
    asked = {**given, "output_hidden_states": True}
    chain = tg.GraphChain(Hidden(model), keep_together="model")
    ours = tg.collect(chain(**asked))
    theirs = model(**asked).hidden_states
    assert len(ours) == len(theirs) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> Any:
        return self.model(**given).hidden_states


def check(chain: tg.GraphChain, model: nn.Module, calls: Sequence[Arguments]) -> None:
    """Compare outputs, gradients and buffers of all calls in both modes, and what comes back."""
    assert len(chain.layout.shards) > 1
    for training in (False, True):
        model.train(training)
        chain.train(training)
        for args, kwargs in calls:
            expected = model(*args, **kwargs)
            given = tg.collect(chain(*args, **kwargs))
            compare_outputs(given, expected)
            model.zero_grad()
            chain.zero_grad()
            objective(expected, expected).backward()
            objective(given, expected).backward()
            compare_gradients(chain, model)
    back = chain.to_module()
    assert type(back) is type(model)
    assert list(back.state_dict()) == list(model.state_dict())
    ours, theirs = dict(back.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys()
    for key, buffer in theirs.items():
        same_bits(ours[key], buffer)
    for (key, parameter), own in zip(back.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, own), key
        assert parameter.requires_grad == own.requires_grad, key


def objective(output: Any, expected: Any) -> torch.Tensor:
    """Depends on all that a gradient reaches."""
    both = zip(tensors(output), tensors(expected), strict=True)
    parts = [ours.square().sum() for ours, theirs in both if theirs.requires_grad]
    return torch.stack(parts).sum()


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(output)[0] if isinstance(leaf, torch.Tensor)]


def compare_outputs(given: Any, expected: Any) -> None:
    assert type(given) is type(expected)
    ours, theirs = flatten(given), flatten(expected)
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        if not isinstance(b, torch.Tensor):
            assert a == b
            continue
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        assert a.requires_grad >= b.requires_grad
        same_bits(a.detach(), b.detach())


def compare_gradients(chain: tg.GraphChain, model: nn.Module) -> None:
    """None or zeros are the same gradient. A tied parameter has one under its first name."""
    found = tg.collect(chain.grads())
    names = dict(model.named_parameters())
    assert found.keys() == {name for name, p in names.items() if p.requires_grad}
    largest = max((p.grad.abs().max() for p in names.values() if p.grad is not None), default=0.0)
    for name, ours in found.items():
        theirs = names[name].grad
        if ours is None or theirs is None:
            other = ours if theirs is None else theirs
            assert other is None or not other.any(), name
        else:
            assert torch.isfinite(theirs).all(), name
            torch.testing.assert_close(
                *(ours, theirs),
                rtol=0,
                atol=ROUNDING * float(max(theirs.abs().max(), largest)),
                msg=lambda text, name=name: f"gradient of {name}: {text}",
            )


def same_bits(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)
