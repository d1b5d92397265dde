"""Several chains trained together: one Optimizer over them, and a Trainer of a function of them."""

from __future__ import annotations

import gc
import json
import operator
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import assert_same, long, long_rows
from plain import Embed, Head, PlainTrainer, _draw_from_streams, next_token, tokens
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.thunk import Thunk
from test_transaction import Adam, set_trap

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Dropout(0.2),
    )  # fmt: skip


class UNet(nn.Module):
    """Takes (n, 1, 8, 8)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.bottom, self.up = block(1, 4), block(4, 8), block(12, 4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        a = self.down(x)
        b = self.bottom(F.max_pool2d(a, 2))
        return self.head(self.up(torch.cat([a, F.interpolate(b, scale_factor=2)], 1)))


class Chains:
    """The same network over chains, and a module."""

    def __init__(self, client, workers=2):
        model = UNet()
        places = {"down": [0, 0, 1, 1], "bottom": [1, 2, 2, 2], "up": [2, 2, 0, 0]}
        for name, at in places.items():
            placement = [worker % workers for worker in at]
            chain = tg.GraphChain(getattr(model, name), client=client, placement=placement)
            setattr(self, name, chain)
        self.head = model.head

    def __call__(self, x):
        a = self.down(x)
        b = self.bottom(tg.spawn(F.max_pool2d, a, 2))
        both = torch.cat([a, tg.spawn(F.interpolate, b, scale_factor=2)], 1)
        return tg.spawn(self.head, self.up(both))


def plain_unet(loss_fn=F.mse_loss, optimizer=SGD, **options):
    plain = PlainTrainer(UNet(), loss_fn, optimizer, **options)
    for name, module in plain.model.named_modules():
        if isinstance(module, nn.Dropout):
            _draw_from_streams(module, name, plain.draw)
    return plain


def images(steps, size=10):
    torch.manual_seed(1)
    return [(torch.randn(size, 1, 8, 8), torch.randn(size, 1, 8, 8)) for _ in range(steps)]


def assert_states(ours, theirs, what=""):
    assert [*ours] == [*theirs], what
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.detach()), (what, name)


def items(losses):
    return [loss.item() for loss in losses]


# One optimizer over several chains


def pair(client):
    torch.manual_seed(0)
    models = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    chains = [
        tg.GraphChain(models[0], client=client, placement=[0, 1]),
        tg.GraphChain(models[1], client=client, placement=[1, 1]),
    ]
    return models, chains


def backward(chains, x):
    loss = tg.spawn(F.mse_loss, chains[1](chains[0](x)), x)
    loss.backward()
    return loss


def test_an_optimizer_of_two_chains_is_plain_torchs_over_all_parameters(client):
    models, chains = pair(client)
    ours = tg.Optimizer(chains, ADAMW)
    plain = nn.Sequential(*models)
    theirs = ADAMW(plain.parameters())
    for step in range(4):
        x = torch.randn(5, 4)
        loss = backward(chains, x)
        expected = F.mse_loss(plain(x), x)
        expected.backward()
        assert_same(tg.collect(loss).detach(), expected.detach(), f"step {step}")
        ours.step()
        ours.zero_grad()
        theirs.step()
        theirs.zero_grad()
        for chain, model in zip(chains, models, strict=True):
            assert_states(chain.state_dict(), model.state_dict(), f"step {step}")
    assert all(tg.collect(g) is None for chain in chains for g in chain.grads().values())
    # Adam keeps two numbers for each parameter, and counts.
    assert sum(row.optimizer for row in chains[0].memory()) >= 2 * 30 * 4
    assert sum(row.optimizer for row in chains[1].memory()) >= 2 * 28 * 4


def test_copies_of_tied_parameters_are_refreshed_in_each_chain(client):
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    models = nn.Sequential(first, nn.Tanh(), first), nn.Sequential(nn.Linear(4, 4))
    chains = [
        tg.GraphChain(models[0], client=client, placement=[0, 0, 1]),
        tg.GraphChain(models[1], client=client, placement=[1]),
    ]
    ours = tg.Optimizer({"encoder": chains[0], "decoder": chains[1]}, SGD)
    plain = nn.Sequential(*models)
    theirs = SGD(plain.parameters())
    for _ in range(3):
        x = torch.randn(5, 4)
        backward(chains, x)
        F.mse_loss(plain(x), x).backward()
        ours.step()
        ours.zero_grad()
        theirs.step()
        theirs.zero_grad()
    for chain, model in zip(chains, models, strict=True):
        assert_states(chain.state_dict(), model.state_dict())


def test_a_step_that_fails_on_one_chain_is_taken_back_on_the_other(client):
    torch.manual_seed(0)
    chains = [
        tg.GraphChain(nn.Linear(4, 4), client=client, placement=[worker]) for worker in (0, 1)
    ]
    optimizer = tg.Optimizer(chains, Adam)
    backward(chains, torch.randn(3, 4))
    optimizer.step()
    before = [chain.state_dict() for chain in chains]
    grads = [tg.collect(chain.grads()) for chain in chains]
    client.run(set_trap, "optimizer: memory", workers=[chains[1].placement[0].worker])
    with pytest.raises(tg.LayerError, match="sprung"):
        optimizer.step()
    for chain, state, grad in zip(chains, before, grads, strict=True):
        assert_states(chain.state_dict(), state)
        assert_states(tg.collect(chain.grads()), grad)
    optimizer.step()
    for chain, state in zip(chains, before, strict=True):
        assert not torch.equal(chain.state_dict()["weight"], state["weight"])


def test_each_chain_has_one_owner(client):
    _, chains = pair(client)
    together = tg.Optimizer({"encoder": chains[0], "decoder": chains[1]}, SGD)
    alone = tg.Optimizer(chains[1], SGD)
    backward(chains, torch.randn(3, 4))
    with pytest.raises(tg.TaskgradError, match="chain 'decoder' has another Trainer or Optimizer"):
        together.step()
    before = chains[0].state_dict()
    alone.step()
    assert_states(chains[0].state_dict(), before)
    again = tg.Optimizer(chains, SGD)
    with pytest.raises(tg.TaskgradError, match="has another Trainer or Optimizer"):
        alone.step()
    again.step()


def test_what_cannot_be_one_optimizer(client, fresh):
    _, chains = pair(client)
    with pytest.raises(ValueError, match="chain '1' is the same one as '0'"):
        tg.Optimizer([chains[0], chains[0]], SGD)
    with pytest.raises(TypeError, match="chain '1' of several .* is a Linear"):
        tg.Optimizer([chains[0], nn.Linear(1, 1)], SGD)
    with pytest.raises(ValueError, match="no chains"):
        tg.Optimizer([], SGD)
    with pytest.raises(ValueError, match="cannot be told from names of layers"):
        tg.Optimizer({"net": chains[0], "net.0": chains[1]}, SGD)
    frozen = [tg.GraphChain(nn.Linear(2, 2).requires_grad_(False), client=client) for _ in range(2)]
    with pytest.raises(ValueError, match="no trainable parameters"):
        tg.Optimizer(frozen, SGD)
    other = tg.GraphChain(nn.Linear(2, 2), client=fresh(n_workers=1))
    with pytest.raises(tg.TaskgradError, match="chain 'b' is of another client than chain 'a'"):
        tg.Optimizer({"a": chains[0], "b": other}, SGD)


# A trainer of a function


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (2, {}),
        (3, {"schedule": "zb_h2"}),
        *long_rows(
            (1, {}),
            (1, {"schedule": "zb_h2"}),
            (2, {"schedule": "zb_h2"}),
            (3, {"schedule": "gpipe"}),
            (3, {"schedule": "interleaved_1f1b", "checkpoint": "always"}),
            (2, {"schedule": "auto"}),
            (2, {"checkpoint": lambda name: name in ("up.0", "cat")}),
        ),
    ],
)
def test_a_function_of_chains_trains_as_plain_torch(four, workers, options):
    with four.as_current():
        both = {
            "microbatches": 3,
            "clip_norm": 0.5,
            "accumulate": 2,
            "lr_scheduler": partial(StepLR, step_size=2, gamma=0.5),
        }
        unet, plain, batches = Chains(four, workers), plain_unet(**both), images(7)
        trainer = tg.Trainer(unet, F.mse_loss, SGD, **both, **options)
        assert items([trainer.step(x, y) for x, y in batches]) == plain.train(batches)
        state = plain.model.state_dict()
        assert_states(trainer.chain.state_dict(), state)
        # The chains themselves are what was trained.
        for name in ("down", "bottom", "up"):
            own = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{name}.")}
            assert_states(getattr(unet, name).state_dict(), own)
            assert_states(getattr(unet, name).to_module().state_dict(), own)
        head = trainer.chain.chains["head"].to_module()
        assert_same(head.state_dict()["bias"], state["head.bias"])
        with torch.no_grad():
            plain.model.eval()
            x, y = batches[0]
            expected = plain.model(x)
            [found] = trainer.predict([x])
            assert_same(found, expected)
            assert trainer.evaluate([(x, y)])["loss"] == float(F.mse_loss(expected, y))
        # And go on from there.
        plain.model.train()
        assert items([trainer.step(x, y) for x, y in batches]) == plain.train(batches)


def test_options_of_the_trainer_hold_for_a_function(client):
    options = {"microbatches": 2, "autocast": torch.bfloat16}
    unet, plain, batches = Chains(client), plain_unet(optimizer=ADAMW, **options), images(3)
    trainer = tg.Trainer(unet, F.mse_loss, ADAMW, microbatches=2, amp="bf16")
    assert items([trainer.step(x, y) for x, y in batches]) == plain.train(batches)
    assert_states(trainer.chain.state_dict(), plain.model.state_dict())


def test_reading_a_chain_waits_for_the_steps_of_all(client):
    unet, plain, batches = Chains(client), plain_unet(microbatches=2), images(4)
    trainer = tg.Trainer(unet, F.mse_loss, SGD, microbatches=2)
    for count, batch in enumerate(batches, 1):
        trainer.step(*batch)
        state = unet.bottom.state_dict()  # the step may still be on its way
        plain.train([batch])
        assert_same(state["0.weight"], plain.model.bottom[0].weight.detach(), f"step {count}")
    trainer.step(*batches[0])
    x = batches[0][0]
    both = tg.collect([unet.down.eval()(x), unet.bottom.eval()(x.expand(-1, 4, -1, -1))])
    plain.train(batches[:1])
    plain.model.eval()
    assert_same(both[0].detach(), plain.model.down(x).detach())
    assert_same(both[1].detach(), plain.model.bottom(x.expand(-1, 4, -1, -1)).detach())
    # The mode of that call is not that of a step.
    plain.model.train()
    assert trainer.step(*batches[1]).item() == plain.train([batches[1]])[0]


def test_names_are_those_of_the_function(client, tmp_path):
    unet = Chains(client)
    trainer = tg.Trainer(
        unet, F.mse_loss, SGD, param_groups={"up.1.*": {"lr": 0.0}, "head.*": {"lr": 0.0}}
    )
    before = trainer.chain.state_dict()
    trainer.step(*images(1)[0]).item()
    after = trainer.chain.state_dict()
    assert [*before] == [*UNet().state_dict()]
    same = {name for name in before if torch.equal(before[name], after[name])}
    same -= {f"{part}.0.bias" for part in ("down", "bottom", "up")}  # batch norm undoes these
    assert same == {"up.1.weight", "up.1.bias", "head.weight", "head.bias"}
    assert trainer.chain.placement.column("layer")[:2] == ["down.0", "down.1"]
    names = [name for stage in trainer.plan.stages for name in stage.names]
    assert names[0] == "down.0"
    assert {"max_pool2d", "cat", "interpolate", "head"} <= {*names}
    with pytest.raises(ValueError, match=r"no trainable parameter .* 'low\.\*'.*down\.0\.weight"):
        tg.Trainer(unet, F.mse_loss, SGD, param_groups={"low.*": {"lr": 0.0}})
    with pytest.raises(tg.LayerError, match=r"'down\.0'"):
        trainer.step(torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)).item()
    with pytest.raises(tg.LayerError, match="'cat'"):
        trainer.step(torch.randn(2, 1, 7, 7), torch.randn(2, 1, 7, 7)).item()
    assert_states(trainer.chain.state_dict(), after)
    trainer.save(tmp_path)
    index = json.loads((tmp_path / "checkpoint.json").read_text())
    assert [*index["tensors"]] == [*before]


def test_a_function_in_a_local_scope_and_names_that_are_given(client):
    model = UNet()
    left, right = (tg.GraphChain(m, client=client) for m in (model.down, model.head))
    blocks = [right]

    def of_closure(x):
        return blocks[0](left(x))

    trainer = tg.Trainer(of_closure, F.mse_loss, SGD)
    assert [*trainer.chain.chains] == ["left", "blocks.0"]
    assert trainer.chain.layout.trainable[-1] == "blocks.0.bias"

    def of_arguments(x, first=left, second=None):
        return second(first(x))

    trainer = tg.Trainer(partial(of_arguments, second=right), F.mse_loss, SGD)
    assert [*trainer.chain.chains] == ["first", "second"]
    given = tg.Trainer(of_closure, F.mse_loss, SGD, chains={"b": right, "a": left})
    assert [*given.chain.chains] == ["b", "a"]
    assert given.chain.layout.trainable[0] == "b.weight"
    hidden = {None: left}
    with pytest.raises(ValueError, match=r"calls a chain \(Sequential\) that has no name here"):
        tg.Trainer(lambda x: hidden[None](x), F.mse_loss, SGD)
    other = tg.GraphChain(model.up, client=client)
    with pytest.raises(ValueError, match="does not call 'up', which is one of chains="):
        tg.Trainer(of_closure, F.mse_loss, SGD, chains={"a": left, "b": right, "up": other})


@pytest.mark.usefixtures("executor")
def test_save_and_restore(client, fresh, tmp_path):
    batches = images(8)
    plain = plain_unet(optimizer=ADAMW, microbatches=2)
    expected = plain.train(batches)
    trainer = tg.Trainer(Chains(client), F.mse_loss, ADAMW, microbatches=2)
    assert items([trainer.step(x, y) for x, y in batches[:4]]) == expected[:4]
    trainer.save(tmp_path)
    # Other workers, and chains with other weights.
    elsewhere = fresh(n_workers=1)
    with elsewhere.as_current():
        unet = Chains(elsewhere, workers=1)
        nn.init.zeros_(unet.head.weight)
        again = tg.Trainer.restore(tmp_path, unet, F.mse_loss, ADAMW)
        assert again.steps == 4
        assert items([again.step(x, y) for x, y in batches[4:]]) == expected[4:]
        assert_same(unet.up.state_dict()["0.weight"], plain.model.up[0].weight.detach())
        down = unet.down
        with pytest.raises(tg.CheckpointError, match=r"another model .*'bottom\.0\.weight'"):
            tg.Trainer.restore(tmp_path, lambda x: down(x), F.mse_loss, ADAMW)
        # What trained before goes on.
        plain.train(batches[:1])
        again.step(*batches[0])
        assert_same(unet.down.state_dict()["0.weight"], plain.model.down[0].weight.detach())


@pytest.mark.usefixtures("executor")
def test_a_restore_that_fails_leaves_the_trainer_that_there_is(client, tmp_path):
    batches = images(6)
    unet, plain = Chains(client), plain_unet(optimizer=ADAMW, microbatches=2)
    groups = {"up.*": {"lr": 0.5}, "head.*": {"lr": 0.1}}
    tg.Trainer(unet, F.mse_loss, ADAMW, param_groups=groups).save(tmp_path)
    trainer = tg.Trainer(unet, F.mse_loss, ADAMW, microbatches=2)
    assert items([trainer.step(x, y) for x, y in batches[:3]]) == plain.train(batches[:3])
    with pytest.raises(tg.CheckpointError, match=r"'up\.0\.weight' .* in groups with other"):
        tg.Trainer.restore(tmp_path, unet, F.mse_loss, ADAMW, param_groups={})
    assert items([trainer.step(x, y) for x, y in batches[3:]]) == plain.train(batches[3:])
    assert_states(trainer.chain.state_dict(), plain.model.state_dict())


class Notes(tg.Callback):
    """Notes the weights of all chains after each step, and of one of them."""

    def __init__(self, one):
        self.one = one
        self.all, self.own = [], []

    def on_step(self, trainer, loss):
        time.sleep(0.05)
        self.own.append(self.one.state_dict())
        self.all.append(trainer.chain.state_dict())


@pytest.mark.usefixtures("executor")
def test_callbacks_see_the_chains_of_their_step(client):
    unet, plain, batches = Chains(client), plain_unet(microbatches=2), images(4)
    notes = Notes(unet.up)
    trainer = tg.Trainer(unet, F.mse_loss, SGD, microbatches=2, callbacks=[notes])
    trainer.fit(batches, progress=False)
    for batch, found, own in zip(batches, notes.all, notes.own, strict=True):
        plain.train([batch])
        assert_states(found, plain.model.state_dict())
        assert_states(own, plain.model.up.state_dict())


@pytest.mark.usefixtures("executor")
def test_another_sequence_of_calls_is_an_error(client):
    unet = Chains(client)
    swapped = skipped = False

    def net(x):
        a = unet.down(x)
        if skipped:
            return tg.spawn(unet.head, a)
        b = tg.spawn(torch.tanh if swapped else torch.relu, a)
        return tg.spawn(unet.head, torch.add(b, a) if not swapped else torch.add(a, b))

    trainer = tg.Trainer(net, F.mse_loss, SGD, microbatches=2)
    batch = images(1)[0]
    trainer.step(*batch).item()
    before = trainer.chain.state_dict()
    skipped = True
    with pytest.raises(tg.TaskgradError, match="number 2 was 'relu', and is 'unet.head' now"):
        trainer.step(*batch)
    skipped, swapped = False, True
    with pytest.raises(tg.TaskgradError, match="net makes other calls .*number 2 was 'relu'"):
        trainer.step(*batch)
    assert_states(trainer.chain.state_dict(), before)
    swapped = False
    trainer.step(*batch).item()
    assert not torch.equal(trainer.chain.state_dict()["unet.head.bias"], before["unet.head.bias"])


@pytest.mark.usefixtures("executor")
def test_values_of_the_driver_are_those_of_each_call(client):
    """Noise that is drawn in the function, a factor that changes and that another closes over."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    chain, factor = tg.GraphChain(model, client=client), 1.0

    def noisy(x):
        scaled = tg.spawn(lambda v, w: v * factor + w, chain(x), torch.ones(4) * factor)
        return scaled + torch.randn(4)

    trainer = tg.Trainer(noisy, F.mse_loss, SGD, microbatches=2)
    batches = [(torch.randn(4, 4), torch.randn(4, 4)) for _ in range(4)]
    torch.manual_seed(3)
    ours = []
    for batch in batches:
        ours.append(trainer.step(*batch).item())
        factor *= 0.5
    factor = 1.0
    torch.manual_seed(3)
    plain = PlainTrainer(model, F.mse_loss, SGD, microbatches=2)
    forward = model.forward
    model.forward = lambda x: forward(x) * factor + torch.ones(4) * factor + torch.randn(4)
    theirs = []
    for batch in batches:
        theirs += plain.train([batch])
        factor *= 0.5
    assert ours == theirs


class Twins(nn.Module):
    """One encoder for two inputs, as plain torch calls it, or over a chain."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        a = self.encoder(x)
        b = self.encoder(torch.tanh(x))
        return self.head(torch.cat([a, b], 1))

    def spawned(self, x):
        a = self.encoder(x)
        b = self.encoder(tg.spawn(torch.tanh, x))
        return self.head(tg.spawn(torch.cat, [a, b], 1))


def twins(norm=nn.LayerNorm):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Dropout(0.5), nn.Linear(6, 3, bias=False))
    return encoder, nn.Linear(6, 2)


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("schedule", ["1f1b", *long("zb_h2")])
def test_a_chain_that_is_called_twice(client, schedule):
    """A method, too. The second call draws from a stream of its own."""
    encoder, head = twins()
    model = Twins(
        tg.GraphChain(encoder, client=client, placement=[0, 1, 1, 0]),
        tg.GraphChain(head, client=client, placement=[1]),
    )
    trainer = tg.Trainer(
        model.spawned, F.mse_loss, SGD, microbatches=2, clip_norm=0.3, schedule=schedule
    )
    assert trainer.chain.layout.trainable == [
        *("encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"),
        *("encoder.3.weight", "head.weight", "head.bias"),
    ]
    plain = PlainTrainer(Twins(*twins()), F.mse_loss, SGD, microbatches=2, clip_norm=0.3)
    drop = plain.model.encoder[2]
    forward, calls = drop.forward, []

    def drawn(x):
        calls.append(None)
        again = "" if len(calls) % 2 else " (call 2)"
        with tg.random_stream(*plain.draw, f"encoder.2{again}"):
            return forward(x)

    drop.forward = drawn
    torch.manual_seed(1)
    batches = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(4)]
    assert items([trainer.step(x, y) for x, y in batches]) == plain.train(batches)
    assert_states(trainer.chain.state_dict(), plain.model.state_dict())


def test_deferred_batch_norm_counts_both_calls(client):
    encoder, head = twins(nn.BatchNorm1d)
    encoder[2].p = 0.0
    whole = Twins(*twins(nn.BatchNorm1d))
    whole.encoder[2].p = 0.0
    model = Twins(
        tg.GraphChain(encoder, client=client, placement=[0, 1, 1, 0]),
        tg.GraphChain(head, client=client, placement=[1]),
    )
    trainer = tg.Trainer(model.spawned, F.mse_loss, SGD, microbatches=3, deferred_batch_norm=True)
    with pytest.raises(ValueError, match="'encoder' is called more than once and has batch norm"):
        tg.Trainer(model.spawned, F.mse_loss, SGD, microbatches=3)
    torch.manual_seed(1)
    x, y = torch.randn(9, 4), torch.randn(9, 2)
    trainer.step(x, y).item()
    whole(x)
    ours = trainer.chain.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(ours[f"encoder.1.{name}"], whole.encoder[1].get_buffer(name))


@pytest.mark.usefixtures("executor")
def test_parts_without_grad_and_modules_without_parameters(client):
    torch.manual_seed(0)
    teacher_net, net = nn.Linear(4, 4), nn.Linear(4, 4)
    teacher, student = (tg.GraphChain(m, client=client, placement=[0]) for m in (teacher_net, net))
    drop = nn.Dropout(0.5)

    def distance(x):
        with torch.no_grad():
            wanted = teacher(x)
        return {"off": tg.spawn(drop, student(x) - wanted)}

    def size(found, y):
        return found["off"].square().mean()

    trainer = tg.Trainer(distance, size, SGD, microbatches=2)
    x = torch.randn(6, 4)
    before = teacher.state_dict()
    losses = [trainer.step(x, x).item() for _ in range(2)]
    assert_states(teacher.state_dict(), before)
    optimizer = SGD([*teacher_net.parameters(), *net.parameters()])
    for step, loss in enumerate(losses):
        total = 0.0
        for m, part in enumerate(x.tensor_split(2)):
            with tg.random_stream(0, step, m, "Dropout"):
                off = F.dropout(net(part) - teacher_net(part).detach(), 0.5)
            own = off.square().mean()
            (own * 0.5).backward()
            total += own.detach() * 0.5
        optimizer.step()
        optimizer.zero_grad()
        assert loss == float(total)
    assert_states(student.state_dict(), net.state_dict())
    # It evaluates without dropout.
    [found] = trainer.predict([x])
    assert torch.equal(found["off"], (net(x) - teacher_net(x)).detach())


def test_batches_that_lie_on_workers_and_are_nested(client):
    torch.manual_seed(0)
    left, right = (tg.GraphChain(nn.Linear(4, 4), client=client) for _ in range(2))

    def both(x):
        return left(x["a"]) + right(x["b"])

    trainer = tg.Trainer(both, F.mse_loss, SGD, microbatches=2)
    x = {"a": torch.randn(6, 4), "b": torch.randn(6, 4)}
    y = torch.randn(6, 4)
    plain = [chain.to_module() for chain in (left, right)]
    expected = F.mse_loss(plain[0](x["a"]) + plain[1](x["b"]), y)
    torch.testing.assert_close(trainer.step(x, y).item(), expected.item())
    there = tg.spawn(operator.itemgetter(0), [x]), tg.spawn(torch.clone, y)
    plain = [chain.to_module() for chain in (left, right)]
    expected = F.mse_loss(plain[0](x["a"]) + plain[1](x["b"]), y)
    torch.testing.assert_close(trainer.step(*there).item(), expected.item())


def test_what_a_function_may_not_do(client):
    model = UNet()
    down, up = (tg.GraphChain(m, client=client) for m in (model.down, model.up))
    ready = down(torch.ones(1, 1, 8, 8))
    weight = nn.Parameter(torch.ones(4, 1, 1))
    tied = nn.Linear(3, 3), nn.Linear(3, 3)
    tied[1].weight = tied[0].weight

    def trained(function, **options):
        return tg.Trainer(function, F.mse_loss, SGD, **options)

    held = total_held(client)
    with pytest.raises(tg.TaskgradError, match="a value is read in a function"):
        trained(lambda x: tg.collect(down(x)))
    with pytest.raises(tg.TaskgradError, match="a value is read in a function"):
        trained(lambda x: down(x) * down(x).item())
    with pytest.raises(TypeError, match="takes a tensor of the driver's that requires grad"):
        trained(lambda x: down(x) * weight)
    with pytest.raises(TypeError, match="make the module outside of the function"):
        trained(lambda x: tg.spawn(model.head.forward, down(x)))
    with pytest.raises(ValueError, match="calls a Linear that has no name here"):
        trained(lambda x: tg.spawn(nn.Linear(8, 8), down(x)))
    with pytest.raises(tg.TaskgradError, match="'add' in .* takes what was not made in it"):
        trained(lambda x: down(x) + ready)
    with pytest.raises(TypeError, match="returns what the chains and functions in it make"):
        trained(lambda x: 3)
    with pytest.raises(ValueError, match="calls '(down|up)' and does not use what it gives"):
        trained(lambda x: [down(x), up(down(x))][0])
    with pytest.raises(TypeError, match="calls none, and gives no module"):
        trained(lambda x: tg.spawn(torch.relu, x))
    with pytest.raises(ValueError, match=r"'tied\.0' and 'tied\.1' share a tensor"):
        trained(lambda x: tg.spawn(tied[1], tg.spawn(tied[0], x)))
    with pytest.raises(TypeError, match="a Trainer trains a GraphChain; got"):
        trained([down, up])
    with pytest.raises(TypeError, match="a Trainer trains a GraphChain; got"):
        trained(model)
    with pytest.raises(TypeError, match="chains= names the chains of a function"):
        trained(down, chains={"down": down})
    with pytest.raises(ValueError, match="number from 1 on"):
        trained(lambda x: down(x), microbatches=0)
    assert total_held(client)["tapes"] == held["tapes"]


@pytest.mark.usefixtures("executor")
def test_nothing_is_left_of_a_trainer_and_its_chains(client):
    unet = Chains(client)
    trainer = tg.Trainer(unet, F.mse_loss, SGD, microbatches=2)
    trainer.step(*images(1)[0]).item()
    down = unet.down
    del unet, trainer
    gc.collect()
    assert down.state_dict()
    del down
    gc.collect()
    assert wait_until(lambda: not any(total_held(client).values()))


def trap_of(dask_worker):
    return getattr(store_of(dask_worker), "trap", "")


@pytest.mark.usefixtures("executor")
def test_a_step_that_a_trainer_left_unfinished_is_taken_back_on_all_chains(client):
    """The optimizer raises on one worker, and nobody reads the loss: then another trainer comes."""
    torch.manual_seed(0)
    left, right = (
        tg.GraphChain(nn.Linear(4, 4), client=client, placement=[worker]) for worker in (0, 1)
    )
    net = tg.Trainer(lambda x: right(left(x)), F.mse_loss, Adam, microbatches=2)
    x = torch.randn(4, 4)
    net.step(x, x).item()
    before = [left.state_dict(), right.state_dict()]
    client.run(set_trap, "optimizer: memory", workers=[right.placement[0].worker])
    net.step(x, x)
    assert wait_until(lambda: not any(client.run(trap_of).values()))
    del net
    gc.collect()
    tg.Trainer(left, F.mse_loss, SGD)
    for chain, state in zip((left, right), before, strict=True):
        assert_states(chain.state_dict(), state)


@pytest.mark.usefixtures("executor")
def test_an_optimizer_that_raises_on_one_worker(client):
    unet = Chains(client)
    trainer = tg.Trainer(unet, F.mse_loss, Adam, microbatches=2)
    batch = images(1)[0]
    trainer.step(*batch).item()
    before = trainer.chain.state_dict()
    client.run(set_trap, "optimizer: memory", workers=[unet.down.placement[0].worker])
    loss = trainer.step(*batch)
    with pytest.raises(tg.LayerError, match="sprung"):
        loss.item()
    assert_states(trainer.chain.state_dict(), before)
    trainer.step(*batch).item()
    # Another owner of one of the chains ends this one.
    tg.Trainer(unet.up, F.mse_loss, SGD)
    with pytest.raises(tg.TaskgradError, match="chain 'up' has another Trainer or Optimizer"):
        trainer.step(*batch)
    # The module's chain goes on in another trainer, as the others do.
    before = trainer.chain.state_dict()
    again = tg.Trainer(unet, F.mse_loss, SGD, microbatches=2)
    assert_states(again.chain.state_dict(), before)
    again.step(*batch).item()
    assert not torch.equal(again.chain.state_dict()["head.bias"], before["head.bias"])


def test_tied_layers_within_a_chain(client):
    def parts():
        torch.manual_seed(0)
        embed = Embed(11, 8, 6)
        return nn.Sequential(embed, nn.Tanh(), Head(embed.token.weight)), nn.Linear(11, 11)

    body, last = parts()
    chain = tg.GraphChain(body, client=client, placement=[0, 0, 1])

    def model(x):
        return tg.spawn(last, chain(x))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain, self.last = parts()

        def forward(self, x):
            return self.last(self.chain(x))

    plain = PlainTrainer(Plain(), next_token, ADAMW, microbatches=2, clip_norm=0.5)
    _draw_from_streams(plain.model.chain[0], "chain.0", plain.draw)
    trainer = tg.Trainer(model, next_token, ADAMW, microbatches=2, clip_norm=0.5)
    batches = tokens(4)
    assert items([trainer.step(x, y) for x, y in batches]) == plain.train(batches)
    assert_states(trainer.chain.state_dict(), plain.model.state_dict())


class Net(nn.Module):
    """A module that calls chains, modules in a list, and a function on a worker of its own."""

    def __init__(self, client):
        super().__init__()
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.body = tg.GraphChain(body, client=client, placement=[0, 1, 0, 1])
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        x = self.body(x)
        for layer in self.blocks:
            x = tg.spawn(layer, x)
        return tg.spawn(torch.sin, x, worker=2)


@pytest.mark.usefixtures("executor")
def test_a_module_over_chains_and_a_worker_with_a_function_alone(four):
    with four.as_current():
        net = Net(four)
        trainer = tg.Trainer(net, F.mse_loss, SGD, microbatches=2)
        workers = [w.address for w in trainer.chain.layout.session.workers()]
        assert trainer.plan.workers[-1].address == workers[2]
        assert trainer.chain.layout.last.worker == workers[2]
        assert [*trainer.chain.chains] == ["body", "blocks.0", "blocks.1"]
        plain = PlainTrainer(
            nn.Sequential(net.body.to_module(), *net.blocks), _sin_loss, SGD, microbatches=2
        )
        torch.manual_seed(1)
        batches = [(torch.randn(6, 4), torch.randn(6, 4)) for _ in range(3)]
        assert items([trainer.step(x, y) for x, y in batches]) == plain.train(batches)
        # Another function of the same module, elsewhere: it stays where it is.
        other = tg.GraphChain(nn.Linear(4, 4), client=four, placement=[3])
        block = net.blocks[0]
        again = tg.Trainer(lambda x: torch.relu(tg.spawn(block, other(x))), F.mse_loss, SGD)
        assert again.chain.chains["block"] is trainer.chain.chains["blocks.0"]
        assert workers.index(again.chain.layout.last.worker) == 1
        again.step(*batches[0]).item()
        assert_states(
            again.chain.chains["block"].state_dict(),
            trainer.chain.chains["blocks.0"].state_dict(),
        )


def _sin_loss(output, y):
    return F.mse_loss(torch.sin(output), y)


@pytest.mark.usefixtures("executor")
def test_averages_of_all_chains(client):
    """A callback that works on the workers; one chain is loaded between steps."""
    unet, plain, batches = Chains(client), plain_unet(microbatches=2), images(4)
    ema = tg.EMA(0.5)
    trainer = tg.Trainer(unet, F.mse_loss, SGD, microbatches=2, callbacks=[ema])
    averaged = AveragedModel(plain.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for i, batch in enumerate(batches):
        trainer.step(*batch).item()
        plain.train([batch])
        averaged.update_parameters(plain.model)
        if i == 1:
            unet.down.load_state_dict(UNet().down.state_dict())
            plain.model.down.load_state_dict(UNet().down.state_dict())
    with ema.applied(trainer):
        names = dict(averaged.module.named_parameters())
        found = {n: v for n, v in trainer.chain.state_dict().items() if n in names}
        assert_states(found, names)
        with pytest.raises(tg.TaskgradError, match=r"in a block of EMA\.applied"):
            unet.down.load_state_dict(unet.down.state_dict())
    assert_states(trainer.chain.state_dict(), plain.model.state_dict())
    held = trainer.chain.memory()
    assert sum(held.column("optimizer")) == 2 * sum(held.column("parameters"))  # and momentum
    assert sum(held.column("tapes")) == 0
    layout = trainer.chain.layout
    output = Thunk(layout.calls((batches[0][0],), {}, mode=True)[-1], layout.session)
    tg.collect(output)
    assert sum(trainer.chain.memory().column("tapes")) > 0
