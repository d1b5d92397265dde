"""pmap: what goes in and comes out, gradients, training, and what is refused."""

from __future__ import annotations

import copy
import gc
import math
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import ran_on, total_held, wait_until
from helpers import known_to_scheduler
from taskgrad.cluster.tasks import mailboxes
from taskgrad.cluster.wire import scatter
from taskgrad.graph.pytree import tensors


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def empty(client) -> bool:
    """Whether no worker holds anything of ours, mailboxes included."""
    counts = [*client.run(mailboxes).values(), total_held(client)]
    return not any(value for count in counts for value in count.values())


def test_ranks_run_on_workers_of_their_own(client):
    def doubled(x):
        return x * 2, tg.axis_index("i"), os.getpid()

    x = torch.arange(6.0).reshape(2, 3)
    y, ranks, processes = tg.pmap(doubled, axis_name="i", client=client)(x)
    assert torch.equal(y, x * 2)
    assert ranks.tolist() == [0, 1]
    assert len(set(processes.tolist())) == 2
    one = tg.pmap(lambda x: x + 1, client=client)(x[:1])
    assert torch.equal(one, x[:1] + 1)


def test_axes_as_jax_reads_them(four):
    x = torch.arange(24.0).reshape(2, 4, 3)
    w = torch.randn(3)
    tree = {"a": torch.arange(4.0), "b": (torch.arange(8.0).reshape(2, 4), 7)}

    def f(x, w, tree, *, k):
        return {"x": x * w, "k": k}, Pair(tree["a"] + tree["b"][1], tree["b"][0]), w.sum()

    mapped = tg.pmap(
        f,
        in_axes=(1, None, {"a": 0, "b": (1, None)}),
        out_axes=({"x": 1, "k": -1}, 0, None),
        client=four,
    )
    out, pair, total = mapped(x, w, tree, k=torch.arange(8.0).reshape(4, 2))
    assert torch.equal(out["x"], x * w)
    assert torch.equal(out["k"], torch.arange(8.0).reshape(4, 2).T)
    assert torch.equal(pair.left, torch.arange(4.0) + 7)
    assert torch.equal(pair.right, torch.arange(8.0).reshape(2, 4).T)
    assert torch.equal(total, w.sum())


def test_axes_that_do_not_fit(client):
    x = torch.ones(2, 3)

    def refused(kind, text, *args, in_axes=0, out_axes=0, fn=lambda *a: a[0]):
        with pytest.raises(kind, match=text):
            tg.pmap(fn, in_axes=in_axes, out_axes=out_axes, client=client)(*args)

    refused(ValueError, "inconsistent sizes", x, torch.ones(1))
    refused(ValueError, "no axis is mapped", x, in_axes=None)
    refused(ValueError, "has no axis 2 to map", x, in_axes=2)
    refused(ValueError, "has no axis 0 to map", torch.ones(()))
    refused(ValueError, "2 entries for 1 positional", x, in_axes=(0, 0))
    refused(ValueError, "not a prefix", (x, x), in_axes=((0, 0, 0),))
    refused(ValueError, "length 0", torch.ones(0, 3))
    refused(TypeError, "a int has no axis 0 to map.*axis None", x, 3)
    refused(TypeError, "ints, None and containers", x, in_axes=("0",))
    refused(TypeError, "an int, None or a tuple", x, in_axes={"x": 0})
    refused(TypeError, "tg.collect its thunks first", tg.spawn(torch.ones, 2))
    refused(ValueError, "not a prefix", x, out_axes=(0, 0))
    refused(ValueError, "not the same on all ranks", torch.arange(2.0), out_axes=None)
    refused(TypeError, "outputs are tensors and numbers; got a str", x, fn=lambda x: "word")

    def ragged(x):
        return x[: 1 + tg.axis_index("i")]

    with pytest.raises(ValueError, match="differ in shape or dtype"):
        tg.pmap(ragged, axis_name="i", client=client)(x)


def test_wrong_use_is_refused(client):
    x = torch.ones(2)
    with pytest.raises(TypeError, match="takes a function or a module"):
        tg.pmap(3)
    with pytest.raises(TypeError, match="a GraphChain has workers of its own"):
        tg.pmap(tg.GraphChain(nn.Linear(1, 1)))
    with pytest.raises(TypeError, match="maps one axis"):
        tg.pmap(torch.sin, axis_name=("i", "j"))
    with pytest.raises(ValueError, match="have the axis name 'i'"):
        tg.pmap(tg.pmap(torch.sin, "i"), "i")

    with pytest.raises(tg.LayerError, match="is called inside a task"):
        tg.collect(tg.spawn(lambda x: tg.pmap(torch.sin)(x), x))
    with pytest.raises(TypeError, match="cannot be sent to a worker"):
        tg.pmap(lambda x, g: x, in_axes=(0, None), client=client)(x, (i for i in range(3)))


def test_gradients_of_arguments_and_of_what_is_closed_over(client):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    scale = torch.tensor(2.0, requires_grad=True)
    x = torch.randn(3, 2, requires_grad=True)
    shift = torch.randn(2, requires_grad=True)
    f = tg.pmap(
        lambda x, shift, layer: layer(x) * scale + tg.psum(x.sum() * shift, "i") + model.bias,
        axis_name="i",
        in_axes=(1, None, None),
        out_axes=1,
        client=client,
    )
    (f(x, shift, model).exp()).sum().backward()
    ours = [t.grad for t in (model.weight, model.bias, scale, x, shift)]
    for t in (model.weight, model.bias, scale, x, shift):
        t.grad = None
    # One after the other in this process.
    sums = x.sum() * shift
    outs = [model(x[:, r]) * scale + sums + model.bias for r in range(2)]
    torch.stack(outs, 1).exp().sum().backward()
    theirs = [t.grad for t in (model.weight, model.bias, scale, x, shift)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_out_axes_none_is_the_value_of_rank_0_and_its_gradient(client):
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    y = tg.pmap(lambda x: tg.psum(x * x, "i"), "i", out_axes=None, client=client)(x)
    assert y == 10
    y.backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_the_forward_runs_once_and_nothing_stays(client):
    before = len(ran_on(client, "forward:rank_"))
    x = torch.randn(2, 3, requires_grad=True)
    y = tg.pmap(lambda x: tg.psum(x * x, "i"), axis_name="i", client=client)(x)
    assert total_held(client)["tapes"] == 2
    y.sum().backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.sum().backward()
    assert torch.equal(x.grad, first)
    assert len(ran_on(client, "forward:rank_")) - before == 2
    with pytest.raises(tg.TapeError, match="a second time"):
        y.sum().backward()
    del y
    assert wait_until(lambda: empty(client))
    with torch.no_grad():
        y = tg.pmap(lambda x: tg.psum(x * x, "i"), axis_name="i", client=client)(x)
    assert not y.requires_grad
    assert wait_until(lambda: empty(client))


def test_random_numbers_are_each_ranks_own_and_follow_the_seed(client):
    f = tg.pmap(lambda x: (torch.rand(3), F.dropout(x, 0.5), tg.psum(x, "i"), torch.rand(3)), "i")
    x = torch.ones(2, 50)
    torch.manual_seed(3)
    first, other = f(x), f(x)
    torch.manual_seed(3)
    again = f(x)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[1][0], first[1][1])
    assert not torch.equal(first[0], first[3])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.head(x.flatten(1))


def test_data_parallel_training_equals_plain_torch_on_the_whole_batch(four):
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    x, t = torch.randn(4, 4, 1, 8, 8), torch.randint(3, (4, 4))

    # As in JAX: each rank takes its own gradients, and the mean over the ranks is everybody's.
    def gradients(params, x, t):
        def loss(params):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), t)

        grads, value = torch.func.grad_and_value(loss)(params)
        return tg.pmean(grads, "batch"), tg.pmean(value, "batch")

    step = tg.pmap(gradients, "batch", in_axes=(None, 0, 0), out_axes=None, client=four)
    # And as in torch: the loss is the driver's, and so is the backward.
    losses = tg.pmap(
        lambda model, x, t: F.cross_entropy(model(x), t), in_axes=(None, 0, 0), client=four
    )
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, other, plain)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        grads, value = step({n: p.detach() for n, p in model.named_parameters()}, x, t)
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name]
        loss = losses(other, x, t).mean()
        loss.backward()
        expected = F.cross_entropy(plain(x.flatten(0, 1)), t.flatten())
        expected.backward()
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(loss, expected)
        for optimizer in optimizers:
            optimizer.step()
    for m in (model, other):
        torch.testing.assert_close(m.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def test_a_result_that_takes_no_gradient_keeps_no_tape(client):
    """Though the function closes over parameters that would."""
    model = nn.Linear(3, 1)

    def f(x):
        held = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, held, (x,)), model(x)

    x = torch.randn(2, 5, 3)
    without, of_parameters = tg.pmap(f, client=client)(x)
    assert not without.requires_grad
    assert of_parameters.requires_grad
    torch.testing.assert_close(without, model(x).detach())
    of_parameters.sum().backward()
    assert model.weight.grad is not None

    alone = tg.pmap(lambda x: f(x)[0], client=client)(x)
    assert not alone.requires_grad
    assert wait_until(lambda: not any(total_held(client).values()))


def test_buffers_that_a_module_changes_come_from_rank_0(client):
    norm = nn.BatchNorm1d(3)
    x = torch.randn(2, 5, 3)
    tg.pmap(norm, client=client)(x)
    plain = nn.BatchNorm1d(3)
    plain(x[0])
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


@tg.vectorize
def swish(x, beta):
    return x / (1 + math.exp(-beta * x))


def test_a_vectorized_kernel_with_gradients_inside(client):
    x = torch.randn(2, 7, requires_grad=True)
    beta = torch.tensor(1.5, requires_grad=True)
    tg.pmap(lambda x: tg.psum(swish(x, beta), "i") * x, "i", client=client)(x).sum().backward()
    y, b = x.detach().requires_grad_(), beta.detach().requires_grad_()
    ((y * torch.sigmoid(b * y)).sum(0) * y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(beta.grad, b.grad)


def test_what_a_call_with_a_tape_closes_over_is_sent_once(client, monkeypatch):
    """Again when it has changed; what ranks write to it is theirs."""
    sent: list[int] = []
    send = scatter.send

    def counting(to, parts):
        sent.extend(t.nbytes for values, _ in parts for v in values.values() for t in tensors(v))
        return send(to, parts)

    monkeypatch.setattr(scatter, "send", counting)
    before = known_to_scheduler(client)
    assert while_it_exists(client, sent) > before
    gc.collect()
    assert wait_until(lambda: known_to_scheduler(client) <= before)


def while_it_exists(client, sent: list[int]) -> set[str]:
    """What the scheduler then knows."""
    data, w = torch.randn(2, 1 << 20), torch.ones(1 << 20, requires_grad=True)

    def f(x):
        data.add_(x)
        return (data * w).mean()

    mapped = tg.pmap(f, client=client)

    def sends(*sizes: int) -> None:
        sent.clear()
        w.grad = None
        found = mapped(torch.tensor([1.0, 2.0]))
        found.sum().backward()
        assert sorted(sent) == sorted(sizes)
        expected = torch.stack([data + 1, data + 2])
        torch.testing.assert_close(found, (expected * w).mean((1, 2)))
        torch.testing.assert_close(w.grad, expected.sum((0, 1)) / data.numel())

    sends(data.nbytes, w.nbytes)
    sends()
    with torch.no_grad():
        w.sub_(w.grad)
    sends(w.nbytes)
    data.mul_(2)
    sends(data.nbytes)
    data.data[0, 0] = 7  # which torch does not count
    sends(data.nbytes)
    sends()
    return known_to_scheduler(client)


def test_large_buffers_that_a_module_writes(client):
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1 << 19))
            self.register_buffer("seen", torch.zeros(1 << 19))

        def forward(self, x):
            if self.training:
                self.seen += x
            return (self.seen * self.weight).mean()

    model, plain = Counts(), Counts()
    mapped = tg.pmap(model, client=client)
    for training in (True, True, False, False, True):
        model.train(training)
        plain.train(training)
        found = mapped(torch.tensor([1.0, 2.0]))
        found.sum().backward()
        before = plain.seen.clone()
        wanted = plain(torch.tensor(1.0))  # rank 0's are returned
        wanted.backward()
        assert torch.equal(model.seen, plain.seen)
        torch.testing.assert_close(found[0], wanted)
        torch.testing.assert_close(found[1], (before + 2 * training).mean())
