"""Models of transformers: weights read from its folders on the workers, and written there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import taskgrad as tg
from helpers import assert_same
from taskgrad.graph import pack
from taskgrad.graph.any_model import in_layers
from taskgrad.graph.constructing import construct
from taskgrad.graph.deferred_init import TensorSpec, plan_init, unsent_tensors
from taskgrad.graph.layers import flatten_model, rebuild_model
from taskgrad.worker.materialize import make_values
from taskgrad.worker_names import WorkerName

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def llama(**options):
    sizes = {**SMALL, "vocab_size": 40, "num_key_value_heads": 2, **options}
    config = hf.LlamaConfig(**sizes, use_cache=False)
    return lambda: hf.LlamaForCausalLM(config)


def gpt2(kind="GPT2LMHeadModel", **options):
    config = hf.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=1, **options,
    )  # fmt: skip
    return lambda: getattr(hf, kind)(config)


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=8))


def t5():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, num_layers=2, num_heads=2))


def clip():
    text = {"vocab_size": 40, **SMALL, "max_position_embeddings": 16}
    image = {**SMALL, "image_size": 16, "patch_size": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))


def wav2vec2():
    config = hf.Wav2Vec2Config(
        vocab_size=20, **SMALL, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(config)


def mixtral():
    sizes = {"vocab_size": 40, **SMALL, "num_key_value_heads": 2, "num_local_experts": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))


def assert_same_tensors(ours, theirs):
    """All parameters and buffers are the same, the buffers that are not persistent too."""
    for named in (nn.Module.named_parameters, nn.Module.named_buffers):
        found = dict(named(ours, remove_duplicate=False))
        expected = dict(named(theirs, remove_duplicate=False))
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name].detach(), value.detach(), name)


def made(make, seed):
    torch.manual_seed(seed)
    return make()


def loss_of(output, labels):
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


# -- weights from folders --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        llama(tie_word_embeddings=True),
        pytest.param(llama(), marks=pytest.mark.long),
        mixtral,  # whose experts are in one tensor in the model, and apart in the files
        *(pytest.param(make, marks=pytest.mark.long) for make in (vit, t5, clip, wav2vec2)),
    ],
)
def test_a_folder_of_several_files(client, tmp_path, make):
    model = made(make, 3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    chain = tg.GraphChain(make, client=client, weights=tmp_path)
    assert list(chain.state_dict()) == list(model.state_dict())
    assert_same_tensors(chain.to_module(), type(model).from_pretrained(tmp_path))
    assert_same_tensors(chain.to_module(), model)


def test_values_take_the_dtype_of_the_model(client, tmp_path):
    model = made(gpt2(), 3).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    state = tg.GraphChain(gpt2(), client=client, weights=tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert_same(state[name], value.float(), name)


def test_the_folder_of_a_base_model_and_of_one_with_another_head(client, tmp_path):
    base = made(gpt2("GPT2Model"), 3)
    base.save_pretrained(tmp_path / "base")
    # Its head is tied, so nothing is missing.
    chain = tg.GraphChain(gpt2(), client=client, weights=tmp_path / "base")
    assert_same_tensors(chain.to_module().transformer, base)
    with pytest.warns(UserWarning, match=r"lack \['score.weight'\], which are initialized"):
        chain = tg.GraphChain(
            gpt2("GPT2ForSequenceClassification"), client=client, weights=tmp_path / "base"
        )
    assert_same_tensors(chain.to_module().transformer, base)
    chain.to_module().save_pretrained(tmp_path / "head")
    chain = tg.GraphChain(gpt2("GPT2Model"), client=client, weights=tmp_path / "head")
    assert_same_tensors(chain.to_module(), base)
    with pytest.raises(tg.CheckpointError, match=r"Missing: .*h\.2\.ln_1\.weight"):
        tg.GraphChain(
            lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)),
            client=client,
            weights=tmp_path / "base",
        )


def test_folders_that_are_refused(client, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(tg.CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        tg.GraphChain(gpt2(), client=client, weights=tmp_path)
    model = made(gpt2(), 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    chain = tg.GraphChain(gpt2(), client=client, weights=tmp_path)  # both names, and the same
    assert_same(chain.state_dict()["lm_head.weight"], state["lm_head.weight"])
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(tg.CheckpointError, match="is tied to another parameter"):
        tg.GraphChain(gpt2(), client=client, weights=tmp_path)


MEASURED = """
import sys, torch, transformers, taskgrad as tg
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith(field))
if __name__ == "__main__":
    config = transformers.LlamaConfig.from_pretrained(sys.argv[1])
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    make = lambda: transformers.LlamaForCausalLM(config)
    small = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=16)
    tg.GraphChain(lambda: transformers.LlamaForCausalLM(small)).state_dict()
    before = memory("VmRSS")
    chain = tg.GraphChain(make, weights=sys.argv[1])
    chain.save_pretrained(sys.argv[2])
    print("MiB", memory("VmHWM") - before, sum(chain.placement.column("bytes")) >> 20)
    client.close()
"""


@pytest.mark.long
def test_weights_do_not_pass_through_the_driver(tmp_path):
    make = llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=4000)
    with torch.device("meta"):
        model = make()
    model.config.save_pretrained(tmp_path)
    weight_map = {}
    for i, (name, value) in enumerate(model.state_dict().items()):
        weight_map[name] = f"model-{i}.safetensors"
        save_file({name: torch.full(value.shape, float(i))}, tmp_path / weight_map[name])
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    done = subprocess.run(
        [sys.executable, script, tmp_path, tmp_path / "saved"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("MiB")), None)
    assert line is not None, done.stderr
    grown, size = map(int, line.split()[1:])
    assert size > 500
    assert grown < 100, (grown, size)
    saved = tg.load_state_dict(tmp_path / "saved")
    assert all((saved[name] == i).all() for i, name in enumerate(weight_map))


# -- values that no file has -----------------------------------------------------------------------


def test_values_are_made_as_transformers_makes_them(client):
    two = tg.GraphChain(gpt2(), client=client)
    assert len({row.worker for row in two.placement}) == 2
    chains = [two, tg.GraphChain(gpt2(), client=client, placement=[1] * len(two))]
    here, there = (chain.state_dict() for chain in chains)
    for name, value in here.items():
        assert value.isfinite().all(), name
        assert_same(there[name], value, name)
    assert not torch.equal(
        tg.GraphChain(gpt2(), client=client, seed=1).state_dict()["lm_head.weight"],
        here["lm_head.weight"],
    )
    assert here["transformer.h.0.attn.c_attn.weight"].std() == pytest.approx(0.02, rel=0.15)
    assert here["transformer.h.0.attn.c_proj.weight"].std() == pytest.approx(0.01, rel=0.2)
    assert_same(here["transformer.h.1.ln_1.weight"], torch.ones(16))
    assert_same(here["transformer.h.1.mlp.c_fc.bias"], torch.zeros(64))
    plain = llama()()
    ours = tg.GraphChain(llama(), client=client).to_module()
    for (name, buffer), (_, value) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        assert_same(buffer, value, name)
    assert "rotary_emb.inv_freq" in dict(ours.model.named_buffers())
    x = torch.arange(8)[None]
    with torch.no_grad():
        assert ours(x).logits.isfinite().all()


def values_of(make, flatten):
    """What workers make of a model that is cut so."""
    found = construct(make, 0)
    flat = flatten(found.module)
    plans, sent = plan_init(found.module, flat, None, found.constructed)
    unsent = unsent_tensors(flat, plans)
    layers = []
    for i, module in enumerate(flat.modules):
        packed = pack.pack(module)
        values = [
            TensorSpec.of(t).empty(torch.device("cpu")) if id(t) in unsent else sent.get(id(t), t)
            for t in packed.tensors
        ]
        layers.append(pack.unpack(packed.data, values, own=True))
        if i in plans:
            make_values(layers[i], plans[i], 0, WorkerName("tcp://here", "here"))
    return rebuild_model(flat.skeleton, layers, flat.tensors.values())


@pytest.mark.parametrize("make", [gpt2(), vit, t5, clip, wav2vec2])
@pytest.mark.parametrize("cut", [pytest.param(None, marks=pytest.mark.long), 6])
def test_values_do_not_depend_on_the_cut(make, cut):
    def flatten(model):
        flat = in_layers(model, None, cut, None, 2).flat
        assert len(flat.layers) > 2
        return flat

    whole = values_of(make, flatten_model)
    assert_same_tensors(values_of(make, flatten), whole)
    plain = made(make, 0)
    assert list(whole.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        ours = whole.state_dict()[name]
        assert ours.isfinite().all(), name
        if value.numel() > 500 and value.std() > 0:
            assert 0.8 < ours.std() / value.std() < 1.25, name


class Scaled(nn.Module):
    """Has a parameter and tables that only its constructor makes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        with torch.no_grad():
            self.scale[0] = 5.0
        self.register_buffer("positions", torch.arange(3), persistent=False)
        self.big = nn.Linear(3, 3)

    def reset_parameters(self):
        """It does not set the positions, whose kind of number has no NaN."""
        with torch.no_grad():
            self.scale.copy_(torch.tensor([5.0, 2.0, 2.0]))

    def forward(self, x):
        return self.big(x * self.scale) + self.positions


class Unset(Scaled):
    reset_parameters = None


@pytest.mark.parametrize("kind", [Scaled, Unset])
def test_what_only_a_constructor_makes(client, kind):
    chain = tg.GraphChain(lambda: nn.Sequential(kind(), nn.Linear(3, 2)), client=client)
    module = chain.to_module()
    assert_same(module[0].scale.detach(), torch.tensor([5.0, 2.0, 2.0]))
    assert_same(module[0].positions, torch.arange(3))


# -- save_pretrained -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2(), pytest.param(llama(), marks=pytest.mark.long)])
def test_plain_transformers_loads_what_is_saved(client, tmp_path, make):
    x = torch.arange(16).reshape(2, 8)
    chain = tg.GraphChain(make, client=client, example_inputs=((x,), {}))
    trainer = tg.Trainer(chain, loss_of, functools.partial(torch.optim.SGD, lr=0.1))
    kind = type(chain.to_module())
    for size in ("8KB", 10**9):
        trainer.step(x, x)  # on its way when the weights are asked for
        chain.save_pretrained(tmp_path, max_shard_size=size)
        model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        state = chain.state_dict()
        assert list(model.state_dict()) == list(state)
        for name, value in state.items():
            assert_same(model.state_dict()[name], value, name)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert (len(files) > 2) == (size == "8KB")
        assert {p.name for p in tmp_path.glob("*.safetensors")} == files
        assert not [p for p in tmp_path.iterdir() if p.is_dir()]
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == [kind.__name__]
        assert config["dtype"] == "float32"
        assert (tmp_path / "generation_config.json").exists()
    assert ("lm_head.weight" in index["weight_map"]) == (kind is hf.LlamaForCausalLM)
    again = tg.GraphChain(make, client=client, weights=tmp_path).state_dict()
    for name, value in state.items():
        assert_same(again[name], value, name)


def fail(dask_worker, fails):
    """Have a worker's files fail to be written, or no longer."""
    from taskgrad.errors import CheckpointError
    from taskgrad.worker import checkpoint

    checkpoint.right = getattr(checkpoint, "right", checkpoint.write)

    def wrong(who, file, tensors):
        if "00002-of" in file.name:
            raise CheckpointError("the disk is full")
        return checkpoint.right(who, file, tensors)

    checkpoint.write = wrong if fails else checkpoint.right


def test_a_save_that_fails_leaves_what_was_there(client, tmp_path, monkeypatch):
    first, second = (tg.GraphChain(gpt2(), client=client, seed=seed) for seed in (0, 1))
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    client.run(fail, fails=True)
    try:
        with pytest.raises(tg.CheckpointError, match="the disk is full"):
            second.save_pretrained(tmp_path, max_shard_size="20KB")
    finally:
        client.run(fail, fails=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    # While the files get the names that the old ones have.
    files = len([name for name in before if name.startswith("model-")])
    monkeypatch.setattr(os, "replace", _failing(f"model-00002-of-{files:05d}.safetensors"))
    with pytest.raises(tg.CheckpointError, match="the connection is lost"):
        second.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.undo()
    loaded = hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert_same_tensors(loaded, second.to_module())
    first.save_pretrained(tmp_path)
    assert_same_tensors(hf.GPT2LMHeadModel.from_pretrained(tmp_path), first.to_module())
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert (tmp_path / "tokenizer.json").exists()


def _failing(name):
    replace = os.replace

    def failing(source, target):
        if target.name == name:
            raise OSError("the connection is lost")
        replace(source, target)

    return failing


def test_what_save_pretrained_refuses(client, tmp_path):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    with pytest.raises(TypeError, match=r"this is a Sequential. Trainer.save writes"):
        chain.save_pretrained(tmp_path)
    chain = tg.GraphChain(gpt2(), client=client)
    with pytest.raises(ValueError, match="max_shard_size is a number of bytes"):
        chain.save_pretrained(tmp_path, max_shard_size="much")
    with pytest.raises(TypeError, match="max_shard_size is a number of bytes"):
        chain.save_pretrained(tmp_path, max_shard_size=1.5)
    assert not list(tmp_path.iterdir())


# -- adapters --------------------------------------------------------------------------------------


def adapted(make, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    return lambda: peft.get_peft_model(make(), config)


def test_adapters_train_with_a_frozen_base(client, tmp_path):
    base = made(llama(), 3)
    base.save_pretrained(tmp_path)
    make = adapted(llama(), init_lora_weights="gaussian")
    x = torch.arange(16).reshape(2, 8)
    example = ((x,), {})
    chain = tg.GraphChain(make, client=client, weights=tmp_path, example_inputs=example)
    plain = chain.to_module()
    assert list(plain.state_dict()) == list(make().state_dict())
    with torch.no_grad():  # the adapters change nothing yet
        assert_same(plain(x).logits, base(x).logits)
    a = plain.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert a.std() == pytest.approx(1 / 4, rel=0.3)
    adamw = functools.partial(torch.optim.AdamW, lr=0.1)
    trainer = tg.Trainer(chain, loss_of, adamw)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert set(chain.grads()) == set(trained)
    optimizer = adamw(trained.values())
    for _ in range(3):
        trainer.step(x, x)
        optimizer.zero_grad()
        loss_of(plain(x), x).backward()
        optimizer.step()
    state = chain.state_dict()
    for name, value in plain.state_dict().items():
        assert_same(state[name], value, name)
    nbytes = sum(p.nbytes for p in trained.values())
    assert 2 * nbytes <= sum(chain.memory().column("optimizer")) < 2.1 * nbytes
    assert sum(chain.memory().column("parameters")) > 5 * nbytes
    assert len(chain.memory()) == 2
    del trainer
    tg.spawn(loss_of, chain(x), x).backward()
    assert sum(chain.memory().column("gradients")) == nbytes


def test_adapters_whose_values_come_from_the_weights(client):
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which computes it from"):
        tg.GraphChain(adapted(llama(), init_lora_weights="pissa"), client=client)
