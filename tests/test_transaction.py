"""An update is made on all workers or on none, whatever raises in it; training goes on as if it had
not been tried."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from distributed import get_worker
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import assert_same, long, long_rows
from plain import PlainTrainer, assert_same_training, next_token, tokens, transformer
from taskgrad.cluster.worker_plugin import store_of

pytestmark = pytest.mark.usefixtures("executor")


def spring(here: str) -> None:
    """Raise, or worse, if this worker was told to do it at this place."""
    try:
        store = store_of(get_worker())
    except ValueError:  # plain torch, on the driver
        return
    place, _, how = getattr(store, "trap", "").partition(": ")
    if place != here:
        return
    store.trap = ""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(2)
        return
    raise {"memory": MemoryError, "exit": SystemExit}.get(how, ArithmeticError)("sprung")


def set_trap(trap: str, dask_worker) -> None:
    store_of(dask_worker).trap = trap


class Changed(torch.optim.AdamW):
    """Also changes options of its groups, attributes of its own and, at the end, gradients."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr=lr)
        self.count, self.log, self.means = 0, [], {}

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] *= 0.99
            for i, p in enumerate(group["params"]):
                self.means[i] = self.means.get(i, torch.zeros_like(p)) + p.detach()
                p.data.add_(self.means[i], alpha=-1e-3 / self.count)
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["note"] = self.count
                p.grad.zero_()
        self.log.append(self.count)
        spring("optimizer")


class Adam(torch.optim.Adam):
    def step(self, closure=None):
        super().step(closure)
        spring("optimizer")


def hooked(params):
    made = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    made.register_step_post_hook(lambda *_: spring("optimizer"))
    return made


class Falling:
    """A schedule with a state of its own."""

    def __init__(self):
        self.seen = 0

    def __call__(self, step):
        self.seen += 1
        if step:
            spring("scheduler")
        return 0.9**self.seen


def falling(optimizer):
    return LambdaLR(optimizer, Falling())


def in_a_row(optimizer):
    first, then = StepLR(optimizer, 2, 0.5), LambdaLR(optimizer, Falling())
    return SequentialLR(optimizer, [first, then], [2])


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()), *(nn.Dropout(0.2), nn.Linear(8, 3))
    )


def batches(n):
    torch.manual_seed(1)
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(n)]


CASES = {
    "adam, its first step": (Adam, {}, "optimizer", 0),
    "adam, a later step": (Adam, {}, "optimizer", 3),
    "one that changes much": (Changed, {}, "optimizer", 3),
    "one that changes much, its first step": (Changed, {}, "optimizer", 0),
    "a hook": (hooked, {"clip_norm": 0.5}, "optimizer", 2),
    "accumulating": (Adam, {"accumulate": 2}, "optimizer", 3),
    "a scheduler": (Adam, {"lr_scheduler": falling}, "scheduler", 3),
    "schedulers in a row": (Changed, {"lr_scheduler": in_a_row}, "scheduler", 5),
    "out of memory": (Adam, {"clip_norm": 0.5}, "optimizer: memory", 3),
}


ON_WORKERS = [(case, i % 2) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("case", "worker"), [*ON_WORKERS[:3], *long_rows(*ON_WORKERS[3:])])
def test_a_step_whose_update_raises_on_one_worker_was_not(client, case, worker):
    optimizer, options, trap, at = CASES[case]
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, optimizer, microbatches=2, **options)
    plain = PlainTrainer(net(), F.cross_entropy, optimizer, microbatches=2, **options)
    data = batches(at + 20)
    losses = [trainer.step(x, y).item() for x, y in data[:at]]
    client.run(set_trap, trap, workers=[chain.placement[4 * worker].worker])
    with pytest.raises(tg.LayerError, match=f"on worker .* in step {at}: sprung") as raised:
        trainer.step(*data[at]).item()
    assert raised.value.layer in ("optimizer", "lr_scheduler")
    assert raised.value.worker == chain.placement[4 * worker].worker
    assert trainer.steps == at
    losses += [loss.item() for loss in [trainer.step(x, y) for x, y in data[at:]]]
    assert losses == plain.train(data)
    assert_same_training(chain, plain, client)
    assert wait_until(lambda: undone_bytes(client) == 0)


def undone_bytes(client):
    return sum(client.run(_kept).values())


def _kept(dask_worker):
    stages = [
        e
        for e in store_of(dask_worker).entries().values()
        if hasattr(e, "update") and hasattr(e, "layers")
    ]
    return sum(s.update is not None and s.update.before is not None for s in stages)


def test_fp16_and_deferred_batch_norm(client):
    """The scale of the loss and the statistics go back too: the same as where nothing raised."""
    results = []
    for failing in (True, False):
        chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
        trainer = tg.Trainer(
            chain, F.cross_entropy, Adam, microbatches=2, amp="fp16", deferred_batch_norm=True
        )
        data = batches(8)
        losses = [trainer.step(x, y).item() for x, y in data[:3]]
        if failing:
            client.run(set_trap, "optimizer", workers=[chain.placement[4].worker])
            with pytest.raises(tg.LayerError, match="sprung"):
                trainer.step(*data[3]).item()
        losses += [trainer.step(x, y).item() for x, y in data[3:]]
        results.append((losses, chain.state_dict()))
    (ours, state), (theirs, expected) = results
    assert ours == theirs
    for name, value in expected.items():
        assert_same(state[name], value, name)


def test_copies_of_tied_parameters_go_back(client):
    tied = partial(transformer, tied=True)
    chain = tg.GraphChain(tied(), client=client, placement=[0, 0, 1, 1])
    trainer = tg.Trainer(chain, next_token, Adam, microbatches=2)
    plain = PlainTrainer(tied(), next_token, Adam, microbatches=2)
    data = tokens(4)
    client.run(set_trap, "optimizer", workers=[chain.placement[3].worker])
    with pytest.raises(tg.LayerError, match="sprung"):
        trainer.step(*data[0]).item()
    assert [trainer.step(x, y).item() for x, y in data] == plain.train(data)
    assert_same_training(chain, plain, client)


def test_the_step_behind_is_taken_back_with_it(client):
    """It has begun on the worker whose update was made."""
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, microbatches=2)
    plain = PlainTrainer(net(), F.cross_entropy, Adam, microbatches=2)
    data = batches(5)
    client.run(set_trap, "optimizer", workers=[chain.placement[4].worker])
    losses = [trainer.step(x, y) for x, y in data[:2]]
    for loss in losses:
        with pytest.raises(tg.LayerError, match="sprung"):
            loss.item()
    assert trainer.steps == 0
    assert [trainer.step(x, y).item() for x, y in data] == plain.train(data)
    assert_same_training(chain, plain, client)


def test_ctrl_c_while_an_update_runs(client):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, microbatches=2)
    plain = PlainTrainer(net(), F.cross_entropy, Adam, microbatches=2)
    data = batches(4)
    client.run(set_trap, "optimizer: slow", workers=[chain.placement[4].worker])
    timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*data[0]).item()
    timer.join()
    trainer.wait()  # the step was made, or it was not
    losses = [trainer.step(x, y).item() for x, y in data[trainer.steps :]]
    assert losses == plain.train(data)[-len(losses) :]
    assert_same_training(chain, plain, client)


@pytest.mark.long
def test_a_worker_killed_between_two_updates(fresh):
    client = fresh(n_workers=2)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam)
    other = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    optimizer = tg.Optimizer(other, Adam)
    client.run(set_trap, "optimizer: killed", workers=[chain.placement[4].worker])
    with pytest.raises(tg.WorkerLostError):
        trainer.step(*batches(1)[0]).item()
    with pytest.raises(tg.TaskgradError, match="lost part of its model"):
        trainer.step(*batches(1)[0])
    with pytest.raises(tg.WorkerLostError):
        optimizer.step()
    with pytest.raises(tg.WorkerLostError):
        optimizer.step()


def run_again(dask_worker) -> None:
    """Have every update on this worker run twice, as Dask does if its result is lost."""
    from taskgrad.worker import optimizing, training

    for module, name in ((training, "commit"), (optimizing, "update")):
        original = getattr(module, name)

        def twice(*args, original=original, **kwargs):
            original(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(module, name, twice)
        setattr(module, f"original_{name}", original)


def run_once(dask_worker) -> None:
    from taskgrad.worker import optimizing, training

    training.commit, optimizing.update = training.original_commit, optimizing.original_update


def test_an_update_that_dask_runs_again_is_made_once(client):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    plain = PlainTrainer(net(), F.cross_entropy, Adam)
    client.run(run_again)
    try:
        trainer = tg.Trainer(chain, F.cross_entropy, Adam)
        assert [trainer.step(x, y).item() for x, y in batches(3)] == plain.train(batches(3))
        assert_same_training(chain, plain, client)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        other = tg.GraphChain(model, client=client, placement=[0, 1])
        pair = loops(other, tg.Optimizer(other, Adam)), loops(model, Adam(model.parameters()))
        assert_same(*(train(*batches(1)[0]) for train in pair))
        assert_same(*(train(*batches(1)[0]) for train in pair))
    finally:
        client.run(run_once)


# -- tg.Optimizer ----------------------------------------------------------------------------------


def loops(model, optimizer):
    """A loop of one's own: one step, whose loss it gives. A failed update is tried again."""

    def train(x, y, tries=1):
        loss = F.cross_entropy(tg.collect(model(x)), y)
        loss.backward()
        for _ in range(tries - 1):
            with pytest.raises(tg.LayerError, match="the optimizer on worker .*: sprung"):
                optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train


@pytest.mark.parametrize("factory", [Adam, Changed, hooked])
@pytest.mark.parametrize("at", [2, *long(0)])
def test_optimizer_takes_a_step_everywhere_or_nowhere(client, factory, at):
    """And keeps the gradients, so that the step can be tried again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    ours = loops(chain, tg.Optimizer(chain, factory))
    theirs = loops(model, factory(model.parameters()))
    for i, (x, y) in enumerate(batches(at + 20)):
        if i == at:
            client.run(set_trap, "optimizer", workers=[chain.placement[2].worker])
        assert_same(ours(x, y, tries=1 + (i == at)), theirs(x, y))
    for name, value in chain.state_dict().items():
        assert_same(value, model.state_dict()[name], name)


def test_optimizer_with_tied_parameters(client):
    tied = partial(transformer, tied=True)
    model = tied()
    chain = tg.GraphChain(tied(), client=client, placement=[0, 0, 1, 1]).eval()
    optimizer, plain = tg.Optimizer(chain, Adam), Adam(model.eval().parameters())
    [(x, y), *_] = tokens(1)
    for tries in (1, 2, 1):
        next_token(tg.collect(chain(x)), y).backward()
        next_token(model(x), y).backward()
        if tries == 2:
            client.run(set_trap, "optimizer", workers=[chain.placement[3].worker])
            with pytest.raises(tg.LayerError, match="sprung"):
                optimizer.step()
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
    for name, value in chain.state_dict().items():
        assert_same(value, model.state_dict()[name], name)


# -- one at a time ---------------------------------------------------------------------------------


def test_a_chain_has_one_trainer_at_a_time(client):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    first = tg.Trainer(chain, F.cross_entropy, Adam)
    (x, y), *_ = batches(1)
    on_its_way = first.step(x, y)
    second = tg.Trainer(chain, F.cross_entropy, Adam)
    assert on_its_way.done
    with pytest.raises(tg.TaskgradError, match="has another Trainer or Optimizer since this Tr"):
        first.step(x, y)
    optimizer = tg.Optimizer(chain, Adam)
    with pytest.raises(tg.TaskgradError, match="another Trainer or Optimizer"):
        second.step(x, y)
    optimizer.step()
    tg.Trainer(chain, F.cross_entropy, Adam).step(x, y).item()
    with pytest.raises(tg.TaskgradError, match="since this Optimizer was made"):
        optimizer.step()


def fussy(params):
    if any(p.shape == (3, 8) for p in params):
        raise ArithmeticError("not these")
    return Adam(params)


@pytest.mark.parametrize("make", [partial(tg.Trainer, loss_fn=F.cross_entropy), tg.Optimizer])
def test_a_trainer_that_cannot_be_made_on_one_worker_leaves_the_one_before(client, make):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam)
    plain = PlainTrainer(net(), F.cross_entropy, Adam)
    data = batches(4)
    losses = [trainer.step(x, y).item() for x, y in data[:2]]
    with pytest.raises(tg.LayerError, match="could not be made on worker .*: not these"):
        make(chain, **{"factory" if make is tg.Optimizer else "optimizer": fussy})
    losses += [trainer.step(x, y).item() for x, y in data[2:]]
    assert losses == plain.train(data)
    assert_same_training(chain, plain, client)


def test_a_trainer_that_is_let_go_in_the_middle_of_a_step_leaves_nothing(client):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    before = chain.state_dict()
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, microbatches=2)
    client.run(set_trap, "optimizer: slow", workers=[chain.placement[4].worker])
    trainer.step(*batches(1)[0])
    time.sleep(0.5)
    del trainer
    gc.collect()
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, microbatches=2)
    taken = not all(torch.equal(v, before[n]) for n, v in chain.state_dict().items())
    plain = PlainTrainer(net(), F.cross_entropy, Adam, microbatches=2)
    plain.train(batches(1)[:taken])
    plain.optimizer, plain.steps = Adam(plain.model.parameters()), 0
    data = batches(4)[1:]
    assert [trainer.step(x, y).item() for x, y in data] == plain.train(data)
    assert wait_until(lambda: total_held(client)["tapes"] == 0)


class Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, cotangent):
        spring("backward")
        return cotangent


class Pauses(nn.Module):
    def forward(self, x):
        return Pause.apply(x)


@pytest.mark.parametrize("use", ["state_dict", "load_state_dict"])
def test_a_chain_whose_trainer_is_let_go_in_the_middle_of_a_step_is_of_one_step(client, use):
    """The last worker has made its update when the first one is cut off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Pauses(), nn.Linear(8, 3))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    plain = PlainTrainer(model, F.cross_entropy, Adam)
    data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    trainer = tg.Trainer(chain, F.cross_entropy, Adam)
    trainer.step(*data[0]).item()
    client.run(set_trap, "backward: slow", workers=[chain.placement[0].worker])
    trainer.step(*data[1])
    time.sleep(0.5)
    del trainer
    gc.collect()
    if use == "load_state_dict":
        expected = [{name: torch.ones_like(v) for name, v in model.state_dict().items()}]
        chain.load_state_dict(expected[0])
        tg.Trainer(chain, F.cross_entropy, Adam)
    else:
        expected = []
        for item in data:
            plain.train([item])
            expected.append({n: v.clone() for n, v in plain.model.state_dict().items()})
    found = chain.state_dict()
    assert any(all(torch.equal(found[n], v) for n, v in state.items()) for state in expected)


# -- where copies lie in files ---------------------------------------------------------------------


@pytest.mark.parametrize("spilled", [False, True])
def test_what_takes_a_step_back_can_lie_in_files(tmp_path, spilled):
    from taskgrad.worker.offload import CopiesInFiles, SpilledState
    from taskgrad.worker.undo import Undo

    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(700, 1000).t()), nn.Parameter(torch.randn(3))]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    state = SpilledState(str(tmp_path)) if spilled else None
    copies = CopiesInFiles(str(tmp_path), state)

    def step():
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step() if state is None else state.step(optimizer)

    for taken in range(3):
        before = [p.detach().clone() for p in parameters]
        kept = [dict(optimizer.state[p]) for p in parameters if p in optimizer.state]
        kept = [{k: v.clone() for k, v in of.items()} for of in kept]
        undo = Undo([optimizer], copies)
        step()
        undo.restore()
        assert [len(optimizer.state[p]) for p in parameters] == [3 * (taken > 0)] * 2
        for p, value in zip(parameters, before, strict=True):
            assert_same(p.detach(), value)
        for p, of in zip(parameters, kept, strict=False):
            for key, value in of.items():
                assert_same(optimizer.state[p][key], value, key)
        step()
    assert not list(tmp_path.iterdir())  # the files have no names
