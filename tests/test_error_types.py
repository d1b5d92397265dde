"""Errors come home as their own type, with what was chained to them, whatever they are."""

from __future__ import annotations

import functools
import pickle
import sys
import threading
import traceback

import dask
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from taskgrad.remote_errors import RemoteError, dumps, loads


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one, self.two = one, two


class Locked(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()
        self.code = 7


class Lies(Exception):
    def __reduce__(self):
        return ValueError, ("a lie",)


class ExitsWhenLoaded(Exception):
    def __reduce__(self):
        return sys.exit, (1,)


class NoText(Exception):
    def __str__(self):
        raise ValueError("no text")


class Slots(Exception):
    __slots__ = ("code",)

    def __init__(self, code):
        super().__init__("slots")
        self.code = code


def recurse(n=0):
    return recurse(n + 1)


MAKERS = {
    "plain": lambda: KeyError("k"),
    "long": lambda: ValueError("x" * 100_000),
    "longer than an error may be": lambda: ValueError("x" * 5_000_000),
    "no strings": lambda: ValueError(1, [2], None),
    "file": lambda: FileNotFoundError(2, "no", "/a/b"),
    "needs arguments": lambda: NeedsTwo(1, 2),
    "cannot be pickled": lambda: Locked("locked"),
    "pickled as another": lambda: Lies("the truth"),
    "exits when loaded": lambda: ExitsWhenLoaded("here"),
    "without text": lambda: NoText(),
    "slots": lambda: Slots(3),
    "group": lambda: ExceptionGroup("two", [ValueError(1), NeedsTwo(3, 4)]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_cause_is_what_the_layer_raised(client, name):
    make = MAKERS[name]

    def raises(x):
        raise make()

    with pytest.raises(tg.LayerError, match="raised") as raised:
        tg.collect(tg.spawn(raises, torch.ones(1)))
    error, expected = raised.value, make()
    assert len(str(error)) < 10_000
    assert type(error.__cause__) is type(expected)
    assert "in raises" in "".join(traceback.format_tb(error.__cause__.__traceback__))
    if name == "without text":
        return
    if len(str(expected)) < 1_000_000:
        assert str(error.__cause__) == str(expected)
    else:
        assert str(error.__cause__).startswith("xxx")
    for attribute in ("one", "two", "code", "filename"):
        if hasattr(expected, attribute):
            assert getattr(error.__cause__, attribute) == getattr(expected, attribute)


@pytest.mark.parametrize("call", ["spawn", "chain", "step", "map", "imap", "pmap", "dask"])
@pytest.mark.parametrize("name", ["recursion", "long", "cannot be pickled"])
def test_every_call_raises_our_own_type(client, call, name):
    def f(x):
        if name == "recursion":
            recurse()
        raise MAKERS[name]()

    class Layer(nn.Linear):
        def forward(self, x):
            return f(x)

    x, sgd = torch.ones(2, 2), functools.partial(torch.optim.SGD, lr=0.1)
    makes = lambda: tg.GraphChain(nn.Sequential(nn.Linear(2, 2), Layer(2, 2)), placement=[0, 1])  # noqa: E731
    calls = {
        "spawn": lambda: tg.collect(tg.spawn(f, x)),
        "chain": lambda: tg.collect(makes()(x)),
        "step": lambda: tg.Trainer(makes(), F.mse_loss, sgd).step(x, x).item(),
        "map": lambda: tg.map(f, [1, 2]),
        "imap": lambda: list(tg.imap(f, [1, 2])),
        "pmap": lambda: tg.pmap(f, "i")(x),
        "dask": lambda: dask.compute(tg.spawn(f, x)),
    }
    own = {"recursion": RecursionError, "long": ValueError, "cannot be pickled": Locked}[name]
    with pytest.raises((tg.TaskgradError, own)) as raised:
        calls[call]()
    error = raised.value
    if call not in ("map", "imap"):
        assert type(error) is tg.LayerError
        assert len(str(error)) < 10_000
        error = error.__cause__
    elif name == "cannot be pickled":  # an item's own type means the item's own error, whole
        assert type(error) is tg.TravelError
        error = error.__cause__
    assert type(error) is own
    if own is Locked:
        assert error.code == 7
        assert "lock" in error.lock  # its text


def raises_in_context():
    error = ValueError("outer")
    error.add_note("a note")
    error.batch, error.large = torch.arange(3), torch.zeros(10_000_000)
    try:
        raise KeyError("inner")
    except KeyError:
        raise error  # noqa: B904


def raises_from_none():
    try:
        raise KeyError("inner")
    except KeyError:
        raise ValueError("outer") from None


@pytest.mark.parametrize("over", ["processes", "streaming"])
def test_notes_context_and_attributes_are_kept(client, over):
    run = tg.map if over == "processes" else lambda *a: list(tg.imap(*a))
    with pytest.raises(ValueError, match="outer") as raised:
        run(lambda i: raises_in_context(), [1, 2])
    error = raised.value
    assert error.__notes__[0] == "a note"
    assert repr(error.__context__) == "KeyError('inner')"
    assert error.__suppress_context__ is False
    assert error.batch.tolist() == [0, 1, 2]
    assert error.large == "a tensor of torch.float32 [10000000]"
    with pytest.raises(ValueError, match="outer") as raised:
        run(lambda i: raises_from_none(), [1, 2])
    assert raised.value.__suppress_context__ is True
    assert repr(raised.value.__context__) == "KeyError('inner')"


def test_a_long_error_of_ours(client):
    """A cotangent of another structure, described in full."""
    y = tg.spawn(lambda x: x * 2, torch.ones(2, requires_grad=True))
    with pytest.raises(tg.CotangentError, match="another structure") as raised:
        y.backward(tg.spawn(lambda: [torch.ones(2)] * 3000))
    assert len(str(raised.value)) < 10_000


def test_a_layer_with_a_long_name(client):
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError

    model = nn.Sequential()
    model.add_module("n" * 20_000, Fails())
    with pytest.raises(tg.LayerError) as raised:
        tg.collect(tg.GraphChain(model)(torch.ones(1)))
    assert len(str(raised.value)) < 10_000
    assert raised.value.layer == "n" * 20_000


def travelled(error):
    again = pickle.loads(pickle.dumps(RemoteError(error)))
    assert type(again) is type(loads(dumps(error)))
    return again


def test_chains_of_errors():
    one, two = ValueError(1), KeyError(2)
    one.__cause__, two.__cause__ = two, one
    again = travelled(one)
    assert again.__cause__.__cause__ is again

    first = error = ValueError(0)
    for i in range(1, 5000):
        error.__context__ = ValueError(i)
        error = error.__context__
    again, count = travelled(first), 0
    while again is not None:
        again, count = again.__context__, count + 1
    assert 10 < count < 1000

    group = ExceptionGroup("g", [ExceptionGroup("h", [ValueError(1)]), NeedsTwo(1, 2)])
    group.exceptions[1].__cause__ = OSError(5, "five")
    again = travelled(group)
    assert again.exceptions[1].two == 2
    assert again.exceptions[1].__cause__.errno == 5
    assert type(again.exceptions[0].exceptions[0]) is ValueError

    nested = tg.LayerError("outer", "1", "tcp://a", tg.LayerError("inner", "2", "b", Locked("l")))
    again = travelled(nested)
    assert (again.layer, again.__cause__.layer) == ("1", "2")
    assert again.__cause__.__cause__.code == 7

    error = ValueError("itself")
    error.args = (error,)
    assert isinstance(travelled(error), tg.TravelError)


def test_a_layer_error_can_be_pickled_as_always():
    error = tg.LayerError("message", "1", "tcp://a", KeyError("k"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.layer, again.worker) == ("message", "1", "tcp://a")
    assert repr(again.__cause__) == "KeyError('k')"
