"""Checkpoints: the same bits after them, whole ones after a crash, and what does not fit."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, StepLR

import taskgrad as tg
from helpers import assert_same, long, long_rows

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)


@pytest.fixture(scope="module")
def elsewhere():
    """Another cluster, of three workers."""
    client = tg.local_cluster(n_workers=3, dashboard_address=":0")
    yield client
    client.close()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(4 * 36, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3),
    )  # fmt: skip


def batch(step):
    torch.manual_seed(100 + step)
    return torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))


def train(trainer, first, last):
    return [trainer.step(*batch(i)).item() for i in range(first, last)]


def optimizer_state(dask_worker, tokens):
    """Every number that optimizers and trainers hold on these stages of a worker."""
    from taskgrad.cluster.worker_plugin import store_of

    found = {}
    for token, stage in store_of(dask_worker).entries().items():
        if token not in tokens or stage.optimizer is None:
            continue
        for name, p in stage.parameters.items():
            found |= {f"{name}/{k}": v for k, v in stage.optimizer.state.get(p, {}).items()}
            found[f"{name}/grad"] = None if p.grad is None else p.grad.clone()
        groups = stage.optimizer.param_groups
        names = {id(p): n for n, p in stage.parameters.items()}
        for group in groups:
            options = {k: v for k, v in group.items() if k != "params"}
            found |= {f"{names[id(p)]}/group": options for p in group["params"]}
        kept = stage.training
        found["scheduler"] = None if kept.scheduler is None else kept.scheduler.state_dict()
        found["scaler"] = kept.scaler and vars(kept.scaler)
        found["done"] = kept.done
    return found


def everything(trainer):
    trainer.wait()
    found = trainer.chain.state_dict()
    tokens = {stage.token for stage in trainer.chain.layout.shards}
    states = trainer.chain.layout.session.client.run(optimizer_state, tokens=tokens)
    for state in states.values():
        found |= state
    return found


def assert_same_everything(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert_same(ours[name], value, name)
        else:
            assert ours[name] == value, name


RECIPES = {
    "momentum": (SGD, {}),
    "adamw, schedule, clipping": (
        ADAMW,
        {"lr_scheduler": functools.partial(StepLR, step_size=3, gamma=0.5), "clip_norm": 0.5},
    ),
    "milestones, values clipped": (
        SGD,
        {
            "lr_scheduler": functools.partial(MultiStepLR, milestones=[2, 12], gamma=0.5),
            "clip_value": 0.01,
            "schedule": "gpipe",
        },
    ),
    "groups": (
        functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
        {"param_groups": {"*.bias": {"weight_decay": 0.0, "betas": (0.8, 0.99)}}},
    ),
    "a function as schedule": (
        SGD,
        {"lr_scheduler": functools.partial(LambdaLR, lr_lambda=lambda step: 0.9**step)},
    ),
    "bf16": (SGD, {"amp": "bf16", "checkpoint": "always"}),
    "fp16": (SGD, {"amp": "fp16", "seed": 7}),
}


@pytest.mark.parametrize("recipe", [*list(RECIPES)[:1], *long(*list(RECIPES)[1:])])
def test_ten_steps_after_a_restore_are_the_same_bits(client, elsewhere, tmp_path, recipe):
    optimizer, options = RECIPES[recipe]
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, F.cross_entropy, optimizer, microbatches=3, **options)
    train(trainer, 0, 10)
    trainer.save(tmp_path / "run")
    saved = everything(trainer)
    losses = train(trainer, 10, 20)

    other = tg.GraphChain(net(), client=elsewhere)
    again = {"lr_scheduler": options["lr_scheduler"]} if "lr_scheduler" in options else {}
    restored = tg.Trainer.restore(tmp_path / "run", other, F.cross_entropy, optimizer, **again)
    assert restored.steps == 10
    assert_same_everything(everything(restored), saved)
    assert train(restored, 10, 20) == losses
    assert_same_everything(everything(restored), everything(trainer))


def test_in_the_middle_of_accumulating(client, tmp_path):
    options = {"microbatches": 2, "accumulate": 4}
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, **options)
    train(trainer, 0, 6)
    trainer.save(tmp_path)
    losses = train(trainer, 6, 12)
    other = tg.GraphChain(net(), client=client)
    with pytest.raises(tg.CheckpointError, match="accumulate=4 and its state depends on that"):
        tg.Trainer.restore(tmp_path, other, F.cross_entropy, ADAMW, accumulate=2)
    restored = tg.Trainer.restore(tmp_path, other, F.cross_entropy, ADAMW)
    assert train(restored, 6, 12) == losses
    assert_same_everything(everything(restored), everything(trainer))


@pytest.mark.parametrize(("saved_on", "cut"), [(1, [0, 0, 1, 1, 1, 1, 2, 2, 2]),
    *long_rows((2, [0] * 9), (2, [1, 0, 0, 0, 1, 1, 0, 0, 1]))])  # fmt: skip
def test_on_other_workers(client, elsewhere, tmp_path, saved_on, cut):
    schedule = functools.partial(StepLR, step_size=2, gamma=0.5)
    groups = {"*.bias": {"lr": 0.02}}
    chain = tg.GraphChain(net(), client=client, placement=None if saved_on == 2 else [0] * 9)
    trainer = tg.Trainer(
        chain, F.cross_entropy, ADAMW, microbatches=2, lr_scheduler=schedule, clip_norm=1.0,
        accumulate=2, param_groups=groups,
    )  # fmt: skip
    train(trainer, 0, 5)
    trainer.save(tmp_path)
    losses = train(trainer, 5, 10)
    other = tg.GraphChain(net(), client=elsewhere, placement=cut)
    restored = tg.Trainer.restore(tmp_path, other, F.cross_entropy, ADAMW, lr_scheduler=schedule)
    assert train(restored, 5, 10) == losses
    assert_same_everything(everything(restored), everything(trainer))


def tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 7, bias=False))
    model[2].weight = model[0].weight
    return model


def test_tied_weights_are_written_once_and_loaded_wherever_they_are(client, tmp_path):
    chain = tg.GraphChain(tied(), client=client, placement=[0, 0, 1])
    x, t = torch.randint(0, 7, (4, 5)), torch.randn(4, 5, 7)
    trainer = tg.Trainer(chain, F.mse_loss, ADAMW, microbatches=2)
    for _ in range(3):
        trainer.step(x, t)
    trainer.save(tmp_path)
    loss = trainer.step(x, t).item()
    for cut in ([0, 0, 1], [1, 0, 0], [0, 0, 0]):
        other = tg.GraphChain(tied(), client=client, placement=cut)
        restored = tg.Trainer.restore(tmp_path, other, F.mse_loss, ADAMW)
        assert restored.step(x, t).item() == loss
        assert_same_everything(other.state_dict(), chain.state_dict())
    index = json.loads((tmp_path / "checkpoint.json").read_text())
    names = [n for f in index["files"].values() for n in f["tensors"] if not n.startswith("optim")]
    assert names == ["0.weight"]
    tied().load_state_dict(tg.load_state_dict(tmp_path), strict=True)


def test_plain_torch_reads_it_and_so_does_safetensors(client, tmp_path):
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD)
    train(trainer, 0, 2)
    trainer.save(tmp_path)
    state = tg.load_state_dict(tmp_path)
    assert_same_everything(state, chain.state_dict())
    net().load_state_dict(state, strict=True)
    script = f"""
        import json, pathlib, sys
        from safetensors.torch import load_file
        [index] = pathlib.Path({str(tmp_path)!r}).glob("*/model.safetensors.index.json")
        files = json.loads(index.read_text())["weight_map"]
        found = {{n: load_file(index.parent / file)[n] for n, file in files.items()}}
        assert list(found)[0] == "0.weight" and found["8.bias"].shape == (3,)
        assert "taskgrad" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=200)
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".pt", ".pkl", ".bin")]


class Counting(nn.Module):
    """Has all sorts of state beside parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.note = {"seen": 0}

    def forward(self, x):
        self.calls += 1
        self.scratch += 0.5
        self.note["seen"] += 1
        return x * self.weight * (1 + self.scratch.sum())

    def get_extra_state(self):
        return {"seen": self.note["seen"], "of": (1, 2), "t": torch.ones(2)}

    def set_extra_state(self, state):
        assert state["of"] == (1, 2)
        self.note["seen"] = state["seen"]


def test_buffers_and_extra_state(client, tmp_path):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(3, 3), Counting()), client=client)
    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    x, t = torch.randn(4, 3), torch.randn(4, 3)
    for _ in range(3):
        trainer.step(x, t)
    trainer.save(tmp_path)
    other = tg.GraphChain(nn.Sequential(nn.Linear(3, 3), Counting()), client=client)
    restored = tg.Trainer.restore(tmp_path, other, F.mse_loss, SGD)
    assert [trainer.step(x, t).item() for _ in range(2)] == [
        restored.step(x, t).item() for _ in range(2)
    ]
    module = other.to_module()[1]
    assert module.note["seen"] == module.calls == 5
    assert_same(module.scratch, torch.full((2,), 2.5))
    plain = nn.Sequential(nn.Linear(3, 3), Counting())
    plain.load_state_dict(tg.load_state_dict(tmp_path), strict=True)
    assert plain[1].note["seen"] == 3


def test_save_waits_for_the_steps_that_run(client, tmp_path):
    trainer = tg.Trainer(tg.GraphChain(net(), client=client), F.cross_entropy, SGD)
    losses = [trainer.step(*batch(i)) for i in range(4)]
    trainer.save(tmp_path)
    assert all(loss.done for loss in losses)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == 4


# -- crashes ---------------------------------------------------------------------------------------


def folders(path):
    return sorted(f.name for f in Path(path).iterdir() if f.is_dir())


def test_a_new_checkpoint_replaces_the_old_one_and_nothing_else(client, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "step-mine").mkdir()
    trainer = tg.Trainer(tg.GraphChain(net(), client=client), F.cross_entropy, SGD)
    trainer.save(tmp_path)
    first = folders(tmp_path)
    train(trainer, 0, 1)
    trainer.save(tmp_path)
    assert len(first) == len(folders(tmp_path)) == 3
    assert set(first) & set(folders(tmp_path)) == {"mine", "step-mine"}
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_file()) == ["checkpoint.json"]


def go_wrong(dask_worker, how, folder):
    """Have a worker's writes go wrong, in one way until the next call of this."""
    from taskgrad.worker import checkpoint

    checkpoint.right = getattr(checkpoint, "right", checkpoint.write)

    def wrong(who, file, tensors):
        about = checkpoint.right(who, file, tensors)
        if how == "elsewhere":
            os.rename(file, f"{folder}/elsewhere")
        elif how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return about

    checkpoint.write = wrong


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("disk full", "could not write .*: OSError|SafetensorError"),
        ("elsewhere", "the driver sees no such file: a checkpoint goes to a filesystem"),
    ],
)
def test_a_save_that_fails_leaves_the_old_checkpoint(client, tmp_path, how, message):
    run = tmp_path / "run"
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD)
    train(trainer, 0, 3)
    trainer.save(run)
    saved, before = everything(trainer), folders(run)
    train(trainer, 3, 5)
    if how == "disk full":
        client.run(limit_files, 1000)
    client.run(go_wrong, how=how, folder=str(tmp_path))
    try:
        with pytest.raises(tg.CheckpointError, match=message):
            trainer.save(run)
    finally:
        client.run(limit_files, resource.RLIM_INFINITY)
        client.run(go_wrong, how="not", folder="")
    assert folders(run) == before
    other = tg.GraphChain(net(), client=client)
    restored = tg.Trainer.restore(run, other, F.cross_entropy, SGD)
    assert_same_everything(everything(restored), saved)
    trainer.save(run)  # and it can be saved again
    assert folders(run) != before


def limit_files(size):
    """Have the system refuse longer files, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.long
def test_a_worker_killed_while_saving_leaves_the_old_checkpoint(client, fresh, tmp_path):
    breaking = fresh(n_workers=2)
    chain = tg.GraphChain(net(), client=breaking)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD)
    train(trainer, 0, 3)
    trainer.save(tmp_path)
    saved, before = everything(trainer), folders(tmp_path)
    train(trainer, 3, 5)
    breaking.run(go_wrong, how="killed", folder="", workers=[chain.placement[0].worker])
    with pytest.raises(tg.WorkerLostError):
        trainer.save(tmp_path)
    assert folders(tmp_path) == before
    other = tg.GraphChain(net(), client=client)
    restored = tg.Trainer.restore(tmp_path, other, F.cross_entropy, SGD)
    assert_same_everything(everything(restored), saved)


DRIVER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from distributed import Client
from taskgrad.train.checkpoints import write
from test_checkpoint import F, SGD, net, tg, train

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

with Client({address!r}) as client:
    trainer = tg.Trainer(tg.GraphChain(net(), client=client), F.cross_entropy, SGD)
    train(trainer, 0, 3)
    trainer.save({run!r})
    train(trainer, 3, 5)
    write.{moment} = die
    trainer.save({run!r})
"""


@pytest.mark.parametrize("moment", ["os.replace", *long("check_visible", "write_json")])
def test_a_driver_killed_while_saving_leaves_the_old_checkpoint(client, tmp_path, moment):
    run = tmp_path / "run"
    known = {"tests": str(Path(__file__).parent), "address": client.scheduler.address}
    script = DRIVER.format(**known, run=str(run), moment=moment)
    done = subprocess.run([sys.executable, "-c", script], timeout=200, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(folders(run)) == 2  # the new one is not in the index
    other = tg.GraphChain(net(), client=client)
    restored = tg.Trainer.restore(run, other, F.cross_entropy, SGD)
    straight = tg.Trainer(tg.GraphChain(net(), client=client), F.cross_entropy, SGD)
    train(straight, 0, 3)
    assert_same_everything(everything(restored), everything(straight))
    restored.save(run)
    assert len(folders(run)) == 1


# -- what does not fit -----------------------------------------------------------------------------


@pytest.fixture
def saved(client, tmp_path):
    trainer = tg.Trainer(tg.GraphChain(net(), client=client), F.cross_entropy, ADAMW, amp="fp16")
    train(trainer, 0, 2)
    trainer.save(tmp_path)
    return tmp_path


def wider():
    model = net()
    model[5] = nn.Linear(4 * 36, 16, bias=False)
    model[8] = nn.Linear(16, 4)
    model.add_module("more", nn.Linear(4, 3))
    return model


def test_another_model(client, saved):
    chain = tg.GraphChain(wider(), client=client)
    before = chain.state_dict()
    with pytest.raises(tg.CheckpointError) as caught:
        tg.Trainer.restore(saved, chain, F.cross_entropy, ADAMW)
    for part in (
        "Missing there: ['more.weight', 'more.bias']",
        "Unexpected there: ['5.bias']",
        "8.weight: shape is [4, 16] here, [3, 16] there",
    ):
        assert part in str(caught.value)
    assert_same_everything(chain.state_dict(), before)
    half = net().to(torch.bfloat16)
    with pytest.raises(tg.CheckpointError, match="0.weight: dtype is bfloat16 here, float32 there"):
        tg.Trainer.restore(saved, tg.GraphChain(half, client=client), F.cross_entropy, ADAMW)
    frozen = net()
    frozen[0].requires_grad_(False)
    with pytest.raises(tg.CheckpointError, match="0.weight: requires_grad is False here"):
        tg.Trainer.restore(saved, tg.GraphChain(frozen, client=client), F.cross_entropy, ADAMW)


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (SGD, {}, "has the state of AdamW, and SGD was given"),
        (ADAMW, {"amp": None}, "saved with amp='fp16' and its state depends on that; amp=None"),
        (
            ADAMW,
            {"lr_scheduler": functools.partial(StepLR, step_size=1)},
            "saved without an lr_scheduler",
        ),
    ],
)
def test_contradictions(client, saved, optimizer, options, message):
    chain = tg.GraphChain(net(), client=client)
    before = chain.state_dict()
    with pytest.raises(tg.CheckpointError, match=message):
        tg.Trainer.restore(saved, chain, F.cross_entropy, optimizer, **options)
    assert_same_everything(chain.state_dict(), before)


def test_functions_have_to_be_given_again(client, tmp_path):
    chain = tg.GraphChain(net(), client=client)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, checkpoint=lambda name: name == "5")
    trainer.save(tmp_path)
    other = tg.GraphChain(net(), client=client)
    with pytest.raises(tg.CheckpointError, match="had a checkpoint that is a function"):
        tg.Trainer.restore(tmp_path, other, F.cross_entropy, SGD)
    tg.Trainer.restore(tmp_path, other, F.cross_entropy, SGD, checkpoint="never")


def cut_short(folder):
    shard = sorted(folder.glob("step-*/*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 8)


def flip_a_bit(folder):
    shard = sorted(folder.glob("step-*/*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def lose_a_shard(folder):
    sorted(folder.glob("step-*/*.safetensors"))[0].unlink()


def another_version(folder):
    index = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**index, "version": 99}))


def not_json(folder):
    (folder / "checkpoint.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "was cut short or written over"),
        (flip_a_bit, "is damaged: its checksum differs"),
        (lose_a_shard, "does not see .*safetensors: a checkpoint must be on a filesystem"),
        (another_version, "format version 99, written by taskgrad .* reads version 1"),
        (not_json, "cannot be read"),
        (shutil.rmtree, "there is no checkpoint in .*: it has no file checkpoint.json"),
    ],
)
def test_damage(client, saved, damage, message):
    damage(saved)
    chain = tg.GraphChain(net(), client=client)
    before = chain.state_dict()
    with pytest.raises(tg.CheckpointError, match=message):
        tg.Trainer.restore(saved, chain, F.cross_entropy, ADAMW)
    assert_same_everything(chain.state_dict(), before)
    tg.Trainer(chain, F.cross_entropy, ADAMW).step(*batch(0)).item()  # it is still usable


class Odd(torch.optim.SGD):
    """Keeps something that is no plain value."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["friend"] = object()


def test_what_cannot_be_written(client, tmp_path):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 1)), client=client)
    trainer = tg.Trainer(chain, F.mse_loss, functools.partial(Odd, lr=0.1))
    trainer.step(torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(tg.CheckpointError, match="'optimizer/0.weight/friend' is a object"):
        trainer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(tg.CheckpointError, match="cannot write a checkpoint to"):
        trainer.save(tmp_path / "file")
