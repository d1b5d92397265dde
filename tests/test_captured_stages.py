"""The stages of a model's graph on workers, against plain torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn
from torch.optim import AdamW
from torch.utils._pytree import register_pytree_node

import taskgrad as tg
from beside import assert_same_grads, assert_same_state
from captured import Plain, captured_chain, graph_of
from helpers import assert_same, long
from taskgrad.graph.adjoint import adjoint
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Element
from taskgrad.graph.pytree import flatten


class Rows(nn.Module):
    """Layers `l0`, `l1` and so on, for forwards that are given apart."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"l{i}", layer)


def linears(count: int, size: int = 6) -> Rows:
    torch.manual_seed(0)
    return Rows(*(nn.Linear(size, size) for _ in range(count)))


def skip(g: Plain, x: torch.Tensor) -> Any:
    """The value of layer 0 is used by the stages of layers 1 and 2."""
    a = g.layer("l0", x)
    b = g.layer("l1", g.function(torch.relu, a))
    c = g.layer("l2", g.function(torch.add, b, a))
    return g.layer("l3", c)


def towers(g: Plain, x: torch.Tensor) -> Any:
    a = g.layer("l1", g.layer("l0", x))
    b = g.layer("l3", g.layer("l2", g.function(torch.sin, x)))
    return {"sum": g.function(torch.add, a, b), "towers": [a, (b, 3)]}


def used_twice(g: Plain, x: torch.Tensor) -> Any:
    """The value of layer 0 is used in four stages, in each of them several times."""
    a = g.layer("l0", x)
    b = g.layer("l1", a)
    c = g.layer("l2", g.function(torch.mul, g.function(torch.mul, b, a), a))
    d = g.layer("l3", g.function(torch.mul, g.function(torch.sub, c, a), a))
    return g.function(torch.mul, g.function(torch.add, d, a), a)


def with_parameter(g: Plain, x: torch.Tensor) -> Any:
    """The weight of layer 0 is used on both workers, by functions."""
    weight = g.read("l0", "weight")
    a = g.layer("l1", g.function(F.linear, g.layer("l0", x), weight))
    return g.layer("l2", g.function(F.linear, a, g.function(torch.sin, weight)))


def without_grad(g: Plain, x: torch.Tensor) -> Any:
    a = g.layer("l0", x)
    with torch.no_grad():
        scale = g.layer("l1", g.function(torch.sigmoid, a))
    return g.function(torch.mul, g.layer("l2", a), scale)


def in_place(g: Plain, x: torch.Tensor) -> Any:
    a = g.layer("l0", x)
    b = g.function(torch.mul, a, 2.0)
    view = g.function(torch.narrow, b, 1, 0, 2)
    g.function(torch.Tensor.mul_, view, 3.0)
    g.together(b, view)
    return g.layer("l2", g.layer("l1", b))


FORWARDS = [skip, towers, used_twice, with_parameter, without_grad, in_place]


def scalar(output: Any) -> torch.Tensor:
    leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, torch.Tensor)]
    return torch.stack([leaf.square().sum() for leaf in leaves]).sum()


@pytest.mark.parametrize("forward", FORWARDS)
def test_values_and_gradients_are_those_of_plain_torch(client: Client, forward: Any) -> None:
    model, x = linears(4), torch.randn(3, 6, requires_grad=True)
    chain = captured_chain(model, forward, [0, 1, 0, 1])
    ours = tg.collect(chain(x))
    theirs = forward(Plain(model), x)
    (a, structure), (b, expected) = flatten(ours), flatten(theirs)
    assert structure == expected
    for mine, plain in zip(a, b, strict=True):
        if isinstance(plain, torch.Tensor):
            assert_same(mine.detach(), plain.detach())
        else:
            assert mine == plain
    scalar(ours).backward()
    gx = x.grad
    x.grad = None
    scalar(theirs).backward()
    assert_same(gx, x.grad)
    used = {n for n, p in model.named_parameters() if p.grad is not None}
    found = tg.collect(chain.grads())
    for name, parameter in model.named_parameters():
        assert (found[name] is not None) == (name in used)
        if name in used:
            assert_same(found[name], parameter.grad, name)
    with torch.no_grad():
        again = tg.collect(chain.eval()(x.detach()))
    assert_same(flatten(again)[0][0], flatten(theirs)[0][0].detach())


@pytest.mark.long
@pytest.mark.parametrize("forward", FORWARDS)
def test_three_workers(four: Client, forward: Any) -> None:
    with four.as_current():
        model, x = linears(4), torch.randn(3, 6)
        chain = captured_chain(
            model, forward, [0, 0, 0, 0] if forward is in_place else [0, 1, 2, 1]
        )
        tg.spawn(scalar, chain(x)).backward()
        scalar(forward(Plain(model), x)).backward()
        found = tg.collect(chain.grads())
        for name, parameter in model.named_parameters():
            assert_same(found[name], parameter.grad, name)


def trained(
    model: nn.Module,
    forward: Any,
    placement: list[int],
    *,
    batches: Any = None,
    starts: frozenset[int] = frozenset(),
    **options: Any,
) -> tuple[tg.GraphChain, tg.Trainer]:
    """A chain after three steps, whose state is that of plain torch."""
    torch.manual_seed(1)
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    model.train()
    chain = captured_chain(model, forward, placement, x[:2], starts=starts)
    make = partial(AdamW, lr=0.05)
    trainer = tg.Trainer(chain, F.mse_loss, make, microbatches=4, clip_norm=1.0, **options)
    plain = copy.deepcopy(model)
    theirs = make(plain.parameters())
    for number in range(3):
        trainer.step(x, y)
        for m, (part, wanted) in enumerate(zip(x.chunk(4), y.chunk(4), strict=True)):
            with torch.autocast("cpu", torch.bfloat16, enabled="amp" in options):
                loss = F.mse_loss(forward(Plain(plain, (0, number, m)), part), wanted)
            (loss / 4).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step(), theirs.zero_grad()
    trainer.wait()
    assert_same_state(chain.state_dict(), plain.state_dict())
    return chain, trainer


def dropping(count: int) -> Rows:
    torch.manual_seed(0)
    return Rows(*(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2)) for _ in range(count)))


def dropped(g: Plain, x: torch.Tensor) -> Any:
    """Layers and functions that draw random numbers; layer 1 is called twice."""
    a = g.layer("l0", x)
    b = g.layer("l1", g.function(F.dropout, a, 0.3))
    c = g.function(torch.add, g.layer("l2", b), a)
    return g.function(torch.add, g.layer("l1", g.function(F.dropout, c, 0.3)), b)


def dropped_once(g: Plain, x: torch.Tensor) -> Any:
    """No layer is called twice: under autocast plain torch would cast its weight once for both."""
    a = g.layer("l0", x)
    b = g.layer("l1", g.function(F.dropout, a, 0.3))
    return g.function(torch.add, g.layer("l2", b), a)


@pytest.mark.parametrize("options", [{}, *long({"checkpoint": "always"}, {"schedule": "zb_h1"})])
def test_steps_are_those_of_plain_torch(
    client: Client, executor: str, options: dict[str, Any]
) -> None:
    _, trainer = trained(dropping(3), dropped, [0, 1, 0], **options)
    assert len(trainer.plan.stages) == 4
    assert [stage.inputs for stage in trainer.plan.stages] == [(), (0,), (1, 0), (2, 1)]


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"amp": "bf16"}, {"checkpoint": lambda name: name == "l1"}, {"compile": True}]
)
def test_steps_with_other_options(client: Client, executor: str, options: dict[str, Any]) -> None:
    if "compile" in options:  # its kernels need not give torch's own bits
        torch.manual_seed(1)
        x = torch.randn(8, 6)
        chain = captured_chain(linears(4), skip, [0, 1, 0, 1], x[:2])
        trainer = tg.Trainer(chain, F.mse_loss, AdamW, microbatches=2, **options)
        losses = [float(trainer.step(x, x)) for _ in range(3)]
        assert losses[-1] < losses[0]
    else:
        forward = dropped_once if "amp" in options else dropped
        trained(dropping(3), forward, [0, 1, 0], **options)


@pytest.mark.long
@pytest.mark.parametrize("forward", [used_twice, with_parameter, without_grad])
def test_steps_of_other_graphs(client: Client, executor: str, forward: Any) -> None:
    trained(linears(4), forward, [0, 1, 0, 1])


@pytest.mark.parametrize("order", ["l0 l1 l2", "l2 l1 l0"])
def test_a_parameter_that_is_tied_over_two_workers(
    client: Client, executor: str, order: str
) -> None:
    """It lives where layer 0 is, which comes first or last in the model's forward."""
    model = linears(3)
    model.l2.weight = model.l0.weight

    def forward(g: Plain, x: torch.Tensor) -> Any:
        for name in order.split():
            x = g.layer(name, x)
        return x

    trained(model, forward, [0, 0, 1])


def normed(g: Plain, x: torch.Tensor) -> Any:
    return g.layer("l2", g.layer("l1", g.layer("l0", x)))


def test_deferred_batch_norm(client: Client) -> None:
    torch.manual_seed(0)
    model, x = Rows(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)), torch.randn(8, 6)
    chain = captured_chain(model, normed, [0, 0, 1], x[:4])
    trainer = tg.Trainer(chain, F.mse_loss, AdamW, microbatches=2, deferred_batch_norm=True)
    trainer.step(x, x)
    trainer.wait()
    normed(Plain(model.train()), x)
    ours, theirs = chain.state_dict(), model.state_dict()
    torch.testing.assert_close(ours["l1.running_mean"], theirs["l1.running_mean"])
    torch.testing.assert_close(ours["l1.running_var"], theirs["l1.running_var"])


def test_only_what_is_needed_travels(client: Client) -> None:
    chain = captured_chain(linears(4), without_grad, [0, 1, 0, 1])
    first, second, third = chain.layout.calls((torch.randn(3, 6),), {}, mode=True)
    a, scale = third.inputs
    assert isinstance(a, Element)
    assert isinstance(scale, Element)
    assert (a.source, scale.source) == (first, second)
    assert third.spec.needs_grad == (True, False)
    assert not second.tape.wanted
    found = adjoint([(third, Leaf(torch.ones(3, 6)))])
    assert [pullback.call for pullback in found.pullbacks] == [third, first]


def test_an_error_names_the_layer_and_its_frames(client: Client) -> None:
    def forward(g: Plain, x: torch.Tensor) -> Any:
        a = g.layer("l1", g.layer("l0", x))
        return g.function(torch.add, a, g.function(checked, a))

    chain = captured_chain(linears(2), forward, [0, 1])
    assert tg.collect(chain(torch.randn(3, 6))).shape == (3, 6)
    # The graph was made with other numbers of the same shape.
    with pytest.raises(tg.LayerError, match=r"'checked_1' \(checked\) on worker .*no number") as e:
        tg.collect(chain(torch.full((3, 6), torch.nan)))
    assert "in checked" in str(e.value)


def checked(x: torch.Tensor) -> torch.Tensor:
    if x.isnan().any():
        raise ValueError("no number")
    return x * 1


def test_a_result_that_is_another_than_expected(client: Client) -> None:
    model = linears(2)

    def forward(g: Plain, x: torch.Tensor) -> Any:
        return g.layer("l1", g.layer("l0", x))

    chain = captured_chain(model, forward, [0, 1], expected=True)
    assert tg.collect(chain(torch.randn(2, 6))).shape == (2, 6)
    with pytest.raises(tg.LayerError, match=r"'l0'.*gave \[3, 6\], and \[2, 6\].*keep_together="):
        tg.collect(chain(torch.randn(3, 6)))


def test_arguments_that_a_call_writes_into(client: Client) -> None:
    """A layer adds to a list that it is given: the values in it are those of later steps."""

    class Appending(nn.Linear):
        def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
            cache.append(x * 2)
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Rows(Appending(6, 6), Appending(6, 6)), torch.randn(3, 6)

    def forward(g: Plain, x: torch.Tensor) -> Any:
        cache: list[torch.Tensor] = []
        y = g.layer("l1", g.layer("l0", x, cache), cache)
        return {"y": y, "cache": cache}

    chain = captured_chain(model, forward, [0, 1])
    ours, theirs = tg.collect(chain(x)), forward(Plain(model), x)
    for mine, plain in zip(flatten(ours)[0], flatten(theirs)[0], strict=True):
        assert_same(mine.detach(), plain.detach())
    scalar(ours).backward(), scalar(theirs).backward()
    assert_same_grads(chain, model)


@dataclass
class Sparse:
    """Leaves out what is None when it is taken apart, as outputs of transformers do."""

    first: Any = None
    second: Any = None


register_pytree_node(
    Sparse,
    lambda s: (
        [v for v in vars(s).values() if v is not None],
        [k for k, v in vars(s).items() if v is not None],
    ),
    lambda values, names: Sparse(**dict(zip(names, values, strict=True))),
)


def doubled(x: torch.Tensor) -> Sparse:
    return Sparse(x * 2, x * 3)


def test_a_part_of_an_output_that_leaves_out_none_gets_no_cotangent(client: Client) -> None:
    x = torch.ones(2, requires_grad=True)
    tg.collect(tg.spawn(doubled, x)).first.sum().backward()
    assert_same(x.grad, torch.full((2,), 2.0))


def test_a_chain_is_drawn_as_the_graph_of_its_model(client: Client) -> None:
    chain = captured_chain(linears(4), skip, [0, 1, 0, 1])
    with pytest.raises(tg.TaskgradError, match="was not followed yet"):
        chain.draw()
    assert "<svg" not in chain._repr_html_()
    chain(torch.randn(3, 6))
    found = chain.graph()
    at = [about["stage"] for node, about in found.nodes(data=True) if isinstance(node, int)]
    assert at == [0, 0, 1, 1, 2, 3]
    assert [t.get_text() for t in chain.draw().axes[0].texts][1] == "l0\nLinear"
    assert "<svg" in chain._repr_html_()
    assert chain.draw()._repr_png_().startswith(b"\x89PNG")
    plain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert len(plain.draw().axes[0].texts) == 2
    with pytest.raises(tg.TaskgradError, match=r"draw\(\) shows"):
        plain.graph()


def test_other_stages_than_the_plan_has_are_an_error(client: Client) -> None:
    def forward(g: Plain, x: torch.Tensor) -> Any:
        return g.layer("l1", g.layer("l0", x)) if len(x) == 2 else g.layer("l0", g.layer("l1", x))

    x = torch.randn(8, 6)
    chain = captured_chain(linears(2), forward, [0, 1], x[:2])
    trainer = tg.Trainer(chain, F.mse_loss, AdamW, microbatches=4)
    trainer.step(x, x)
    with pytest.raises(tg.TaskgradError, match="takes another way .* keep_together="):
        trainer.step(x[:4], x[:4])


def test_the_calls_of_a_graph_that_was_seen_are_made_of_what_is_kept(client: Client) -> None:
    x = torch.randn(3, 6)
    chain = captured_chain(linears(4), skip, [0, 1, 0, 1])
    first, second = (chain.layout.calls((x,), {}, mode=True) for _ in range(2))
    assert all(a.spec.segment is b.spec.segment for a, b in zip(first, second, strict=True))


def test_a_thunk_of_several_stages_is_shown(client: Client) -> None:
    chain = captured_chain(linears(4), skip, [0, 1, 0, 1])
    y = chain(torch.randn(3, 6))
    assert repr(y).startswith("Thunk[6](Linear, ")
    assert "l3" in y._repr_html_()
    assert len(graph_of(linears(4), skip, torch.randn(3, 6)).steps) == 6
