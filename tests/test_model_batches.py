"""Batches for models that are called with keywords and compute their own loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import dask
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import taskgrad as tg
from taskgrad.graph.layers import flatten_model
from taskgrad.graph.signature import signature_of

SGD = partial(torch.optim.SGD, lr=0.2)


@dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Classifier(nn.Module):
    """Named arguments, one of them optional; a loss if there are labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, values, scale=None, labels=None):
        logits = self.linear(values if scale is None else values * scale)
        loss = None if labels is None else F.cross_entropy(logits, labels, ignore_index=-100)
        return Output(loss, logits)


class First(nn.Module):
    """The first layer of a Sequential; the samples of its `values` are columns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, values, *, scale):
        return self.linear(values.T) * scale


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)

    def forward(self, x, y):
        return F.mse_loss(self.linear(x)[:, 0], y)


def batches(count=2, size=6):
    torch.manual_seed(1)
    found = []
    for _ in range(count):
        values, scale = torch.randn(size, 4), torch.rand(size, 1)
        found.append({"values": values, "scale": scale, "labels": torch.randint(3, (size,))})
    return found


def trained(model, steps, loss_of):
    """Plain torch after one step on each of these, and the losses."""
    optimizer, losses = SGD(model.parameters()), []
    for batch in steps:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.state_dict(), losses


def assert_trained(trainer, found, expected):
    state, losses = expected
    assert [loss.item() for loss in found] == pytest.approx(losses, rel=1e-5)
    ours = trainer.chain.state_dict()
    for name, value in state.items():
        there = ours[name if name in ours else f"0.{name}"]
        torch.testing.assert_close(there, value, rtol=1e-4, atol=1e-6)


def one_layer(model):
    """A chain of a model that is not cut, on one worker."""
    return tg.GraphChain(nn.Sequential(model))


def test_dicts_are_keyword_arguments_and_the_loss_is_the_models(client, executor):
    expected = trained(Classifier(), batches(), lambda model, b: model(**b).loss)
    trainer = tg.Trainer(one_layer(Classifier()), None, SGD, microbatches=3)
    found = [trainer.step(dict(reversed(b.items())) if i else b) for i, b in enumerate(batches())]
    assert_trained(trainer, found, expected)


def test_the_first_layer_of_a_sequential_takes_keywords(client, executor):
    given = [({"values": b["values"].T, "scale": b["scale"]}, b["labels"]) for b in batches()]
    options = {"microbatches": 2, "in_dims": {"values": 1, "scale": 0}}
    torch.manual_seed(3)
    model = nn.Sequential(First(), nn.Linear(3, 3))
    chain = tg.GraphChain(model, placement=[0, 1])

    def loss_of(model, item):
        return F.cross_entropy(model[1](model[0](**item[0])), item[1])

    outputs = [model[1](model[0](**x)).detach() for x, _ in given]
    losses = [loss_of(model, item).item() for item in given]
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, **options)
    for ours, theirs in zip(trainer.predict([x for x, _ in given]), outputs, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert trainer.evaluate(given)["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    found = [trainer.step(x, y) for x, y in given]
    assert_trained(trainer, found, trained(model, given, loss_of))


def test_fit_and_evaluate_take_batches_as_they_are(client, executor):
    model = Classifier()
    with torch.no_grad():
        losses = [model(**b).loss.item() for b in batches()]
    expected = trained(model, batches(), lambda model, b: model(**b).loss)
    trainer = tg.Trainer(one_layer(Classifier()), None, SGD, microbatches=2)

    def right(output, batch):
        return (output.logits.argmax(1) == batch["labels"]).float().mean()

    before = trainer.evaluate(batches(), {"right": right})
    assert before["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert 0 <= before["right"] <= 1
    history = trainer.fit(batches(), val_loader=batches(), progress=False)
    assert history[0]["loss"] == pytest.approx(sum(expected[1]) / 2, rel=1e-5)
    after = [model(**b).loss.item() for b in batches()]
    assert history[0]["val_loss"] == pytest.approx(sum(after) / 2, rel=1e-4)
    [output] = trainer.predict([{"values": batches()[0]["values"]}])
    assert output.loss is None


def test_tuples_are_positional_arguments_and_the_output_may_be_the_loss(client, executor):
    torch.manual_seed(1)
    x, y = torch.randn(8, 4), torch.randn(8)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)  # yields lists
    expected = trained(Scalar(), [(x[:4], y[:4]), (x[4:], y[4:])], lambda model, b: model(*b))
    trainer = tg.Trainer(one_layer(Scalar()), None, SGD, microbatches=2)
    [results] = trainer.fit(loader, progress=False)
    assert results["loss"] == pytest.approx(sum(expected[1]) / 2, rel=1e-5)
    assert_trained(trainer, [], (expected[0], []))


def test_batches_on_workers(client, executor):
    expected = trained(Classifier(), batches(), lambda model, b: model(**b).loss)
    trainer = tg.Trainer(one_layer(Classifier()), None, SGD, microbatches=2)
    there = [{k: dask.delayed(v) for k, v in b.items()} for b in batches()]
    assert_trained(trainer, [trainer.step(b) for b in there], expected)
    with pytest.raises(ValueError, match="cut there along its in_dims"):
        tg.Trainer(
            trainer.chain, None, SGD, in_dims={"values": 0, "scale": None, "labels": 0}
        ).step(there[0])


def test_a_function_of_chains_takes_a_batch_as_one(client, executor):
    first, second = tg.GraphChain(nn.Linear(4, 3)), tg.GraphChain(nn.Linear(3, 3))

    def model(batch):
        logits = second(first(batch["values"]))
        return tg.spawn(F.cross_entropy, logits, batch["labels"])

    plain = nn.Sequential(first.to_module(), second.to_module())
    given = batches(1)[0]
    loss = F.cross_entropy(plain(given["values"]), given["labels"]).item()
    trainer = tg.Trainer(model, None, SGD, microbatches=2, loss_weight="labels")
    assert trainer.step(given).item() == pytest.approx(loss, rel=1e-5)


def test_weights_of_batches_without_targets(client, tmp_path):
    """A function gets the batch; the name of a field is saved with the trainer."""
    given = batches(1)[0]
    given["labels"][:2] = -100  # all of the first microbatch, whose loss is NaN
    loss = Classifier()(**given).loss.item()
    seen = []

    def count(batch):
        seen.append(sorted(batch))
        return (batch["labels"] != -100).sum()

    for weight in (count, "labels"):
        trainer = tg.Trainer(one_layer(Classifier()), None, SGD, microbatches=3, loss_weight=weight)
        assert trainer.step(given).item() == pytest.approx(loss, rel=1e-5)
    assert seen == [["labels", "scale", "values"]] * 3
    trainer.save(tmp_path)
    again = tg.Trainer.restore(tmp_path, one_layer(Classifier()), None, SGD)
    assert again.step(given).item() == trainer.step(given).item() != pytest.approx(loss)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def gpt2(transformers):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, use_cache=False
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config)


def encoding(transformers, lengths, seed):
    """What a tokenizer and a collator give: padded rows of these lengths."""
    torch.manual_seed(seed)
    ids, mask = torch.randint(64, (len(lengths), 12)), torch.zeros(len(lengths), 12).long()
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels})


@pytest.mark.long
def test_a_padded_language_model_equals_the_whole_batch(client, executor, transformers):
    given = [encoding(transformers, n, i) for i, n in enumerate(([12, 2, 3, 2], [2, 9, 5, 12]))]
    plain = gpt2(transformers)
    both = {key: torch.cat([b[key] for b in given]) for key in given[0]}
    losses = [plain(**b).loss.item() for b in given]
    state, _ = trained(plain, [both], lambda model, b: model(**b).loss)
    options = {"microbatches": 4, "accumulate": 2, "loss_weight": "labels"}
    trainer = tg.Trainer(one_layer(gpt2(transformers)), None, SGD, **options)
    counts = [(b["labels"][:, 1:] != -100).sum().item() for b in given]
    mean = sum(a * n for a, n in zip(losses, counts, strict=True)) / sum(counts)
    assert trainer.evaluate(given)["loss"] == pytest.approx(mean, rel=1e-5)
    assert_trained(trainer, [trainer.step(b) for b in given], (state, losses))
    with pytest.raises(ValueError, match="only if a batch has 'labels'"):
        trainer.step({"input_ids": given[0]["input_ids"]})
    [output] = trainer.predict([{"input_ids": given[0]["input_ids"]}])
    assert output.logits.shape == (4, 12, 64)


def test_models_that_shift_their_labels_are_known(transformers):
    def shifts(kind, **options):
        with torch.device("meta"):
            return signature_of(kind(kind.config_class(**options))).shifts_labels

    assert flatten_model(gpt2(transformers)).takes.shifts_labels
    assert not flatten_model(nn.Sequential(gpt2(transformers), Scalar())).takes.shifts_labels
    assert shifts(transformers.LlamaForCausalLM, num_hidden_layers=1)
    assert not shifts(transformers.T5ForConditionalGeneration, num_layers=1)
    assert not shifts(transformers.BertForMaskedLM, num_hidden_layers=1)
    assert not signature_of(Classifier()).shifts_labels


def test_errors_before_a_task(client):
    trainer = tg.Trainer(one_layer(Classifier()), None, SGD)
    b = batches(1)[0]
    with pytest.raises(TypeError, match="'label' is not among them"):
        trainer.step({"values": b["values"], "label": b["labels"]})
    with pytest.raises(TypeError, match="takes all of a batch"):
        trainer.step(b["values"], b["labels"])
    with pytest.raises(TypeError, match="of 4 positional arguments does not fit"):
        trainer.step((b["values"], b["scale"], b["labels"], 1))
    with pytest.raises(TypeError, match="'y' is missing"):
        tg.Trainer(one_layer(Scalar()), None, SGD).step(b["values"])
    with pytest.raises(TypeError, match="'b' is not among them and 'y' is missing"):
        tg.Trainer(one_layer(Scalar()), None, SGD).step({"x": b["values"], "b": 1})
    assert trainer.steps == 0


def test_a_model_without_a_loss_says_what_it_gave(client, executor):
    trainer = tg.Trainer(tg.GraphChain(nn.Linear(4, 3)), None, SGD)
    with pytest.raises(tg.LayerError, match=r"is one tensor, float32\[6, 3\].* loss_fn of"):
        trainer.step(batches()[0]["values"]).item()
    trainer = tg.Trainer(one_layer(Classifier()), None, SGD)
    with pytest.raises(tg.LayerError, match="is of type Output and has no loss"):
        trainer.step({"values": batches()[0]["values"]}).item()
    with pytest.raises(tg.LayerError, match="is of type Output and has no loss"):
        trainer.evaluate([{"values": batches()[0]["values"]}])


def forward(*, source):
    """A module whose forward is this one."""
    space = {"Mapping": Mapping}
    exec(compile(f"def forward(self, {source}): pass", "made", "exec", dont_inherit=True), space)
    return type("Made", (nn.Module,), {"forward": space["forward"]})()


@pytest.mark.parametrize(
    ("source", "keys", "found"),
    [
        ("x, y", "xy", True),
        ("x, y=None", "x", True),
        ("x", "x", True),
        ("x", "xy", False),
        ("x", "ab", False),
        ("batch, mask=None", "ab", False),
        ("batch=None, mask=None", "ab", False),
        ("**kwargs", "ab", True),
        ("x, **kwargs", "ab", False),
        ("x, **kwargs", "xb", True),
        ("*args, **kwargs", "ab", True),
        ("*args", "ab", False),
        ("x: dict", "x", False),
        ("x: 'dict[str, int]'", "x", False),
        ("x: Mapping", "x", False),
        ("*, x", "x", True),
        ("x, y", "xa", None),
        ("x=None, y=None", "xa", None),
        ("x, y", "ab", None),
        ("*, x", "a", None),
    ],
)
def test_when_a_dict_is_keyword_arguments(source, keys, found):
    signature = signature_of(forward(source=source))
    batch = dict.fromkeys(keys, 1)
    if found is None:
        with pytest.raises(TypeError, match="the batch has the keys"):
            signature.takes_keywords(batch)
    else:
        assert signature.takes_keywords(batch) is found
    assert not signature.takes_keywords({1: 2})
