"""What a task has returned is never written to: others may read it while work goes on.

A result is not copied when it is sent: the network, or another worker that reads it where it lies,
takes its bytes late. Each test here writes as hard as it can meanwhile.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

import taskgrad as tg
from helpers import assert_same

COUNT = 2_000_000  # floats: 8 MB, on their way for some milliseconds
READS = 6


class Table(nn.Module):
    """Gives its parameter, a view of it and a buffer that it changes at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(COUNT)))
        self.register_buffer("seen", torch.zeros(COUNT))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen += 1
        return self.weight, self.weight[1:], self.seen, x.sum()


def test_steps_and_buffers_do_not_write_into_results(client):
    chain = tg.GraphChain(nn.Sequential(Table()), client=client, placement=[0])
    optimizer = tg.Optimizer(chain, functools.partial(torch.optim.SGD, lr=1.0))
    x = torch.ones(3)
    y = chain(x)
    before = [t.detach().clone() for t in tg.collect(y)]
    for _ in range(READS):
        # The other worker fetches the result while steps and calls write to what it was made of.
        read = tg.spawn(lambda value: [t.clone() for t in value], y, worker=1).persist()
        again = chain(x)
        tg.spawn(lambda value: value[0].sum() + value[1].sum(), again).backward()
        optimizer.step()
        optimizer.zero_grad()
        for found, expected in zip(tg.collect(read), before, strict=True):
            assert_same(found.detach(), expected)
    assert (chain.state_dict()["0.weight"] != before[0]).all()  # there was something to tear
    assert (chain.state_dict()["0.seen"] != before[2]).all()


def test_in_place_layers_do_not_write_into_results(client):
    """At both ends of a stage: what one has given the next one reads and changes."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Hardtanh(inplace=True))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 0])
    h = tg.spawn(torch.neg, torch.linspace(-3, 3, COUNT), worker=0)
    before = -torch.linspace(-3, 3, COUNT)
    for _ in range(READS):
        changed = [chain(h), tg.spawn(lambda t: t.mul_(0), h, worker=0)]
        read = tg.spawn(torch.clone, h, worker=1)
        found, *_ = tg.collect([read, *changed])
        assert_same(found, before)
    y = chain(h)
    expected = tg.collect(y)
    for _ in range(READS):
        read = tg.spawn(torch.clone, y, worker=1)
        found, _ = tg.collect([read, tg.spawn(lambda t: t.mul_(0), y, worker=0)])
        assert_same(found, expected)
