"""Training on a GPU is plain torch's training on that GPU, to the bit.

Deterministic algorithms are on, and reach the workers with the calls. Everything here also runs on
the CPU: some of it always, the rest with TASKGRAD_TEST_DEVICE=cpu.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn
from torch.utils._triton import has_triton

import taskgrad as tg
from helpers import assert_same
from plain import (
    ConvNet,
    PlainTrainer,
    assert_same_training,
    images,
    next_token,
    tokens,
    transformer,
)
from taskgrad.train.memory import check_fits

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
STEPS = 4


def train(
    client: Client,
    device: str,
    make: Any,
    batches: list[Any],
    workers: int,
    *,
    loss: Any = F.cross_entropy,
    optimizer: Any = ADAMW,
    **options: Any,
) -> tuple[tg.GraphChain, tg.Trainer, list[float]]:
    """A chain over so many workers, its trainer, and the losses of a step for each batch."""
    model = make()
    placement = [i * workers // len(model) for i in range(len(model))]
    chain = tg.GraphChain(model, client=client, placement=placement, device=device)
    assert {row.device.partition(":")[0] for row in chain.placement} == {device}
    trainer = tg.Trainer(chain, loss, optimizer, **options)
    return chain, trainer, [trainer.step(x, y).item() for x, y in batches]


@pytest.mark.parametrize("workers", [1, 2])
def test_conv_net(client, executor, device, workers):
    both = {"microbatches": 3, "clip_norm": 0.5}
    batches = images(STEPS)
    chain, _, losses = train(client, device, ConvNet, batches, workers, optimizer=SGD, **both)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, device=device, **both)
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "ours",
    [{}, {"schedule": "zb_h1"}, {"checkpoint": "always"}, {"schedule": "gpipe"}],
    ids=["1f1b", "split backward", "recomputed", "gpipe"],
)
def test_transformer(client, executor, gpu, workers, ours):
    both = {"microbatches": 4, "seed": 3}
    batches = tokens(STEPS)
    chain, _, losses = train(
        client, gpu, transformer, batches, workers, loss=next_token, **both, **ours
    )
    plain = PlainTrainer(transformer(), next_token, ADAMW, device=gpu, **both)
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)


def test_tied_weights_and_accumulation(client, gpu):
    both = {"microbatches": 2, "accumulate": 2}
    make, batches = partial(transformer, tied=True), tokens(STEPS)
    chain, _, losses = train(client, gpu, make, batches, 2, loss=next_token, **both)
    plain = PlainTrainer(make(), next_token, ADAMW, device=gpu, **both)
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)


def test_replicas(client, executor, gpu):
    """Two replicas of one stage: their gradients are summed in the order of the microbatches."""
    batches = tokens(STEPS)
    chain, _, losses = train(
        client, gpu, transformer, batches, 1, loss=next_token, microbatches=4, replicas=2
    )
    plain = PlainTrainer(transformer(), next_token, ADAMW, device=gpu, microbatches=4)
    assert losses == plain.train(batches)
    ours = chain.state_dict()
    for name, value in plain.model.named_parameters():
        assert_same(ours[name], value.detach().cpu(), name)


@pytest.mark.parametrize(
    "norms",
    [{"deferred_batch_norm": True}, {"sync_batch_norm": True, "checkpoint": "always"}],
    ids=["deferred", "synchronized"],
)
def test_batch_norm_over_replicas(client, gpu, norms):
    """To rounding as on the CPU."""
    batches = images(2)
    options = {"microbatches": 2, "replicas": 2, "optimizer": SGD, **norms}
    chain, _, losses = train(client, gpu, batch_norms, batches, 1, **options)
    other, _, expected = train(client, "cpu", batch_norms, batches, 1, **options)
    assert losses == pytest.approx(expected, rel=1e-3)
    state = other.state_dict()
    for name, value in chain.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


def batch_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    )


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}], ids=str)
def test_implementations_of_optimizers(client, gpu, options):
    optimizer = partial(ADAMW, **options)
    batches = images(STEPS)
    chain, _, losses = train(client, gpu, ConvNet, batches, 2, optimizer=optimizer)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, optimizer, device=gpu)
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)


# -- precision, layout, compilation --------------------------------------------------------------


def large_loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return next_token(scores, targets) * 30


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(client, device, amp):
    """With fp16 the first steps overflow and are skipped, as torch's GradScaler does."""
    batches = tokens(8)
    both = {"microbatches": 2, "clip_norm": 1.0}
    chain, _, losses = train(
        client, device, transformer, batches, 2, loss=large_loss, amp=amp, **both
    )
    kind = torch.device(device).type
    plain = PlainTrainer(
        transformer(),
        large_loss,
        ADAMW,
        device=device,
        autocast=torch.float16 if amp == "fp16" else torch.bfloat16,
        scaler=torch.amp.GradScaler(kind, init_scale=2.0**16) if amp == "fp16" else None,
        **both,
    )
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)


def channels_last() -> nn.Sequential:
    return ConvNet().to(memory_format=torch.channels_last)


def test_a_loss_that_closes_over_tensors(client, gpu):
    """They are given on the CPU, as the driver may have no GPU."""
    weights = torch.linspace(0.5, 1.5, 10)
    loss = partial(F.cross_entropy, weight=weights)
    _, _, losses = train(client, gpu, ConvNet, images(2), 2, loss=loss)
    there = partial(F.cross_entropy, weight=weights.to(gpu))
    assert losses == PlainTrainer(ConvNet(), there, ADAMW, device=gpu).train(images(2))


class Masked(nn.Module):
    """Its forward has the device of its input, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        mask = torch.arange(4, device=y.device) > 0
        y = (y * mask).to(y.device)
        return self.second(y + torch.arange(4.0, device=y.device))


def test_a_forward_that_asks_for_devices(client, device):
    chain = tg.GraphChain(Masked(), client=client, placement=[0, 1], device=device)
    x = torch.randn(3, 4)
    y = tg.collect(chain(x))
    assert_same(y.detach(), Masked().to(device)(x.to(device)).detach().cpu())


def test_channels_last(client, gpu):
    batches = [(x.to(memory_format=torch.channels_last), y) for x, y in images(STEPS)]
    chain, _, losses = train(client, gpu, channels_last, batches, 2, microbatches=2)
    plain = PlainTrainer(channels_last(), F.cross_entropy, ADAMW, device=gpu, microbatches=2)
    assert losses == plain.train(batches)
    assert_same_training(chain, plain, client)
    weight = chain.state_dict()["4.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compiled_layers(client, gpu):
    compiler = gpu != "cpu" and has_triton() and shutil.which("cc")  # a bare machine has none
    backend = "inductor" if compiler else "aot_eager"
    batches = images(2)
    compiled = {"compile": {"backend": backend}, "optimizer": SGD}
    _, _, losses = train(client, gpu, ConvNet, batches, 2, microbatches=2, **compiled)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, device=gpu, microbatches=2)
    assert losses == pytest.approx(plain.train(batches), rel=1e-4)


# -- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_continues_with_the_same_bits(client, gpu, tmp_path):
    batches = images(6)
    _, trainer, before = train(client, gpu, ConvNet, batches[:3], 2, microbatches=2)
    trainer.save(tmp_path)
    chain = tg.GraphChain(ConvNet(), client=client, placement=[0] * 5 + [1] * 5, device=gpu)
    restored = tg.Trainer.restore(tmp_path, chain, F.cross_entropy, ADAMW)
    after = [restored.step(x, y).item() for x, y in batches[3:]]
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, device=gpu, microbatches=2)
    assert before + after == plain.train(batches)
    assert_same_training(chain, plain, client)


@pytest.mark.parametrize("to_gpu", [True, False], ids=["CPU to GPU", "GPU to CPU"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_moves(client, gpu, tmp_path, to_gpu, fused):
    """The weights to the bit; on the other device the steps give other bits, and near numbers."""
    optimizer = partial(ADAMW, fused=fused)
    first, second = ("cpu", gpu) if to_gpu else (gpu, "cpu")
    batches = images(3)
    chain, trainer, _ = train(client, first, ConvNet, batches[:2], 2, optimizer=optimizer)
    trainer.save(tmp_path)
    other = tg.GraphChain(ConvNet(), client=client, placement=[0] * 10, device=second)
    restored = tg.Trainer.restore(tmp_path, other, F.cross_entropy, optimizer)
    for name, value in chain.state_dict().items():
        assert_same(other.state_dict()[name], value, name)
    ours, theirs = (one.step(*batches[2]).item() for one in (restored, trainer))
    assert ours == pytest.approx(theirs, rel=1e-4)


# -- memory --------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """Takes more memory than there is if its input is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.detach().abs().max()) > 1e6:
            torch.empty(1 << 50, device=x.device)
        return x


def hungry() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Hungry(), nn.Linear(4, 2))


def test_out_of_memory_is_one_error_and_the_trainer_goes_on(client, executor, device):
    torch.manual_seed(1)
    batches = [(torch.randn(4, 4), torch.randn(4, 2)) for _ in range(2)]
    options = {"loss": F.mse_loss, "microbatches": 2}
    chain, trainer, first = train(client, device, hungry, batches[:1], 2, **options)
    large = torch.cat([batches[1][0][:2], torch.full((2, 4), 1e9)])
    with pytest.raises(tg.LayerError) as caught:
        trainer.step(large, batches[1][1]).item()
    message = str(caught.value)
    assert "layer '1' (Hungry)" in message
    assert "in microbatch 1 of step 1" in message
    assert "There is no memory left for it" in message
    assert "checkpoint=" in message
    again = trainer.step(*batches[1]).item()
    plain = PlainTrainer(hungry(), F.mse_loss, ADAMW, device=device, microbatches=2)
    assert [*first, again] == plain.train(batches)
    trainer.wait()
    assert [row.tapes for row in chain.memory()] == [0, 0]


class Broken(nn.Module):
    """Fails as CUDA and its libraries do, in the forward or the backward."""

    def __init__(self, message: str, backward: bool) -> None:
        super().__init__()
        self.message = message
        self.backward = backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.backward:
            self.fail(x)
        y = x * 1
        y.register_hook(self.fail)
        return y

    def fail(self, x: torch.Tensor) -> None:
        raise RuntimeError(self.message)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "There is no memory left for it"),
        ("CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING=1"),
    ],
)
def test_errors_of_cuda_say_what_helps(client, message, advice, backward):
    model = nn.Sequential(nn.Linear(2, 2), Broken(message, backward), nn.Linear(2, 2))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2)
    with pytest.raises(tg.LayerError) as caught:
        trainer.step(torch.ones(4, 2), torch.ones(4, 2)).item()
    assert message in str(caught.value)
    assert advice in str(caught.value)


def test_memory_of_the_device(client, device):
    chain, trainer, _ = train(client, device, ConvNet, images(1), 2)
    trainer.wait()
    rows = chain.memory()
    count = sum(p.nbytes for p in ConvNet().parameters())
    assert sum(row.parameters for row in rows) == count
    assert sum(row.optimizer for row in rows) >= 2 * count
    for row in rows:
        if device != "cuda":  # torch can tell of no other device
            assert row.device_used is row.device_total is None
        else:
            assert row.parameters + row.optimizer < row.device_used < row.device_total
    assert ("device_used" in str(rows)) == (device == "cuda")


def test_too_little_memory_on_a_device_is_found_before_training(client, monkeypatch):
    chain = tg.GraphChain(hungry(), client=client, placement=[0, 0, 0])
    [worker] = chain.layout.devices
    chain.layout.devices = {worker: "cuda:0"}
    sizes = {worker: {"device_used": 1000, "device_total": 1100}}
    monkeypatch.setattr(chain.layout, "device_memory", lambda: sizes)
    with pytest.raises(tg.MemoryLimitError, match="of the memory of cuda:0") as caught:
        check_fits(chain, chain.layout, ADAMW, 1, 1, averages=False)
    assert "in files" not in str(caught.value)
    sizes[worker]["device_total"] = 10_000
    assert check_fits(chain, chain.layout, ADAMW, 1, 1, averages=False) == {}
