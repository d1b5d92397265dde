"""Calls of one trainer from several threads, and from its own callbacks, take turns."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import assert_same, long
from plain import PlainTrainer, assert_same_training

pytestmark = pytest.mark.usefixtures("executor")

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


_GENERATOR = torch.Generator().manual_seed(1)
_BATCH = torch.randn(6, 4, generator=_GENERATOR), torch.randint(3, (6,), generator=_GENERATOR)


def batch():
    return _BATCH


def made(client, **options):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1])
    return chain, tg.Trainer(chain, F.cross_entropy, SGD, microbatches=2, **options)


def together(*calls):
    """Run each in a thread of its own, all at once; what they give. None may hang."""
    with ThreadPoolExecutor(len(calls)) as pool:
        ready = threading.Barrier(len(calls))

        def run(call):
            ready.wait()
            return call()

        return [f.result(timeout=200) for f in [pool.submit(run, call) for call in calls]]


def same_as_plain(client, chain, steps):
    plain = PlainTrainer(net(), F.cross_entropy, SGD, microbatches=2)
    losses = plain.train([batch()] * steps)
    assert_same_training(chain, plain, client)
    return losses


def test_steps(client):
    """All are taken, one after the other: of the same batch, so that the order is no matter."""
    chain, trainer = made(client)
    found = together(*[lambda: [trainer.step(*batch()).item() for _ in range(5)]] * 4)
    trainer.wait()
    assert trainer.steps == 20
    assert sorted(v for part in found for v in part) == sorted(same_as_plain(client, chain, 20))


def test_everything_at_once(client, tmp_path):
    heard = []

    class Hears(tg.Callback):
        def on_step(self, trainer, loss):
            heard.append(loss.step)

    chain, trainer = made(client, callbacks=[Hears()])
    data = [batch()] * 5
    trainer.step(*batch())
    together(
        lambda: trainer.fit(data, progress=False),
        lambda: [trainer.step(*batch()).item() for _ in range(5)],
        lambda: trainer.fit(data, 2, data, progress=False),
        lambda: [trainer.evaluate(data) for _ in range(2)],
        lambda: [list(trainer.predict([x for x, _ in data])) for _ in range(2)],
        lambda: [trainer.save(tmp_path) for _ in range(2)],
        lambda: [trainer.wait() for _ in range(20)],
    )
    trainer.wait()
    assert trainer.steps == 21
    assert heard == list(range(21))
    same_as_plain(client, chain, 21)
    restored = tg.Trainer.restore(
        tmp_path, tg.GraphChain(net(), client=client), F.cross_entropy, SGD
    )
    plain = PlainTrainer(net(), F.cross_entropy, SGD, microbatches=2)
    plain.train([batch()] * restored.steps)
    for name, value in restored.chain.state_dict().items():
        assert_same(value, plain.model.state_dict()[name], name)
    assert wait_until(lambda: total_held(client)["tapes"] == 0)


def test_one_loss_read_by_many_threads(client):
    chain, trainer = made(client)
    losses = [trainer.step(*batch()) for _ in range(2)]
    found = together(*[lambda: [loss.item() for loss in reversed(losses)]] * 6)
    assert found == [same_as_plain(client, chain, 2)[::-1]] * 6


def test_a_failed_step_is_the_error_of_every_thread_that_reads_it(client):
    chain, trainer = made(client)
    x, y = batch()
    loss = trainer.step(x, y + 7)

    def read():
        with pytest.raises(tg.LayerError, match="out of bounds"):
            loss.item()
        return trainer.step(x, y).item()

    together(*[read] * 4)
    assert trainer.steps == 4
    same_as_plain(client, chain, 4)


class Calls(tg.Callback):
    """Calls the trainer, in one way, after the first step."""

    def __init__(self, how):
        self.how, self.heard, self.found = how, [], None

    def on_step(self, trainer, loss):
        self.heard.append(loss.step)
        if len(self.heard) == 1:
            self.found = self.how(trainer)


CALLS = {
    "step": lambda t: t.step(*batch()).item(),
    "wait": lambda t: t.wait(),
    "fit": lambda t: t.fit([batch()] * 3, progress=False),
    "evaluate": lambda t: t.evaluate([batch()] * 3),
    "predict": lambda t: list(t.predict([batch()[0]] * 3)),
    "in a thread": lambda t: together(lambda: t.step(*batch()).item()),
    "fit in a thread": lambda t: together(lambda: t.fit([batch()] * 3, progress=False)),
}


@pytest.mark.parametrize(
    "how",
    ["step", "fit in a thread", *long("wait", "fit", "evaluate", "predict", "in a thread")],
)
def test_a_callback_that_calls_the_trainer(client, how):
    calls = Calls(CALLS[how])
    chain, trainer = made(client, callbacks=[calls])
    trainer.fit([batch()] * 4, progress=False)
    trainer.wait()
    more = {"step": 1, "fit": 3, "in a thread": 1, "fit in a thread": 3}.get(how, 0)
    assert trainer.steps == 4 + more
    assert calls.heard == list(range(4 + more))
    same_as_plain(client, chain, 4 + more)


def test_a_callback_that_raises(client):
    class Raises(Calls):
        def on_step(self, trainer, loss):
            super().on_step(trainer, loss)
            if loss.step == 1:
                raise ArithmeticError("mine")

    calls = Raises(lambda t: None)
    chain, trainer = made(client, callbacks=[calls])
    with pytest.raises(ArithmeticError, match="mine"):
        trainer.fit([batch()] * 5, progress=False)
    trainer.step(*batch()).item()
    assert calls.heard == list(range(trainer.steps))
    same_as_plain(client, chain, trainer.steps)


def test_a_step_between_two_predictions(client):
    """Each output is of the weights of one moment: before the step, or after it."""
    chain, trainer = made(client)
    plain = PlainTrainer(net(), F.cross_entropy, SGD, microbatches=2)
    x, _ = batch()
    wanted = []
    for _ in range(9):
        with torch.no_grad():
            wanted.append(plain.model.eval()(x))
        plain.model.train()
        plain.train([batch()])
    found = []
    for i, output in enumerate(trainer.predict([x] * 8)):
        found.append(next(k for k, w in enumerate(wanted) if torch.equal(w, output)))
        trainer.step(*batch())
        assert found[-1] <= i
    assert found == sorted(found)
    trainer.wait()
    assert found[0] == 0 < found[-1]


def test_optimizer_from_several_threads(client):
    model = net()
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    optimizer, plain = tg.Optimizer(chain, SGD), SGD(model.parameters())
    x, y = batch()
    tg.spawn(F.cross_entropy, chain(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    together(*[lambda: [optimizer.step() for _ in range(3)]] * 3)
    for _ in range(9):
        plain.step()
    for name, value in chain.state_dict().items():
        assert_same(value, model.state_dict()[name], name)


def test_a_thread_that_waits_long_keeps_nobody_from_a_loss_that_is_there(client, tmp_path):
    slow, read = tmp_path / "slow", tmp_path / "read"

    def loss_fn(output, target):
        end = time.monotonic() + 30
        while slow.exists() and not read.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return F.cross_entropy(output, target)

    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, loss_fn, SGD, microbatches=2)
    done = trainer.step(*batch())
    done.item()

    slow.touch()
    late = trainer.step(*batch())
    reader = threading.Thread(target=late.item)
    reader.start()
    assert done.item() > 0
    assert "on its way" in repr(late)
    read.touch()
    reader.join(timeout=200)
    assert late.done
