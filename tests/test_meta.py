"""Models without values on the driver: made on their workers, or read there from files."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import taskgrad as tg
from helpers import assert_same
from taskgrad.executors import futures


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 16), nn.Tanh(),
        nn.Linear(16, 3),
    )  # fmt: skip


def on_meta(make=net):
    with torch.device("meta"):
        return make()


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert_same(ours[name], value, name)


def as_made(model, seed):
    """What a chain makes of a model, in this process."""
    for name, module in model.named_modules():
        if hasattr(module, "reset_parameters"):
            with tg.random_stream(seed, -1, -1, name):
                module.reset_parameters()
    return model.state_dict()


@pytest.mark.parametrize("placement", [None, [0] * 6, [1, 1, 0, 0, 1, 0]])
def test_values_do_not_depend_on_where_they_are_made(client, placement):
    chain = tg.GraphChain(on_meta(), client=client, placement=placement, seed=3)
    assert_same_state(chain.state_dict(), as_made(net(), 3))
    assert {row.device for row in chain.placement} == {"cpu"}
    assert_same_state(chain.to_module().state_dict(), chain.state_dict())


def test_the_seed_counts_and_so_does_the_name(client):
    states = [tg.GraphChain(net, client=client, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert_same_state(states[0], states[1])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])
    twins = tg.GraphChain(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), client=client)
    state = twins.state_dict()
    assert not torch.equal(state["0.weight"], state["1.weight"])


def test_it_trains(client):
    chain = tg.GraphChain(net, client=client)
    plain = chain.to_module()
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    trainer, optimizer = tg.Trainer(chain, F.cross_entropy, sgd), sgd(plain.parameters())
    for step in range(3):
        torch.manual_seed(step)
        x, t = torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4,))
        trainer.step(x, t)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), t).backward()
        optimizer.step()
    trainer.wait()
    assert_same_state(chain.state_dict(), plain.state_dict())


def test_a_part_on_meta_and_a_part_not(client):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, device="meta"))
    model[0].weight.requires_grad_(False)
    chain = tg.GraphChain(model, client=client)
    state = chain.state_dict()
    assert_same(state["0.weight"], model[0].weight.detach())
    assert_same(
        state["1.weight"], as_made(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), 0)["1.weight"]
    )
    assert not chain.to_module()[0].weight.requires_grad


def tied():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 7, bias=False))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("placement", [[0, 0, 1], [1, 0, 0], [0, 0, 0]])
def test_tied_values_are_those_of_the_first_module(client, placement):
    chain = tg.GraphChain(tied, client=client, placement=placement)
    state = chain.state_dict()
    with tg.random_stream(0, -1, -1, "0"):
        theirs = nn.Embedding(7, 3).weight.detach()
    assert_same(state["0.weight"], theirs)
    assert_same(state["2.weight"], theirs)
    module = chain.to_module()
    assert module[0].weight is module[2].weight


def test_nothing_big_leaves_the_driver(client, monkeypatch):
    sent = []
    scatter = client.scatter
    monkeypatch.setattr(client, "scatter", lambda *a, **kw: sent.append(a) or scatter(*a, **kw))
    graphs = []
    lower = futures.lower

    def lowered(nodes, *args, **kwargs):
        graph = lower(nodes, *args, **kwargs)
        graphs.extend(task.args[0] for task in graph.values() if getattr(task, "args", None))
        return graph

    monkeypatch.setattr(futures, "lower", lowered)
    big = tg.GraphChain(
        lambda: nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000)), client=client
    )
    assert sum(map(len, graphs)) < 20_000
    assert not sent
    assert sum(big.placement.column("bytes")) > 4_000_000
    assert len(graphs) >= 1


class Rotary(nn.Module):
    """Has a table that is computed, as rotary embeddings have."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return x + self.table


class RotaryThatCan(Rotary):
    def reset_parameters(self):
        self.table.copy_(torch.arange(4.0))


class Forgetful(nn.Module):
    """Sets only one of its parameters."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(2))
        self.b = nn.Parameter(torch.ones(2))

    def reset_parameters(self):
        nn.init.ones_(self.a)


def test_computed_buffers(client):
    message = r"'0\.table' of module '0' \(Rotary\) is on the meta device.*no reset_parameters"
    with pytest.raises(ValueError, match=message):
        tg.GraphChain(on_meta(lambda: nn.Sequential(Rotary())), client=client)
    for model in (
        on_meta(lambda: nn.Sequential(RotaryThatCan())),
        lambda: nn.Sequential(RotaryThatCan()),
        lambda: nn.Sequential(Rotary()),
    ):
        chain = tg.GraphChain(model, client=client)
        assert_same(tg.collect(chain(torch.zeros(4))), torch.arange(4.0))


def test_values_that_are_left_unset(client):
    with pytest.raises(tg.LayerError, match="left 'b' without values"):
        tg.GraphChain(lambda: nn.Sequential(Forgetful()), client=client)


def test_attention_is_made_as_torch_makes_it(client):
    make = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True)
    state = tg.GraphChain(make, client=client).state_dict()
    assert_same(state["self_attn.out_proj.bias"], torch.zeros(8))
    assert_same(state["norm1.weight"], torch.ones(8))
    bound = (6 / (8 + 24)) ** 0.5  # Xavier's
    assert 0.8 * bound < state["self_attn.in_proj_weight"].abs().max() <= bound


@pytest.mark.parametrize("model", [lambda: None, lambda x: x])
def test_a_factory_that_is_none(client, model):
    with pytest.raises(TypeError, match="GraphChain takes an nn.Module, or a function"):
        tg.GraphChain(model, client=client)


# -- weights from files ----------------------------------------------------------------------------


def one_file(model, folder):
    save_file(model.state_dict(), folder / "any.safetensors")
    return folder / "any.safetensors"


def a_folder(model, folder):
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def a_folder_with_an_index(model, folder):
    state = list(model.state_dict().items())
    weight_map = {}
    for i, part in enumerate((state[:3], state[3:]), 1):
        name = f"model-{i:05d}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        weight_map |= {key: name for key, _ in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("write", [one_file, a_folder, a_folder_with_an_index])
@pytest.mark.parametrize("make", [net, on_meta])
def test_weights_from_files(client, tmp_path, write, make):
    torch.manual_seed(5)
    trained = net()
    path = write(trained, tmp_path)
    chain = tg.GraphChain(make(), client=client, weights=path)
    assert_same_state(chain.state_dict(), trained.state_dict())
    assert set(tg.load_state_dict(path)) == set(trained.state_dict())


def test_weights_from_a_checkpoint(client, tmp_path):
    chain = tg.GraphChain(tied, client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, functools.partial(torch.optim.SGD, lr=0.1))
    trainer.step(torch.randint(0, 7, (4, 5)), torch.randn(4, 5, 7))
    trainer.save(tmp_path)
    other = tg.GraphChain(tied, client=client, placement=[1, 1, 0], weights=tmp_path)
    assert_same_state(other.state_dict(), chain.state_dict())


def test_weights_are_converted_and_computed_buffers_made(client, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), RotaryThatCan())
    save_file(
        {n: v.to(torch.bfloat16) for n, v in model.state_dict().items()}, tmp_path / "w.safetensors"
    )
    chain = tg.GraphChain(
        lambda: nn.Sequential(nn.Linear(4, 4), RotaryThatCan()), client=client,
        weights=tmp_path / "w.safetensors",
    )  # fmt: skip
    assert_same(chain.state_dict()["0.bias"], model[0].bias.detach().to(torch.bfloat16).float())
    assert_same(chain.to_module()[1].table, torch.arange(4.0))


def test_weights_that_do_not_fit(client, tmp_path):
    state = net().state_dict()
    state["3.weight"] = torch.zeros(2, 2)
    state["more"] = state.pop("5.bias")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(tg.CheckpointError) as caught:
        tg.GraphChain(net, client=client, weights=tmp_path / "w.safetensors")
    for part in (
        "Missing: ['5.bias']",
        "Unexpected: ['more']",
        "3.weight: the model has [16, 144], the file has [2, 2]",
    ):
        assert part in str(caught.value)
    with pytest.raises(tg.CheckpointError, match="there are no weights at .*nowhere"):
        tg.GraphChain(net, client=client, weights=tmp_path / "nowhere")
    with pytest.raises(tg.CheckpointError, match="it has none of checkpoint.json"):
        tg.GraphChain(net, client=client, weights=tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(tg.CheckpointError, match="cannot be read as safetensors"):
        tg.load_state_dict(tmp_path / "w.safetensors")
