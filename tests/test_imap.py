"""Streaming maps: order, windows, and what deepdish's maps get wrong."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, get_worker

import taskgrad as tg
from conftest import wait_until
from taskgrad.cluster.messages import task_messages


def double(x: Any) -> Any:
    return 2 * x


def indexed(i: int, x: Any) -> tuple[int, Any]:
    return i, 2 * x


def nothing_left(client: Client) -> bool:
    """Whether no task, no function and no receiver of any map is left."""
    return (
        not client.run_on_scheduler(_tasks)
        and not client.run_on_scheduler(_broadcast)
        and not any(client.run(_received).values())
        and not task_messages._receivers
    )


def _tasks(dask_scheduler: Any) -> list[str]:
    return [str(key) for key in dask_scheduler.tasks if "imap" in str(key)]


def _broadcast(dask_scheduler: Any) -> int:
    plugin = dask_scheduler.plugins["taskgrad-messages"]
    return len(plugin._values) + len(plugin._holders)


def _received(dask_worker: Any) -> list[str]:
    return list(task_messages.broadcast_values(dask_worker))


# What deepdish documents.


def test_twenty_doublings_in_order(client: Client) -> None:
    assert list(tg.imap(double, range(20), client=client)) == [2 * i for i in range(20)]


def test_ten_batches_through_starmap(client: Client) -> None:
    batches = [(batch,) for batch in np.array_split(np.arange(100), 10)]
    results = tg.starmap(double, batches, client=client)
    np.testing.assert_array_equal(np.concatenate(list(results)), 2 * np.arange(100))


def test_unordered_with_its_index(client: Client) -> None:
    batches = list(enumerate(np.array_split(np.arange(100), 10)))
    found = dict(tg.starmap(indexed, batches, unordered=True, client=client))
    assert sorted(found) == list(range(10))
    np.testing.assert_array_equal(np.concatenate([found[i] for i in range(10)]), 2 * np.arange(100))


# Where deepdish loses or hangs.


def test_none_is_an_item_and_a_result(client: Client) -> None:
    items = [None, 1, None, None, 2, None]
    assert list(tg.imap(lambda x: x, items, client=client)) == items
    assert list(tg.starmap(lambda x: x, [(i,) for i in items], client=client)) == items


def test_break_then_map_again(client: Client) -> None:
    for y in tg.imap(double, itertools.count(), client=client):
        if y == 10:
            break
    assert y == 10
    assert list(tg.imap(double, range(7), client=client)) == [2 * i for i in range(7)]
    assert wait_until(lambda: nothing_left(client))


def test_two_maps_zipped_on_one_worker(fresh: Any) -> None:
    one = fresh(n_workers=1)
    ups = tg.imap(lambda x: x + 1, itertools.count(), client=one)
    downs = tg.imap(lambda x: x - 1, range(300), client=one)
    pairs = list(itertools.islice(zip(ups, downs, strict=False), 300))
    assert pairs == [(i + 1, i - 1) for i in range(300)]


def fails_at_7(x: int) -> int:
    if x >= 7:
        raise KeyError(f"no {x}")
    return x


def test_an_exception_in_a_worker(client: Client) -> None:
    results = tg.imap(fails_at_7, itertools.count(), client=client)
    seen = []
    with pytest.raises(KeyError, match="no 7") as raised:
        seen.extend(results_into(seen, results))
    assert seen == list(range(7))
    where, frames = raised.value.__notes__
    assert where.startswith("This is item 7 of the map of 'fails_at_7', on worker ")
    assert "(tcp://" in where
    assert "in fails_at_7" in frames
    assert list(results) == []  # it is over
    del results
    assert list(tg.imap(double, [1, 2], client=client)) == [2, 4]
    assert wait_until(lambda: nothing_left(client))


def results_into(seen: list[Any], results: Iterator[Any]) -> list[Any]:
    for value in results:
        seen.append(value)
    return []


# The window.


def test_no_more_than_the_buffer_is_pulled_ahead(client: Client) -> None:
    pulled = 0

    def source() -> Iterator[int]:
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled

    for chunksize in ("auto", 1, 4):
        pulled = 0
        furthest = 0
        results = tg.imap(double, source(), buffersize=12, chunksize=chunksize, client=client)
        for yielded, y in enumerate(itertools.islice(results, 400), 1):
            assert y == 2 * yielded
            furthest = max(furthest, pulled - yielded)
            assert pulled - (yielded - 1) <= 12 + 1, chunksize
        assert furthest > 1, "it never pulled ahead"
        results.close()


def test_nothing_is_pulled_before_the_first_result_is_asked_for(client: Client) -> None:
    source = (i for i in [1, 2, 3])
    results = tg.imap(double, source, client=client)
    time.sleep(0.05)
    assert next(source) == 1
    assert list(results) == [4, 6]


def settled(count: Callable[[], int]) -> int:
    """What it counts once that stands still, however slow the machine."""

    def stands_still() -> bool:
        before = count()
        time.sleep(0.3)
        return count() == before

    assert wait_until(stands_still)
    return count()


def test_a_slow_consumer_stops_the_input(client: Client) -> None:
    pulled: list[int] = []
    source = (pulled.append(i) or i for i in itertools.count())
    results = tg.imap(double, source, chunksize=1, client=client)
    next(results)
    assert wait_until(lambda: len(pulled) >= 8)
    assert settled(lambda: len(pulled)) <= 17  # eight chunks a thread
    results.close()


def test_results_do_not_wait_for_an_input_that_waits_for_them(client: Client) -> None:
    """The next item is made of the last result."""
    results_so_far: list[int] = []
    there = threading.Semaphore(1)

    def source() -> Iterator[int]:
        while True:
            assert there.acquire(timeout=200)
            yield results_so_far[-1] if results_so_far else 1

    for y in tg.imap(double, source(), client=client):
        results_so_far.append(y)
        there.release()
        if y >= 2**8:
            break
    assert results_so_far == [2**i for i in range(1, 9)]


def test_a_quick_result_is_yielded_while_a_slow_one_runs(client: Client, tmp_path: Any) -> None:
    """Ordered: those before the slow one; unordered: all others."""
    gate = tmp_path / "gate"

    def wait_at_3(i: int) -> int:
        end = time.monotonic() + 20
        while i == 3 and not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return i

    results = tg.imap(wait_at_3, range(8), chunksize=1, client=client)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    gate.touch()
    assert list(results) == [3, 4, 5, 6, 7]
    gate.unlink()
    results = tg.imap(wait_at_3, range(8), chunksize=1, unordered=True, client=client)
    assert {next(results) for _ in range(7)} == {0, 1, 2, 4, 5, 6, 7}
    gate.touch()
    assert list(results) == [3]


# Inputs.


def test_several_iterables_end_with_the_shortest(client: Client) -> None:
    results = tg.imap(pow, itertools.count(1), itertools.repeat(2), range(10, 14), client=client)
    assert list(results) == [pow(i, 2, m) for i, m in zip(range(1, 5), range(10, 14), strict=True)]
    assert list(tg.imap(double, [], client=client)) == []


def test_what_the_input_raises_comes_after_the_results_before_it(client: Client) -> None:
    def source() -> Iterator[int]:
        yield from range(50)
        raise OSError("the disk is gone")

    seen: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        results_into(seen, tg.imap(double, source(), client=client))
    assert seen == [2 * i for i in range(50)]


@pytest.mark.parametrize("how", ["close", "garbage", "interrupt", "error"])
def test_the_input_is_closed_and_the_rest_cancelled(client: Client, how: str) -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    def slowly(x: int) -> int:
        time.sleep(0.001)
        if x == 40 and how == "error":
            raise ArithmeticError
        return x

    results = tg.imap(slowly, source(), client=client)
    next(results)
    if how == "close":
        results.close()
        assert closed.is_set()
    elif how == "garbage":
        del results
        gc.collect()
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            interrupted(results)
        del results
    else:
        with pytest.raises(ArithmeticError):
            list(results)
    assert closed.wait(60)
    assert wait_until(lambda: nothing_left(client))


def interrupted(results: Iterator[Any]) -> None:
    """Ctrl-C while the main thread waits for a result."""
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    for _ in results:
        pass


def test_a_cancelled_chunk_stops_between_its_items(client: Client, tmp_path: Any) -> None:
    def mark(i: int) -> int:
        if i >= 50:
            (tmp_path / str(i)).touch()
            time.sleep(0.1)
        return i

    results = tg.imap(mark, range(5000), chunksize=50, client=client)
    assert next(results) == 0
    assert wait_until(lambda: len(list(tmp_path.iterdir())) > 2)
    results.close()
    assert wait_until(lambda: nothing_left(client))
    assert settled(lambda: len(list(tmp_path.iterdir()))) < 50


# Functions.


class Counts:
    """Says how often it was unpickled in this process."""

    unpickled = 0

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size)

    def __setstate__(self, state: Any) -> None:
        Counts.unpickled += 1
        self.__dict__.update(state)


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_closure_is_sent_once_a_worker(client: Client, size: int) -> None:
    held = Counts(size)

    def look(i: int) -> tuple[str, int, float]:
        time.sleep(0.002)
        return get_worker().address, Counts.unpickled, held.data[0] + i

    client.run(lambda: setattr(Counts, "unpickled", 0))
    found = list(tg.imap(look, range(200), chunksize=5, client=client))
    assert {count for _, count, _ in found} == {1}
    assert len({address for address, _, _ in found}) == 2
    assert [value for _, _, value in found] == list(range(200))


def test_functions_that_use_torch(client: Client) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    model = torch.nn.Linear(3, 2)
    xs = [torch.full((4, 3), float(i)) for i in range(20)]
    for x, y in zip(xs, tg.imap(lambda x: x @ weight.T, xs, client=client), strict=True):
        assert torch.equal(y, x @ weight.T)
    for x, y in zip(xs, tg.imap(model, xs, client=client), strict=True):
        assert torch.equal(y, model(x).detach())
        assert not y.requires_grad
    halves = [x.bfloat16() for x in xs]
    for x, y in zip(halves, tg.imap(torch.neg, halves, client=client), strict=True):
        assert y.dtype is torch.bfloat16
        assert torch.equal(y, -x)


def test_a_map_in_a_function_of_a_map(client: Client) -> None:
    def inner(n: int) -> int:
        return sum(tg.imap(double, range(n)))

    assert list(tg.imap(inner, [2, 3, 4, 5], client=client)) == [2, 6, 12, 20]


# Items and results of every size.


@pytest.mark.parametrize("size", [100, 20_000, 300_000])
def test_an_item_is_what_it_was_when_it_was_pulled(client: Client, size: int) -> None:
    """One array, filled anew for each item; and one result, filled anew by the function."""
    again = np.zeros(size)
    kept = np.zeros(size)

    def source() -> Iterator[np.ndarray]:
        for i in range(60):
            again[:] = i
            yield again

    def work(x: np.ndarray) -> np.ndarray:
        kept[:] = x + 1
        return kept

    for i, y in enumerate(tg.imap(work, source(), client=client)):
        assert (y == i + 1).all()
        y += 1  # it is the caller's own
    assert i == 59


def test_large_items_where_memory_cannot_be_read(client: Client, monkeypatch: Any) -> None:
    """As from workers on other hosts: they go straight to a worker, and come from it."""
    monkeypatch.setattr("taskgrad.cluster.wire.process_memory.available", lambda: False)
    items = [np.full(300_000, i) for i in range(12)]
    for i, y in enumerate(tg.imap(double, items, client=client)):
        assert (y == 2 * i).all()
    assert wait_until(lambda: nothing_left(client))


def test_large_items_when_reading_fails_midway(client: Client, monkeypatch: Any) -> None:
    """The driver's memory is not what a worker finds under that address: another host."""
    monkeypatch.setattr("taskgrad.cluster.wire.leases.os.getpid", lambda: os.getppid())
    items = [np.full(300_000, i) for i in range(12)]
    for i, y in enumerate(tg.imap(double, items, client=client)):
        assert (y == 2 * i).all()


# Errors.


def test_what_cannot_travel_is_named(client: Client) -> None:
    lock = threading.Lock()
    with pytest.raises(tg.TravelError, match="function '<lambda>' cannot be sent"):
        tg.imap(lambda x: lock, [1], client=client)

    seen: list[int] = []
    with pytest.raises(tg.TravelError, match=r"item 5 of the map of 'double'.*_thread.lock"):
        results_into(seen, tg.imap(double, [0, 1, 2, 3, 4, lock, 6], client=client))
    assert seen == [0, 2, 4, 6, 8]

    seen = []
    results = tg.imap(lambda i: threading.Lock() if i == 5 else i, range(9), client=client)
    with pytest.raises(tg.TravelError, match=r"a result cannot be sent.*_thread.lock") as raised:
        results_into(seen, results)
    assert seen == [0, 1, 2, 3, 4]
    assert "item 5" in raised.value.__notes__[0]


class TwoPart(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def test_an_exception_that_cannot_travel(client: Client) -> None:
    def raises(i: int) -> None:
        raise TwoPart("one", "two")

    with pytest.raises(tg.TravelError, match="TwoPart: one") as raised:
        list(tg.imap(raises, range(3), client=client))
    assert "item 0" in raised.value.__notes__[0]


def test_stop_iteration_in_a_function_does_not_end_the_map(client: Client) -> None:
    def stops(i: int) -> int:
        return next(iter([]))

    with pytest.raises(RuntimeError, match="StopIteration") as raised:
        list(tg.imap(stops, range(3), client=client))
    assert isinstance(raised.value.__cause__, StopIteration)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda c: tg.imap(double, client=c), TypeError, "imap needs an iterable"),
        (lambda c: tg.imap(3, [1], client=c), TypeError, "imap maps a function; got int"),
        (lambda c: tg.imap(double, [1], 2, client=c), TypeError, "argument 2 .* is a int"),
        (lambda c: tg.starmap(double, 1, client=c), TypeError, "starmap: argument 1"),
        (lambda c: tg.imap(double, [1], chunksize=0, client=c), ValueError, "got 0"),
        (lambda c: tg.imap(double, [1], chunksize="big", client=c), ValueError, "got 'big'"),
        (lambda c: tg.imap(double, [1], buffersize=-1, client=c), ValueError, "buffersize"),
        (
            lambda c: tg.imap(double, [1], chunksize=5, buffersize=2, client=c),
            ValueError,
            "does not fit",
        ),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(
    client: Client, make: Any, error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        make(client)


def test_progress(client: Client, capsys: Any, monkeypatch: Any) -> None:
    assert list(tg.imap(double, range(30), progress=True, client=client))[-1] == 58
    shown = capsys.readouterr().err
    assert "double" in shown
    assert "30/30" in shown
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="needs tqdm: pip install tqdm"):
        tg.imap(double, range(30), progress=True, client=client)


def test_arrays_and_tensors_of_every_kind_come_as_they_went(client: Client) -> None:
    arrays = [
        *(np.arange(6).astype(d).reshape(2, 3) for d in ("f2", "f4", ">f8", "i1", "u8", "?", "c8")),
        *(np.array(3.5), np.zeros((0, 3)), np.arange(12).reshape(3, 4).T, np.arange(9)[::2]),
        *(np.array(["a", "bc"]), np.array([None, 1], object), np.datetime64("2026-01-01", "D")),
        *(np.ma.masked_array([1, 2], [True, False]), np.float32(2.5)),
    ]
    tensors = [
        *(torch.arange(6).reshape(2, 3).to(d) for d in (torch.float16, torch.bfloat16, torch.bool)),
        *(
            torch.tensor(1.5),
            torch.zeros(0, 2),
            torch.arange(6).reshape(2, 3).T,
            torch.ones(2) * 1j,
        ),
        *((torch.ones(2) * 1j).conj(), torch.eye(3).to_sparse(), torch.nn.Parameter(torch.ones(2))),
    ]
    items: list[Any] = [x for x in [*arrays, None, *tensors, "word", 3] for _ in range(3)]
    for sent, got in zip(
        items, tg.imap(lambda x: x, items, chunksize=50, client=client), strict=True
    ):
        assert type(got) is type(sent)
        if isinstance(sent, np.ndarray):
            assert got.dtype == sent.dtype
            np.testing.assert_array_equal(got, sent)
            assert got.flags.writeable
        elif isinstance(sent, torch.Tensor):
            assert got.dtype is sent.dtype
            assert got.layout is sent.layout
            assert got.is_conj() == sent.is_conj()
            assert torch.equal(got.to_dense(), sent.to_dense())
        else:
            assert got == sent
