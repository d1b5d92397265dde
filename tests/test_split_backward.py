"""A backward in two tasks gives the bits of one, and leaves weights to the second."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from conftest import keys_of, total_held, wait_until
from helpers import long
from plain import (
    ConvNet,
    PlainTrainer,
    assert_same_training,
    images,
    next_token,
    tokens,
    transformer,
)
from taskgrad.graph.calls import CallSpec, Draw, StepContext
from taskgrad.graph.functions import template
from taskgrad.graph.pytree import Slot
from taskgrad.plan.rules import schedule
from taskgrad.plan.schedule import Action, Schedule
from taskgrad.worker.backward import Backward, WeightBackward
from taskgrad.worker.forward import Forward
from taskgrad.worker.memory import tape_bytes
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.split_backward import WeightUses, splitting
from taskgrad.worker.store import Store
from taskgrad.worker.training_state import Training
from taskgrad.worker_names import WorkerName

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


# What is split, and how, in one process.


def take_back(module: nn.Module, x: torch.Tensor, *, split: bool, amp: bool = False):
    """The output and all gradients; the names of parameters whose gradients came later."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    uses = WeightUses() if split else None
    inputs = [x.detach().requires_grad_()] if x.is_floating_point() else []
    torch.manual_seed(1)
    with (
        splitting(uses, module.modules(), named.values()),
        torch.autocast("cpu", torch.bfloat16, enabled=amp),
    ):
        output = module(inputs[0] * 1 if inputs else x)
    ends = (output.float().square().sum(), [*inputs, *named.values()])
    if uses is None:
        return [output, *torch.autograd.grad(*ends, allow_unused=True)], set()
    with uses.record():
        found = torch.autograd.grad(*ends, allow_unused=True)
    late = uses.gradients(named.values(), retain=False)
    assert not uses.recorded
    grads = list(found[len(inputs) :])
    for i, parameter in enumerate(named.values()):
        if parameter in late:
            grads[i] = late[parameter] if grads[i] is None else grads[i] + late[parameter]
    names = {name for name, p in named.items() if p in late}
    return [output, *found[: len(inputs)], *grads], names


def assert_same_bits(module: nn.Module, x: torch.Tensor, *, amp: bool = False) -> set[str]:
    expected, _ = take_back(copy.deepcopy(module), x, split=False, amp=amp)
    found, late = take_back(copy.deepcopy(module), x, split=True, amp=amp)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.dtype, ours.layout) == (theirs.dtype, theirs.layout)
            assert ours.is_sparse or ours.stride() == theirs.stride()
            assert torch.equal(ours.to_dense(), theirs.to_dense())
    return late


class Function(nn.Module):
    """A function of some modules and an input."""

    def __init__(self, fn, *modules: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.parts = nn.ModuleList(modules)

    def forward(self, x):
        return self.fn(x, *self.parts)


class Product(torch.autograd.Function):
    """x @ weight, of which functions that override torch's see nothing."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


def slope(x, first, second):
    """A layer that differentiates in its forward, and is differentiated itself."""
    y = second(torch.tanh(first(x)))
    [once] = torch.autograd.grad(y.sum(), x, create_graph=True)
    [constant] = torch.autograd.grad(y.sum(), x, retain_graph=True)
    return y + once + constant


def conv(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), *more)


def skip() -> Function:
    block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU(inplace=True))
    return Function(lambda x, f, g: g(torch.relu(x + f(x))) + x, block, copy.deepcopy(block))


ROWS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
SEQUENCES = ROWS.repeat(4, 1, 1) * torch.linspace(-1, 2, 4)[:, None, None]
IMAGES = torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(0))
LAST = torch.channels_last
IDS = torch.arange(28).reshape(4, 7) ** 2 % 11
BLOCK = partial(nn.TransformerEncoderLayer, 16, 4, 32)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    ("make", "x", "in_b"),
    [
        (lambda: nn.Linear(16, 12), ROWS[0], 0),
        (lambda: nn.Linear(16, 12), ROWS, 0),
        (lambda: nn.Linear(16, 12), ROWS[:1], 0),
        (lambda: nn.Linear(8, 12), ROWS.t(), 0),
        (lambda: nn.Linear(16, 12), SEQUENCES, 0),
        (lambda: nn.Linear(16, 12, bias=False), SEQUENCES, 0),
        (lambda: nn.Linear(8, 12), SEQUENCES.transpose(1, 2), 0),
        (lambda: nn.Linear(16, 12), SEQUENCES.reshape(2, 2, 8, 16), 0),
        (lambda: conv(nn.Conv2d(8, 4, 3, stride=2, groups=2, bias=False)), IMAGES, 2),
        (lambda: conv().to(memory_format=LAST), IMAGES.to(memory_format=LAST), 2),
        (lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2, padding_mode="reflect"), IMAGES, 0),
        (lambda: conv(nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1)), IMAGES, 2),
        (lambda: nn.Sequential(nn.Conv1d(8, 6, 3), nn.ConvTranspose1d(6, 2, 3)), SEQUENCES, 0),
        (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ConvTranspose3d(4, 2, 2)), IMAGES[None], 0),
        (skip, IMAGES, 0),
        (lambda: nn.Embedding(11, 16, padding_idx=4, scale_grad_by_freq=True), IDS, 0),
        (lambda: nn.Embedding(11, 16, max_norm=1.0), IDS, 0),
        (lambda: nn.Embedding(11, 16, sparse=True), IDS, 1),
        (lambda: nn.Sequential(nn.Embedding(11, 16), BLOCK(batch_first=True)), IDS, 4),
        (lambda: BLOCK(norm_first=True, dropout=0.0), SEQUENCES, 4),
        (lambda: Function(lambda x, m: m(x, 2 * x, -x)[0], nn.MultiheadAttention(16, 4)), ROWS, 2),
        (lambda: Function(lambda x, m: m(x)[0], nn.LSTM(16, 8)), SEQUENCES, 4),
        (lambda: Function(lambda x, m: m(m(m(x)).relu()), nn.Linear(16, 16)), ROWS, 0),
        (
            lambda: Function(
                lambda x, m: F.linear(input=x, weight=m.weight, bias=m.bias), nn.Linear(16, 4)
            ),
            ROWS,
            0,
        ),
        (
            lambda: Function(
                lambda x, e: F.linear(torch.tanh(e(x)), e.weight), nn.Embedding(11, 16)
            ),
            IDS,
            0,
        ),
        (
            lambda: Function(
                lambda x, m, n: n(checkpoint(m, x, use_reentrant=False)),
                nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)),
                nn.Linear(16, 16),
            ),
            ROWS,
            4,
        ),
        (lambda: Function(lambda x, m: torch.func.vmap(m)(x), nn.Linear(16, 16)), ROWS, 2),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), ROWS, 3),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)), IMAGES, 2),
    ],
)
def test_bits_of_one_operation(make, x, in_b, amp):
    """`in_b` parameters get their gradients with the inputs' cotangents."""
    torch.manual_seed(0)
    module = make()
    late = assert_same_bits(module, x, amp=amp)
    assert len(late) == len(list(module.parameters())) - in_b


def test_what_the_users_own_code_hides_or_differentiates():
    torch.manual_seed(0)
    hides = Function(lambda x, m: m(Product.apply(x, m.weight)), nn.Linear(16, 16))
    assert assert_same_bits(hides, ROWS) == {"parts.0.weight", "parts.0.bias"}
    assert not assert_same_bits(Function(slope, nn.Linear(16, 16), nn.Linear(16, 16)), ROWS)


def test_a_weight_that_other_functions_use_too():
    def several(x, m):
        return m(m(x) + x @ m.weight.t()) + m.weight.square().mean()

    torch.manual_seed(0)
    assert assert_same_bits(Function(several, nn.Linear(16, 16)), ROWS) == {"parts.0.bias"}


def test_frozen_parameters_and_compiled_modules():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    module[0].weight.requires_grad_(False)
    module[1].bias.requires_grad_(False)
    assert assert_same_bits(module, ROWS) == {"1.weight", "2.weight", "2.bias"}
    module[2].compile(backend="eager")
    uses = WeightUses()
    with splitting(uses, module.modules(), module.parameters()):
        output = module(ROWS)
    with uses.record():
        output.sum().backward()
    assert not uses.recorded
    assert module[2].weight.grad is not None


# The three tasks, in one process.


def actions(module: nn.Module):
    """A store with a shard that holds this module; F, B and W of one call of it."""
    parameters = dict(module.named_parameters())
    names = frozenset(parameters)
    shard = ResidentShard({0: module}, parameters, torch.device("cpu"), trainable=names)
    shard.training = Training(list(names))
    store = Store(WorkerName("here"), "")
    store.put("shard", shard)
    step, draw = ((0, "layer", "Module"),), Draw(0, 0, 0)
    context = StepContext(draw, split=True)
    one_input = template(((Slot(0),), {}))
    spec = CallSpec(
        *("call", "layer", step, "shard", b"", (), one_input, b"", True, (True,)),
        *((), None, (), False, context),
    )
    backward = partial(Backward, "back", "call", "layer", (0,), (0,), False, draw)
    weights = WeightBackward("call", "layer", draw)
    return store, shard, Forward(spec, taped=True, give_buffers=False), backward, weights


def test_weights_wait_for_their_own_task():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    expected, _ = take_back(copy.deepcopy(module), ROWS, split=False)
    store, shard, forward, backward, weights = actions(module)
    module[2].bias.register_hook(lambda grad: grad)
    output = forward.run(store, ROWS)
    cotangent = backward(accumulate={name: [] for name in shard.parameters}).run(store, 2 * output)
    have = {name for name, p in module.named_parameters() if p.grad is not None}
    assert have == {"1.weight", "1.bias", "2.bias"}
    assert store.held()["tapes"] == 1
    saved = 4 * (ROWS.numel() + 8 * 32 + 8 * 32 + 8 * 4)  # two inputs, two cotangents
    assert tape_bytes(store.get("call")) == saved
    with pytest.raises(tg.TapeError):
        backward().run(store, 2 * output)
    weights.run(store)
    for ours, theirs in zip(
        [output, cotangent, *(p.grad for p in module.parameters())], expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    assert store.held()["tapes"] == 0
    with pytest.raises(tg.TapeError, match="was used"):
        weights.run(store)


def test_gradients_that_other_calls_add_to_are_left_by_the_first_task():
    torch.manual_seed(0)
    module = nn.Linear(16, 4)
    store, _, forward, backward, weights = actions(module)
    output = forward.run(store, ROWS)
    backward(accumulate={"bias": []}).run(store, 2 * output)
    assert module.bias.grad is None
    [left] = store.gradients("back").items()
    weights.run(store)
    expected, _ = take_back(module, ROWS, split=False)
    assert left[0] == "weight"
    assert torch.equal(left[1], expected[2])
    assert torch.equal(module.bias.grad, expected[3])


def test_a_gradient_keeps_its_place_among_the_microbatches():
    """Sums are in the order of microbatches, though one of them could not be split."""
    module = nn.Linear(16, 4)
    store, shard, forward, backward, weights = actions(module)
    every = {name: [] for name in shard.parameters}
    output = forward.run(store, ROWS)
    backward(accumulate=every).run(store, 2 * output)
    second, left = copy.copy(forward), copy.copy(weights)
    object.__setattr__(second, "call", forward.call._replace(key="other"))
    object.__setattr__(left, "token", "other")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        output = second.run(store, ROWS)
    back = backward(accumulate=every)
    object.__setattr__(back, "token", "other")
    back.run(store, 2 * output)
    assert module.weight.grad is None
    weights.run(store)
    first = module.weight.grad.clone()
    left.run(store)
    assert torch.equal(module.weight.grad, first + first)


def test_nothing_waits_for_the_garbage_collector():
    module = nn.Sequential(nn.Linear(16, 16), nn.Embedding(4, 3), nn.Conv1d(8, 8, 3))
    model = Function(lambda x, a, e, c: c(a(x)[None]).sum() + e(IDS % 4).sum(), *module)
    store, shard, forward, backward, weights = actions(model)

    def alive(kind: str) -> int:
        return sum(type(o).__name__ == kind for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        output = forward.run(store, ROWS)
        assert alive("_SplitBackward") == 3
        backward(accumulate={name: [] for name in shard.parameters}).run(store, output)
        assert (alive("_SplitBackward"), alive("WeightUse")) == (0, 3)
        weights.run(store)
        assert alive("WeightUse") == 0
    finally:
        gc.enable()


# Training on workers.


def split(place: str, pipeline, microbatches: int) -> Schedule:
    """1F1B with each W right after its B, one B later, or at the end."""
    whole = schedule("1f1b", pipeline, microbatches)
    wait = {"after": 0, "later": 1, "end": microbatches * len(pipeline.workers)}[place]
    orders = []
    for order in whole.orders:
        found: list[Action] = []
        waiting: list[Action] = []
        for action in order:
            found.append(action)
            if action.kind == "B":
                waiting.append(action._replace(kind="W"))
                if len(waiting) > wait:
                    found.append(waiting.pop(0))
        orders.append((*found, *waiting))
    return Schedule(f"1f1b, W {place}", pipeline, microbatches, tuple(orders))


def compare(client, make, loss_fn, batches, optimizer, *, place, placement, ours=None, **both):
    """Train the same model over workers and in plain torch; returns the chain and the trainer."""
    chain = tg.GraphChain(make(), client=client, placement=placement)
    schedule = partial(split, place)
    ours = {"schedule": schedule, **(ours or {})}
    autocast = torch.bfloat16 if ours.get("amp") else None
    trainer = tg.Trainer(chain, loss_fn, optimizer, **both, **ours)
    plain = PlainTrainer(make(), loss_fn, optimizer, autocast=autocast, **both)
    losses = [trainer.step(x, y) for x, y in batches]
    assert [loss.item() for loss in losses] == plain.train(batches)
    assert_same_training(chain, plain, client)
    return chain, trainer


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)]
    return nn.Sequential(*layers)


def rows(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(10, 16), torch.randn(10, 16)) for _ in range(steps)]


PLACES = ["end", *long("after", "later")]
CONV = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("place", ["after", "later", "end"])
def test_mlp(four, place):
    placement = [0, 0, 1, 2, 2]
    _, trainer = compare(
        four, mlp, F.mse_loss, rows(6), ADAMW, place=place, placement=placement, microbatches=4
    )
    assert " W0.0 " in str(trainer.plan)


def test_there_is_a_task_for_weights(client):
    before = keys_of(client, "weights:")
    compare(
        client,
        mlp,
        F.mse_loss,
        rows(2),
        SGD,
        place="end",
        placement=[0, 0, 1, 1, 1],
        microbatches=2,
        ours={"executor": "futures"},
    )
    assert len(keys_of(client, "weights:") - before) == 8
    assert wait_until(lambda: not total_held(client)["tapes"])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "both",
    [
        {"clip_norm": 0.1},
        *long({"accumulate": 2}),
    ],
)
def test_conv_net_with_batch_norm(four, place, both):
    options = {"place": place, "placement": CONV, "microbatches": 3}
    compare(four, ConvNet, F.cross_entropy, images(6), ADAMW, **options, **both)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("placement", [[0, 0, 1, 2], *long([0, 1, 1, 0])])
@pytest.mark.parametrize("tied", [True, *long(False)])
def test_transformer(four, place, placement, tied):
    """With tied weights over workers, or in two stages of one worker."""
    make = partial(transformer, tied=tied)
    options = {"place": place, "placement": placement, "microbatches": 3, "clip_norm": 0.2}
    compare(four, make, next_token, tokens(5), ADAMW, **options)


def with_hook() -> nn.Sequential:
    model = mlp()
    model[2].weight.register_hook(double)
    return model


def double(grad: torch.Tensor) -> torch.Tensor:
    return 2 * grad


def frozen() -> nn.Sequential:
    model = mlp()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def normalized() -> nn.Sequential:
    model = mlp()
    for i in (0, 4):
        nn.utils.parametrizations.weight_norm(model[i])
    return model


class Reused(nn.Module):
    """A weight that is used twice, in a block with a skip, and by another function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x):
        return x + self.inner(torch.relu(self.inner(x))) + self.inner.weight.square().mean()


def reused() -> nn.Sequential:
    model = mlp()
    return nn.Sequential(*model[:2], Reused(), *model[3:])


def strides() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(inplace=True)),
        *(nn.ConvTranspose2d(16, 1, 4), nn.Flatten()),
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [with_hook, frozen, normalized, reused, strides])
def test_special_parameters(four, make, place):
    batches = [(x, x) for x, _ in rows(4)]
    options = {"placement": [0, 0, 1, 1, 2], "microbatches": 3, "accumulate": 2}
    compare(four, make, F.mse_loss, batches, SGD, place=place, **options)


@pytest.mark.parametrize(
    "ours", [{"amp": "bf16"}, {"checkpoint": "always"}, {"checkpoint": "except_last"}]
)
@pytest.mark.parametrize("place", PLACES)
def test_options(four, ours, place):
    options = {"placement": CONV, "microbatches": 3, "accumulate": 2}
    compare(four, ConvNet, F.cross_entropy, images(4), SGD, place=place, ours=ours, **options)


@pytest.mark.parametrize("ours", [{"amp": "fp16"}, {"amp": "bf16"}, *long({"compile": True})])
def test_options_as_in_a_whole_backward(four, ours):
    found = []
    for order in ("1f1b", partial(split, "end")):
        if "compile" in ours:
            args, loss_fn, batches = (mlp(), [0, 0, 1, 2, 2]), F.mse_loss, rows(3)
        else:
            args, loss_fn, batches = (transformer(), [0, 0, 1, 2]), next_token, tokens(4)
        chain = tg.GraphChain(args[0], client=four, placement=args[1])
        trainer = tg.Trainer(chain, loss_fn, SGD, microbatches=2, schedule=order, **ours)
        losses = [trainer.step(x, y).item() for x, y in batches]
        found.append((losses, chain.state_dict()))
    (losses, state), (expected, whole) = found
    assert losses == expected
    for name, value in whole.items():
        assert torch.equal(state[name], value), name


def test_a_step_that_fails_leaves_nothing(four):
    chain = tg.GraphChain(mlp(), client=four, placement=[0, 0, 1, 2, 2])
    options = {"microbatches": 5}
    trainer = tg.Trainer(
        chain, refusing, ADAMW, schedule=partial(split, "end"), accumulate=2, **options
    )
    plain = PlainTrainer(mlp(), refusing, ADAMW, accumulate=2, **options)
    (x, y), *rest = batches = rows(4)
    bad = y.clone()
    bad[-1] = torch.nan  # the last microbatch: others have gone back by then
    losses = [trainer.step(x, y).item()]
    with pytest.raises(tg.LayerError, match="not a number"):
        trainer.step(x, bad).item()
    assert wait_until(lambda: not total_held(four)["tapes"])
    losses += [trainer.step(*batch).item() for batch in rest]
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, four)


def refusing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if target.isnan().any():
        raise ValueError("not a number")
    return F.mse_loss(output, target)
