"""Callbacks see the state of their own step, in order, at every point of a training."""

import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from helpers import assert_same, long
from plain import PlainTrainer

SGD = torch.optim.SGD
PLACEMENT = [0, 0, 1]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 6, generator=generator),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def made(client, callbacks, **options):
    chain = tg.GraphChain(net(), client=client, placement=PLACEMENT)
    options = {"microbatches": 2, **options}
    return tg.Trainer(chain, F.cross_entropy, adam, callbacks=callbacks, **options)


def plain_states(given):
    """The state of plain torch after each step."""
    plain = PlainTrainer(net(), F.cross_entropy, adam, microbatches=2)
    states = []
    for item in given:
        plain.train([item])
        states.append({n: v.clone() for n, v in plain.model.state_dict().items()})
    return states


def same(found, expected):
    for name, value in expected.items():
        assert_same(found[name], value, name)


class Reads(tg.Callback):
    """Reads the state in some steps, and says so beforehand or not."""

    def __init__(self, steps, how, *, declared=False, pause=0.0):
        self.steps, self.how, self.declared, self.pause = steps, how, declared, pause
        self.found = {}

    def reads_state(self, step):
        return self.declared and step in self.steps

    def on_step(self, trainer, loss):
        time.sleep(self.pause)
        if loss.step in self.steps:
            self.found[loss.step] = self.how(trainer)


class Order(tg.Callback):
    def __init__(self):
        self.steps, self.counts, self.running = [], [], 0

    def on_step(self, trainer, loss):
        self.running += 1
        assert self.running == 1
        self.steps.append(loss.step)
        self.counts.append(trainer.steps)
        self.running -= 1


READS = {
    "state_dict": lambda t: t.chain.state_dict(),
    "to_module": lambda t: t.chain.to_module().state_dict(),
    "a call": lambda t: (tg.collect(t.chain.eval()(torch.ones(2, 6))), t.chain.train())[0],
}


@pytest.mark.parametrize("executor", ["compiled", "futures"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_callback_reads_the_state_of_its_own_step(client, executor, declared):
    given = batches(12)
    reads = Reads(range(12), READS["state_dict"], declared=declared, pause=0.02)
    order = Order()
    trainer = made(client, [reads, order], executor=executor)
    losses = [trainer.step(*item) for item in given]
    trainer.wait()
    states = plain_states(given)
    for step, expected in enumerate(states):
        same(reads.found[step], expected)
    assert order.steps == list(range(12))
    assert order.counts == list(range(1, 13))
    assert [loss.step for loss in losses] == list(range(12))
    same(trainer.chain.state_dict(), states[-1])


@pytest.mark.parametrize("how", ["state_dict", *long("to_module")])
@pytest.mark.parametrize("pause", [0.0, *long(0.6)])
def test_a_read_that_nobody_foresaw(client, how, pause):
    """The step ahead is taken back, and taken again with the same bits."""
    given = batches(12)
    reads = Reads((5, 9), READS[how], pause=pause)
    order = Order()
    trainer = made(client, [order, reads])
    losses = [trainer.step(*item) for item in given]
    found = [loss.item() for loss in losses]
    states = plain_states(given)
    same(reads.found[5], states[5])
    same(reads.found[9], states[9])
    same(trainer.chain.state_dict(), states[-1])
    assert order.steps == list(range(12))
    plain = PlainTrainer(net(), F.cross_entropy, adam, microbatches=2)
    assert found == plain.train(given)


def test_a_read_of_the_whole_before_a_loss_is_read(client):
    """Losses that are read late have their callbacks late; each still sees its own step."""
    given = batches(4)
    reads = Reads((1, 2), READS["state_dict"])
    trainer = made(client, [reads])
    for item in given:
        trainer.step(*item)
        time.sleep(0.5)  # longer than a worker waits for the next step
    trainer.wait()
    states = plain_states(given)
    for step in (1, 2):
        same(reads.found[step], states[step])
    same(trainer.chain.state_dict(), states[-1])


def test_what_cannot_be_taken_back_is_refused(client):
    given = batches(6)
    reads = Reads((3,), READS["state_dict"])
    trainer = made(client, [reads], executor="futures")
    with pytest.raises(tg.TaskgradError, match=r"callback Reads uses the state after step 3"):
        trainer.fit(given, progress=False)
    trainer.wait()
    taken = trainer.steps
    assert taken > 4  # the step after the one that was to be read
    trainer.step(*given[0]).item()  # it can go on
    same(trainer.chain.state_dict(), plain_states([*given[:taken], given[0]])[-1])


def test_a_callback_that_cannot_say_what_it_reads_takes_no_step(client):
    class Unsure(tg.Callback):
        def reads_state(self, step):
            return 1 / (step - 2) > 0

        def on_step(self, trainer, loss):
            self.seen = loss.step

    given = batches(4)
    unsure = Unsure()
    trainer = made(client, [unsure])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(given, progress=False)
    assert trainer.steps == 2
    assert unsure.seen == 1
    same(trainer.chain.state_dict(), plain_states(given)[1])


def test_a_batch_whose_memory_was_reused_is_not_taken_again(client):
    memory = torch.zeros(8, 6)

    def loader():
        for x, y in batches(8):
            yield memory.copy_(x), y

    reads = Reads((4,), READS["state_dict"])
    trainer = made(client, [reads])
    with pytest.raises(tg.TaskgradError, match="memory of its batch was written"):
        trainer.fit(loader(), progress=False)
    declared = Reads((4,), READS["state_dict"], declared=True)
    trainer = made(client, [declared])
    trainer.fit(loader(), progress=False)
    same(declared.found[4], plain_states(batches(8))[4])


def test_arrays_whose_memory_was_reused_are_taken_again(client):
    memory = torch.zeros(8, 6).numpy()

    def loader():
        for x, y in batches(8):
            memory[:] = x.numpy()
            yield memory, y

    reads = Reads((4,), READS["state_dict"])
    trainer = made(client, [reads])
    trainer.fit(loader(), progress=False)
    states = plain_states(batches(8))
    same(reads.found[4], states[4])
    same(trainer.chain.state_dict(), states[-1])


class Average(tg.Callback):
    """An exponential moving average on the driver, with pauses."""

    def __init__(self):
        self.average, self.random = None, random.Random(0)

    def on_step(self, trainer, loss):
        time.sleep(self.random.choice([0.0, 0.0, 0.01, 0.05]))
        state = trainer.chain.state_dict()
        if self.average is None:
            self.average = state
            return
        for name, value in state.items():
            self.average[name] = 0.9 * self.average[name] + 0.1 * value


def test_an_average_over_50_steps_is_that_of_plain_torch(client):
    given = batches(50)
    average = Average()
    trainer = made(client, [average])
    trainer.fit(given, progress=False)
    expected = None
    for state in plain_states(given):
        expected = expected or state
        if expected is not state:
            expected = {n: 0.9 * expected[n] + 0.1 * v for n, v in state.items()}
    same(average.average, expected)


class Best(tg.Callback):
    """Saves the weights of the best loss."""

    def __init__(self, folder):
        self.folder, self.best, self.step = folder, float("inf"), None

    def on_step(self, trainer, loss):
        if loss.item() < self.best:
            self.best, self.step = loss.item(), loss.step
            trainer.save(self.folder)


def test_the_best_weights_are_those_of_the_step_that_is_named(client, tmp_path):
    given = batches(20)
    best = Best(tmp_path / "best")
    trainer = made(client, [best])
    trainer.fit(given, progress=False)
    plain = PlainTrainer(net(), F.cross_entropy, adam, microbatches=2)
    losses = plain.train(given)
    assert best.step == losses.index(min(losses)) > 0
    saved = tg.load_state_dict(tmp_path / "best")
    same(saved, plain_states(given)[best.step])
    chain = tg.GraphChain(net(), client=client, placement=PLACEMENT)
    again = tg.Trainer.restore(tmp_path / "best", chain, F.cross_entropy, adam)
    assert again.steps == best.step + 1
    again.fit(given, progress=False)
    same(chain.state_dict(), plain_states(given)[-1])


# -- stopping, and the points of a fit -----------------------------------------------------------


class Stops(tg.Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, loss):
        if loss.step == self.step:
            trainer.stop()


@pytest.mark.parametrize("step", [0, 3, 7, 9])
def test_stop_ends_a_fit_after_the_step(client, step):
    given = batches(5)
    trainer = made(client, [Stops(step)])
    history = trainer.fit(given, epochs=4, val_loader=given, progress=False)
    assert trainer.steps == step + 1
    states = plain_states(given * 2)
    same(trainer.chain.state_dict(), states[step])
    assert len(history) == step // 5 + 1
    assert all("val_loss" in results for results in history[: step // 5])
    assert "val_loss" not in history[-1]
    trainer.step(*given[0]).item()  # it can go on
    assert trainer.steps == step + 2


def test_stop_between_epochs(client):
    class StopsLate(tg.Callback):
        def on_epoch(self, trainer, epoch, results):
            if epoch == 1:
                trainer.stop()

    given = batches(3)
    trainer = made(client, [StopsLate()])
    history = trainer.fit(given, epochs=5, val_loader=given, progress=False)
    assert len(history) == 2
    assert "val_loss" in history[-1]
    assert len(trainer.fit(given, epochs=1, progress=False)) == 1  # a new one


class Points(tg.Callback):
    def __init__(self):
        self.heard = []

    def _hear(self, name, *about):
        self.heard.append((name, *about))


def _point(name):
    def method(self, trainer, *args):
        assert isinstance(trainer, tg.Trainer)
        self._hear(name, *args)

    return method


POINTS = [n for n in vars(tg.Callback) if n.startswith("on_")]
for _name in POINTS:
    setattr(Points, _name, _point(_name))


def test_the_points_of_a_fit(client, tmp_path):
    points = Points()
    trainer = made(client, [points])
    given = batches(2)
    history = trainer.fit(given, epochs=2, val_loader=given, progress=False)
    trainer.save(tmp_path / "c")
    names = [heard[0] for heard in points.heard]
    epoch = ["on_epoch_begin", "on_step", "on_step"]
    epoch += ["on_validation_begin", "on_validation_end", "on_epoch"]
    assert names == ["on_fit_begin", *epoch, *epoch, "on_fit_end", "on_save"]
    assert ("on_epoch", 1, history[1]) in points.heard
    assert ("on_validation_end", {"val_loss": history[0]["val_loss"]}) in points.heard
    assert points.heard[-1] == ("on_save", tmp_path / "c")

    def failing():
        yield given[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        trainer.fit(failing(), progress=False)
    assert points.heard[-1] == ("on_exception", caught.value)
    assert set(POINTS) == {heard[0] for heard in points.heard}


@pytest.mark.parametrize("executor", ["compiled", "futures"])
def test_a_step_in_numbers(client, executor):
    reports = []

    class Reports(tg.Callback):
        def on_step(self, trainer, loss):
            reports.append(loss.report)

    trainer = made(
        client,
        [Reports()],
        executor=executor,
        clip_norm=float("inf"),
        param_groups={"2.*": {"lr": 0.5}},
        lr_scheduler=halve,
    )
    given = batches(3)
    trainer.fit(given, progress=False)
    plain = PlainTrainer(net(), F.cross_entropy, adam, microbatches=2)
    for step, report in enumerate(reports):
        assert report["step"] == step
        assert type(report["loss"]) is float
        assert report["learning_rates"] == {"default": 0.01 / 2**step, "2.*": 0.5 / 2**step}
        assert type(report["grad_norm"]) is float
        assert report["grad_norm"] > 0
        assert 0 <= report["bubble"] <= 1
        assert report["seconds"] > 0
        assert set(report["busy"]) == set(trainer.chain.placement.column("worker"))
    assert reports[0]["loss"] == plain.train(given[:1])[0]


def halve(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_a_scheduler_gets_the_metric_that_monitor_names(client):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)

    def same_always(output, targets):
        return torch.zeros(())

    rates = []

    class Rates(tg.Callback):
        def on_step(self, trainer, loss):
            rates.append(loss.report["learning_rates"]["default"])

    given = batches(1)
    trainer = made(client, [Rates()], lr_scheduler=plateau, monitor="val_flat")
    trainer.fit(given, 3, val_loader=given, metrics={"flat": same_always}, progress=False)
    assert rates == pytest.approx([0.01, 0.01, 0.001])
    with pytest.raises(ValueError, match=r"monitor is 'val_flat', and an epoch has"):
        trainer.fit(given, 1, val_loader=given, progress=False)
    with pytest.raises(tg.LayerError, match="smaller values are better"):
        made(client, [], lr_scheduler=plateau)


def test_a_module_that_is_fetched_for_evaluation_leaves_training_as_it_is(client):
    given = batches(4)
    trainer = made(client, [])
    trainer.step(*given[0])
    module = trainer.chain.eval().to_module()
    assert not any(part.training for part in module.modules())
    for item in given[1:]:
        trainer.step(*item)
    same(trainer.chain.state_dict(), plain_states(given)[-1])
