"""Any object that can be pickled may stand between two stages, with its tensors' gradients."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import threading
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import taskgrad as tg
from helpers import assert_same


class Padded:
    """Features and which of them count: neither a dataclass nor a tuple."""

    def __init__(self, features, mask):
        self.features = features
        self.mask = mask


class Slotted:
    __slots__ = ("__weakref__", "a", "b")

    def __init__(self, a, b):
        self.a, self.b = a, b


class Checked(NamedTuple("Checked", [("a", Any), ("b", Any)])):
    """A named tuple with rules of its own."""

    def __new__(cls, a, b):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
            raise TypeError("tensors only")
        made = super().__new__(cls, a, b)
        made.total = a.sum() + b.sum()
        return made


@dataclasses.dataclass
class Derived:
    a: Any
    scale: dataclasses.InitVar[float] = 2.0
    b: Any = dataclasses.field(init=False)
    unset: Any = dataclasses.field(init=False)

    def __post_init__(self, scale):
        self.b = self.a * scale
        self.beside = self.a.exp()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    a: Any
    b: Any = None


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As the outputs of transformers: fields that are items as well."""

    a: Any = None
    b: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self[field.name] = getattr(self, field.name)


class Sequence(list):
    pass


class Mapping(dict):
    pass


class Stateful:
    """Says itself what is pickled, in another order than it has it."""

    def __init__(self, a, b):
        if a.dim() < 1:
            raise ValueError("no number")
        self.a, self.b = a, b

    def __reduce__(self):
        return Stateful, (self.a, self.b), {"note": "again"}

    def __setstate__(self, state):
        self.b, self.a = self.b, self.a
        self.__dict__.update(state)


class Node:
    """A cycle, and one tensor twice."""

    def __init__(self, a, b):
        self.me = self
        self.parts = {"a": a, "again": a, "views": (b, None)}
        self.kind = Colour.red


class Colour(enum.Enum):
    red = 1


class Shifted(torch.Tensor):
    pass


def ordered(a, b):
    return collections.OrderedDict(b=b, a=a)


def with_array(a, b):
    array = np.empty(2, object)
    array[0], array[1] = a, b
    return array


def with_history(a, b):
    held = types.SimpleNamespace(a=a, b=b, history=collections.deque([a, b], maxlen=2))
    held.user = collections.UserDict(a=a)
    held.ends = slice(1, 2), torch.Size([3]), Colour.red, None, a.dtype
    return held


def with_module(a, b):
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(torch.eye(3))
    linear.bias = None
    return types.SimpleNamespace(linear=linear, a=a, b=b)


# How a stage packs two tensors, and how the next one gets at them.
KINDS = {
    "object": (Padded, lambda v: (v.features, v.mask)),
    "slots": (Slotted, lambda v: (v.a, v.b)),
    "named tuple with rules": (Checked, lambda v: (v.a + v.total, v.b)),
    "derived": (lambda a, b: Derived(a * b), lambda v: (v.a + v.beside, v.b)),
    "frozen": (lambda a, b: Frozen(a=a, b=b), lambda v: (v.a, v.b)),
    "model output": (Output, lambda v: (v["a"] + v.a, v.b)),
    "list": (lambda a, b: Sequence([a, b]), lambda v: (v[0], v[1])),
    "dict": (lambda a, b: Mapping(a=a, b=b), lambda v: (v["a"], v["b"])),
    "ordered dict": (ordered, lambda v: (v["a"], v["b"])),
    "default dict": (
        lambda a, b: collections.defaultdict(list, a=a, b=[b]),
        lambda v: (v["a"], v["b"][0]),
    ),
    "user dict": (lambda a, b: collections.UserDict(a=a, b=b), lambda v: (v["a"], v["b"])),
    "deque": (lambda a, b: collections.deque([a, b], 2), lambda v: (v[0], v[1])),
    "namespace": (with_history, lambda v: (v.a + v.history[0], v.b + v.user["a"])),
    "own pickle": (Stateful, lambda v: (v.a, v.b)),
    "cycle": (Node, lambda v: (v.me.parts["a"] + v.parts["again"], v.parts["views"][0])),
    "object array": (with_array, lambda v: (v[0], v[1])),
    "partial": (
        lambda a, b: functools.partial(torch.add, a, alpha=2),
        lambda v: (v(v.args[0]), v.args[0]),
    ),
    "closure": (lambda a, b: lambda c: a * c + b, lambda v: (v(2.0), v(3.0))),
    "method": (lambda a, b: Padded(a, b).__eq__, lambda v: (v.__self__.features, v.__self__.mask)),
    "values": (lambda a, b: {"a": a, "b": b}.values(), lambda v: tuple(v)),
    "one in a set": (lambda a, b: {a * b}, lambda v: (next(iter(v)), next(iter(v)) + 1)),
    "distribution": (
        lambda a, b: torch.distributions.Normal(a, b.exp()),
        lambda v: (v.loc, v.scale.log()),
    ),
    "module": (with_module, lambda v: (v.linear(v.a), v.b)),
    "nested": (
        lambda a, b: {"x": [Padded((a, Slotted(b, 1)), None)]},
        lambda v: (v["x"][0].features[0], v["x"][0].features[1].a),
    ),
    "views": (lambda a, b: Padded(a, b[:, 1:]), lambda v: (v.features, F.pad(v.mask, (1, 0)))),
    "complex": (
        lambda a, b: Padded(torch.complex(a, b), a.long()),
        lambda v: (v.features.real * v.mask, v.features.imag),
    ),
    "sparse": (
        lambda a, b: Padded(a.to_sparse(), b),
        lambda v: (v.features.to_dense(), v.mask),
    ),
}


class Give(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)
        self.pack = pack

    def forward(self, x):
        return self.pack(self.one(x), self.two(x))


class Take(nn.Module):
    def __init__(self, unpack):
        super().__init__()
        self.three = nn.Linear(3, 2)
        self.unpack = unpack

    def forward(self, value):
        a, b = self.unpack(value)
        return (self.three(a) * (3 * self.three(b))).sum()


def model(kind):
    torch.manual_seed(0)
    pack, unpack = KINDS[kind]
    return nn.Sequential(Give(pack), Take(unpack))


def gradients(kind, x):
    plain = model(kind)
    plain(x).backward()
    return {name: p.grad for name, p in plain.named_parameters()}


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(5, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_a_value_between_two_stages(client, x, kind):
    chain = tg.GraphChain(model(kind), placement=[0, 1])
    chain(x).backward()
    found = tg.collect(chain.grads())
    for name, grad in gradients(kind, x).items():
        assert_same(found[name], grad, name)


def pack_on_worker(kind, a, b):
    return KINDS[kind][0](a, b)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"closure"}))
def test_gradients_flow_through_a_value_that_comes_home_or_goes_out(client, x, kind):
    """Made by a call and used on the driver; made on the driver and used by a call."""
    pack, unpack = KINDS[kind]
    a, b = x[:, :3].clone().requires_grad_(), x[:, 1:].clone().requires_grad_()
    first, second = unpack(pack(a * 2, b))
    expected = torch.autograd.grad((first * second * second).sum(), (a, b), allow_unused=True)

    value = tg.collect(tg.spawn(pack_on_worker, kind, a * 2, b))
    first, second = unpack(value)
    found = torch.autograd.grad((first * second * second).sum(), (a, b), allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, "home")

    def use(value):
        first, second = unpack(value)
        return (first * second * second).sum()

    loss = tg.collect(tg.spawn(use, pack(a * 2, b)))
    found = torch.autograd.grad(loss, (a, b), allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, "out")


class Pack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)

    def forward(self, batch):
        embedded = self.embedding(batch["tokens"])
        return pack_padded_sequence(
            embedded, batch["lengths"], batch_first=True, enforce_sorted=False
        )


class Pool(nn.Module):
    def forward(self, inputs):
        packed, (h, c) = inputs
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        return padded.sum(1) / lengths[:, None] + torch.cat([h[0], c[1]], 1)


def test_packed_sequences_cross_workers_with_their_gradients(client):
    torch.manual_seed(0)
    plain = nn.Sequential(Pack(), nn.LSTM(6, 5, batch_first=True, bidirectional=True), Pool())
    batch = {"tokens": torch.randint(12, (4, 7)), "lengths": torch.tensor([3, 7, 1, 5])}
    chain = tg.GraphChain(plain, placement=[0, 1, 0])
    plain(batch).square().sum().backward()
    tg.spawn(torch.sum, chain(batch).__pow__(2)).backward()
    found = tg.collect(chain.grads())
    for name, p in plain.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-6), name


class Hides:
    """Its pickle leaves a tensor out."""

    def __init__(self, a, b):
        self.a, self.cache = a, b

    def __getstate__(self):
        return {"a": self.a, "cache": None}


class Detaches(Hides):
    def __getstate__(self):
        return {"a": self.a, "cache": self.cache.detach()}


class Locked:
    def __init__(self, a, b):
        self.a, self.lock = (a, b), threading.Lock()


REFUSED = {
    "hides": (Hides, "Hides holds a tensor that requires grad (.cache) which its pickle leaves"),
    "detaches": (Detaches, "Detaches holds a tensor that requires grad (.cache) which its pickle"),
    "lock": (Locked, "Locked holds a tensor that requires grad (.a[0]), and cannot be pickled"),
    "set": (lambda a, b: {a + 0, b + 0}, "set has 2 tensors that require grad in a set"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_lose_gradients_is_refused_by_name(client, x, kind):
    make, words = REFUSED[kind]
    torch.manual_seed(0)
    chain = tg.GraphChain(nn.Sequential(Give(make), nn.Identity()), placement=[0, 1])
    with pytest.raises(tg.LayerError) as raised:
        tg.collect(chain(x))
    assert words in str(raised.value)
    assert any(advice in str(raised.value) for advice in ("register_pytree_node", "Use a list"))
    a = x[:, :3].clone().requires_grad_()
    for call in (tg.spawn, lambda *given: tg.map(given[0], [given[1]])):
        with pytest.raises(tg.TravelError) as refused:
            call(id, make(a * 1, a * 2))
        assert words in str(refused.value)


def test_a_value_that_is_nested_too_deeply_is_refused(client, x):
    def nested(value, depth):
        for _ in range(depth):
            value = [value]
        return value

    def innermost(value):
        while isinstance(value, list):
            [value] = value
        return value

    assert_same(tg.collect(tg.spawn(innermost, nested(x, 200))), x)
    assert_same(innermost(tg.collect(tg.spawn(nested, x, 200))), x)
    for call in (tg.spawn, lambda fn, value: tg.map(fn, [value])):
        with pytest.raises(tg.TravelError, match="is nested too deeply"):
            call(innermost, nested(x, 5000))
    with pytest.raises(tg.TaskgradError, match="is nested too deeply"):
        tg.collect(tg.spawn(nested, x, 5000))


def test_what_holds_no_gradient_passes_as_it_is(client, x):
    """Hidden tensors too, where none is to take a gradient."""
    hidden = tg.collect(tg.spawn(Hides, x, x))
    assert_same(hidden.a, x)
    assert hidden.cache is None
    same = {"loss": tg.spawn(torch.sum, x), "other": Locked(x, x)}
    assert tg.collect(same)["other"] is same["other"]


@pytest.mark.parametrize("over", ["processes", "threads"])
def test_items_and_results_of_a_map_carry_gradients_in_objects(client, x, over):
    a = x[:, :3].clone().requires_grad_()

    def work(item):
        return Padded(item.features * 2, item.mask)

    def run(mapped):
        results = mapped(work, [Padded(a * 3, a[:1] > 0), Padded(a.exp(), None)])
        loss = sum((r.features.square()).sum() for r in results)
        return torch.autograd.grad(loss, a)[0]

    expected = run(lambda fn, items: [fn(item) for item in items])
    assert_same(run(lambda fn, items: tg.map(fn, items, over=over)), expected)


def test_sums_of_objects_are_refused(client, x):
    with pytest.raises(TypeError, match="a result of this map is or has a .*Padded"):
        tg.map(lambda t: Padded(t, 3), x, reduce="sum", over="threads")


def test_ranks_take_and_give_objects(client, x):
    w = x[:2, :3].clone().requires_grad_()

    def rank(item, whole):
        return Padded(item.features * whole.features, tg.psum(item, "i").features)

    f = tg.pmap(rank, axis_name="i", in_axes=(0, None))
    found = f(Padded(w * 2, None), Padded(w.sum(), None))
    expected = w * 2 * w.sum(), (w * 2).sum(0).expand(2, 3)
    assert_same(found.features.detach(), expected[0].detach())
    assert_same(found.mask.detach(), expected[1].detach())
    ours = torch.autograd.grad((found.features * found.mask).sum(), w)[0]
    theirs = torch.autograd.grad((expected[0] * expected[1]).sum(), w)[0]
    assert torch.allclose(ours, theirs)


def test_cotangents_of_objects(client, x):
    torch.manual_seed(0)
    give = nn.Sequential(Give(Padded))
    y, back = tg.vjp(tg.GraphChain(give), x)
    value = tg.collect(y)
    ones = torch.ones(5, 3)
    grads, gx = tg.collect(back(Padded(ones, None)))
    value = give(x)
    value.features.backward(ones)
    assert_same(grads["0.one.weight"], give[0].one.weight.grad)
    assert grads["0.two.weight"] is None
    with pytest.raises(tg.CotangentError, match="another structure than the output"):
        back(Slotted(ones, ones))


def test_gradients_of_objects_come_as_objects(client, x):
    def double(value):
        return Stateful(value.a * 2, value.b * 3)

    made = tg.spawn(Stateful, x, x + 1)
    y, back = tg.vjp(lambda v: tg.spawn(lambda v: (v.a * v.b).sum(), v), made)
    (_, gx) = back(torch.tensor(1.0))
    found = tg.collect(gx)
    assert_same(found.a, x + 1)
    assert_same(found.b, x)


def test_a_module_among_the_arguments_takes_gradients_and_can_be_trained_there(client, x):
    model = nn.Linear(4, 1)
    loss = tg.collect(tg.spawn(lambda m, x: m(x).square().mean(), model, x))
    loss.backward()
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert_same(p.grad, grad)

    def train(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
        return model

    trained = tg.collect(tg.spawn(train, model, x))
    [again] = tg.map(train, [model], [x])
    for made in (trained, again):
        for new, p, grad in zip(made.parameters(), model.parameters(), expected, strict=True):
            assert isinstance(new, nn.Parameter)
            assert_same(new.detach(), (p - 0.1 * grad).detach())
        torch.optim.SGD(made.parameters(), lr=0.1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, batch):
        return Padded(self.linear(batch.features), batch.mask)


def masked_loss(output, target):
    return F.mse_loss(output.features * output.mask, target.features)


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_batches_outputs_and_targets_of_a_trainer_are_objects(client, x, checkpoint):
    torch.manual_seed(0)
    plain = nn.Sequential(Model(), nn.Identity())
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    chain = tg.GraphChain(plain, placement=[0, 1])
    trainer = tg.Trainer(chain, masked_loss, sgd, microbatches=2, checkpoint=checkpoint)
    x = x[:4]
    t = torch.ones(4, 1)
    trainer.step(Padded(x, x[:, :1].numpy() > 0), Padded(t, None)).item()
    optimizer = sgd(plain.parameters())
    for part, target in zip(x.tensor_split(2), t.tensor_split(2), strict=True):
        out = plain(Padded(part, part[:, :1] > 0))
        (masked_loss(out, Padded(target, None)) * 0.5).backward()
    optimizer.step()
    for name, value in chain.state_dict().items():
        assert_same(value, plain.state_dict()[name], name)
    found = trainer.evaluate([(Padded(x, x[:, :1] > 0), Padded(t, None))])
    with torch.no_grad():
        expected = masked_loss(plain(Padded(x, x[:, :1] > 0)), Padded(t, None))
    assert found["loss"] == pytest.approx(expected.item())


class Registered:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def __getstate__(self):
        raise TypeError("not by pickle")


def test_a_type_that_only_the_driver_registered(client, x):
    """Lambdas: what registers it cannot be imported."""
    pytree.register_pytree_node(
        Registered, lambda v: ([v.b, v.a], None), lambda parts, _: Registered(*list(parts)[::-1])
    )
    w = x.clone().requires_grad_()
    loss = tg.spawn(lambda v: (v.a * v.b.exp()).sum(), Registered(w * 2, w))
    tg.collect(loss).backward()
    expected = torch.autograd.grad((w * 2 * w.exp()).sum(), w)[0]
    assert torch.allclose(w.grad, expected)
