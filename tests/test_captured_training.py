"""Training captured models over workers, against plain torch in one process."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import nn

import taskgrad as tg

transformers = pytest.importorskip("transformers")

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3,
        n_embd=16,
        n_head=2,
        vocab_size=40,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return transformers.GPT2LMHeadModel(config)


def token_batches(count: int, size: int = 4, *, padded: bool = True) -> list[dict[str, Any]]:
    """Batches as a tokenizer makes them, of other lengths each time."""
    torch.manual_seed(1)
    batches = []
    for i in range(count):
        ids = torch.randint(1, 40, (size, 8 + i % 3))
        mask = torch.ones_like(ids)
        if padded:
            for row in range(size):
                mask[row, 8 - (row + i) % 4 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


class Streams:
    """Has each layer of a plain model draw from the stream that a trainer gives it."""

    def __init__(self, model: nn.Module, layers: list[str], seed: int) -> None:
        self.at = (seed, 0, 0)
        self._open: list[Any] = []
        for name in layers:
            if name:
                module = model.get_submodule(name)
                module.register_forward_pre_hook(functools.partial(self._enter, name))
                module.register_forward_hook(self._leave)

    def _enter(self, name: str, module: Any, args: Any) -> None:
        self._open.append(tg.random_stream(*self.at, name))
        self._open[-1].__enter__()

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def train_plain(
    model: nn.Module,
    layers: list[str],
    batches: list[Any],
    microbatches: int,
    *,
    clip: float | None = None,
    bf16: bool = False,
    accumulate: int = 1,
) -> list[float]:
    model.train()
    streams = Streams(model, layers, seed=5)
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step, batch in enumerate(batches):
        parts = {key: value.tensor_split(microbatches) for key, value in batch.items()}
        found = [{key: part[m] for key, part in parts.items()} for m in range(microbatches)]
        counts = [len(part["input_ids"]) for part in found]
        total = 0.0
        for m, part in enumerate(found):
            streams.at = 5, step, m
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**part).loss
            share = counts[m] / sum(counts)
            loss.backward(torch.full_like(loss, share / accumulate))
            total += loss.item() * share
        losses.append(total)
        if (step + 1) % accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same_weights(chain: tg.GraphChain, plain: nn.Module) -> None:
    ours = chain.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.long)])
def test_twenty_steps_have_the_bits_of_plain_torch(workers, four, executor):
    model, batches = gpt2(), token_batches(20)
    count = len(tg.GraphChain(model, client=four))
    chain = tg.GraphChain(
        model,
        client=four,
        example_inputs=batches[0],
        placement=[i * workers // count for i in range(count)],
    )
    assert len(chain.layout.shards) == workers
    layers = [row.layer for row in chain.placement]
    trainer = tg.Trainer(
        chain, None, ADAMW, microbatches=2, clip_norm=0.5, seed=5, executor=executor
    )
    losses = [trainer.step(batch) for batch in batches]
    expected = train_plain(model, layers, batches, 2, clip=0.5)
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-6)
    assert_same_weights(chain, model)
    trained = chain.to_module()
    assert type(trained) is type(model)
    assert trained.lm_head.weight is trained.transformer.wte.weight


def test_without_an_example_the_first_batch_says_what_runs(client):
    model, batches = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), token_batches(3)
    chain = tg.GraphChain(model, client=client)
    layers = [row.layer for row in chain.placement]
    trainer = tg.Trainer(chain, None, ADAMW, microbatches=2, seed=5)
    with pytest.raises(tg.TaskgradError, match="has no plan before its forward was followed"):
        trainer.plan  # noqa: B018
    for batch in batches:
        trainer.step(batch)
    trainer.wait()
    train_plain(model, layers, batches, 2)
    assert_same_weights(chain, model)
    assert len(trainer.plan.stages) == 2


def test_a_loss_of_ones_own_and_batches_without_padding(client):
    def loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())

    model, batches = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), token_batches(3)
    chain = tg.GraphChain(model, client=client)
    trainer = tg.Trainer(chain, loss, ADAMW, seed=5)
    optimizer = ADAMW(model.parameters())
    for batch in batches:
        x = {"input_ids": batch["input_ids"], "use_cache": False}
        found = trainer.step(x, batch["labels"])
        expected = loss(model(**x), batch["labels"])
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_weights(chain, model)


def test_a_token_mean_over_padded_batches(client):
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    batches = token_batches(4)
    chain = tg.GraphChain(model, client=client)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    trainer = tg.Trainer(chain, None, sgd, microbatches=4, loss_weight="labels")
    optimizer = sgd(model.parameters())
    for batch in batches:
        found = trainer.step(batch)
        expected = model(**batch).loss  # of the whole batch
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = chain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)
    results = trainer.evaluate(batches)
    model.eval()
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    losses = [model(**b).loss.item() for b in batches]
    mean = sum(c * v for c, v in zip(counts, losses, strict=True)) / sum(counts)
    assert results["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_value_that_decides_is_an_error_that_names_the_line(client):
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                if x.abs().max() < 1e-3:  # a decision by a value
                    break
            return x

    chain = tg.GraphChain(Early(), client=client)
    trainer = tg.Trainer(chain, nn.functional.mse_loss, ADAMW)
    with pytest.raises(tg.TaskgradError, match=r"test_captured_training\.py, line \d+, in forward"):
        trainer.step(torch.randn(2, 4), torch.randn(2, 4))


def test_a_model_without_a_loss(client):
    model = gpt2()
    chain = tg.GraphChain(model, client=client)
    trainer = tg.Trainer(chain, None, ADAMW)
    with pytest.raises(ValueError, match="computes a loss only if a batch has 'labels'"):
        trainer.step({"input_ids": torch.ones(2, 4, dtype=torch.long)})
    trainer.step(token_batches(1)[0]).item()  # and can go on


class Deciding(nn.Module):
    """Goes on by the value of an activation; takes parts of it by another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        x = first = self.norm(self.layers[0](x))
        for layer in self.layers[1:]:
            x = layer(x) + first
            if x.abs().mean() > 1.2:
                break
        rows = x.sum(-1) > 0
        return x[rows] * float(x.detach().max()), first


def test_a_value_that_decides_is_collected(four, caplog):
    model = Deciding().double()
    chain = tg.GraphChain(model, client=four, placement=[0, 1, 2, 3, 0])
    layers = {row.layer: row.worker for row in chain.placement}
    assert len(set(layers.values())) == 4
    for scale in (0.1, 1.0, 30.0):
        x = torch.randn(6, 4).double() * scale
        ours, plain = tg.collect(chain(x)), model(x)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)
        model.zero_grad()
        chain.zero_grad()
        sum(t.square().sum() for t in plain).backward()
        sum(t.square().sum() for t in ours).backward()
        for name, parameter in model.named_parameters():
            found = tg.collect(chain.grads()[name])
            if parameter.grad is not None:
                torch.testing.assert_close(found, parameter.grad)
    assert int(chain.state_dict()["norm.num_batches_tracked"]) == 3  # each layer ran once
    said = [r for r in caplog.records if "reads the value of an activation" in r.getMessage()]
    assert len(said) == 1
    assert "test_captured_training.py, line" in said[0].getMessage()


OPTIONS = {
    "bf16": {"amp": "bf16"},
    "zb_h2": {"schedule": "zb_h2", "microbatches": 4},
    "recompute": {"checkpoint": "always"},
    "recompute one": {"checkpoint": lambda name: name.endswith("h.1")},
    "accumulate": {"accumulate": 2},
    "interleaved": {"schedule": "interleaved_1f1b", "microbatches": 6},
}


@pytest.mark.long
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_a_trainer_keep_the_bits(options, client, executor):
    model, batches = gpt2(), token_batches(4, size=6)
    stages = 2 if options.get("schedule") == "interleaved_1f1b" else 1
    chain = tg.GraphChain(model, client=client, example_inputs=batches[0], stages_per_worker=stages)
    layers = [row.layer for row in chain.placement]
    trainer = tg.Trainer(chain, None, ADAMW, seed=5, **{"microbatches": 2, **options})
    for batch in batches:
        trainer.step(batch)
    trainer.wait()
    train_plain(
        model,
        layers,
        batches,
        options.get("microbatches", 2),
        bf16="amp" in options,
        accumulate=options.get("accumulate", 1),
    )
    assert_same_weights(chain, model)


def test_a_checkpoint_goes_on_at_another_placement(client, tmp_path):
    batches = token_batches(4)
    chain = tg.GraphChain(gpt2(), client=client, example_inputs=batches[0])
    trainer = tg.Trainer(chain, None, ADAMW, microbatches=2, seed=5)
    for batch in batches[:2]:
        trainer.step(batch)
    trainer.save(tmp_path)
    other = tg.GraphChain(gpt2(), client=client, placement=[i % 2 for i in range(len(chain))])
    restored = tg.Trainer.restore(tmp_path, other, None, ADAMW)
    for batch in batches[2:]:
        trainer.step(batch)
        restored.step(batch)
    trainer.wait()
    ours, theirs = other.state_dict(), chain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class PartUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("placement", [[0, 0, 1, 2], [0, 0, 2, 1]], ids=["last", "between"])
def test_a_worker_whose_layers_no_call_uses(placement, four, executor):
    model = PartUnused()
    chain = tg.GraphChain(model, client=four, placement=placement)
    loss, x, y = nn.functional.mse_loss, torch.randn(4, 4), torch.randn(4, 4)
    trainer = tg.Trainer(chain, loss, ADAMW, microbatches=2, schedule="zb_h1")
    optimizer = ADAMW(model.parameters())
    for _ in range(3):
        trainer.step(x, y)
        for part, target in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
            (loss(model(part), target) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer.wait()
    assert_same_weights(chain, model)


def test_errors_come_before_any_task(client):
    layer, own = PartUnused(), PartUnused()
    layer.layers[1].lock = own.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"layer 'layers\.1' \(Linear\) cannot be sent"):
        tg.GraphChain(layer, client=client)
    with pytest.raises(TypeError, match="the attribute 'lock' of 'PartUnused' cannot be pickled"):
        tg.GraphChain(own, client=client)
    with pytest.raises(TypeError, match=r"PartUnused does not take .* too many positional"):
        tg.GraphChain(PartUnused(), client=client, example_inputs=(1, 2))
    with pytest.raises(ValueError, match="matches no module of the model"):
        tg.GraphChain(PartUnused(), client=client, cut="blocks.*")
    chain = tg.GraphChain(PartUnused(), client=client)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        chain(torch.ones(2, 3))
    with pytest.raises(tg.TaskgradError, match="a Thunk is on a worker: collect it first"):
        chain(tg.spawn(torch.ones, 2, 4))
    with pytest.raises(TypeError, match="calls a chain of PartUnused, whose own forward says"):
        tg.Trainer(lambda x: chain(x), nn.functional.mse_loss, ADAMW, chains={"chain": chain})
