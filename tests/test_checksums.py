"""What taskgrad wrote is verified however it is loaded; damage is an error and changes nothing."""

from __future__ import annotations

import functools
import json
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import taskgrad as tg
from helpers import assert_same

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def written(cluster, tmp_path_factory):
    """A checkpoint, on disk, and the weights in it."""
    path = tmp_path_factory.mktemp("written")
    with cluster.as_current():
        chain = tg.GraphChain(net(), client=cluster, placement=[0, 0, 1, 1])
        trainer = tg.Trainer(chain, F.cross_entropy, ADAMW)
        trainer.step(torch.randn(6, 4), torch.randint(3, (6,))).item()
        trainer.save(path)
        return path, chain.state_dict()


@pytest.fixture
def saved(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "run")
    return tmp_path / "run"


def folder(run):
    return run / json.loads((run / "checkpoint.json").read_text())["folder"]


def chain_of_weights(client, path):
    return tg.GraphChain(net, client=client, placement=[0, 0, 1, 1], weights=path)


def restored(client, path):
    chain = tg.GraphChain(net(3), client=client, placement=[0, 0, 1, 1])
    before = chain.state_dict()
    try:
        tg.Trainer.restore(path, chain, F.cross_entropy, ADAMW)
    except tg.CheckpointError:
        for name, value in chain.state_dict().items():
            assert_same(value, before[name], name)  # nothing was changed
        raise
    return chain


WAYS = {
    "plain torch": lambda client, run: tg.load_state_dict(run),
    "plain torch, the folder": lambda client, run: tg.load_state_dict(folder(run)),
    "a chain": lambda client, run: chain_of_weights(client, run),
    "a chain, the folder": lambda client, run: chain_of_weights(client, folder(run)),
    "a trainer": restored,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_whole_is_loaded(client, written, way):
    found = WAYS[way](client, written[0])
    state = found if isinstance(found, dict) else found.state_dict()
    for name, value in written[1].items():
        assert_same(state[name], value, name)


def models(run):
    return sorted(folder(run).glob("model-*.safetensors"))


def rewrite(file, change):
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def flip(where):
    def change(data):
        data[where if where >= 0 else len(data) + where] ^= 1

    return lambda run: rewrite(models(run)[0], change)


def truncate(run):
    rewrite(models(run)[-1], lambda data: data.__delitem__(slice(-4, None)))


def lose(run):
    models(run)[0].unlink()


def swap_tensors(run):
    """Two of one shape: everything but the values is as it should be."""
    for file in models(run):
        tensors = load_file(file)
        if "1.weight" in tensors:
            tensors["1.weight"], tensors["1.bias"] = tensors["1.bias"] + 0, tensors["1.weight"] + 0
            save_file(tensors, file)


def swap_files(run):
    first, last = models(run)
    data = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(data)


def of_another_run(run):
    """The same names and shapes, and whole in itself."""
    for file in models(run):
        old = file.read_bytes()
        tensors = {name: value + 1 for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        assert len(old) != 0


def other_dtype(run):
    """The same bytes, by another name."""
    rewrite(
        models(run)[0], lambda data: data.__setitem__(slice(None), data.replace(b"F32", b"I32"))
    )


DAMAGES = {
    "the last bit": flip(-1),
    "a bit in the middle": flip(-40),
    "a bit of a tensor's name": lambda run: rewrite(
        models(run)[0],
        lambda data: data.__setitem__(slice(None), data.replace(b'"0.bias"', b'"0.biat"')),
    ),
    "cut short": truncate,
    "a file that is gone": lose,
    "tensors swapped": swap_tensors,
    "files swapped": swap_files,
    "another run's": of_another_run,
    "another dtype": other_dtype,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", WAYS)
def test_damage(client, saved, damage, way):
    DAMAGES[damage](saved)
    with pytest.raises(tg.CheckpointError, match="damaged|cut short|see|no file|does not|do not"):
        WAYS[way](client, saved)


@pytest.mark.parametrize("way", ["a file", "a chain"])
def test_a_file_by_itself(client, saved, tmp_path, way):
    """Its own metadata has the checksums."""
    everything = {n: v for file in models(saved) for n, v in load_file(file).items()}
    chain = tg.GraphChain(net(), client=client, placement=[0] * 4)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW)
    trainer.save(tmp_path / "one")
    [file] = models(tmp_path / "one")
    load = tg.load_state_dict if way == "a file" else functools.partial(chain_of_weights, client)
    load(file)
    rewrite(file, lambda data: data.__setitem__(-1, data[-1] ^ 4))
    with pytest.raises(tg.CheckpointError, match="is damaged: its checksum differs"):
        load(file)
    foreign = tmp_path / "model.safetensors"  # and another's file has none
    save_file(everything, foreign)
    load(foreign)
    load(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors.index.json"])
def test_any_flipped_bit_of_an_index(client, saved, name):
    """Each is an error, or leaves the values what they were (white space, say)."""
    file = saved / name if name == "checkpoint.json" else folder(saved) / name
    data, expected = file.read_bytes(), tg.load_state_dict(saved)
    path = saved if name == "checkpoint.json" else file.parent
    weights = set(expected)
    chance = random.Random(0)
    found = 0
    for _ in range(150):
        at = chance.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
        try:
            state = tg.load_state_dict(path)
        except tg.CheckpointError:
            found += 1
            continue
        for n in weights:
            assert_same(state[n], expected[n], n)
    assert found > 75


def test_any_flipped_bit_of_a_file(client, saved):
    expected = tg.load_state_dict(saved)
    file = models(saved)[0]
    data = file.read_bytes()
    chance = random.Random(1)
    for path in (saved, file.parent, file):
        for _ in range(60):
            at = chance.randrange(len(data))
            flipped = bytes([data[at] ^ 1 << chance.randrange(8)])
            file.write_bytes(data[:at] + flipped + data[at + 1 :])
            try:
                state = tg.load_state_dict(path)
            except tg.CheckpointError:
                continue
            for n, value in state.items():
                assert_same(value, expected[n], n)
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update({"0.weight": "nowhere.safetensors"}), "no file"),
        (lambda i: i["weight_map"].update({"ghost": "model.safetensors"}), "do not have"),
        (lambda i: i["weight_map"].update({"0.weight": 3}), "cannot be read"),
        (lambda i: i.update(weight_map=None), "cannot be read"),
        (lambda i: i["metadata"].update(tied={"x": "ghost"}), "do not have"),
    ],
)
def test_an_index_of_others_that_lies(tmp_path, change, message):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(net().state_dict(), "model.safetensors")}
    change(index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(tg.CheckpointError, match=message):
        tg.load_state_dict(tmp_path)


@pytest.mark.parametrize("path", [None, 3, "", [], b"bytes"])
def test_a_path_that_is_none(client, path):
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW)
    for load in (
        tg.load_state_dict,
        trainer.save,
        lambda p: tg.Trainer.restore(p, chain, F.cross_entropy, ADAMW),
    ):
        with pytest.raises(TypeError, match="a path is a string or a pathlib.Path; got"):
            load(path)
