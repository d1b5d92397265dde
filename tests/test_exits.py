"""Code of the user's that exits, or raises what is no Exception, fails its call and no more."""

from __future__ import annotations

import asyncio
import functools
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from distributed import get_worker
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import long_rows
from taskgrad.cluster.tasks import mailboxes


def in_worker() -> bool:
    try:
        get_worker()
    except ValueError:
        return False
    return True


@pytest.fixture
def survives(client):
    """Afterwards the same processes answer, and hold nothing."""
    before = client.run(os.getpid)
    yield client
    assert client.run(os.getpid) == before
    assert wait_until(lambda: not any(total_held(client).values()))
    assert wait_until(
        lambda: not any(n for m in client.run(mailboxes).values() for n in m.values())
    )


def caught(call, match="SystemExit", kind=tg.LayerError, cause=SystemExit):
    with pytest.raises(kind, match=match) as raised:
        call()
    error = raised.value
    error.__traceback__ = None
    assert type(error.__cause__) is cause
    return error


class Leaves(nn.Module):
    def forward(self, x):
        if bool((x < 0).any()):
            sys.exit(3)
        return x * 2


def test_exit_in_a_layer(survives):
    chain = tg.GraphChain(nn.Sequential(nn.Identity(), Leaves()), placement=[0, 1])
    x = torch.ones(2, 2)
    error = caught(lambda: tg.collect(chain(-x)), match=r"layer '1' \(Leaves\).*SystemExit: 3")
    assert (error.layer, error.worker) == ("1", chain.placement[1].worker)
    assert error.__cause__.code == 3
    assert tg.collect(chain(x)).tolist() == [[2.0, 2.0], [2.0, 2.0]]


EXITS = [
    (SystemExit, "bye"),
    (KeyboardInterrupt,),
    (GeneratorExit,),
    (asyncio.CancelledError,),
    (BaseException, "mine"),
    (BaseExceptionGroup, "two", [SystemExit(1), ValueError(2)]),
]


KINDS = [(kind, args) for kind, *args in EXITS]


@pytest.mark.parametrize(("kind", "args"), [*KINDS[:2], *long_rows(*KINDS[2:])])
def test_what_is_no_exception_is_an_error_of_its_call(survives, kind, args):
    def raises(i):
        raise kind(*args)

    calls = {
        "spawn": lambda: tg.collect(tg.spawn(raises, torch.ones(1))),
        "map": lambda: tg.map(raises, range(4)),
        "imap": lambda: list(tg.imap(raises, range(4))),
        "pmap": lambda: tg.pmap(_but_rank_0(raises), "i")(torch.ones(2)),
    }
    if kind is not KeyboardInterrupt:  # which is Ctrl-C, in the main thread
        calls["threads"] = lambda: tg.map(raises, range(1), over="threads")
    for name, call in calls.items():
        raised = caught(call, match=f"raised {kind.__name__}", cause=kind)
        assert ("item 0 of the map" in str(raised)) == (name in ("map", "imap", "threads"))
    caught(lambda: tg.map(raises, range(4), over="threads"), "raised", cause=kind)


def _but_rank_0(raises):
    """All other ranks raise while rank 0 waits for them."""

    def rank(x):
        return tg.psum(x, "i") if tg.axis_index("i") == 0 else raises(1)

    return rank


@pytest.mark.parametrize("error", [StopIteration(1), StopAsyncIteration(1)])
def test_the_end_of_an_iterator_in_a_layer(survives, error):
    def raises(x):
        if x:
            raise error

    caught(lambda: tg.collect(tg.spawn(raises, 1)), "raised Stop", cause=type(error))
    match = f"item 1 of the map of 'raises', .* raised {type(error).__name__}: 1"
    for maps in (
        functools.partial(tg.map, over="processes"),
        functools.partial(tg.map, over="threads"),
        tg.imap,
        functools.partial(tg.imap, unordered=True, chunksize=1),
    ):
        # A consumer that is an iterator: what it calls must not raise StopIteration.
        consumer = map(lambda _, maps=maps: list(maps(raises, range(2))), range(1))
        caught(lambda consumer=consumer: list(consumer), match, cause=type(error))


class Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        sys.exit(4)


class Backs(nn.Module):
    def forward(self, x):
        return Back.apply(x)


def test_exit_in_a_backward(survives):
    x = torch.ones(2, requires_grad=True)
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), Backs()), placement=[0, 1])

    def hooked(x):
        x = x * 2
        x.register_hook(lambda g: sys.exit(4))
        return x.sum()

    for call in (
        lambda: chain(torch.ones(1, 2)).backward(torch.ones(1, 2)),
        lambda: tg.collect(tg.spawn(Backs(), x)).sum().backward(),
        lambda: tg.spawn(hooked, x).backward(),
        lambda: sum(tg.map(lambda i: Back.apply(i * x).sum(), [1, 2], eager_grad=False)).backward(),
        lambda: sum(tg.map(lambda i: Back.apply(i * x).sum(), [1, 2], over="threads")).backward(),
        lambda: tg.pmap(lambda i: Back.apply(i * x), "i")(torch.ones(2)).sum().backward(),
    ):
        error = caught(call, "the backward of .* raised SystemExit: 4")
        assert error.__cause__.code == 4
    eager = functools.partial(tg.map, lambda i: Back.apply(i * x).sum(), [1, 2], eager_grad=True)
    caught(eager, "SystemExit: 4")


class Exits:
    """Exits in the process of a worker when it is pickled, or unpickled, or both."""

    def __init__(self, *when):
        self.when = when

    def __getstate__(self):
        if "pickled" in self.when and in_worker():
            sys.exit(5)
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)
        if "unpickled" in self.when and in_worker():
            sys.exit(6)


def test_exit_where_a_value_is_pickled_or_unpickled(survives):
    given, gives = Exits("unpickled"), Exits("pickled")
    takes = functools.partial(lambda exits, x: x, given)
    ones = torch.ones(2)
    for call in (
        lambda: tg.collect(tg.spawn(torch.is_tensor, given)),
        lambda: tg.collect(tg.spawn(lambda: gives)),
        lambda: tg.map(id, [given, given]),
        lambda: tg.map(lambda i: gives, [1, 2]),
        lambda: list(tg.imap(lambda i: gives, [1, 2])),
        lambda: tg.pmap(takes, "i")(ones),
        lambda: tg.pmap(lambda x: gives, "i")(ones),
    ):
        caught(call)
    with pytest.raises(tg.TaskgradError, match="cannot be unpickled.*SystemExit: 6"):
        list(tg.imap(takes, [1, 2]))
    with pytest.raises(tg.TravelError, match="cannot be unpickled.*SystemExit: 6"):
        list(tg.imap(id, [given, given]))


class Unreadable:
    def __init__(self, error):
        self.error = error

    def __setstate__(self, state):
        raise state["error"]


@pytest.mark.parametrize("error", [SystemExit(7), ValueError("no")], ids=["exit", "error"])
def test_a_result_that_cannot_be_unpickled_is_refused_by_its_task(survives, error):
    """Another worker that asks for it would wait for ever."""

    def gives(x):
        return {"part": Unreadable(error), "x": x}

    made = tg.spawn(gives, torch.ones(2), worker=0)
    match = f"raises when it is unpickled.*{type(error).__name__}"
    caught(lambda: tg.collect(tg.spawn(len, made, worker=1)), match, tg.TravelError, type(error))
    caught(lambda: tg.map(gives, [1, 2]), match, tg.TravelError, type(error))
    with pytest.raises(tg.TravelError, match=f"cannot be unpickled here.*{type(error).__name__}"):
        list(tg.imap(gives, [1, 2]))


class Unset(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))

    def reset_parameters(self):
        sys.exit(8)

    def forward(self, x):
        return x


class Unloads(nn.Module):
    def __setstate__(self, state):
        super().__setstate__(state)
        if in_worker():
            sys.exit(8)

    def forward(self, x):
        return x


class Reads(nn.Linear):
    def state_dict(self, *args, **kwargs):
        if in_worker():
            sys.exit(8)
        return super().state_dict(*args, **kwargs)


def test_exit_where_a_model_is_made_or_read(survives):
    caught(lambda: tg.GraphChain(lambda: nn.Sequential(Unset(), nn.Linear(2, 2))), "SystemExit: 8")
    caught(lambda: tg.GraphChain(nn.Sequential(nn.Linear(2, 2), Unloads())), "SystemExit: 8")
    chain = tg.GraphChain(nn.Sequential(Reads(2, 2)))
    caught(chain.state_dict, "SystemExit: 8")
    assert tg.collect(chain(torch.ones(1, 2))).shape == (1, 2)


def exits_in_worker(*args):
    if in_worker():
        sys.exit(9)


class BadStep(torch.optim.SGD):
    def step(self, closure=None):
        exits_in_worker()
        return super().step(closure)


class BadInit(torch.optim.SGD):
    def __init__(self, *args, **kwargs):
        exits_in_worker()
        super().__init__(*args, **kwargs)


class BadSchedule(torch.optim.lr_scheduler.StepLR):
    steps = 0

    def step(self, *args):
        self.steps += 1
        if self.steps > 1:
            exits_in_worker()
        super().step(*args)


SGD = functools.partial(torch.optim.SGD, lr=0.1)


def exiting_loss(output, target):
    sys.exit(9)


@pytest.mark.parametrize(
    ("optimizer", "loss", "scheduler"),
    [
        (functools.partial(BadStep, lr=0.1), F.mse_loss, None),
        (functools.partial(BadInit, lr=0.1), F.mse_loss, None),
        (SGD, exiting_loss, None),
        (SGD, F.mse_loss, functools.partial(BadSchedule, step_size=1)),
    ],
    ids=["step", "optimizer", "loss", "scheduler"],
)
def test_exit_in_what_trains(survives, optimizer, loss, scheduler):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), placement=[0, 1])
    x, y = torch.ones(4, 2), torch.zeros(4, 1)

    def step():
        tg.Trainer(chain, loss, optimizer, lr_scheduler=scheduler).step(x, y).item()

    error = caught(step, "SystemExit.*: 9")
    assert error.__cause__.code == 9
    assert tg.Trainer(chain, F.mse_loss, SGD).step(x, y).item() >= 0  # the chain is usable


def test_exit_in_a_metric(survives):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), placement=[0, 1])
    batch = torch.ones(4, 2), torch.zeros(4, 1)
    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    caught(lambda: trainer.evaluate([batch], {"m": exits_in_worker}), "SystemExit: 9")
    assert trainer.step(*batch).item() >= 0


def test_exit_on_workers_that_are_threads_of_this_process(fresh):
    client = fresh(n_workers=2, processes=False)
    with client.as_current():
        chain = tg.GraphChain(nn.Sequential(nn.Identity(), Leaves()), placement=[0, 1])
        caught(lambda: tg.collect(chain(-torch.ones(2))), "SystemExit: 3")
        assert tg.collect(chain(torch.ones(2))).tolist() == [2.0, 2.0]
        caught(lambda: tg.map(sys.exit, [1, 2]), "SystemExit: 1")
        caught(lambda: list(tg.imap(sys.exit, [1, 2])), "SystemExit: 1")
        raises = _but_rank_0(sys.exit)
        caught(lambda: tg.pmap(raises, "i")(torch.ones(2)), "SystemExit: 1")
        chain = None
        assert wait_until(lambda: not any(total_held(client).values()))
