"""Large results that a worker publishes are read by others of its host, and not asked for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster, Worker
from torch.utils import _pytree as pytree

from conftest import wait_until
from leasing import (
    THERE,
    acquaint,
    borrowed,
    equal,
    make,
    needs_call,
    needs_others,
    pass_one,
    readers,
    use,
)
from taskgrad.cluster.wire import process_memory, result_table
from taskgrad.cluster.wire.peers import PeerRegistry
from taskgrad.cluster.wire.result_table import ResultTable, lookup

COUNT = 200_000  # floats: 0.8 MB


def nested(seed: int) -> Any:
    return make(seed, COUNT), None, [make(seed + 1, COUNT), make(seed + 2, 3)]


def small(seed: int) -> torch.Tensor:
    return make(seed, 3)


def same_values(a: Any, b: Any) -> bool:
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    pairs = zip(leaves, others, strict=True)
    return spec == other_spec and all(x is y is None or torch.equal(x, y) for x, y in pairs)


def equals(value: Any, seed: int, maker: Callable[[int], Any]) -> bool:
    return same_values(value, maker(seed))


def equal_and_small(t: torch.Tensor, seed: int, small: int) -> bool:
    return equal(t, seed) and small == seed


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Client, list[str]]]:
    """Two worker processes that can read each other, and know it."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        _, (a, b) = use(client)
        acquaint(client, a, b)
        acquaint(client, b, a)
        yield client, [a, b]


def published(client: Client, worker: str) -> list[Any]:
    def look(dask_worker: Worker) -> list[Any]:
        return list(result_table._tables[dask_worker]._entries)

    found: list[Any] = client.run(look, workers=[worker])[worker]
    return found


def publish(client: Client, worker: str, function: Any, *arguments: Any) -> Any:
    """A result that a worker has published."""
    future = client.submit(function, *arguments, workers=[worker], pure=False)
    assert wait_until(lambda: future.key in published(client, worker))
    return future


def asked(client: Client, worker: str) -> int:
    """How often this worker was asked for results."""

    def look(dask_worker: Worker) -> int:
        return int(dask_worker.transfer_outgoing_count_total)

    return int(client.run(look, workers=[worker])[worker])


@needs_others
@pytest.mark.parametrize("maker", [make, nested, small])
def test_what_is_published_is_read_and_not_asked_for(pair, maker):
    client, (a, b) = pair
    before = asked(client, a), borrowed(client)[b]
    for seed in range(3):
        there = publish(client, a, maker, seed)
        assert client.submit(equals, there, seed, maker, workers=[b], pure=False).result(30)
    large = sum(t.nbytes for t in pytree.tree_leaves(maker(0)) if t is not None and t.numel() > 3)
    assert (asked(client, a), borrowed(client)[b]) == (before[0], before[1] + 3 * large)


@needs_others
def test_what_else_a_task_takes_is_asked_for(pair):
    client, (a, b) = pair
    before = asked(client, a)
    small = client.submit(int, 7, workers=[a], pure=False)
    large = publish(client, a, make, 7)
    taken = client.submit(equal_and_small, large, 7, small, workers=[b], pure=False)
    assert taken.result(timeout=200)
    assert asked(client, a) == before + 1
    assert small.key not in published(client, a)


@needs_others
def test_workers_get_to_know_each_other_by_small_tensors():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        _, (a, b) = use(client)
        assert pass_one(client, a, b, 1, small)
        assert wait_until(lambda: readers(client, a) == [b])
        before = asked(client, a)
        there = publish(client, a, small, 2)
        assert client.submit(equals, there, 2, small, workers=[b], pure=False).result(timeout=200)
        assert asked(client, a) == before


@needs_others
def test_what_is_released_is_in_no_table(pair):
    client, (a, _) = pair
    key = publish(client, a, make, 1).key
    assert wait_until(lambda: key not in published(client, a))


@needs_others
def test_what_came_from_another_worker_is_not_published(pair):
    client, (a, b) = pair
    there = publish(client, a, make, 1)
    assert client.submit(equal, there, 1, workers=[b], pure=False).result(timeout=200)
    assert set(client.who_has(there)[there.key]) == {a, b}
    assert there.key not in published(client, b)


# From here on the reader is the process itself: to its own memory it can do anything in between.


class Nobody:
    """A table looks at its worker only when it is told of a task."""


NOBODY = Nobody()


def make_table() -> ResultTable:
    return ResultTable(NOBODY, set())


def values() -> dict[str, torch.Tensor]:
    return {"x": make(1, COUNT), "y": make(2, COUNT)}


@pytest.fixture
def filled() -> tuple[ResultTable, dict[str, torch.Tensor]]:
    """A table, and what is in it."""
    found, in_it = make_table(), values()
    for key, value in in_it.items():
        found.publish(key, value)
    return found, in_it


@needs_call
def test_a_reader_finds_values_of_its_own(filled):
    found, in_it = filled
    got = lookup(found.location, ["x", "elsewhere", "y"])
    assert list(got) == ["x", "y"]
    assert all(torch.equal(got[key], in_it[key]) for key in in_it)
    in_it["x"].zero_()
    assert torch.equal(got["x"], make(1, COUNT))


@needs_call
def test_a_tensor_that_dies_is_found_no_more(filled):
    found, in_it = filled
    del in_it["x"]
    assert list(lookup(found.location, ["x", "y"])) == ["y"]


@needs_call
def test_a_part_that_dies_takes_the_whole_away():
    found, parts = make_table(), [make(1, COUNT), make(2, COUNT)]
    found.publish("x", parts)
    assert same_values(lookup(found.location, ["x"])["x"], parts)
    parts.pop()
    assert lookup(found.location, ["x"]) == {}


@needs_call
def test_a_key_that_is_made_again_has_its_new_value(filled):
    found, in_it = filled
    new = make(3, COUNT)
    found.publish("x", new)
    assert torch.equal(lookup(found.location, ["x"])["x"], new)
    found.publish("x", 3)  # not of those that are published; and the old value is not it
    assert list(lookup(found.location, list(in_it))) == ["y"]


@needs_call
def test_the_oldest_makes_room(filled):
    found, in_it = filled
    more = {i: make(i, COUNT // 2) for i in range(result_table.SLOTS - 1)}
    for key, value in more.items():
        found.publish(key, value)
    assert list(lookup(found.location, ["x", "y", *more])) == ["y", *more]
    found.close()
    assert lookup(found.location, ["y", *more]) == {}
    for key, value in in_it.items():
        found.publish(key, value)
    assert list(lookup(found.location, list(in_it))) == list(in_it)


@pytest.mark.parametrize(
    "value",
    [
        None,
        torch.nn.Parameter(make(1, COUNT)),
        make(1, COUNT).requires_grad_(),
        make(1, 2 * COUNT).view(-1, 2)[:, 0],
        {"x": make(1, COUNT)},
        [make(1, 3) for _ in range(65)],
        [make(1, COUNT), "a word"],
        make(1, COUNT).to_sparse(),
        torch.ones(COUNT, device="meta"),
        3,
    ],
    ids=["none", "parameter", "leaf", "strided", "dict", "many", "mixed", "sparse", "meta", "int"],
)
def test_what_is_not_published(value):
    found = make_table()
    found.publish("x", value)
    assert not found._entries


@needs_call
@pytest.mark.parametrize("reads", [1, 2, 3, 4])
def test_what_dies_while_it_is_read_is_not_taken(filled, monkeypatch, reads):
    """The table, an item, its token, its tensor, the token again: after any of these."""
    found, in_it = filled
    stock, count = process_memory.read, 0

    def read(pid, pieces):
        nonlocal count
        stock(pid, pieces)
        count += 1
        if count == reads:
            del in_it["x"]

    monkeypatch.setattr(process_memory, "read", read)
    assert lookup(found.location, ["x"]) == {}
    assert "x" not in in_it


@needs_call
def test_records_that_are_half_written_lead_to_nothing(filled):
    found, _ = filled
    size = result_table._RECORD.size
    slots = [found._entries[key].slot * size for key in ("x", "y")]
    (x, y) = (list(result_table._RECORD.unpack_from(found._table, at)) for at in slots)
    result_table._RECORD.pack_into(found._table, slots[0], *x[:2], *y[2:])
    assert list(lookup(found.location, ["x", "y"])) == ["y"]
    result_table._RECORD.pack_into(found._table, slots[0], x[0], bytes(16), *x[2:])
    assert list(lookup(found.location, ["x", "y"])) == ["y"]
    result_table._RECORD.pack_into(found._table, slots[0], *x[:2], 8, 100)  # no memory at all
    assert list(lookup(found.location, ["x", "y"])) == ["y"]


@needs_call
def test_a_table_that_is_gone_is_forgotten(filled):
    found, _ = filled
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    registry = PeerRegistry("tcp://127.0.0.1:3")
    registry.tables[THERE] = found.location._replace(pid=ended.pid)
    assert result_table.lookup_at(registry, THERE, ["x"]) == {}
    assert registry.tables == {}
    registry.tables[THERE] = tuple(found.location)
    assert list(result_table.lookup_at(registry, THERE, ["x"])) == ["x"]


def test_a_worker_that_is_too_busy_for_the_rest_is_asked_for_all_of_it_again(monkeypatch):
    """Dask takes such an answer for all that it wanted, so it has to be one."""
    asked_for = []

    async def busy(rpc, keys, worker, *, who=None):
        asked_for.append(keys)
        return {"status": "busy"}

    monkeypatch.setattr(result_table.peers, "registry_at", lambda address: address)
    monkeypatch.setattr(result_table, "lookup_at", lambda registry, worker, keys: {"x": 1})
    gather = result_table._wrap_gather(busy)
    answer = asyncio.run(gather(None, ["x", "y"], "there", who="here"))
    assert (answer, asked_for) == ({"status": "busy"}, [["y"]])
