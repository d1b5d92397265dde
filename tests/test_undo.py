"""Copies that take back a step, in memory that is used again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from helpers import assert_same
from taskgrad.worker import optimizing, training
from taskgrad.worker.offload import CopiesInFiles
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.store import Store
from taskgrad.worker.training_state import Training
from taskgrad.worker.undo import ReusedCopies, Undo
from taskgrad.worker_names import WorkerName

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def addresses(undo: Undo) -> set[int]:
    return {copy.data_ptr() for _, _, copy in undo._tensors}


def test_copies_reuse_the_memory_of_those_that_were_given_back():
    copies = ReusedCopies()
    tensors = [torch.ones(3), torch.ones(2, 2).t(), torch.ones(4, dtype=torch.int64)]
    first = Undo([tensors], copies)
    second = Undo([tensors], copies)  # the first may be needed yet
    assert not addresses(first) & addresses(second)
    for tensor in tensors:
        tensor.add_(1)
    given_back = addresses(first)
    first.release()
    third = Undo([tensors], copies)
    assert addresses(third) == given_back
    for tensor in tensors:
        tensor.add_(1)
    third.restore()
    assert all(bool((tensor == 2).all()) for tensor in tensors)
    second.restore()
    assert all(bool((tensor == 1).all()) for tensor in tensors)


def test_copies_of_tensors_that_have_other_memory_are_new():
    copies = ReusedCopies()
    parameter, sparse = nn.Parameter(torch.ones(4)), torch.ones(3).to_sparse()
    Undo([[parameter, sparse]], copies).release()
    parameter.data = torch.full((2, 3), 2.0)
    sparse.data = torch.full((3,), 2.0).to_sparse()
    undo = Undo([[parameter, sparse]], copies)
    undo.release()
    undo = Undo([[parameter, sparse]], copies)
    parameter.data = torch.zeros(7)
    sparse.data = torch.zeros(3).to_sparse()
    undo.restore()
    assert_same(parameter.detach(), torch.full((2, 3), 2.0))
    assert_same(sparse.to_dense(), torch.full((3,), 2.0))


@pytest.mark.parametrize("files", [False, True])
def test_a_step_can_be_taken_back_when_the_next_one_has_begun(tmp_path, files):
    """Another worker failed in a step; this one had made it, and begun to copy for the next."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(600, 600), nn.BatchNorm1d(600))  # large enough for a file
    parameters = dict(layer.named_parameters())
    store = Store(WorkerName("tcp://somewhere"), str(tmp_path))
    shard = ResidentShard({0: layer}, parameters, torch.device("cpu"))
    shard.optimizer = SGD(parameters.values())
    shard.training = Training(list(parameters))
    if files:
        shard.training.copies = CopiesInFiles(str(tmp_path), None)
    store.put("shard", shard)

    def step(number: int) -> None:
        training.copy_ahead(store, "shard", step=number)
        training.begin(shard, number)
        layer(torch.randn(8, 600)).square().sum().backward()
        about = {"clip_norm": None, "clip_value": None, "order": [], "send": []}
        training.commit(store, "shard", step=number, update=True, **about)

    def state() -> dict[str, torch.Tensor]:
        momenta = {n: shard.optimizer.state[p]["momentum_buffer"] for n, p in parameters.items()}
        found = layer.state_dict() | {f"momentum of {n}": m for n, m in momenta.items()}
        return {name: value.clone() for name, value in found.items()}

    for number in range(3):
        step(number)
        optimizing.settle(store, "shard", number=number)
    before = state()
    step(3)
    training.copy_ahead(store, "shard", step=4)
    layer(torch.randn(8, 600))
    training.roll_back(store, "shard", done=3)
    assert shard.training.done == 3
    after = state()
    for name, value in before.items():
        assert_same(after[name], value, name)
