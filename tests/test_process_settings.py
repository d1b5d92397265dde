"""What holds for torch on the driver where a call is made holds where it runs, and no longer."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import taskgrad as tg
from helpers import reference
from taskgrad.errors import ClusterMismatchError
from taskgrad.graph.process_settings import SETTINGS, process_values
from taskgrad.graph.torch_settings import TorchSettings, settings_now
from taskgrad.worker.settings import applied

SGD = functools.partial(torch.optim.SGD, lr=0.1)
NORMAL = 1.2e-38  # of which half is denormal in float32


def seen(x: Any = None) -> dict[str, Any]:
    """What a function that runs here can see of it."""
    found = dict(zip([s.name for s in SETTINGS], process_values(), strict=True))
    found["grad"] = torch.is_grad_enabled()
    found["autocast"] = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    found["cached"] = torch.is_autocast_cache_enabled()
    found["device"] = str(torch.empty(0).device)
    found["flush"] = (torch.tensor([NORMAL], device="cpu") * 0.5).item() == 0
    return {name: str(value) for name, value in found.items()}


@contextlib.contextmanager
def unusual() -> Iterator[None]:
    """All settings other than torch starts with, as users set them."""
    with contextlib.ExitStack() as stack:
        for setting in SETTINGS:
            stack.callback(setting.set, setting.get())
        stack.callback(torch.set_flush_denormal, False)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cudnn.enabled = False
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.mkldnn.enabled = False
        torch.backends.mkldnn.deterministic = True
        torch.backends.quantized.engine = "qnnpack"
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.sparse.check_sparse_tensor_invariants.enable()
        torch.distributions.Distribution.set_default_validate_args(False)
        torch.set_anomaly_enabled(True, check_nan=False)
        torch.set_flush_denormal(True)
        stack.enter_context(torch.autocast("cpu", torch.float16, cache_enabled=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("meta"))
        yield


class Seen(nn.Module):
    def forward(self, x):
        return seen()


WAYS = {
    "chain": lambda: tg.collect(tg.GraphChain(nn.Sequential(nn.Identity(), Seen()))(X)),
    "spawn": lambda: tg.collect(tg.spawn(seen, X)),
    "map": lambda: tg.map(seen, [X])[0],
    "map in threads": lambda: tg.map(seen, [X, X], over="threads")[1],
    "map over both": lambda: tg.map(seen, [X, X], over="both")[0],
    "imap": lambda: next(tg.imap(seen, [1])),
    "starmap": lambda: next(tg.starmap(seen, [(1,)])),
    "pmap": lambda: tg.pmap(lambda x: (seen(), x)[:1], out_axes=None)(X)[0],
}
X = torch.ones(1, 1)


class Runs(nn.Sequential):
    """A model of one layer, which is a function."""

    def __init__(self, fn):
        super().__init__(_Layer(fn))


class _Layer(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


@pytest.mark.parametrize("way", WAYS)
def test_a_call_sees_what_holds_where_it_is_made(client, way):
    usual = {} if way == "map in threads" else client.run(process_values)
    with unusual():
        expected = seen()
        found = WAYS[way]()
    assert found == expected
    assert WAYS[way]() == seen() != expected
    if usual:
        assert client.run(process_values) == usual


def test_torch_starts_with_what_is_taken_for_its_start(client):
    assert set(client.run(lambda: settings_now().process).values()) == {()}


def test_what_holds_where_a_call_is_made_counts_not_where_it_is_collected(client):
    torch.set_default_dtype(torch.float64)
    try:
        made = tg.spawn(torch.ones, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert tg.collect(made).dtype is torch.float64
    assert tg.collect(tg.spawn(torch.ones, 2)).dtype is torch.float32
    with torch.device("meta"):
        made = tg.spawn(torch.ones, 2)
    assert tg.collect(made).device.type == "meta"


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Ramp(nn.Module):
    def forward(self, x):
        return x + torch.linspace(0.0, 1.0, x.shape[-1])


def test_a_model_in_double_precision_gives_plain_torchs_bits(client, double):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), Ramp(), nn.Linear(7, 1))
    x = torch.randn(5, 7)
    out, grads, _ = reference(model, x)
    for call in (model, tg.GraphChain(model, placement=[0, 1, 1])):
        y, back = tg.vjp(call, x)
        assert torch.equal(tg.collect(y), out)
        ours = tg.collect(back(torch.ones_like(out))[0])
        assert all(torch.equal(ours[name], grads[name]) for name in grads)
    losses = torch.stack(tg.map(lambda row: model(row).sum(), list(x)))
    losses.sum().backward()
    assert torch.allclose(losses, out.sum(1), rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, grads[name], rtol=0, atol=1e-12)


class Expects(torch.autograd.Function):
    """The identity, whose backward gives the wrong gradient under other settings."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.ones(()).element_size()


class Counts(nn.Module):
    """Twice what it gets; gradients are multiplied by the bytes of the default dtype."""

    def forward(self, x):
        return Expects.apply(x) * torch.ones(()).element_size()


def _checkpointed(x):
    return torch.utils.checkpoint.checkpoint(Counts(), x, use_reentrant=False)


@pytest.mark.parametrize("how", ["chain", "spawn", "map", "checkpointed"])
def test_a_backward_has_the_settings_of_its_own_time(client, how):
    w = torch.ones(2, 1, requires_grad=True)
    module: Any = _checkpointed if how == "checkpointed" else Counts()
    if how == "map":
        [y] = tg.map(lambda x: module(x).sum(), [w])
    else:
        call = tg.GraphChain(nn.Sequential(module)) if how == "chain" else module
        y = tg.collect(tg.spawn(call, w)).sum()
    assert y.item() == 8
    torch.set_default_dtype(torch.float64)
    try:
        y.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert w.grad.flatten().tolist() == [32, 32]


def _double(name: str) -> None:
    if torch.get_default_dtype() is not torch.float64:
        raise RuntimeError(f"{name} has another default dtype")


class Strict(nn.Linear):
    def reset_parameters(self):
        if self.weight.device.type != "meta":
            _double("reset_parameters")
            super().reset_parameters()

    def forward(self, x):
        _double("forward")
        return super().forward(x)


class StrictSGD(torch.optim.SGD):
    def __init__(self, *args, **kwargs):
        _double("the optimizer")
        super().__init__(*args, **kwargs)

    def step(self, closure=None):
        _double("the optimizer's step")
        return super().step(closure)


def _strict_loss(output, target):
    _double("the loss")
    return nn.functional.mse_loss(output, target)


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_all_of_a_training_has_the_drivers_settings(client, double, checkpoint):
    with torch.device("meta"):
        model = nn.Sequential(Strict(2, 2), Counts(), Strict(2, 1))
    chain = tg.GraphChain(model)
    plain = chain.to_module()
    optimizer = functools.partial(StrictSGD, lr=0.1)
    trainer = tg.Trainer(chain, _strict_loss, optimizer, checkpoint=checkpoint)
    x, y = torch.randn(4, 2), torch.randn(4, 1)
    loss = trainer.step(x, y)
    expected = _strict_loss(plain(x), y)
    expected.backward()
    optimizer(plain.parameters()).step()
    assert loss.item() == expected.item()
    for name, value in chain.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert trainer.evaluate([(x, y)]) == {"loss": _strict_loss(plain(x), y).item()}
    [output] = trainer.predict([x])
    assert torch.equal(output, plain(x))


def test_a_chain_is_made_whatever_the_default_device(client):
    with torch.device("meta"):
        chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)))
    assert tg.collect(chain(torch.ones(1, 2))).isfinite().all()


def test_a_trainer_takes_the_autocast_that_its_step_is_in(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    plain = chain.to_module()
    trainer = tg.Trainer(chain, nn.functional.mse_loss, SGD)
    x, y = torch.randn(4, 2), torch.zeros(4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trainer.step(x, y)
        expected = nn.functional.mse_loss(plain(x), y)
    assert loss.item() == expected.item() != nn.functional.mse_loss(plain(x), y).item()


def test_autocast_that_is_off_inside_is_off(client):
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert tg.collect(tg.spawn(torch.mm, X, X)).dtype is torch.float32


def _takes_own_gradient(x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((leaf**2).sum(), leaf)[0]


@pytest.mark.parametrize("how", ["spawn", "chain", "map", "imap"])
def test_a_function_can_take_a_gradient_where_nobody_else_does(client, how):
    run = {
        "spawn": lambda: tg.collect(tg.spawn(_takes_own_gradient, X)),
        "chain": lambda: tg.collect(tg.GraphChain(Runs(_takes_own_gradient))(X)),
        "map": lambda: tg.map(_takes_own_gradient, [X])[0],
        "imap": lambda: next(tg.imap(_takes_own_gradient, [X])),
    }[how]
    assert run().item() == 2
    with torch.no_grad(), pytest.raises(Exception, match="does not require grad"):
        run()


def _put(x):
    return x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("how", ["spawn", "chain", "map", "imap"])
def test_an_operation_that_is_not_deterministic_is_an_error_there_too(client, how):
    x = torch.zeros(2)
    run = {
        "spawn": lambda: tg.collect(tg.spawn(_put, x)),
        "chain": lambda: tg.collect(tg.GraphChain(Runs(_put))(x)),
        "map": lambda: tg.map(_put, [x]),
        "imap": lambda: list(tg.imap(_put, [x])),
    }[how]
    run()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            run()
    finally:
        torch.use_deterministic_algorithms(False)
    run()


def _bad(x):
    return (x.sqrt() * 0).sum()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("how", ["spawn", "chain", "map"])
def test_anomaly_detection_finds_what_it_finds_in_plain_torch(client, how):
    x = torch.zeros(2, requires_grad=True)
    run = {
        "spawn": lambda: tg.collect(tg.spawn(_bad, x)),
        "chain": lambda: tg.collect(tg.GraphChain(Runs(_bad))(x)),
        "map": lambda: tg.map(_bad, [x])[0],
    }[how]
    y = run()
    y.backward()  # gives NaN, and no error
    assert x.grad.isnan().all()
    y = run()
    with (
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="SqrtBackward0' returned nan"),
    ):
        y.backward()


def test_denormal_numbers_are_flushed_where_they_are_on_the_driver(client):
    small = torch.tensor([NORMAL], requires_grad=True)
    torch.set_flush_denormal(True)
    try:
        y = tg.collect(tg.spawn(torch.mul, small, 0.5))
        y.backward(torch.tensor([NORMAL]))
    finally:
        torch.set_flush_denormal(False)
    assert y.item() == small.grad.item() == 0
    assert tg.collect(tg.spawn(torch.mul, small, 0.5)).item() > 0


def test_settings_are_put_back_after_an_error(client):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(tg.LayerError, match="no such luck"):
            tg.collect(tg.spawn(_fails, X))
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(client.run(torch.get_default_dtype).values()) == {torch.float32}


def _fails(x):
    raise ValueError("no such luck")


def test_what_was_set_on_a_worker_comes_back_and_does_not_hold_for_calls(client):
    client.run(torch.set_default_dtype, torch.float64)
    try:
        assert tg.collect(tg.spawn(torch.ones, 2)).dtype is torch.float32
        assert set(client.run(torch.get_default_dtype).values()) == {torch.float64}
    finally:
        client.run(torch.set_default_dtype, torch.float32)


# -- several threads -------------------------------------------------------------------------------


def _watch(x):
    """The default dtypes that it sees in a twentieth of a second."""
    found = set()
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        found.add(torch.get_default_dtype())
        time.sleep(0.002)
    return found


@contextlib.contextmanager
def dtype(wanted: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["a process", "this process"])
def threads(request) -> Iterator[Any]:
    """One worker of several threads."""
    own = request.param == "a process"
    client = tg.local_cluster(1, 4, processes=own, dashboard_address=":0")
    yield client
    client.close()


def _made(fn, *args, **kwargs):
    """A call of each dtype."""
    made = []
    for wanted in DTYPES:
        with dtype(wanted):
            made.append(tg.spawn(fn, *args, **kwargs))
    return made


def test_calls_of_different_settings_never_run_with_each_others(threads):
    with threads.as_current():
        found = tg.collect([_made(_watch, X) for _ in range(3)])
    assert found == [[{wanted} for wanted in DTYPES]] * 3
    assert set(threads.run(torch.get_default_dtype).values()) == {torch.float32}


def _nested(x):
    with dtype(torch.float64):
        inner = tg.spawn(_watch, x)
    return tg.collect(inner), _watch(x)


def test_a_call_made_in_a_call_may_have_other_settings(threads):
    with threads.as_current():
        found = tg.collect(_made(_nested, X))
    assert found == [({torch.float64}, {wanted}) for wanted in DTYPES]


def test_parallel_maps_of_different_settings_do_not_wait_for_each_other(fresh, monkeypatch):
    client = fresh(n_workers=2, threads_per_worker=1, processes=False)
    mine = threading.local()  # instead of settings that hold for both threads
    monkeypatch.setattr("taskgrad.spmd.calls.settings_now", lambda: mine.settings)
    found: dict[torch.dtype, Any] = {}

    def run(wanted: torch.dtype) -> None:
        mine.settings = TorchSettings((("the default dtype", wanted),))
        ranks = tg.pmap(_meet, "i", client=client)
        found[wanted] = [ranks(torch.ones(2)).tolist() for _ in range(3)]

    both = [threading.Thread(target=run, args=(wanted,)) for wanted in DTYPES[1:3]]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert found == {torch.float64: [[16.0, 16.0]] * 3, torch.bfloat16: [[4.0, 4.0]] * 3}


def _meet(x):
    time.sleep(0.02)
    total = tg.psum(x, "i")
    return tg.psum(total / 2 + torch.ones(1).element_size() - 1, "i").squeeze()


def test_the_driver_does_not_take_a_workers_settings_for_its_own(fresh):
    client = fresh(n_workers=1, threads_per_worker=2, processes=False)
    begun, over = threading.Event(), threading.Event()
    _EVENTS[:] = [begun, over]
    before = settings_now()
    with client.as_current():
        with dtype(torch.float64):
            running = tg.spawn(_waits, X).persist()
        assert begun.wait(60)
        meanwhile = settings_now()
        over.set()
        assert tg.collect(running) is torch.float64
    assert meanwhile == before
    assert torch.get_default_dtype() is torch.float32


_EVENTS: list[threading.Event] = []


def _waits(x):
    begun, over = _EVENTS
    begun.set()
    over.wait(60)
    return torch.get_default_dtype()


# -- what cannot be sent ---------------------------------------------------------------------------


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def hooked() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    yield
    handle.remove()


@contextlib.contextmanager
def optimizer_hooked() -> Iterator[None]:
    handle = register_optimizer_step_post_hook(lambda *given: None)
    yield
    handle.remove()


OPEN = {
    "a function mode": (Function, "the mode .*Function"),
    "a dispatch mode": (Dispatch, "the mode .*Dispatch"),
    "flop counting": (
        lambda: FlopCounterMode(display=False),
        "FlopCounterMode",
    ),
    "forward differentiation": (torch.autograd.forward_ad.dual_level, "dual_level"),
    "hooks of all modules": (hooked, "hooks on all modules"),
    "hooks of all optimizers": (optimizer_hooked, "a hook for all optimizers"),
}
CALLS = {
    "spawn": lambda: tg.spawn(torch.relu, X),
    "map": lambda: tg.map(torch.relu, [X]),
    "imap": lambda: tg.imap(torch.relu, [X]),
    "pmap": lambda: tg.pmap(torch.relu)(X),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", OPEN)
def test_what_is_open_around_a_call_and_cannot_be_sent_is_refused(client, what, call):
    opened, named = OPEN[what]

    with opened(), pytest.raises(tg.TaskgradError, match=f"is called inside .*{named}"):
        CALLS[call]()


def test_a_call_in_a_transform_is_refused(client):
    with pytest.raises(tg.TaskgradError, match="a transform of torch.func"):
        torch.vmap(lambda x: tg.collect(tg.spawn(torch.relu, x)))(X)


def test_a_mode_is_refused_by_threads_and_by_a_backward(client):
    w = torch.ones(1, requires_grad=True)
    y = tg.collect(tg.spawn(torch.relu, w))
    with Function(), pytest.raises(tg.TaskgradError, match="does not reach where it runs"):
        tg.map(torch.relu, [w, w], over="threads")
    with Dispatch(), pytest.raises(tg.TaskgradError, match="the backward of relu"):
        y.backward()
    y.backward()
    assert w.grad.item() == 1


def test_a_setting_that_a_worker_does_not_have_is_named():
    before = settings_now()
    settings = TorchSettings((("torch.backends.of_tomorrow", True),))
    with (
        pytest.raises(
            ClusterMismatchError, match=r"of_tomorrow = True, which torch .* of worker w"
        ),
        applied(settings, "w", lambda: None),
    ):
        pass
    settings = TorchSettings((("the default dtype", torch.int32),))
    with (
        pytest.raises(
            tg.TaskgradError, match=r"default dtype = torch.int32, which worker w refuses"
        ),
        applied(settings, "w", lambda: None),
    ):
        pass
    assert settings_now() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a worker without CUDA")
def test_a_default_device_that_a_worker_does_not_have_is_named(client):
    settings = TorchSettings(device="cuda:1")
    made = tg.spawn(torch.relu, X)
    made._node.settings = settings
    with pytest.raises(tg.TaskgradError, match=r"is cuda:1, and worker \d \(tcp\S+\) has none"):
        tg.collect(made)
