"""The Trainer as a user meets it: data, steps, loops, what runs where and when."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from functools import partial

import dask
import dask.array as da
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from distributed import get_worker
from distributed.diagnostics.plugin import SchedulerPlugin
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from plain import ConvNet, PlainTrainer, assert_same_training, images
from taskgrad.cluster.worker_plugin import store_of

pytestmark = pytest.mark.usefixtures("executor")

SGD = partial(torch.optim.SGD, lr=0.1)


def small(client, **options) -> tg.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    return tg.Trainer(chain, F.mse_loss, SGD, **options)


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(size)
    return torch.randn(size, 4), torch.randn(size, 1)


# -- steps ---------------------------------------------------------------------------------------


def test_a_step_does_not_wait_and_its_loss_does(client):
    event = "test_a_step_does_not_wait"
    trainer = waiting_trainer(client, event)
    loss = trainer.step(*batch())
    assert not loss.done
    assert "on its way" in repr(loss)
    client.run(set_flag, event)
    assert float(loss) == loss.item() > 0
    assert f"{loss:.1f}" == f"{loss.item():.1f}"
    assert loss.done
    assert (loss.step, loss.size) == (0, 8)


class WaitsFor(nn.Module):
    """Waits in its forward until somebody sets this flag in its process."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag

    def forward(self, x):
        for _ in range(2000):
            if getattr(store_of(get_worker()), self.flag, False):
                return x
            time.sleep(0.01)
        raise TimeoutError(self.flag)


def set_flag(name: str, dask_worker=None) -> None:
    setattr(store_of(dask_worker), name, True)


def waiting_trainer(client, flag: str, **options) -> tg.Trainer:
    model = nn.Sequential(nn.Linear(4, 4), WaitsFor(flag), nn.Linear(4, 1))
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 1])
    return tg.Trainer(chain, F.mse_loss, SGD, **options)


def test_the_next_steps_input_is_there_before_this_step_ends(client):
    event = "test_prefetch"
    trainer = waiting_trainer(client, event, executor="futures")
    first = trainer.step(*batch())
    # Large enough to be sent ahead, and not in the graph.
    second = trainer.step(torch.randn(16384, 4), torch.randn(16384, 1))
    workers = sorted(client.nthreads())
    stage = trainer.chain.placement[0].worker
    assert stage in workers
    assert wait_until(lambda: any(key.startswith("input") for key in client.has_what()[stage]))
    assert not first.done
    assert not second.done
    client.run(set_flag, event)
    assert second.item() > 0


class Graphs(SchedulerPlugin):
    """Counts the graphs that a client submits."""

    name = "graphs"

    def __init__(self) -> None:
        self.count = 0

    def update_graph(self, scheduler, **kwargs) -> None:
        self.count += 1


def graphs(dask_scheduler) -> int:
    return dask_scheduler.plugins["graphs"].count


def test_a_step_is_one_graph(client):
    trainer = small(client, microbatches=4, clip_norm=1.0, executor="futures")
    client.register_plugin(Graphs())
    try:
        before = client.run_on_scheduler(graphs)
        trainer.step(*batch()).item()
        assert client.run_on_scheduler(graphs) == before + 1
    finally:
        client.unregister_scheduler_plugin("graphs")


def test_compiled_steps_are_no_graphs(client):
    trainer = small(client, microbatches=4, clip_norm=1.0, executor="compiled")
    client.register_plugin(Graphs())
    try:
        trainer.step(*batch()).item()  # starts a task on each worker
        before = client.run_on_scheduler(graphs)
        for _ in range(20):
            trainer.step(*batch()).item()
        assert client.run_on_scheduler(graphs) == before
    finally:
        client.unregister_scheduler_plugin("graphs")


class CountsTapes(nn.Module):
    """Remembers the most tapes that its worker held when it ran, this one not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        store = store_of(get_worker())
        store.most = max(getattr(store, "most", 0), store.held()["tapes"])
        return x * self.weight


def most_tapes(dask_worker) -> int:
    found = store_of(dask_worker).most
    del store_of(dask_worker).most
    return found + 1


@pytest.mark.parametrize(("schedule", "peaks"), [("1f1b", [4, 3, 2, 1]), ("gpipe", [6] * 4)])
def test_tapes_are_as_many_as_the_schedule_says(four, schedule, peaks):
    wait_until(lambda: not any(total_held(four).values()))
    model = nn.Sequential(*(CountsTapes() for _ in range(4)))
    chain = tg.GraphChain(model, client=four, placement=[0, 1, 2, 3])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=6, schedule=schedule)
    trainer.step(torch.ones(6, 2), torch.zeros(6, 2)).item()
    most = four.run(most_tapes)
    assert [most[row.worker] for row in chain.placement] == peaks
    assert total_held(four)["tapes"] == 0


def test_many_steps_leave_nothing(client):
    trainer = small(client, microbatches=3)
    most = 0
    for _ in range(40):
        loss = trainer.step(*batch())
        most = max(most, client.run_on_scheduler(tasks))
    assert most < 40 * 16  # and not those of all steps: 20 each, and what they wait for
    loss.item()
    trainer.wait()
    held = {"shards": 2, "tapes": 0, "gradients": 0, "parts": 0}
    assert wait_until(lambda: total_held(client) == held)
    assert wait_until(lambda: client.run_on_scheduler(tasks) < 10)
    del trainer, loss
    gc.collect()
    assert wait_until(lambda: not any(total_held(client).values()))


def tasks(dask_scheduler) -> int:
    return len(dask_scheduler.tasks)


def test_report(client):
    trainer = small(client, microbatches=2, clip_norm=0.5)
    report = trainer.step(*batch()).report
    assert 0 <= report["bubble"] < 1
    assert report["grad_norm"] > 0
    assert report["skipped"] is False


# -- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "dask.array", "delayed", "thunk"])
def test_kinds_of_data_give_the_same_bits(client, kind):
    """Dask collections are cut on the workers, whatever their chunks."""
    make = {
        "numpy": lambda t, i: t.numpy(),
        "dask.array": lambda t, i: da.from_array(t.numpy(), chunks=(3, *t.shape[1:])),
        "delayed": lambda t, i: dask.delayed(np.asarray)(t.numpy()),
        "thunk": lambda t, i: tg.spawn(torch.clone, t, worker=i),
    }[kind]
    trainer, other = small(client, microbatches=3), small(client, microbatches=3)
    for _ in range(3):
        x, y = batch()
        expected = other.step(x, y)
        with client.as_current():  # tests may have others open
            loss = trainer.step(make(x, 0), make(y, 1))
        assert loss.item() == expected.item()


def test_data_on_a_worker_does_not_pass_the_driver(client):
    trainer = small(client, microbatches=2)
    with client.as_current():
        x = tg.spawn(torch.ones, 100_000, 4, worker=1)
        y = tg.spawn(torch.zeros, 100_000, 1, worker=1)
    read = client.run_on_scheduler(bytes_of_driver)
    trainer.step(x, y).item()
    assert client.run_on_scheduler(bytes_of_driver) - read < 200_000


def bytes_of_driver(dask_scheduler=None) -> int:
    """What passed through this process, where client and scheduler are."""
    counters = psutil.Process().io_counters()
    return counters.read_chars + counters.write_chars


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor
    scale: float


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, both):
        return self.linear(both.left + both.right.T) * both.scale


def test_batches_are_pytrees_with_batch_dimensions_of_their_own(client):
    torch.manual_seed(0)
    join = Join()
    data = Pair(torch.randn(5, 3), torch.randn(3, 5), 2.0)
    target = {"values": torch.randn(5, 3), "weights": torch.rand(3)}
    chain = tg.GraphChain(nn.Sequential(join, nn.Tanh()), client=client)
    trainer = tg.Trainer(
        chain,
        weighted_loss,
        SGD,
        microbatches=2,
        in_dims=Pair(0, 1, None),
        target_dims={"values": 0, "weights": None},
    )
    loss = trainer.step(data, target).item()
    weights = []
    for part in (slice(0, 3), slice(3, 5)):
        piece = Pair(data.left[part], data.right[:, part], 2.0)
        goal = {**target, "values": target["values"][part]}
        share = len(piece.left) / 5
        weights.append(weighted_loss(torch.tanh(join(piece)), goal).detach() * share)
    assert loss == float(weights[0] + weights[1])


def weighted_loss(output, target):
    return ((output - target["values"]).square() * target["weights"]).mean()


@pytest.mark.parametrize("microbatches", [2, 5])
def test_a_loss_that_is_a_sum_is_not_weighted(client, microbatches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1))
    x, y = batch(3)
    expected = F.mse_loss(model(x), y, reduction="sum")
    chain = tg.GraphChain(model, client=client)
    trainer = tg.Trainer(chain, nn.MSELoss(reduction="sum"), SGD, microbatches=microbatches)
    torch.testing.assert_close(torch.tensor(trainer.step(x, y).item()), expected.detach())


# -- batch norm, compiled layers -------------------------------------------------------------------


def test_deferred_batch_norm_has_the_statistics_of_the_whole_batch(client):
    batches = images(3, 9)
    chain = tg.GraphChain(ConvNet(), client=client)
    no_change = partial(torch.optim.SGD, lr=0.0)
    trainer = tg.Trainer(
        chain, F.cross_entropy, no_change, microbatches=4, deferred_batch_norm=True
    )
    for x, y in batches:
        trainer.step(x, y)
    trainer.wait()
    first = nn.Sequential(*list(ConvNet())[:2])
    for x, _ in batches:
        first(x)
    state = chain.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(state[f"1.{name}"], first[1].state_dict()[name])
    module = chain.to_module()
    assert module[1].track_running_stats
    assert not module[1]._forward_pre_hooks


def test_compiled_layers(client):
    chain = tg.GraphChain(ConvNet(), client=client, placement=[0] * 5 + [1] * 5)
    options = {"backend": "aot_eager"}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=2, compile=options)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=2)
    losses = [trainer.step(x, y) for x, y in images(2)]
    expected = plain.train(images(2))
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)
    assert all(client.run(compiled).values())
    assert chain.to_module()[0]._compiled_call_impl is None


def compiled(dask_worker) -> bool:
    stages = [e for e in store_of(dask_worker).entries().values() if hasattr(e, "layers")]
    return any(m._compiled_call_impl is not None for m in stages[-1].layers.values())


# -- loops ---------------------------------------------------------------------------------------


class Notes(tg.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[dict] = []

    def on_step(self, trainer, loss) -> None:
        assert loss.done
        self.steps.append(loss.step)

    def on_epoch(self, trainer, epoch, results) -> None:
        self.epochs.append(results)


def test_fit_is_steps_over_epochs(client, capsys):
    notes = Notes()
    batches = [batch(8), batch(4)]
    trainer = small(client, microbatches=2, callbacks=[notes])
    history = trainer.fit(batches, epochs=2, val_loader=[batch(6)], metrics={"mae": F.l1_loss})
    other = small(client, microbatches=2)
    losses = [other.step(x, y).item() for _ in range(2) for x, y in batches]
    means = [(a * 8 + b * 4) / 12 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert [h["loss"] for h in history] == pytest.approx(means)
    assert notes.steps == [0, 1, 2, 3]
    assert notes.epochs == history
    assert history[1].keys() == {"loss", "val_loss", "val_mae"}
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert "bubble" in shown
    assert "samples/s" in shown


def test_evaluate_and_predict_are_the_model_in_evaluation_mode(client):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    batches = [batch(8), batch(5), batch(2)]
    model.eval()
    outputs = [model(x).detach() for x, _ in batches]
    found = list(trainer.predict(x for x, _ in batches))
    assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
    results = trainer.evaluate(batches, {"mae": F.l1_loss})
    both = [torch.cat(outputs), torch.cat([y for _, y in batches])]
    assert results == pytest.approx(
        {"loss": F.mse_loss(*both).item(), "mae": F.l1_loss(*both).item()}
    )
    assert total_held(client)["tapes"] == 0
    # and training goes on in training mode
    assert trainer.step(*batch()).item() != pytest.approx(F.mse_loss(outputs[0], batch()[1]).item())


def test_predict_takes_as_it_gives(client):
    """However long the input is, only a few batches are on the way."""
    trainer = small(client)
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield torch.ones(1, 4)

    outputs = trainer.predict(endless())
    for _ in range(3):
        next(outputs)
    assert len(taken) < 10
    outputs.close()


def test_two_trainers_take_turns(client):
    """Training state belongs to the trainer that was made last; another chain is not touched."""
    one, two = small(client, microbatches=2), small(client, microbatches=2)
    first = [one.step(*batch()) for _ in range(2)]
    second = [two.step(*batch()) for _ in range(2)]
    assert [a.item() for a in first] == [b.item() for b in second]


def test_several_threads_a_worker(fresh):
    """Random streams and the order of gradients do not depend on who runs when."""
    client = fresh(n_workers=2, threads_per_worker=3)
    chain = tg.GraphChain(ConvNet(), client=client, placement=[0] * 5 + [1] * 5)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=4)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=4)
    losses = [trainer.step(x, y) for x, y in images(5)]
    assert [loss.item() for loss in losses] == plain.train(images(5))
    assert_same_training(chain, plain, client)
