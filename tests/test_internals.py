"""What we touch of Dask's insides is where we think; and nothing breaks when it is not."""

from __future__ import annotations

import asyncio
import inspect
import time
from types import SimpleNamespace

import distributed
import pytest
import torch
from distributed import Client, LocalCluster, Scheduler
from distributed.batched import BatchedSend

import taskgrad as tg
from conftest import about_workers, wait_until
from taskgrad.cluster import client_calls, internals, task_colours


@pytest.fixture(scope="module")
def plain():
    """A client of a cluster that taskgrad has not touched."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_every_stream_is_found_and_says_its_interval(plain):
    def on_scheduler(dask_scheduler):
        streams = internals.streams(dask_scheduler)
        return sorted(internals.interval_of(s) for s in streams)

    def on_worker(dask_worker):
        return [internals.interval_of(s) for s in internals.streams(dask_worker)]

    assert plain.run_on_scheduler(on_scheduler) == [0.002, 0.005]  # to the client; to the worker
    assert list(plain.run(on_worker).values()) == [[0.002]]
    assert [internals.interval_of(s) for s in internals.streams(plain)] == [0.010]


def test_a_stream_sends_at_once_with_no_deadline(plain):
    [stream] = internals.streams(plain)
    assert internals.streams_take_none()
    assert internals.set_interval(stream, 0)
    try:
        assert internals.interval_of(stream) == 0
        for i in range(20):
            assert plain.submit(abs, -i, pure=False).result() == i
            assert stream.next_deadline is None
    finally:
        internals.restore_interval(stream)
    assert type(stream.interval) is float
    assert stream.interval == 0.010
    assert plain.submit(abs, -1, pure=False).result() == 1


def test_messages_arrive_whole_and_in_order_at_any_interval():
    class Comm:
        def __init__(self):
            self.got = []

        def closed(self):
            return False

        async def write(self, messages, **kwargs):
            await asyncio.sleep(0.001)  # so that messages come in while one is being written
            self.got.extend(messages)
            return 1

        async def close(self):
            pass

    async def send():
        comm, stream = Comm(), BatchedSend(interval="2ms")
        stream.start(comm)
        for i in range(300):
            if i % 50 == 0:
                internals.set_interval(stream, (0, 0.001, 0.0)[i // 50 % 3])
            stream.send(i)
            if i % 7 == 0:
                await asyncio.sleep(0.0005)
        internals.restore_interval(stream)
        stream.send(300)
        await stream.close()
        return comm.got

    assert asyncio.run(send()) == list(range(301))


def test_what_somebody_else_set_stays():
    stream = SimpleNamespace(interval=0.005)
    internals.set_interval(stream, 0)
    internals.set_interval(stream, 0.001)
    assert stream.interval == 0.001
    internals.restore_interval(stream)
    assert stream.interval == 0.005
    internals.set_interval(stream, 0)
    stream.interval = 0.5
    internals.restore_interval(stream)
    assert stream.interval == 0.5


def test_another_way_of_keeping_deadlines_is_noticed(monkeypatch):
    class Other:
        def send(self):
            self.next_deadline = max(self.next_deadline, self.interval)

    monkeypatch.setattr(internals, "BatchedSend", Other)
    internals.streams_take_none.cache_clear()
    try:
        assert not internals.streams_take_none()
        stream = SimpleNamespace(interval=0.005)
        assert internals.set_interval(stream, 0)
        assert 1.5 + stream.interval == 1.5  # a plain number, which suits any arithmetic
        internals.restore_interval(stream)
        assert stream.interval == 0.005
    finally:
        internals.streams_take_none.cache_clear()


@pytest.mark.parametrize("moved", [SimpleNamespace(), SimpleNamespace(interval="2ms")])
def test_nothing_breaks_where_dask_has_moved_things(moved):
    nothing = SimpleNamespace()
    assert list(internals.streams(nothing)) == []
    assert list(internals.streams(object.__new__(Scheduler))) == []
    before = dict(vars(moved))
    assert internals.interval_of(moved) is None
    assert not internals.set_interval(moved, 0)
    internals.restore_interval(moved)
    assert vars(moved) == before
    assert internals.memory_limit(nothing) is None
    assert internals.memory_used(nothing) is None
    assert internals.pause_fraction(nothing) is None
    assert internals.timer_interval(nothing, "tick") is None
    internals.set_timer_interval(nothing, "tick", 1.0)
    assert internals.threads(nothing) == 1
    assert internals.results_handler(nothing) is None
    assert internals.held_in_memory(nothing, ["key"]) == []
    with internals.writing_at_once(nothing):
        assert not hasattr(nothing, "allow_offload")


def test_a_worker_hears_from_the_receiver_before_it_forgets_what_it_sent(plain):
    def look(dask_worker):
        return internals.results_handler(dask_worker) == dask_worker.get_data

    assert list(plain.run(look).values()) == [True]


def test_what_a_worker_holds_in_memory(plain):
    def look(dask_worker):
        return internals.held_in_memory(dask_worker, ["there", "elsewhere"])

    (address, *_) = plain.nthreads()
    there = plain.submit(lambda: 3, key="there", workers=[address])
    assert there.result(timeout=200) == 3
    assert plain.run(look, workers=[address])[address] == [3]


def test_a_connection_makes_large_messages_at_once_if_told(plain):
    comm = plain.scheduler_comm.comm
    assert comm.allow_offload is True
    with internals.writing_at_once(comm):
        assert comm.allow_offload is False
    assert comm.allow_offload is True


def test_the_function_that_asks_for_results_is_wrapped_once_and_unwrapped(monkeypatch):
    stock = distributed.worker.get_data_from_worker
    wrapper = lambda gather: lambda *args, **kwargs: gather(*args, **kwargs)  # noqa: E731
    assert internals.wrap_gathering(wrapper)
    wrapped = distributed.worker.get_data_from_worker
    assert wrapped is not stock
    assert internals.wrap_gathering(wrapper)
    assert distributed.worker.get_data_from_worker is wrapped
    internals.unwrap_gathering()
    internals.unwrap_gathering()
    assert distributed.worker.get_data_from_worker is stock
    # A worker calls it by its name in that module, as it stands there then.
    assert "get_data_from_worker(" in inspect.getsource(distributed.Worker.gather_dep)

    def another(rpc, keys, worker):
        return {}

    for gather in (another, None):
        monkeypatch.setattr(distributed.worker, "get_data_from_worker", gather)
        assert not internals.wrap_gathering(wrapper)
        assert distributed.worker.get_data_from_worker is gather


def test_another_way_of_giving_results_away_is_noticed():
    async def without_an_answer(comm, keys, who=None, serializers=None):
        await comm.write({"status": "OK"}, serializers=serializers)

    for handler in (without_an_answer, len, None):
        worker = SimpleNamespace(handlers={"get_data": handler})
        assert internals.results_handler(worker) is None


def test_a_worker_says_its_memory_and_threads(plain):
    def look(dask_worker):
        limit = internals.memory_limit(dask_worker)
        return limit, internals.memory_used(dask_worker), internals.threads(dask_worker)

    [(limit, used, threads)] = plain.run(look).values()
    [worker] = about_workers(plain).values()
    assert limit == worker["memory_limit"]
    assert 10 * 2**20 < used < limit
    assert threads == 3


def test_a_worker_takes_samples_as_often_as_it_is_told(plain):
    async def count(dask_worker):
        """The interval; samples in half a second of a task, at this interval and another."""

        def taken():
            profiles = [dask_worker.profile_recent, *(p for _, p in dask_worker.profile_history)]
            return sum(profile["count"] for profile in profiles)

        found = [internals.timer_interval(dask_worker, "profile")]
        for _ in range(2):
            before = taken()
            await asyncio.sleep(0.5)
            found.append(taken() - before)
            internals.set_timer_interval(dask_worker, "profile", 0.2)
            await asyncio.sleep(0.05)
        internals.set_timer_interval(dask_worker, "profile", found[0])
        return found

    busy = plain.submit(time.sleep, 1.5)
    [(interval, often, seldom)] = plain.run(count).values()
    busy.result()
    assert interval == 0.01
    assert often > 5
    assert 1 <= seldom <= often / 3


def test_a_scheduler_retires_workers_as_we_know_it(plain):
    """That a wrapped one is called, and by whom, is seen in test_retirement.py."""

    def look(dask_scheduler):
        async def wrapper(retire, *args, **kwargs):
            return {}

        before = dask_scheduler.handlers["retire_workers"]
        wrapped = internals.wrap_retirement(dask_scheduler, wrapper)
        changed = dask_scheduler.retire_workers is dask_scheduler.handlers["retire_workers"]
        dask_scheduler.handlers["retire_workers"] = before
        del dask_scheduler.retire_workers
        return wrapped, changed, before == dask_scheduler.retire_workers

    assert plain.run_on_scheduler(look) == (True, True, True)


@pytest.mark.parametrize("handlers", [{}, {"retire_workers": lambda workers: {}}])
def test_another_way_of_retiring_is_left_alone(handlers):
    scheduler = SimpleNamespace(handlers=dict(handlers))
    assert not internals.wrap_retirement(scheduler, None)
    assert vars(scheduler) == {"handlers": handlers}
    assert not internals.wrap_retirement(SimpleNamespace(), None)
    assert not internals.is_closing_itself(None)


@pytest.mark.parametrize("moved", [False, True])
def test_settling(cluster, monkeypatch, moved):
    """With what Dask has today, which must be there, and without."""
    assert inspect.iscoroutinefunction(distributed.client._wait)
    if moved:
        monkeypatch.delattr(distributed.client, "_wait")
    futures = [cluster.submit(time.sleep, 0.2, pure=False), cluster.submit(int, "x", pure=False)]
    pending = client_calls.all_of(cluster, futures)
    assert not pending.done(0.01)
    assert pending.done(30)
    assert [f.status for f in futures] == ["finished", "error"]


def test_a_key_is_let_go_of_though_its_future_lives(plain):
    future = plain.submit(time.sleep, 0.01, pure=False)
    follower = plain.submit(lambda x, y: y, future, 2, pure=False)
    keys = {future.key, follower.key}
    assert follower.result() == 2
    internals.release(plain, [future.key, follower.key])

    def known(dask_scheduler):
        return keys & dask_scheduler.tasks.keys()

    end = time.monotonic() + 10
    while plain.run_on_scheduler(known) and time.monotonic() < end:
        time.sleep(0.02)
    assert not plain.run_on_scheduler(known)
    assert future.status == "finished"  # the future itself was told nothing
    assert plain.submit(abs, -1, pure=False).result() == 1


def test_a_client_can_be_told_by_the_scheduler_and_tell_it(plain):
    """The way of a letter: a worker's stream, the scheduler's handler, the client's."""
    got = []

    def on_scheduler(dask_scheduler):
        def pass_on(client, word, **kwargs):
            dask_scheduler.client_comms[client].send({"op": "test-letter", "word": word})

        dask_scheduler.stream_handlers["test-letter"] = pass_on

    def on_worker(client, dask_worker):
        dask_worker.batched_stream.send({"op": "test-letter", "client": client, "word": "worker"})

    assert internals.add_client_handler(plain, "test-letter", lambda word: got.append(word))
    plain.run_on_scheduler(on_scheduler)
    internals.tell_scheduler(plain, {"op": "test-letter", "word": "client"})
    plain.run(on_worker, plain.id)
    assert wait_until(lambda: sorted(got) == ["client", "worker"])
    assert not internals.add_client_handler(SimpleNamespace(), "test-letter", print)


def test_the_dashboard_asks_for_the_colours_of_layers(client):
    def colours(dask_scheduler):
        from distributed.diagnostics import progress_stream, task_stream
        from distributed.utils import color_of

        def record(name):
            about = {"worker": "w", "thread": 1, "status": "OK", "nbytes": 0, "type": b""}
            times = {"action": "compute", "start": 1.0, "stop": 2.0}
            return {"key": f"{name}-{'0' * 32}", "startstops": (times,), **about}

        names = ["forward:x0", "backward:x0", "weights:x0", "forward:x1", "update:x0", "train"]
        shown = task_stream.rectangles([record(name) for name in names])["color"]
        bars = list(map(progress_stream.color_of, names))
        return shown, bars, list(map(color_of, names))

    tg.collect(tg.spawn(abs, torch.ones(1)))  # taskgrad is on this scheduler
    shown, bars, stock = client.run_on_scheduler(colours)
    assert shown == bars
    light, dark, middle = shown[:3]
    assert shown[4:] == stock[4:]
    assert any((light, middle, dark) == hue for hue in task_colours._HUES)
    assert shown[3] in {hue[0] for hue in task_colours._HUES} - {light}


def test_colours_are_of_modules_that_are_loaded(monkeypatch):
    monkeypatch.setattr(internals, "_COLOURS", (("no.such.module", "color_of"),))
    assert internals.wrap_colours(lambda name: None) == 0
