"""Devices by name: of one worker, of several, and several devices in one chain.

Everything here also runs on the CPU with TASKGRAD_TEST_DEVICE=cpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from helpers import assert_same
from plain import PlainTrainer, next_token, tokens, transformer
from test_cuda_training import ADAMW, SGD, STEPS, hungry


def test_a_device_for_each_worker(client, device):
    """One with an index, as several GPUs of a host have."""
    named = "cpu" if device == "cpu" else f"{device}:0"
    chain = tg.GraphChain(
        hungry(), client=client, placement=[0, 1, 1], device={0: "cpu", 1: torch.device(named)}
    )
    assert [row.device for row in chain.placement] == ["cpu", named, named]
    x = torch.randn(3, 4)
    y = tg.collect(chain(x))
    assert y.device.type == "cpu"
    torch.testing.assert_close(y, hungry()(x))


class Skips(nn.Module):
    """The first worker's value is used on the second one twice, and comes back to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x).tanh()
        second = self.b(first) * first
        return self.c(second + first)


def several(device: str, kinds: str) -> dict[Any, str]:
    """Devices for two workers: two of one kind if there are, or one and the CPU."""
    if kinds == "with CPU":
        return {0: device, 1: "cpu"}
    if device == "cpu":
        return {0: "cpu", 1: "cpu"}
    last = torch.get_device_module(device).device_count() - 1
    return {0: f"{device}:0", 1: f"{device}:{last}"}


@pytest.mark.parametrize("kinds", ["with CPU", "two"])
@pytest.mark.parametrize("tied", [True, False])
def test_workers_with_different_devices(client, executor, gpu, kinds, tied):
    batches = tokens(STEPS)
    chain = tg.GraphChain(
        transformer(tied=tied),
        client=client,
        placement=[0, 0, 1, 1],
        device=several(gpu, kinds),
    )
    both = {"microbatches": 2, "clip_norm": 0.5}
    trainer = tg.Trainer(chain, next_token, ADAMW, **both)
    losses = [trainer.step(x, y).item() for x, y in batches]
    plain = PlainTrainer(transformer(tied=tied), next_token, ADAMW, **both)
    # Dropout draws other numbers on a GPU than on the CPU.
    assert losses == pytest.approx(plain.train(batches), rel=0.3 if gpu == "cuda" else 1e-3)
    for value in chain.state_dict().values():
        assert value.device.type == "cpu"


@pytest.mark.parametrize("kinds", ["with CPU", "two"])
def test_values_that_skip_workers_with_different_devices(client, executor, gpu, kinds):
    torch.manual_seed(1)
    batches = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(STEPS)]
    chain = tg.GraphChain(
        Skips(),
        client=client,
        placement=[0, 1, 0],
        device=several(gpu, kinds),
    )
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2)
    losses = [trainer.step(x, y).item() for x, y in batches]
    model = Skips()
    optimizer = SGD(model.parameters())
    for (x, y), loss in zip(batches, losses, strict=True):
        expected = F.mse_loss(model(x), y)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()


def test_devices_that_are_not_there(client):
    with pytest.raises(tg.PlacementError, match="there is no worker"):
        tg.GraphChain(hungry(), client=client, device={"nobody": "cpu"})
    with pytest.raises(ValueError, match="one of torch's"):
        tg.GraphChain(hungry(), client=client, device={0: "gpu"})
    if not torch.cuda.is_available():
        with pytest.raises(Exception, match="sees no CUDA device"):
            tg.GraphChain(hungry(), client=client, device={0: "cuda"}, placement=[0, 0, 0])


def test_a_model_that_is_on_a_gpu_here_goes_to_those_of_the_workers(client, gpu):
    chain = tg.GraphChain(hungry().to(gpu), client=client, placement=[0, 1, 1])
    assert {row.device.partition(":")[0] for row in chain.placement} == {gpu}
    x = torch.randn(3, 4).to(gpu)
    assert_same(tg.collect(chain(x)).detach().cpu(), hungry().to(gpu)(x).detach().cpu())
