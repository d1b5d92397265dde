"""Averages of the weights, kept on the workers: the bits of plain torch's AveragedModel."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import taskgrad as tg
from helpers import assert_same, long_rows
from plain import PlainTrainer, next_token, tokens, transformer
from taskgrad.cluster.tasks import memory
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.worker import averaging, offload, training
from taskgrad.worker.shard import ResidentShard
from test_transaction import Adam, batches, net, set_trap

BOTH = pytest.mark.usefixtures("executor")

DECAY = 0.9
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Averaging(PlainTrainer):
    """Plain torch's loop, with an average; `averages` has it by parameter."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def _update(self):
        super()._update()
        self.averaged.update_parameters(self.model)

    @property
    def averages(self):
        return dict(self.averaged.module.named_parameters())


class Pauses(tg.Callback):
    def on_step(self, trainer, loss):
        time.sleep(random.random() * 0.02)


def averages_of(ema, trainer):
    """The averages by parameter."""
    with ema.applied(trainer):
        state = trainer.chain.state_dict()
    return {name: state[name] for name, _ in trainer.chain.named_parameters_info()}


def assert_same_averages(ema, trainer, plain):
    assert_averages(averages_of(ema, trainer), plain)


def assert_averages(ours, plain):
    theirs = plain.averages
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert_same(ours[name], value.detach(), name)


def tied():
    return transformer(tied=True)


RECIPES = {
    "momentum": (net, F.cross_entropy, SGD, {}),
    "accumulating": (net, F.cross_entropy, Adam, {"accumulate": 2}),
    "clipping": (net, F.cross_entropy, Adam, {"clip_norm": 0.5}),
    "tied over two workers": (tied, next_token, Adam, {}),
    "tied, accumulating, clipping": (tied, next_token, SGD, {"accumulate": 2, "clip_norm": 0.5}),
}


@pytest.mark.parametrize(
    ("recipe", "workers"),
    [
        ("momentum", 2),
        ("tied, accumulating, clipping", 2),
        *long_rows(*[(recipe, 2) for recipe in list(RECIPES)[1:4]], ("momentum", 1)),
    ],
)
def test_fifty_steps_average_as_plain_torch(client, recipe, workers):
    make, loss_fn, optimizer, options = RECIPES[recipe]
    model = make()
    place = [0, 0, 0, 1, 1] if make is net else [0, 0, 1, 1]
    chain = tg.GraphChain(model, client=client, placement=[w % workers for w in place])
    ema = tg.EMA(DECAY)
    trainer = tg.Trainer(
        chain, loss_fn, optimizer, microbatches=2, callbacks=[Pauses(), ema], **options
    )
    plain = Averaging(make(), loss_fn, optimizer, microbatches=2, **options)
    data = batches(50) if make is net else tokens(50, size=4)
    for i in range(0, 50, 10):  # the averages are read in between, too
        losses = [trainer.step(x, y) for x, y in data[i : i + 10]]
        found = averages_of(ema, trainer)  # waits for steps that run
        assert [loss.item() for loss in losses] == plain.train(data[i : i + 10])
        assert_averages(found, plain)
    for name, value in plain.model.state_dict().items():
        assert_same(chain.state_dict()[name], value, name)


def test_a_step_that_fp16_skips_counts_as_in_a_plain_loop(client):
    def large(output, target):
        return 30 * F.cross_entropy(output, target)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(model(), client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, large, SGD, amp="fp16", callbacks=[ema])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plain = Averaging(model(), large, SGD, autocast=torch.float16, scaler=scaler)
    losses = [trainer.step(x, y) for x, y in batches(8)]
    assert [loss.item() for loss in losses] == plain.train(batches(8))
    skipped = [loss.report["skipped"] for loss in losses]
    assert True in skipped
    assert False in skipped
    assert_same_averages(ema, trainer, plain)


@BOTH
@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_is_taken_back_is_not_averaged(client, worker, at):
    """The worker on which nothing raised has made the step, and takes it back."""
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, microbatches=2, callbacks=[ema])
    plain = Averaging(net(), F.cross_entropy, Adam, microbatches=2)
    data = batches(8)
    losses = [trainer.step(x, y).item() for x, y in data[:at]]
    client.run(set_trap, "optimizer", workers=[chain.placement[4 * worker].worker])
    failing = [trainer.step(x, y) for x, y in data[at : at + 2]]
    for loss in failing:
        with pytest.raises(tg.LayerError, match="sprung"):
            loss.item()
    losses += [loss.item() for loss in [trainer.step(x, y) for x, y in data[at:]]]
    assert losses == plain.train(data)
    assert_same_averages(ema, trainer, plain)


def test_a_step_whose_loss_is_not_finite_leaves_the_average_of_the_step_before(client):
    """Workers that waited in it have made copies already, which are put back."""
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, check_finite=True, callbacks=[ema])
    plain = Averaging(net(), F.cross_entropy, Adam)
    for i, (x, y) in enumerate(batches(8)):
        _, failing = trainer.step(x, y), trainer.step(x * torch.nan, y)
        with pytest.raises(tg.LayerError, match="the loss is nan"):
            failing.item()
        assert trainer.steps == i + 1
        plain.train([(x, y)])
    assert_same_averages(ema, trainer, plain)
    for name, value in plain.model.state_dict().items():
        assert_same(chain.state_dict()[name], value, name)


def run_again(dask_worker):
    """Have updates and exchanges on this worker run twice, as Dask does if a result is lost."""
    for module, name in AGAIN:
        original = getattr(module, name)

        def twice(*args, original=original, **kwargs):
            original(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(module, name, twice)
        setattr(module, f"original_{name}", original)


def run_once(dask_worker):
    for module, name in AGAIN:
        setattr(module, name, getattr(module, f"original_{name}"))


AGAIN = [(training, "commit"), (training, "copy_ahead"), (averaging, "exchange_averages")]


@BOTH
def test_what_dask_runs_again_is_done_once(client):
    client.run(run_again)
    try:
        ema = tg.EMA(DECAY)
        chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
        trainer = tg.Trainer(chain, F.cross_entropy, Adam, callbacks=[ema])
        plain = Averaging(net(), F.cross_entropy, Adam)
        for data in batches(4), batches(2):
            assert [trainer.step(x, y).item() for x, y in data] == plain.train(data)
            assert_same_averages(ema, trainer, plain)
    finally:
        client.run(run_once)


@BOTH
def test_the_weights_come_back_to_the_bit(client):
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(tied(), client=client, placement=[0, 0, 1, 1])
    trainer = tg.Trainer(chain, next_token, SGD, microbatches=2, callbacks=[ema])
    plain = Averaging(tied(), next_token, SGD, microbatches=2)
    data, new = tokens(6), tokens(9)[6:]
    losses = [trainer.step(x, y) for x, y in data]
    trained = chain.state_dict()
    for _ in range(2):
        with contextlib.suppress(ArithmeticError), ema.applied(trainer):
            assert not torch.equal(chain.state_dict()["3.weight"], trained["3.weight"])
            raise ArithmeticError
        for name, value in trained.items():
            assert_same(chain.state_dict()[name], value, name)
        assert_same(chain.to_module()[3].weight.detach(), trained["3.weight"])
    assert [loss.item() for loss in losses] == plain.train(data)
    losses = [trainer.step(x, y).item() for x, y in new]  # copies on the other worker are back, too
    assert losses == plain.train(new)
    assert_same_averages(ema, trainer, plain)


def test_what_reads_the_weights_sees_the_averages(client):
    """As the averaged module of plain torch, on both workers that have the tied parameter."""
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(tied(), client=client, placement=[0, 0, 1, 1])
    trainer = tg.Trainer(chain, next_token, SGD, microbatches=2, callbacks=[ema])
    plain = Averaging(tied(), next_token, SGD, microbatches=2)
    data = tokens(6)
    assert [trainer.step(x, y).item() for x, y in data] == plain.train(data)
    averaged = tied().eval()
    averaged.load_state_dict(plain.averaged.module.state_dict())
    x, y = data[0]
    expected = averaged(x).detach()
    with ema.applied(trainer):
        assert_same(next(trainer.predict([x])), expected)
        assert_same(tg.collect(chain.eval()(x)).detach(), expected)
        assert_same(chain.to_module().eval()(x).detach(), expected)
        found = trainer.evaluate([(x, y)])["loss"]
        submitted = chain.eval()(x).persist()
    assert found == next_token(expected, y).item()
    assert_same(tg.collect(submitted).detach(), expected)
    assert trainer.evaluate([(x, y)])["loss"] != found


class Reads(tg.Callback):
    """Notes the averages and the validation loss after each step, without saying so before."""

    def __init__(self, ema, validation):
        self.ema, self.validation, self.averages, self.losses = ema, validation, [], []

    def on_step(self, trainer, loss):
        with self.ema.applied(trainer):
            time.sleep(random.random() * 0.02)
            self.averages.append(trainer.chain.state_dict())
            self.losses.append(trainer.evaluate(self.validation)["loss"])
        time.sleep(random.random() * 0.02)


@BOTH
def test_a_callback_reads_the_averages_of_its_own_step(client):
    ema, data = tg.EMA(DECAY), batches(12)
    reads = Reads(ema, data[:1])
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, microbatches=2, callbacks=[reads, ema])
    plain = Averaging(net(), F.cross_entropy, Adam, microbatches=2)
    losses = [trainer.step(x, y) for x, y in data]
    trainer.wait()
    for i, (x, y) in enumerate(data):
        assert losses[i].item() == plain.train([(x, y)])[0]
        for name, value in plain.averages.items():
            assert_same(reads.averages[i][name], value.detach(), name)
        assert reads.losses[i] == validation_loss(plain, *data[0])


def validation_loss(plain, x, y, averages=True):
    """Of the averages, or of the weights; both with the buffers of now."""
    model = net().eval()
    model.load_state_dict(plain.model.state_dict() | (plain.averages if averages else {}))
    return F.cross_entropy(model(x), y).item()


@pytest.mark.parametrize("validate", [True, False])
def test_fit_validates_the_averages(client, validate):
    ema, data = tg.EMA(DECAY, validate=validate), batches(5)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    options = {"microbatches": 2, "accumulate": 2}
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, callbacks=[ema], **options)
    plain = Averaging(net(), F.cross_entropy, Adam, **options)
    for train in (data[:1], data[1:], data):  # no step of the optimizer in the first
        [results] = trainer.fit(train, 1, val_loader=data[:1], progress=False)
        plain.train(train)
        averages = validate and train is not data[:1] and len(train) > 1
        assert results["val_loss"] == validation_loss(plain, *data[0], averages)
        for name, value in plain.model.state_dict().items():
            assert_same(chain.state_dict()[name], value, name)
    assert_same_averages(ema, trainer, plain)


def test_a_validation_that_raises_puts_the_weights_back(client):
    def fails(output, targets):
        raise ArithmeticError

    ema, data = tg.EMA(DECAY), batches(3)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, callbacks=[ema])
    plain = Averaging(net(), F.cross_entropy, Adam)
    with pytest.raises(tg.LayerError, match="ArithmeticError"):
        trainer.fit(data, 1, val_loader=data, metrics={"fails": fails}, progress=False)
    assert trainer.step(*data[0]).item() == plain.train([*data, data[0]])[-1]
    assert_same_averages(ema, trainer, plain)


def test_what_would_mix_weights_and_averages_is_refused(client, tmp_path):
    ema, other = tg.EMA(DECAY), tg.EMA(DECAY)
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, callbacks=[ema])
    with pytest.raises(tg.TaskgradError, match="no average of the weights yet"):
        ema.applied(trainer).__enter__()
    with pytest.raises(ValueError, match="not among the callbacks"):
        other.applied(trainer).__enter__()
    [batch] = batches(1)
    trainer.step(*batch)
    trainer.save(tmp_path / "before")
    trained = chain.state_dict()
    with ema.applied(trainer):
        averages = chain.state_dict()
        for refused in (
            lambda: trainer.step(*batch),
            lambda: trainer.fit([batch], progress=False),
            lambda: trainer.save(tmp_path / "within"),
            lambda: tg.Trainer.restore(tmp_path / "before", chain, F.cross_entropy, SGD),
            lambda: tg.Trainer(chain, F.cross_entropy, SGD),
            lambda: tg.Optimizer(chain, SGD),
            lambda: chain.load_state_dict(averages),
            lambda: ema.applied(trainer).__enter__(),
        ):
            with pytest.raises(tg.TaskgradError, match=r"block of EMA\.applied"):
                refused()
        assert trainer.steps == 1
        assert not (tmp_path / "within").exists()
        for name, value in averages.items():
            assert_same(chain.state_dict()[name], value, name)
    for name, value in trained.items():
        assert_same(chain.state_dict()[name], value, name)
    trainer.step(*batch).item()


def test_loading_weights_leaves_the_averages(client):
    """A state is loaded after the step before it was averaged; one that fails changes nothing."""
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, callbacks=[ema])
    plain = Averaging(net(), F.cross_entropy, SGD)
    data, zeros = batches(4), {n: torch.zeros_like(v) for n, v in net().state_dict().items()}
    for i, (x, y) in enumerate(data):
        assert trainer.step(x, y).item() == plain.train([(x, y)])[0]
        if i == 1:
            chain.load_state_dict(zeros)
            plain.model.load_state_dict(zeros)
    assert_same_averages(ema, trainer, plain)


@BOTH
@pytest.mark.parametrize("steps", [5, 6])
def test_a_checkpoint_has_the_averages_for_any_placement(client, tmp_path, steps):
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(tied(), client=client, placement=[0, 0, 1, 1])
    options = {"microbatches": 2, "accumulate": 2}
    trainer = tg.Trainer(chain, next_token, Adam, callbacks=[ema], **options)
    plain = Averaging(tied(), next_token, Adam, **options)
    data = tokens(steps + 5)
    assert [trainer.step(x, y).item() for x, y in data[:steps]] == plain.train(data[:steps])
    trainer.save(tmp_path)
    for placement in ([1, 0, 0, 0], [0, 0, 0, 0]):
        again = tg.EMA(DECAY)
        other = tg.GraphChain(tied(), client=client, placement=placement)
        restored = tg.Trainer.restore(tmp_path, other, next_token, Adam, callbacks=[again])
        assert_same_averages(again, restored, plain)
    assert [restored.step(x, y).item() for x, y in data[steps:]] == plain.train(data[steps:])
    assert_same_averages(again, restored, plain)


def test_a_checkpoint_with_averages_and_a_trainer_without_and_the_other_way(
    client, tmp_path, caplog
):
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, callbacks=[ema])
    for x, y in batches(3):
        trainer.step(x, y)
    trainer.save(tmp_path)
    restored = tg.Trainer.restore(tmp_path, chain, F.cross_entropy, SGD)
    weights = sum(chain.memory().column("parameters"))
    assert sum(chain.memory().column("optimizer")) == weights  # the momentum alone
    restored.save(tmp_path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "taskgrad"):
        restored = tg.Trainer.restore(tmp_path, chain, F.cross_entropy, SGD, callbacks=[ema])
    assert "has no averages of the weights: EMA begins with the next step" in caplog.text
    with pytest.raises(tg.TaskgradError, match="no average of the weights yet"):
        ema.applied(restored).__enter__()
    restored.step(*batches(1)[0])
    for name, value in averages_of(ema, restored).items():
        assert_same(value, chain.state_dict()[name], name)


def test_a_restore_that_fails_leaves_the_averages(client, tmp_path):
    """It has written into the parameters of a step that was yet to be averaged."""
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    groups = {"*.bias": {"foreach": False}}
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, callbacks=[ema], param_groups=groups)
    plain = Averaging(net(), F.cross_entropy, Adam)
    data = batches(4)
    losses = [trainer.step(*data[0]).item()]
    trainer.save(tmp_path)
    losses += [trainer.step(x, y).item() for x, y in data[1:3]]
    with pytest.raises(tg.CheckpointError, match="are in one group"):
        tg.Trainer.restore(
            tmp_path, chain, F.cross_entropy, Adam, callbacks=[tg.EMA()], param_groups={}
        )
    losses.append(trainer.step(*data[3]).item())
    assert losses == plain.train(data)
    assert_same_averages(ema, trainer, plain)


def test_memory_of_the_averages_counts(client):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    ema = tg.EMA(DECAY)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    trainer = tg.Trainer(chain, F.cross_entropy, sgd, callbacks=[ema])
    trainer.step(*batches(1)[0])
    with ema.applied(trainer):
        pass
    held = chain.memory()
    assert held.column("optimizer") == held.column("parameters")


def move_to_files(dask_worker, size):
    """As for a worker without memory: what training keeps lies in files, from this size on."""
    offload._LEAST = size
    store = store_of(dask_worker)
    for shard in store.entries().values():
        if isinstance(shard, ResidentShard):
            spilled = shard.training.spilled = offload.SpilledState(store.folder)
            shard.training.copies = offload.CopiesInFiles(store.folder, spilled)


def test_averages_in_files_have_the_same_bits(client, tmp_path):
    ema = tg.EMA(DECAY)
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, callbacks=[ema])
    plain = Averaging(net(), F.cross_entropy, Adam)
    data, least = batches(8), offload._LEAST
    client.run(move_to_files, size=8)
    try:
        losses = [trainer.step(x, y).item() for x, y in data[:3]]
        client.run(set_trap, "optimizer", workers=[chain.placement[4].worker])
        with pytest.raises(tg.LayerError, match="sprung"):
            trainer.step(*data[3]).item()
        losses.append(trainer.step(*data[3]).item())
        assert losses == plain.train(data[:4])
        assert_same_averages(ema, trainer, plain)
        in_memory = chain.memory()
        assert sum(in_memory.column("optimizer")) < 8 * 4 + 1  # counts of steps
        trainer.save(tmp_path)
        again = tg.EMA(DECAY)
        restored = tg.Trainer.restore(tmp_path, chain, F.cross_entropy, Adam, callbacks=[again])
        client.run(move_to_files, size=8)
        assert [restored.step(x, y).item() for x, y in data[4:]] == plain.train(data[4:])
        assert_same_averages(again, restored, plain)
    finally:
        client.run(move_to_files, size=least)


def leave_free(dask_worker, megabytes):
    """Leave the process so much of the memory that it may use."""
    dask_worker.held_by_somebody = None
    used, limit = memory(dask_worker)
    size = limit - used - (megabytes << 20)
    dask_worker.held_by_somebody = torch.ones(size, dtype=torch.uint8)


def test_averages_that_do_not_fit_go_to_files_or_are_refused(fresh, caplog):
    """With 256 MiB of parameters: 288 without averages, 544 with them, 352 with those in files."""
    client = fresh(n_workers=1, memory_limit="3GiB")
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    make = [functools.partial(nn.Linear, 2048, 2048)] * 16
    chain = tg.GraphChain(lambda: nn.Sequential(*(linear() for linear in make)), client=client)
    client.run(leave_free, megabytes=450)
    tg.Trainer(chain, F.mse_loss, sgd)
    assert "averages in files" not in caplog.text
    tg.Trainer(chain, F.mse_loss, sgd, callbacks=[tg.EMA()])
    assert "256.12 MiB of optimizer state and averages in files" in caplog.text
    client.run(leave_free, megabytes=250)
    with pytest.raises(tg.MemoryLimitError, match="even with the optimizer state and averages in"):
        tg.Trainer(chain, F.mse_loss, sgd, callbacks=[tg.EMA()])


def test_a_parameter_that_its_layer_writes_is_refused(client):
    torch.manual_seed(0)
    layers = nn.Embedding(11, 4, max_norm=0.1), nn.Flatten(), nn.Linear(16, 3)
    chain = tg.GraphChain(nn.Sequential(*layers), client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, Adam, callbacks=[tg.EMA(DECAY)])
    x, y = torch.randint(11, (6, 4)), torch.randint(3, (6,))
    trainer.step(x, y).item()
    with pytest.raises(tg.TaskgradError, match=r"wrote the parameter '0\.weight' itself"):
        trainer.step(x, y).item()


@pytest.mark.parametrize(("decay", "kind"), [(0, ValueError), (1.0, ValueError), ("1", TypeError)])
def test_a_decay_is_between_zero_and_one(decay, kind):
    with pytest.raises(kind, match="between 0 and 1"):
        tg.EMA(decay)


def test_a_trainer_keeps_one_average(client):
    chain = tg.GraphChain(net(), client=client)
    before = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    with pytest.raises(ValueError, match="2 EMA"):
        tg.Trainer(chain, F.cross_entropy, SGD, callbacks=[tg.EMA(), tg.EMA(0.9)])
    assert client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == before
