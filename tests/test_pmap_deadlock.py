"""Ranks that wait for each other in different collectives are told so, long before the deadline."""

from __future__ import annotations

import time

import pytest
import torch

import taskgrad as tg
from conftest import wait_until
from helpers import long, long_rows
from taskgrad.worker.deadlock import DeadlockWatch
from taskgrad.worker.mailbox import ExchangeId, Waiting
from test_pmap_failures import empty

X = torch.arange(4.0).reshape(2, 2)


def composed(fn, client):
    return tg.pmap(tg.pmap(fn, "j"), "i", client=client)


def called(fn, client):
    return tg.pmap(lambda x: tg.pmap(fn, "j")(x), "i", client=client)


def crossed(x):
    """Ranks (0, 0) and (1, 1) sum over "i" first, the others over "j"."""
    i, j = int(tg.axis_index("i")), int(tg.axis_index("j"))
    for axis in ("i", "j") if i == j else ("j", "i"):
        x = tg.psum(x, axis)
    return x


@pytest.mark.parametrize(
    ("workers", "nest", "taped"),
    [
        ("client", composed, False),
        *long_rows(
            ("client", composed, True),
            ("client", called, False),
            ("client", called, True),
            ("four", composed, False),
            ("four", composed, True),
        ),
    ],
)
def test_sums_over_two_axes_in_different_orders(request, workers, nest, taped):
    client = request.getfixturevalue(workers)
    x = X.clone().requires_grad_(taped)
    with pytest.raises(tg.CollectiveError) as raised:
        nest(crossed, client)(x)
    said = str(raised.value)
    assert "wait for each other" in said
    assert all(f"rank {rank} on worker" in said for rank in range(4))
    assert "psum" in said
    assert "as its collective number 1" in said
    del raised
    assert wait_until(lambda: empty(client))


@pytest.mark.parametrize("nest", [composed, *long(called)])
def test_ranks_that_wait_for_a_slow_one_are_let_wait(client, nest):
    """On either axis, and for one that itself waits."""

    def f(x):
        if int(tg.axis_index("i")) + int(tg.axis_index("j")) == 0:
            time.sleep(4)
        return tg.psum(tg.psum(x, "i"), "j")

    assert torch.equal(nest(f, client)(X), torch.full((2, 2), 6.0))


A, B, C = (ExchangeId(ranks, 0) for ranks in ((0, 1), (1, 2), (0, 2)))


def watch_of(waits: dict[int, Waiting], begun: set[tuple[int, ExchangeId]]) -> DeadlockWatch:
    def ask(rank, exchange):
        return None if (rank, exchange) in begun else waits.get(rank)

    return DeadlockWatch(0, ask)


def waiting(exchange: ExchangeId, *missing: int) -> Waiting:
    return Waiting("psum", 1, exchange, missing)


def test_a_cycle_is_one_if_it_is_found_twice():
    waits = {0: waiting(A, 1), 1: waiting(B, 2), 2: waiting(C, 0)}
    watch = watch_of(waits, set())
    assert watch.look() is None
    assert [rank for rank, _ in watch.look()] == [0, 1, 2]


def test_ranks_that_have_gone_on_meanwhile_are_in_no_cycle():
    waits = {0: waiting(A, 1), 1: waiting(B, 2), 2: waiting(C, 0)}
    watch = watch_of(waits, set())
    assert watch.look() is None
    waits[1] = waiting(B._replace(number=1), 2)
    assert watch.look() is None
    assert watch.look() is not None


@pytest.mark.parametrize("begun", [(1, A), (2, B), (0, C)])
def test_a_message_on_its_way_breaks_the_cycle(begun):
    waits = {0: waiting(A, 1), 1: waiting(B, 2), 2: waiting(C, 0)}
    watch = watch_of(waits, {begun})
    assert watch.look() is None
    assert watch.look() is None


def test_a_cycle_beside_this_rank_is_that_of_others():
    waits = {0: waiting(A, 1), 1: waiting(B, 2), 2: waiting(B, 1)}
    watch = watch_of(waits, set())
    assert watch.look() is None
    assert watch.look() is None
