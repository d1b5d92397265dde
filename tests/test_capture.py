"""Following a model's own forward: what it finds, when it looks again, what it refuses."""

from __future__ import annotations

import dataclasses
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

import taskgrad as tg
from followed import Followed
from taskgrad.graph.activation import CannotFollowError
from taskgrad.graph.any_model import in_layers
from taskgrad.graph.layer_graph import FUNCTION


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Twice(nn.Module):
    def forward(self, x):
        return x * 2


class Stack(nn.Module):
    """Blocks in a list; `forward` is given to it, a function of the module and its arguments."""

    def __init__(self, forward, count: int = 3, **attributes) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(count)])
        self.head = nn.Linear(4, 2)
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(4)
        self.token = nn.Parameter(torch.randn(1, 4))
        self.register_buffer("scale", torch.tensor(2.0))
        for name, value in attributes.items():
            setattr(self, name, value)
        self.twice = Twice()
        self.run = forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def through(model, x):
    for block in model.blocks:
        x = block(x)
    return x


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: list
    note: str = "kept"


class Double(torch.autograd.Function):
    """A function whose gradient is not that of what it computes."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 30


def skips(model, x):
    first = model.blocks[0](x)
    second = model.blocks[1](first)
    return model.head(torch.cat([first, second], 0)[: x.shape[0]] + x)


def containers(model, x, *, twice=False, extra=None):
    hidden = [x]
    for block in model.blocks:
        hidden.append(block(hidden[-1]))
    if extra is not None:
        hidden[-1] = hidden[-1] * extra["factor"]
    if twice:
        hidden.append(model.blocks[0](hidden[-1]))
    return Output(model.head(hidden[-1]), hidden)


def own_tensors(model, x):
    return through(model, x + model.token) * model.scale, model.head.weight.sum()


def no_grad_region(model, x):
    with torch.no_grad():
        gate = torch.sigmoid(model.blocks[0](x))
    return model.head(model.blocks[1](x) * gate + x.detach())


def autocast_region(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model.blocks[0](x)
        y = y @ y.T
    return through(model, x) + y.float().sum()


def in_place(model, x):
    x = model.blocks[0](x)
    kept = model.twice(x)
    x += 1  # after a layer took it
    x[:, 0] = 3.0
    y = x.view(-1)
    y.mul_(2)  # seen through x
    return model.act(x), kept, model.norm(kept)


def shapes(model, x):
    assert isinstance(x, torch.Tensor)
    y = model.blocks[0](x)
    assert y.shape == x.shape
    assert (y.dim(), y.dtype, len(y), y.size(-1)) == (2, torch.float32, len(x), 4)
    if y.shape[0] > 3:
        y = y[:3]
    a, b = y.chunk(2, dim=-1)
    for row in y:
        a = a + row[:2]
    return model.head(torch.cat([a, b], -1)).unflatten(-1, (1, 2)).transpose(0, 1).mT.contiguous()


def autograd_function(model, x):
    return model.head(Double.apply(model.blocks[0](x)))


def checkpointed(model, x):
    for block in model.blocks[:2]:
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
    return torch.utils.checkpoint.checkpoint(model.blocks[2], x, use_reentrant=False)


def writes_own(model, x):
    """Writes activations into tensors of its own, and sees them through views."""
    y = model.blocks[0](x)
    sums = torch.zeros(4).scatter_add_(0, y.argmax(-1), x[:, 0])
    rows = torch.zeros(len(x), 4)
    rows[0] = y[0]
    first = rows[0]
    first.add_(y[1])
    padded = torch.full((6, 2), x.sum().item()).T
    inner, turned = padded[:, 1:5], padded.T
    padded[:, 2:] += y[:2]
    turned[0].copy_(y[0, :2])
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0])
    numbers += y[0]
    return model.head(rows + sums), first, inner, padded, turned, numbers, inner.sum()


def reads_attribute(model, x):
    return model.blocks[0](x * model.table) + model.table


def not_all_used(model, x):
    return model.blocks[2](x), None, 7, "text"


FORWARDS = {
    f.__name__: f
    for f in (
        *(skips, containers, own_tensors, no_grad_region, autocast_region, in_place, shapes),
        *(autograd_function, checkpointed, not_all_used, writes_own, reads_attribute),
    )
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_forwards_give_what_they_give(forward):
    followed = Followed(Stack(forward, table=torch.randn(4)))
    for mode in (True, False):
        for rows in (5, 2, 5):
            followed.check(torch.randn(rows, 4, requires_grad=forward is checkpointed), mode=mode)


def test_keyword_arguments_and_nested_inputs():
    followed = Followed(Stack(containers))
    x = torch.randn(2, 4)
    followed.check(x)
    followed.check(x, extra={"factor": torch.tensor(3.0)})
    found = followed.check(x, twice=True, extra={"factor": 2})
    assert type(found) is Output
    assert len(found.hidden) == 5
    assert len(followed.graphs) == 3
    followed.check(x, twice=True, extra={"factor": 2})
    assert len(followed.graphs) == 3
    followed.check(x, twice=True, extra={"factor": 3})  # a number is part of the graph
    assert len(followed.graphs) == 4


class Options:
    """An argument that is no container, with or without a tensor in it."""

    def __init__(self, factor, tensor=None) -> None:
        self.factor, self.tensor = factor, tensor


def test_what_is_in_an_object_among_the_arguments_is_part_of_the_graph():
    def scaled(model, x, options):
        return through(model, x) * options.factor

    x = torch.randn(2, 4)
    for tensor in (None, torch.ones(1)):
        followed, options = Followed(Stack(scaled)), Options(2.0, tensor)
        followed.check(x, options)
        followed.check(x, Options(2.0, tensor))
        assert len(followed.graphs) == 1
        options.factor = 3.0  # the same object
        followed.check(x, options)
        assert len(followed.graphs) == 2


def masked(model, ids, mask):
    """Masks from inputs, in ways that torch's own functions and vmap have."""
    x = torch.nn.functional.one_hot(ids, 4).float()
    positions = torch.arange(ids.shape[1], device=ids.device)
    causal = torch.full((len(positions),) * 2, float("-inf")).triu(1)
    causal[0, 0] = 0
    seen = torch.vmap(lambda i: mask[:, i] > 0, out_dims=1)(positions)
    if mask.all():
        return model.head(model.blocks[0](x)), None
    bias = torch.where(seen[:, None, :], causal, float("-inf"))
    lengths = mask.sum(-1).tolist()
    last = x[torch.arange(len(ids)), mask.sum(-1).long() - 1]
    return model.head(model.blocks[0](x) + bias.softmax(-1).nan_to_num() @ x), lengths, last


def test_what_depends_on_inputs_is_computed_for_each_call():
    followed = Followed(Stack(masked))
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    for ids in torch.randint(0, 4, (4, 2, 5)):
        followed.check(ids, mask)
    assert len(followed.graphs) == 1
    assert followed.find(ids, mask).graph.n_inputs < 6
    other = torch.ones(2, 5)
    for ids in torch.randint(0, 4, (3, 2, 5)):
        followed.check(ids, other)
        followed.check(ids, mask)
    assert len(followed.graphs) == 2  # as the forward went another way
    mask = mask.clone()
    mask[0, 4] = 0  # other lengths: they were read
    followed.check(ids, mask)
    assert len(followed.graphs) == 3


def test_data_that_decides_on_shapes():
    def nonzero(model, x, keep):
        return model.head(through(model, x[keep]))

    followed = Followed(Stack(nonzero))
    x = torch.randn(6, 4)
    for count in (3, 3, 4, 3, 4):
        keep = torch.zeros(6, dtype=torch.bool)
        keep[torch.randperm(6)[:count]] = True
        followed.check(x, keep)
    assert len(followed.graphs) == 2


def stateful(model, x):
    model.calls += 1
    return through(model, x) * model.calls


def cached(model, x):
    if model.mask is None or len(model.mask) != len(x):
        model.mask = torch.arange(len(x)).float()[:, None]
    return through(model, x) * model.mask


def drawing_numpy(model, x):
    return through(model, x) * float(np.random.rand())


def drawing_python(model, x):
    return through(model, x) * random.random()


def test_forwards_with_a_state_are_followed_again(caplog):
    x = torch.randn(2, 4)
    followed = Followed(Stack(stateful, calls=0))
    for _ in range(3):
        followed.check(x)
    assert len(followed.graphs) == 3
    assert not caplog.records
    for _ in range(40):
        followed.find(x)
    [said] = caplog.records
    assert "was followed 32 times" in said.getMessage()

    followed = Followed(Stack(cached, mask=None))
    for _ in range(4):
        followed.check(x)
    assert len(followed.graphs) == 2  # the second reads what the first one has kept
    followed.check(torch.randn(3, 4))
    followed.check(torch.randn(3, 4))

    for forward in (drawing_numpy, drawing_python):
        followed = Followed(Stack(forward))
        followed.find(x)
        followed.find(x)
        assert len(followed.graphs) == 2


def test_torchs_random_numbers_on_the_driver_are_drawn_again():
    def dropped(model, x):
        for block in model.blocks:
            if model.training and torch.rand([]) < 0.5:
                continue
            x = block(x)
        return x

    followed = Followed(Stack(dropped))
    x = torch.randn(2, 4)
    torch.manual_seed(1)
    steps = [len(followed.find(x, mode=True).graph.steps) for _ in range(40)]
    assert set(steps) == {0, 1, 2, 3}
    assert len(followed.graphs) <= 8
    torch.manual_seed(1)
    plain = []
    for _ in range(40):
        plain.append(sum(bool(torch.rand([]) >= 0.5) for _ in range(3)))
    assert steps == plain


def test_an_activation_that_is_kept_in_an_attribute():
    def keeps(model, x):
        last, model.last = model.last, through(model, x)
        return model.last if last is None else last + model.last

    followed = Followed(Stack(keeps, last=None))
    followed.find(torch.randn(2, 4))
    with pytest.raises(tg.TaskgradError, match="activation of an earlier call"):
        followed.find(torch.randn(2, 4))

    def overwrites(model, x):
        model.last = through(model, x)
        return model.last * 2

    followed = Followed(Stack(overwrites, last=None))
    for _ in range(4):
        followed.check(torch.randn(2, 4))
    assert len(followed.graphs) == 2


REFUSED = {
    "a value": (lambda m, x: m.head(x) if through(m, x).sum() > 0 else x, "value of an activation"),
    "numbers": (lambda m, x: torch.tensor(through(m, x).tolist()), "value of an activation"),
    "numpy": (lambda m, x: torch.from_numpy(np.exp(through(m, x).numpy())), "of an activation"),
    "a shape": (lambda m, x: through(m, x)[through(m, x) > 0], "value of an activation"),
    "a hook": (lambda m, x: (y := m.head(x), y.register_hook(print))[0], "register_hook"),
    "a buffer": (lambda m, x: (m.scale.add_(m.head(x).sum()), x)[1], "parameters or buffers"),
    "buffer": (lambda m, x: setattr(m, "scale", m.head(x).sum()) or x, "assigns to a buffer"),
    "known": (lambda m, x: x[:, :2].copy_(m.head(x)), "there before the call"),
    "dtypes": (
        lambda m, x: (y := torch.zeros(2, 2), z := y.view(torch.int32), y.copy_(m.head(x)), z + 1),
        "views of other dtypes",
    ),
    "vmap": (lambda m, x: torch.vmap(torch.sin)(m.head(x)), "other means than torch's functions"),
}


@pytest.mark.parametrize(("forward", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed(forward, why, caplog):
    model = Stack(forward)
    with pytest.raises(CannotFollowError, match=why) as caught:
        Followed(model).find(torch.randn(2, 4))
    assert "test_capture.py, line" in str(caught.value) or "buffer" in why
    if "value of" in why or "of an activation" in why:
        return  # it is known once it runs
    whole = in_layers(model, torch.randn(2, 4), None, None, 2)
    assert whole.capture is None
    assert [layer.kind for layer in whole.flat.layers] == ["Stack"]
    assert "keep_together" in caplog.text


def test_only_the_part_that_cannot_be_followed_stays_whole(caplog):
    outer = Stack(
        lambda m, x: m.bad(m.good(torch.cat([x, x], 1))),
        good=Stack(lambda m, x: through(m, x[:, :4])),
        bad=Stack(REFUSED["a hook"][0]),
    )
    with caplog.at_level(logging.WARNING):
        found = in_layers(outer, torch.randn(2, 2), None, None, 2)
    kinds = {layer.name: layer.kind for layer in found.flat.layers}
    assert kinds["bad"] == "Stack"
    assert kinds["good.blocks.0"] == "Block"
    assert list(found.whole) == ["bad"]


def test_an_error_of_the_forward_is_the_users_own():
    def wrong(model, x):
        raise KeyError("mine")

    def misfits(model, x):
        return model.head(model.blocks[0](x)[:, :3])

    with pytest.raises(KeyError, match="mine"):
        Followed(Stack(wrong)).find(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Followed(Stack(misfits)).find(torch.randn(2, 4))
    with pytest.raises(TypeError, match="example_inputs are the arguments"):
        in_layers(nn.ModuleList([Block()]).append(Block()), {"wrong": 1}, None, None, 2)


class Router(nn.Module):
    """Sends rows to experts by their values: no shapes can be inferred inside."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (x.argmax(-1) % 2 == i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return out


def test_a_layer_whose_shapes_depend_on_values_inside():
    followed = Followed(
        Stack(lambda m, x: m.head(m.router(through(m, x))), router=Router()), keep_together="router"
    )
    for rows in (6, 3):
        found = followed.find(torch.randn(rows, 4))
        followed.check(torch.randn(rows, 4))
    [step] = [s for s in found.graph.steps if s.name == "router"]
    assert step.expected is not None
    assert step.expected.shapes == ((3, 4),)


def test_the_cut():
    model = Stack(through)
    names = [layer.name for layer in in_layers(model, None, None, None, 2).flat.layers]
    assert names[:4] == ["", "blocks.0", "blocks.1", "blocks.2"]  # "" has the token
    inside = in_layers(model, None, "blocks.*.up", None, 2).flat.layers
    assert "blocks.1.down" in [layer.name for layer in inside]
    items = in_layers(model, None, "blocks.*", None, 2).flat.layers  # ".*" matches their parts, too
    assert [layer.name for layer in items] == names
    deep = in_layers(model, None, 3, None, 2).flat.layers
    assert "blocks.1.down" in [layer.name for layer in deep]
    kept = in_layers(model, None, 3, "blocks.1", 2).flat.layers
    assert {"blocks.1", "blocks.0.up"} <= {layer.name for layer in kept}
    [whole] = in_layers(model, None, None, "", 2).flat.layers
    assert whole.kind == "Stack"
    with pytest.raises(ValueError, match=r"cut='layer\.\*'.* matches no module"):
        in_layers(model, None, "layer.*", None, 2)
    with pytest.raises(ValueError, match="keep_together='wrong'.* matches no module"):
        in_layers(model, None, None, "wrong", 2)
    with pytest.raises(TypeError, match="cut= has names or patterns"):
        in_layers(model, None, [1], None, 2)
    with pytest.raises(ValueError, match="which is a part of it"):
        in_layers(model, None, ["blocks.0", "blocks.0.up"], None, 2)


def test_a_layer_that_outweighs_a_share_is_cut_further():
    model = Stack(through, big=nn.Sequential(nn.Linear(4, 400), nn.Linear(400, 4)))
    names = [layer.name for layer in in_layers(model, None, None, None, 2).flat.layers]
    assert {"big.0", "big.1"} <= set(names)
    wide = Stack(through)
    wide.blocks[1] = Block(4)
    wide.blocks[1].up, wide.blocks[1].down = nn.Linear(4, 400), nn.Linear(400, 4)
    names = [layer.name for layer in in_layers(wide, None, None, None, 2).flat.layers]
    assert {"blocks.0", "blocks.1.up", "blocks.1.down", "blocks.2"} <= set(names)


def test_layers_come_in_the_order_of_the_example():
    def backwards(model, x):
        for block in reversed(model.blocks):
            x = block(x)
        return model.head(x)

    found = in_layers(Stack(backwards), torch.randn(8, 4), None, None, 2)
    names = [layer.name for layer in found.flat.layers]
    assert names[:4] == ["blocks.2", "blocks.1", "blocks.0", "head"]
    at = names.index("blocks.0")
    assert found.flat.activations[at] > 8 * 4 * 4


def test_a_module_that_is_called_twice_or_shared():
    def twice(model, x):
        return model.blocks[1](model.blocks[0](model.blocks[0](x)))

    model = Stack(twice)
    model.blocks[2] = model.blocks[1]
    followed = Followed(model)
    followed.check(torch.randn(2, 4))
    steps = followed.find(torch.randn(2, 4)).graph.steps
    assert [s.name for s in steps] == ["blocks.0", "blocks.0 (call 2)", "blocks.1"]


def test_hooks_stay_with_their_layers():
    model = Stack(through)
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    Followed(model).check(torch.randn(2, 4))

    def observed(model, x):
        seen = []
        handle = model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
        x = through(model, x)
        handle.remove()
        return x, seen

    found = Followed(Stack(observed)).check(torch.randn(2, 4))
    assert len(found[1]) == 1

    def spies(model, x):
        seen = []
        handle = model.blocks[1].up.register_forward_hook(lambda m, a, out: seen.append(out))
        x = through(model, x)
        handle.remove()
        return x, seen

    with pytest.raises(CannotFollowError, match=r"inside of 'blocks\.1'"):
        Followed(Stack(spies)).find(torch.randn(2, 4))
    opened = Followed(Stack(spies), example_inputs=torch.randn(2, 4))
    opened.check(torch.randn(2, 4))


def test_what_leaves_a_layer_that_fails_without_values_is_found():
    """The layer runs twice while it is followed, and only the second time to its end."""

    def spies(model, x):
        seen = []
        inner = model.router.experts[0].up
        handle = inner.register_forward_hook(lambda m, a, out: seen.append(out.sum()))
        x = model.router(x)
        handle.remove()
        return model.head(x) + sum(seen)

    model = Stack(spies, router=Router())
    with pytest.raises(CannotFollowError, match=r"inside of 'router'"):
        Followed(model, keep_together="router").find(torch.randn(2, 4))


def test_a_call_that_was_seen_runs_no_forward():
    runs = []

    def counted(model, x):
        runs.append(1)
        return through(model, x)

    followed = Followed(Stack(counted, count=24))
    followed.check(torch.randn(2, 4))
    before = len(runs)
    for _ in range(3):
        followed.find(torch.randn(2, 4))
    assert len(runs) == before


def test_function_names_are_unique():
    steps = Followed(Stack(skips)).find(torch.randn(3, 4)).graph.steps
    names = [s.name for s in steps if s.layer == FUNCTION]
    assert names == ["cat", "getitem", "add"]
