"""A step that fails says where; the trainer goes on from the state before it."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from functools import partial

import dask
import pytest
import torch
import torch.nn.functional as F
from distributed import get_worker
from torch import nn

import taskgrad as tg
from conftest import keys_of, total_held, wait_until
from helpers import long, long_rows
from plain import (
    ConvNet,
    PlainTrainer,
    assert_same_training,
    images,
    next_token,
    tokens,
    transformer,
)
from taskgrad.cluster.worker_plugin import store_of

pytestmark = pytest.mark.usefixtures("executor")

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
STAGES = [0] * 5 + [1] * 5


class Trap(nn.Module):
    """Raises once, in the forward or backward of the call with this number, if a flag is set."""

    def __init__(self, kind: str, call: int) -> None:
        super().__init__()
        self.kind, self.call = kind, call

    def forward(self, x):
        return _Trap.apply(x, self.kind, self.call)


class _Trap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, call):
        ctx.kind, ctx.call = kind, call
        spring("forward", kind, call)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        spring("backward", ctx.kind, ctx.call)
        return g, None, None


def spring(here: str, kind: str, call: int) -> None:
    store = store_of(get_worker())
    if here == kind and getattr(store, "armed", None) is not None:
        store.armed += 1
        if store.armed == call + 1:
            store.armed = None
            raise ArithmeticError("sprung")


def arm(dask_worker) -> None:
    store_of(dask_worker).armed = 0


def disarm(dask_worker) -> None:
    store_of(dask_worker).armed = None


def trapped(kind: str, call: int) -> ConvNet:
    """The same net as `ConvNet`, with a trap in the place of its last activation."""
    model = ConvNet()
    model[6] = nn.Sequential(nn.ReLU(), Trap(kind, call)) if kind else nn.ReLU()
    return model


@pytest.mark.parametrize(
    ("kind", "call"), [("forward", 2), ("backward", 3), *long_rows(("forward", 0), ("backward", 0))]
)
def test_a_layer_that_raises(client, kind, call):
    """In any microbatch, forward or backward: named, nothing stays, and the step can be retried."""
    torch.manual_seed(0)
    model = trapped(kind, call)
    placement = [0] * 5 + [1] * 6
    chain = tg.GraphChain(model, client=client, placement=placement)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=4, accumulate=2)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=4, accumulate=2)
    batches = images(6)
    client.run(disarm)
    losses = [trainer.step(x, y).item() for x, y in batches[:3]]
    client.run(arm)
    with pytest.raises(tg.LayerError, match=f"microbatch {call} of step 3") as raised:
        trainer.step(*batches[3]).item()
    assert isinstance(raised.value.__cause__, ArithmeticError)
    assert raised.value.worker == chain.placement[8].worker
    assert raised.value.layer.startswith("6.1") or kind == "backward"
    del raised
    assert trainer.steps == 3
    assert wait_until(lambda: total_held(client)["tapes"] == 0)
    losses += [trainer.step(x, y).item() for x, y in batches[3:]]
    expected = plain.train(batches)
    assert losses == expected
    ours = {n.replace("6.0", "6"): v for n, v in chain.state_dict().items()}
    assert all(torch.equal(ours[n], v) for n, v in plain.model.state_dict().items())


def test_an_error_in_a_step_not_yet_read_is_raised_by_a_later_one(client):
    chain = tg.GraphChain(trapped("forward", 0), client=client, placement=[0] * 5 + [1] * 6)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW)
    (x, y), *_ = images(1)
    client.run(arm)
    losses = [trainer.step(x, y), trainer.step(x, y)]
    with pytest.raises(tg.LayerError, match="sprung"):
        trainer.step(x, y)
    for loss in losses:  # the one that was on its way behind it is not taken either
        with pytest.raises(tg.LayerError, match="sprung"):
            loss.item()
    assert trainer.steps == 0
    assert trainer.step(x, y).item() > 0


def test_a_loss_that_is_not_finite(client):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2, check_finite=True)
    (x, y), *_ = images(1)
    before = chain.state_dict()
    bad = x.clone()
    bad[-1] = float("nan")
    with pytest.raises(tg.LayerError, match="'loss'.*microbatch 1 of step 0: the loss is nan"):
        trainer.step(bad, y).item()
    after = chain.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert trainer.step(x, y).item() > 0


def test_a_loss_that_is_no_number(client):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    loss = nn.CrossEntropyLoss(reduction="none")
    trainer = tg.Trainer(chain, loss, ADAMW)
    with pytest.raises(tg.LayerError, match=r"a loss is one floating-point number.*float32\[10\]"):
        trainer.step(*images(1)[0]).item()


X, Y = images(1)[0]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:0], Y[:0], "the batch is empty"),
        (X, Y[:7], "10 samples and the targets 7"),
        ((X, X[:4]), Y, "different batch sizes"),
        (torch.ones(()), Y, "no batch dimension 0"),
        ("text", Y, "hold tensors or arrays; got str"),
        (None, Y, "hold tensors or arrays"),
        (tg.spawn(torch.ones, 3), Y, "both on the driver, or both Dask collections"),
    ],
)
def test_bad_batches_are_refused_before_anything_is_submitted(client, x, y, message):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2)
    before = keys_of(client, "forward")
    with pytest.raises(ValueError, match=message):
        trainer.step(x, y)
    assert keys_of(client, "forward") == before
    assert trainer.steps == 0
    assert trainer.step(X, Y).item() > 0


def test_a_batch_of_another_shape_names_the_layer(client):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2)
    with pytest.raises(tg.LayerError, match="layer '0'.*microbatch 0 of step 0"):
        trainer.step(torch.randn(4, 3, 8, 8), Y[:4]).item()
    assert trainer.step(X, Y).item() > 0


def test_thunks_of_another_client_are_refused(client, four):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW)
    with four.as_current():
        x, y = tg.spawn(torch.clone, X, worker=0), tg.spawn(torch.clone, Y, worker=0)
    with pytest.raises(tg.TaskgradError, match="a thunk of another client"):
        trainer.step(x, y)


@pytest.mark.long
def test_a_worker_that_only_holds_the_batch_dies(fresh):
    client = fresh(n_workers=3)
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW)
    x, y = tg.spawn(late, X, worker=2), tg.spawn(torch.clone, Y, worker=2)
    threading.Timer(0.3, client.cluster.scale, [2]).start()  # the newest goes
    with (
        dask.config.set({"taskgrad.worker-deadline": "2s"}),
        pytest.raises(tg.WorkerLostError, match="worker 2"),
    ):
        trainer.step(x, y).item()  # waits for the batch, now or later
    assert trainer.step(X, Y).item() > 0


def late(x):
    time.sleep(8)
    return x


ok = [(X, Y)]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((F.cross_entropy, ADAMW), {"microbatches": 0}, ValueError, "microbatches is a whole"),
        ((F.cross_entropy, ADAMW), {"accumulate": 1.5}, ValueError, "accumulate is a whole"),
        ((F.cross_entropy, ADAMW), {"schedule": "zigzag"}, ValueError, "no schedule 'zigzag'"),
        ((F.cross_entropy, ADAMW), {"amp": "fp8"}, ValueError, "amp is None"),
        ((F.cross_entropy, ADAMW), {"clip_norm": -1}, ValueError, "clip_norm is a positive"),
        ((F.cross_entropy, ADAMW), {"checkpoint": "some"}, ValueError, "checkpoint is"),
        ((F.cross_entropy, ADAMW), {"lr_scheduler": 3}, TypeError, "lr_scheduler is what makes"),
        ((F.cross_entropy, ADAMW), {"param_groups": {"x.*": {}}}, ValueError, "left for 'x.*'"),
        ((F.cross_entropy, 0.1), {}, TypeError, "the optimizer is what makes one"),
        ((F.cross_entropy, torch.optim.SGD([X.clone()])), {}, TypeError, "makes one"),
        ((F.cross_entropy, torch.optim.LBFGS), {}, TypeError, "LBFGS"),
        ((F.cross_entropy, lambda p: p), {}, TypeError, "this one gave a list"),
        (("mse", ADAMW), {}, TypeError, "the loss is a function"),
        ((nn.Bilinear(2, 2, 1), ADAMW), {}, TypeError, "has parameters to train"),
        ((partial(F.cross_entropy, weight=threading.Lock()), ADAMW), {}, TypeError, "pickled"),
    ],
)
@pytest.mark.parametrize("executor", ["compiled"], indirect=True)  # which neither comes to
def test_bad_arguments(client, arguments, options, error, message):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    before = keys_of(client, "start")
    with pytest.raises(error, match=message):
        tg.Trainer(chain, *arguments, **options)
    assert keys_of(client, "start") == before


def test_nothing_to_train(client):
    chain = tg.GraphChain(ConvNet().requires_grad_(False), client=client)
    with pytest.raises(ValueError, match="all of them are frozen"):
        tg.Trainer(chain, F.cross_entropy, ADAMW)
    with pytest.raises(TypeError, match="trains a GraphChain; got ConvNet"):
        tg.Trainer(ConvNet(), F.cross_entropy, ADAMW)


def failing_loader():
    yield X, Y
    yield X, Y
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("loader", "error", "message", "steps"),
    [
        (failing_loader, OSError, "disk gone", 2),
        ([], ValueError, "yielded no batches", 0),
        ([(X, Y), X], ValueError, r"yields pairs \(inputs, targets\)", 1),
        ([(X, Y), (X, Y, X)], ValueError, "yields pairs", 1),
        ([(X, Y), (X, [Y, Y])], tg.LayerError, "'loss'", 1),
    ],
)
def test_loaders_that_go_wrong(client, loader, error, message, steps):
    """What came before counts; the trainer can go on."""
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2)
    with pytest.raises(error, match=message):
        trainer.fit(loader() if callable(loader) else loader, progress=False)
    assert trainer.steps == steps
    assert len(trainer.fit(ok, epochs=2, progress=False)) == 2
    assert trainer.steps == steps + 2


def test_an_iterator_is_used_up_after_one_epoch(client):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW)
    with pytest.raises(ValueError, match="an iterator that an earlier epoch used up"):
        trainer.fit(iter(ok), epochs=2, progress=False)
    assert trainer.steps == 0


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(getattr(store_of(get_worker()), "nap", 0.0))
        return x


def set_nap(seconds: float, dask_worker) -> None:
    store_of(dask_worker).nap = seconds


@pytest.mark.parametrize("nap", [0.6, *long(0.05, 4.0)])
def test_ctrl_c_in_fit(client, nap):
    """Soon back, no work left over, and the step that was under way did not happen."""
    model = ConvNet()
    model[6] = nn.Sequential(nn.ReLU(), Slow())
    chain = tg.GraphChain(model, client=client, placement=[0] * 5 + [1] * 6)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2, accumulate=2)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=2, accumulate=2)
    batches = images(60)
    client.run(set_nap, nap)
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(1.0, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(batches, progress=False)
    assert time.monotonic() - pressed[0] < 2  # as promised, and a deadline; not a measurement
    timer.join()
    client.run(set_nap, 0.0)
    loss = trainer.step(*batches[0])
    taken = trainer.steps - 1
    assert taken < 60
    assert [loss.item()] == plain.train([*batches[:taken], batches[0]])[-1:]
    ours = {n.replace("6.0", "6"): v for n, v in chain.state_dict().items()}
    theirs = plain.model.state_dict()
    assert [n for n, v in theirs.items() if not torch.equal(ours[n], v)] == []
    assert wait_until(lambda: total_held(client)["tapes"] == 0)


@pytest.mark.parametrize("executor", ["compiled", "futures"])
def test_steps_does_not_count_one_that_ctrl_c_ended(client, executor):
    """Nor while its worker is still busy: Ctrl-C does not wait for it."""
    model = ConvNet()
    model[6] = nn.Sequential(nn.ReLU(), Slow())
    chain = tg.GraphChain(model, client=client, placement=[0] * 5 + [1] * 6)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, executor=executor, microbatches=2)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=2)
    batches = images(2)
    losses = [trainer.step(*batches[0]).item()]
    client.run(set_nap, 2.0)  # in each microbatch's forward, of which the first is interrupted
    timer = threading.Timer(0.7, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*batches[1]).item()
    timer.join()
    client.run(set_nap, 0.0)
    assert trainer.steps == 1
    losses.append(trainer.step(*batches[1]).item())
    assert losses == plain.train(batches)
    ours = {n.replace("6.0", "6"): v for n, v in chain.state_dict().items()}
    theirs = plain.model.state_dict()
    assert [n for n, v in theirs.items() if not torch.equal(ours[n], v)] == []


def test_a_worker_that_dies_in_a_step(fresh):
    client = fresh(n_workers=2)
    model = ConvNet()
    model[6] = nn.Sequential(nn.ReLU(), Slow())
    chain = tg.GraphChain(model, client=client, placement=[0] * 5 + [1] * 6)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2)
    trainer.step(X, Y).item()
    client.run(set_nap, 5.0)
    loss = trainer.step(X, Y)
    pid = client.run(os.getpid)[chain.placement[8].worker]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(tg.WorkerLostError, match="worker"):
        loss.item()
    with pytest.raises(tg.TaskgradError, match="lost part of its model"):
        trainer.step(X, Y)


def half_way(dask_worker) -> None:
    """Have the second commit from now on this worker take long, and then not happen."""
    from taskgrad.worker import training

    original, calls = training.commit, itertools.count()

    def stuck(*args, **kwargs):
        if next(calls) != 1:
            return original(*args, **kwargs)
        training.commit = original
        time.sleep(1)
        raise ArithmeticError("commit failed")

    training.commit = stuck


def test_a_step_that_only_some_stages_committed_is_taken_back_by_them(client):
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2, clip_norm=0.5)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=2, clip_norm=0.5)
    batches = images(3)
    client.run(half_way, workers=[chain.placement[9].worker])  # before programs refer to it
    losses = [trainer.step(*batches[0]).item()]
    with pytest.raises(ArithmeticError, match="commit failed"):
        trainer.step(*batches[1]).item()
    assert trainer.steps == 1
    losses += [trainer.step(x, y).item() for x, y in batches[1:]]
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)


def no_refresh(dask_worker) -> None:
    """The second time that copies of tied parameters get their new values here, they do not."""
    from taskgrad.worker import shard_ops

    original, calls = shard_ops.set_parameters, itertools.count()

    def broken(*args, **kwargs):
        if next(calls) != 1:
            return original(*args, **kwargs)
        shard_ops.set_parameters = original
        raise ArithmeticError("no refresh")

    shard_ops.set_parameters = broken


def test_copies_of_tied_parameters_are_refreshed_after_all(client):
    """All stages have committed, and the copies have not got their values."""
    tied = partial(transformer, tied=True)
    chain = tg.GraphChain(tied(), client=client, placement=[0, 0, 1, 1])
    trainer = tg.Trainer(chain, next_token, ADAMW, microbatches=2)
    plain = PlainTrainer(tied(), next_token, ADAMW, microbatches=2)
    batches = tokens(3)
    client.run(no_refresh, workers=[chain.placement[3].worker])
    losses = [trainer.step(*batches[0]).item()]
    with pytest.raises(ArithmeticError, match="no refresh"):
        trainer.step(*batches[1]).item()
    assert trainer.steps == 2
    losses.append(trainer.step(*batches[2]).item())
    expected = plain.train(batches)
    assert losses == [expected[0], expected[2]]
    assert_same_training(chain, plain, client)


def twice(dask_worker) -> None:
    """Have every prepare on this worker run two times, as Dask does if its result is lost."""
    from taskgrad.worker import training

    training.original = training.prepare

    def run_twice(*args, **kwargs):
        training.original(*args, **kwargs)
        return training.original(*args, **kwargs)

    training.prepare = run_twice


def once(dask_worker) -> None:
    from taskgrad.worker import training

    training.prepare = training.original


def test_a_prepare_that_runs_again_scales_gradients_once(client):
    options = {"microbatches": 2, "clip_norm": 0.5}
    chain = tg.GraphChain(ConvNet(), client=client, placement=STAGES)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, amp="fp16", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    options |= {"autocast": torch.float16, "scaler": scaler}
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, **options)
    batches = images(3)
    client.run(twice)
    try:
        losses = [trainer.step(x, y).item() for x, y in batches]
    finally:
        client.run(once)
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)
