"""pmap when a rank fails, does not come, or is gone; and beside other work."""

from __future__ import annotations

import os
import signal
import threading
import time

import dask
import pytest
import torch
from distributed import Client

import taskgrad as tg
from conftest import total_held, wait_until
from taskgrad.cluster.tasks import mailboxes
from taskgrad.worker.mailbox import GroupAborted, Mailboxes, Message, TaskOutcome

X = torch.randn(4, 3)


def empty(client) -> bool:
    """Whether no worker holds anything of ours, mailboxes included."""
    counts = [*client.run(mailboxes).values(), total_held(client)]
    return not any(value for count in counts for value in count.values())


def wait_for(path) -> None:
    """In a rank: until somebody has made this file."""
    end = time.monotonic() + 20
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(f"nobody made {path}")
        time.sleep(0.01)


def failure(fn, client, x=X, kind=tg.LayerError):
    with pytest.raises(kind) as caught:
        tg.pmap(fn, "i", client=client)(x)
    error = caught.value
    caught.value.__traceback__ = None
    assert wait_until(lambda: empty(client))
    return error


def test_the_error_of_the_failing_rank_ends_all(four):
    def f(x):
        x = tg.psum(x, "i")
        if tg.axis_index("i") == 2:
            raise KeyError("boo")
        try:
            return tg.psum(x, "i")
        except Exception:
            return x  # what another rank raised is not for this one to catch

    error = failure(f, four)
    assert "rank 2 of f" in str(error)
    assert error.layer == "rank 2 of f"
    assert error.worker in str(error)
    assert isinstance(error.__cause__, KeyError)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if tg.axis_index("i") == 1:
            raise ValueError("in the backward")
        return g


def test_a_failing_backward_ends_all(four):
    x = X.clone().requires_grad_()
    y = tg.pmap(lambda x: tg.psum(Fails.apply(tg.psum(x, "i")), "i"), "i", client=four)(x)
    with pytest.raises(tg.LayerError, match="backward of 'rank 1 of lambda'") as caught:
        y.sum().backward()
    assert isinstance(caught.value.__cause__, ValueError)
    caught.value.__traceback__ = None
    del y, caught
    assert wait_until(lambda: empty(four))


def test_different_collectives(four):
    def names(x):
        return tg.pmax(x, "i") if tg.axis_index("i") == 1 else tg.psum(x, "i")

    error = failure(names, four, kind=tg.CollectiveError)
    assert "rank 0 calls psum(float32[3]); rank 1 calls pmax(float32[3])" in str(error)

    def shapes(x):
        return tg.psum(x[tg.axis_index("i") % 2 :], "i")

    error = failure(shapes, four, kind=tg.CollectiveError)
    assert "rank 0 calls psum(float32[3]); rank 1 calls psum(float32[2])" in str(error)

    def permutations(x):
        return tg.ppermute(x, "i", [(tg.axis_index("i") % 2, 3)])

    error = failure(permutations, four, kind=tg.CollectiveError)
    assert "perm=[(0, 3)]); rank 1 calls" in str(error)


def test_different_numbers_of_collectives(four):
    def f(x):
        x = tg.psum(x, "i")
        return x if tg.axis_index("i") == 1 else tg.pmax(x, "i")

    error = failure(f, four, kind=tg.CollectiveError)
    assert "calls pmax(float32[3]) as its number 2; rank 1 on worker" in str(error)
    assert "has ended after 1" in str(error)


def test_different_collectives_in_the_backward(four):
    """One rank has recorded a collective that the others have not."""

    def f(x):
        with torch.set_grad_enabled(tg.axis_index("i") == 1):
            return x + tg.psum(x * x, "i")

    x = X.clone().requires_grad_()
    y = tg.pmap(f, "i", client=four)(x)
    with pytest.raises(tg.CollectiveError, match="different numbers of collectives"):
        y.sum().backward()


def test_a_rank_that_does_not_come_in_time(client):
    def f(x):
        if tg.axis_index("i") == 1:
            time.sleep(2)
        return tg.psum(x, "i")

    with dask.config.set({"taskgrad.collective-deadline": "500ms"}):
        error = failure(f, client, X[:2], tg.CollectiveError)
    assert "rank 0 of f" in str(error)
    assert "has waited 0.5 s for rank 1 on worker 1 (tcp://" in str(error)
    assert "taskgrad.collective-deadline" in str(error)


def test_a_worker_that_is_killed_in_a_collective(fresh, tmp_path):
    client = fresh(n_workers=2)
    once = str(tmp_path / "once")

    def f(x):
        x = tg.psum(x, "i")
        if tg.axis_index("i") == 1 and not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return tg.psum(x, "i")

    before = set(client.nthreads())
    with pytest.raises(tg.WorkerLostError, match=r"rank 1 of f is gone with worker 1 \(tcp://"):
        tg.pmap(f, "i", client=client)(X[:2])
    assert wait_until(lambda: len(set(client.nthreads()) - before) == 1, 30)
    assert wait_until(lambda: len(client.nthreads()) == 2, 30)
    assert wait_until(lambda: empty(client))
    y = tg.pmap(f, "i", client=client)(X[:2])
    torch.testing.assert_close(y, 2 * X[:2].sum(0).expand(2, 3))


def test_a_rank_that_waits_gives_its_thread_and_its_random_stream_away(client, tmp_path):
    """On workers of one thread: rank 0 waits for rank 1, which waits for a pmap on rank 0's."""
    flags = [str(tmp_path / name) for name in ("forward", "backward")]

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if tg.axis_index("i") == 1:
                wait_for(flags[1])
            return g

    def f(x):
        if tg.axis_index("i") == 1:
            wait_for(flags[0])
        first = torch.rand(1)
        y = tg.psum(x * x, "i")
        return Waits.apply(y), first, torch.rand(1)

    def make(x, path):
        open(path, "w").close()
        return x + torch.rand(())

    def beside(work, flag):
        thread = threading.Thread(target=work)
        thread.start()
        assert wait_until(lambda: any(c["mailboxes"] for c in client.run(mailboxes).values()))
        tg.pmap(make, in_axes=(0, None), client=client)(X[:1], flag)
        thread.join()

    x = X[:2].clone().requires_grad_()
    found = []
    torch.manual_seed(0)
    beside(lambda: found.extend(tg.pmap(f, "i", client=client)(x)), flags[0])
    y, *drawn = found
    beside(lambda: y.sum().backward(), flags[1])
    torch.testing.assert_close(x.grad, 4 * x.detach())
    # What was drawn meanwhile has not moved the streams of those that waited.
    torch.manual_seed(0)
    _, *again = tg.pmap(f, "i", client=client)(x)
    assert [t.tolist() for t in again] == [t.tolist() for t in drawn]


def test_pmaps_of_two_threads_and_two_clients_at_once(four):
    second = Client(four.scheduler.address, set_as_default=False)
    wrong = []

    def many(client, factor):
        for i in range(5):
            x = (factor * X + i).requires_grad_()
            y = tg.pmap(lambda x: tg.psum(x * x, "i"), "i", client=client)(x)
            y.sum().backward()
            if not torch.allclose(x.grad, 8 * x.detach()):
                wrong.append((factor, i))

    threads = [
        threading.Thread(target=many, args=(client, factor))
        for client, factor in [(four, 1), (four, 2), (second, 3)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    second.close()
    assert not wrong
    assert wait_until(lambda: empty(four))


def lost(worker):
    return ValueError(f"{worker} is gone") if worker == "theirs" else None


def message(source=1, number=0, store="a"):
    return Message(source, number, "psum", False, store, [])


def test_a_mailbox_takes_what_comes_early_and_refuses_what_comes_late():
    mail = Mailboxes()
    assert mail.deliver("task", message()) is None  # before it has begun
    mail.open("task", lost)
    assert mail.wait("task", 0, [1, 2], 0) == {2}
    mail.deliver("task", message(source=2))
    assert [m.source for m in mail.take("task", 0, [1, 2])] == [1, 2]
    mail.end("task", TaskOutcome(1, None))
    assert mail.deliver("task", message(number=1)) == TaskOutcome(1, None)
    assert mail.held() == {"mailboxes": 0, "messages": 0}


def test_a_task_that_is_let_go_of_ends():
    gone = set()
    mail = Mailboxes(is_released=gone.__contains__)
    mail.deliver("early", message())
    mail.open("waits", lost)
    gone |= {"early", "waits"}
    timer = threading.Timer(0.05, mail.release, [["early", "waits"]])
    timer.start()
    with pytest.raises(GroupAborted, match="was released before all of its ranks had run"):
        mail.wait("waits", 0, [1], 10)
    timer.join()
    assert mail.deliver("early", message()).error is not None
    assert mail.held() == {"mailboxes": 1, "messages": 0}
    mail.end("waits", TaskOutcome(0, None))
    assert mail.held() == {"mailboxes": 0, "messages": 0}


def test_a_rank_that_begins_again_elsewhere_is_refused():
    mail = Mailboxes()
    mail.open("task", lost)
    mail.deliver("task", message(store="a"))
    mail.deliver("task", message(store="b"))
    with pytest.raises(GroupAborted, match="rank 1 has begun a second time"):
        mail.wait("task", 0, [1], 0)


def test_mail_for_a_task_that_never_begins_is_dropped_in_time():
    mail = Mailboxes()
    mail.deliver("never", message())
    mail.open("runs", lost)
    mail.expire(60)
    assert mail.held()["mailboxes"] == 2
    mail.expire(0)
    assert mail.held()["mailboxes"] == 1


def test_a_task_fails_when_a_worker_of_its_gang_is_gone():
    mail = Mailboxes()
    mail.open("task", lost)
    mail.gone("another")
    assert mail.wait("task", 0, [1], 0) == {1}
    mail.gone("theirs")
    with pytest.raises(GroupAborted, match="theirs is gone"):
        mail.wait("task", 0, [1], 0)
    with pytest.raises(GroupAborted, match="theirs is gone"):  # since the messages had come
        mail.take("task", 0, [1])
    assert mail.is_gone("task", "theirs")
