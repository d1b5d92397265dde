"""Whatever a trainer or an optimizer cannot work with is refused before anything is submitted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

import taskgrad as tg
from conftest import keys_of
from plain import PlainTrainer, assert_same_training
from taskgrad.plan.rules import schedule
from taskgrad.plan.schedule import Pipeline

SGD = partial(torch.optim.SGD, lr=0.05)
MSE = nn.functional.cross_entropy


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


torch.manual_seed(1)
X, Y = torch.randn(6, 4), torch.randint(3, (6,))


class Silent:
    """No callback: it has but one of the methods."""

    def on_step(self, trainer, loss):
        pass


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


BAD = [
    *(("seed", v, TypeError) for v in ("1", None, float("nan"), 1.5, 1.0, True, [1])),
    *(("schedule", v, TypeError) for v in (None, 3, Pipeline, ["1f1b"])),
    ("schedule", "1F1B", ValueError),
    *(("executor", v, ValueError) for v in ("dask", None, True, "Compiled")),
    *(("in_dims", v, TypeError) for v in ("0", 0.0, True, {"x": "0"}, (0, 1.5))),
    *(("target_dims", v, TypeError) for v in ("0", 1.0, [None, "1"])),
    *(("callbacks", v, TypeError) for v in ("x", None, tg.Callback, tg.Callback(), 3)),
    *(("callbacks", v, TypeError) for v in (["x"], [tg.Callback], [None], [Silent()], [print])),
    *(("check_finite", v, TypeError) for v in ("no", 1, None, [])),
    *(("deferred_batch_norm", v, TypeError) for v in ("yes", 0, None)),
    *(("compile", v, TypeError) for v in ("yes", 1, None, ["mode"], {1: 2})),
    *(("clip_norm", v, TypeError) for v in ("1", True, [1.0], torch.ones(2), 1j)),
    *(("clip_norm", v, ValueError) for v in (float("nan"), 0, -1, float("-inf"))),
    *(("clip_value", v, TypeError) for v in ("1", (1,))),
    *(("clip_value", v, ValueError) for v in (float("nan"), -0.5, 0.0)),
    *(("accumulate", v, ValueError) for v in (0, -1, 1.5, True, "2", None)),
    *(("microbatches", v, ValueError) for v in (0, 2.0, True, "2", None, float("inf"))),
    *(("amp", v, ValueError) for v in ("FP16", "fp8", True, torch.bfloat16, ["bf16"])),
    *(("checkpoint", v, ValueError) for v in ("sometimes", None, True, ["always"], nn.ReLU)),
    *(("checkpoint", v, TypeError) for v in (lambda name: "yes", lambda name: None)),
    *(("param_groups", v, TypeError) for v in ([{"lr": 1}], "*.bias", {"*": 0.1}, {3: {}})),
    ("param_groups", {"*.bias": {"weight_decy": 0.1}}, ValueError),
    ("param_groups", {"*.bias": {"lr": 0.1}, "*": {"betas": (0.9, 0.99)}}, ValueError),
    *(("lr_scheduler", v, TypeError) for v in (3, "StepLR", StepLR(SGD(net().parameters()), 1))),
    *(("loss_fn", v, TypeError) for v in (nn.CrossEntropyLoss, 1, "mse", torch.Tensor)),
    *(("loss_weight", v, TypeError) for v in (1, True, int, ["labels"])),
    *(("optimizer", v, TypeError) for v in (None, "SGD", SGD(net().parameters()), nn.Linear)),
    *(("optimizer", v, TypeError) for v in (torch.optim.LBFGS, NeedsClosure, torch.ones)),
]


@pytest.fixture
def chain(client):
    return tg.GraphChain(net(), client=client, placement=[0, 0, 1])


def test_arguments(client, chain):
    """Each is one error that names the argument, and nothing has run on a worker for it."""
    before = keys_of(client, "start") | keys_of(client, "use")
    wrong = []
    for name, value, error in BAD:
        given = {"loss_fn": MSE, "optimizer": SGD, name: value}
        try:
            tg.Trainer(chain, **given)
        except error as raised:
            word = {"loss_fn": "loss", "schedule": "schedule"}.get(name, name.partition("_")[0])
            if word not in str(raised):
                wrong.append((name, value, raised))
        except Exception as raised:
            wrong.append((name, value, raised))
        else:
            wrong.append((name, value, "taken"))
    assert wrong == []
    assert keys_of(client, "start") | keys_of(client, "use") == before
    assert tg.Trainer(chain, MSE, SGD).step(X, Y).item() > 0


@pytest.mark.parametrize("chain", [None, net(), "chain", tg.GraphChain])
def test_something_else_than_a_chain(client, chain):
    for make in (lambda: tg.Trainer(chain, MSE, SGD), lambda: tg.Optimizer(chain, SGD)):
        with pytest.raises(TypeError, match="a GraphChain; got"):
            make()
    with pytest.raises(TypeError, match="a GraphChain; got"):
        tg.Trainer.restore("nowhere", chain, MSE, SGD)


@pytest.mark.parametrize(
    "factory",
    [None, "SGD", 0.1, SGD(net().parameters()), torch.optim.LBFGS, NeedsClosure, nn.Linear],
)
def test_what_makes_no_optimizer(client, chain, factory):
    before = keys_of(client, "optimizer")
    with pytest.raises(TypeError, match="optimizer"):
        tg.Optimizer(chain, factory)
    assert keys_of(client, "optimizer") == before


@pytest.mark.parametrize(
    "options",
    [
        {"seed": np.int64(7)},
        {"seed": -1},
        {"seed": 2**80},
        {"clip_norm": np.float32(0.5)},
        {"clip_norm": 1},
        {"clip_norm": float("inf")},
        {"clip_norm": torch.tensor(0.5)},
        {"microbatches": 1000},
        {"callbacks": (tg.Callback(),)},
        {"checkpoint": lambda name: name == "1"},
        {"param_groups": {}},
        {"in_dims": None, "target_dims": 0},
        {"schedule": lambda pipeline, m: schedule("gpipe", pipeline, m)},
        {"compile": False, "check_finite": True, "deferred_batch_norm": np.bool_(False)},
    ],
)
def test_what_is_right_is_taken(client, chain, options):
    trainer = tg.Trainer(chain, MSE, SGD, **options)
    assert trainer.step(X, Y).item() > 0


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda pipeline, m: None, TypeError, "it gave None"),
        (lambda pipeline, m: "1f1b", TypeError, "it gave '1f1b'"),
        (lambda pipeline, m: schedule("1f1b", pipeline, m + 1), ValueError, "of 3 microbatches"),
        (lambda pipeline, m: schedule("1f1b", Pipeline.line(5), m), ValueError, "and not of 2"),
    ],
)
def test_a_schedule_that_is_none(client, chain, made, error, message):
    trainer = tg.Trainer(chain, MSE, SGD, microbatches=2, schedule=made)
    before = keys_of(client, "forward")
    with pytest.raises(error, match=message):
        trainer.step(X, Y)
    assert keys_of(client, "forward") == before
    assert trainer.steps == 0


OK = [(X, Y)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loader": 3}, TypeError, "loader is something to iterate over"),
        ({"loader": None}, TypeError, "loader is something to iterate over"),
        ({"loader": "text"}, TypeError, "loader is something to iterate over"),
        ({"loader": list}, TypeError, "loader is something to iterate over"),
        ({"val_loader": 3}, TypeError, "val_loader is something to iterate over"),
        ({"val_loader": "text"}, TypeError, "val_loader is something to iterate over"),
        ({"epochs": -1}, ValueError, "epochs is at least 0"),
        ({"epochs": 1.5}, TypeError, "epochs is a whole number"),
        ({"epochs": True}, TypeError, "epochs is a whole number"),
        ({"epochs": "3"}, TypeError, "epochs is a whole number"),
        ({"epochs": None}, TypeError, "epochs is a whole number"),
        ({"epochs": 2, "val_loader": iter([(X, Y)])}, ValueError, "an earlier epoch used up"),
        ({"val_loader": []}, ValueError, "val_loader is empty"),
        ({"val_loader": [X]}, ValueError, "val_loader yields pairs"),
        ({"progress": "no"}, TypeError, "progress is True or False"),
        ({"metrics": [F.l1_loss]}, TypeError, "metrics has functions by name"),
        ({"metrics": F.l1_loss}, TypeError, "metrics has functions by name"),
        ({"metrics": {"m": 3}}, TypeError, "the metric 'm' is a function"),
        ({"metrics": {"m": nn.L1Loss}}, TypeError, r"give an instance, L1Loss\(\)"),
        ({"metrics": {3: F.l1_loss}}, TypeError, "functions by name"),
        ({"metrics": {"loss": F.l1_loss}}, ValueError, "another name"),
    ],
)
def test_fit_evaluate_and_predict_refuse_before_a_step(client, chain, arguments, error, message):
    trainer = tg.Trainer(chain, MSE, SGD)
    given = {"loader": OK, "val_loader": OK, "progress": False} | arguments
    with pytest.raises(error, match=message):
        trainer.fit(**given)
    if "metrics" in arguments:
        with pytest.raises(error, match=message):
            trainer.evaluate(OK, **arguments)
    if "loader" in arguments:
        for call in (trainer.evaluate, trainer.predict):
            with pytest.raises(error, match=message):
                call(arguments["loader"])
    assert trainer.steps == 0
    assert len(trainer.fit(OK, 2, progress=False)) == 2
    assert trainer.fit(OK, 0, progress=False) == []


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (None, None, "hold tensors or arrays"),
        ("text", Y, "hold tensors or arrays"),
        (["a", "b"], Y, "hold tensors or arrays"),
        (X[:0], Y[:0], "the batch is empty"),
        (X, Y[:4], "6 samples and the targets 4"),
        ((X, X[:4]), Y, "different batch sizes"),
        (torch.ones(()), Y, "no batch dimension"),
        (X, torch.ones(()), "no batch dimension"),
        (X.to_sparse(), Y, "cannot be cut into microbatches: it is torch.sparse_coo"),
        (X.to("meta"), Y, "cannot be cut into microbatches: it is on the meta device"),
        (X, Y.to("meta"), "cannot be cut into microbatches: it is on the meta device"),
    ],
)
def test_batches(client, chain, x, y, message):
    trainer = tg.Trainer(chain, MSE, SGD, microbatches=2)
    before = keys_of(client, "forward")
    with pytest.raises(ValueError, match=message):
        trainer.step(x, y)
    assert keys_of(client, "forward") == before
    assert trainer.steps == 0
    plain = PlainTrainer(net(), MSE, SGD, microbatches=2)
    assert trainer.step(X, Y).item() == plain.train([(X, Y)])[0]
    assert_same_training(chain, plain, client)


def test_a_closed_client(fresh, tmp_path):
    client = fresh(n_workers=1)
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, MSE, SGD)
    losses = [trainer.step(X, Y)]
    losses[0].item()
    losses.append(trainer.step(X, Y))
    client.close()
    for call in (
        lambda: tg.Trainer(chain, MSE, SGD),
        lambda: tg.Optimizer(chain, SGD),
        lambda: losses[1].item(),
        lambda: trainer.step(X, Y),
        lambda: trainer.wait(),
        lambda: trainer.fit(OK, progress=False),
        lambda: trainer.evaluate(OK),
        lambda: list(trainer.predict([X])),
        lambda: trainer.save(tmp_path),
    ):
        with pytest.raises(tg.TaskgradError, match="client is closed|lost part of its model"):
            call()
    assert losses[0].item() > 0


ITERATORS = [iter, zip, enumerate, lambda xs: (x for x in xs), lambda xs: map(tuple, xs)]


@pytest.mark.parametrize("made", [*ITERATORS, lambda xs: iter(torch.utils.data.DataLoader(xs))])
def test_an_iterator_gives_batches_for_one_epoch(client, chain, made):
    trainer = tg.Trainer(chain, MSE, SGD)
    with pytest.raises(ValueError, match="an iterator that an earlier epoch used up"):
        trainer.fit(made(OK), 2, progress=False)
    assert trainer.steps == 0


class Again:
    """An iterator that begins anew, as loaders of others do."""

    def __iter__(self):
        self.left = 2
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return X, Y


def test_an_iterator_that_begins_anew_gives_batches_for_every_epoch(client, chain):
    trainer = tg.Trainer(chain, MSE, SGD)
    assert len(trainer.fit(Again(), 2, progress=False)) == 2
    assert trainer.steps == 4


class Scaled(torch.optim.SGD):
    """Reads an option of groups that it has no default for."""


def test_an_optimizer_of_ones_own_may_read_other_options(client, chain):
    tg.Trainer(chain, MSE, partial(Scaled, lr=0.1), param_groups={"*.bias": {"lr_scale": 0.5}})
    with pytest.raises(ValueError, match="did you mean 'momentum'"):
        tg.Trainer(chain, MSE, partial(Scaled, lr=0.1), param_groups={"*": {"momentun": 0.5}})
