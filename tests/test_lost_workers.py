"""A process that ends while it runs the user's code: the error names the worker and what it ran."""

from __future__ import annotations

import functools
import os
import re
import signal

import pytest
import torch
import torch.nn.functional as F
from distributed import get_worker
from torch import nn

import taskgrad as tg
from helpers import long_rows


def end(way):
    """End the process, if it is a worker's."""
    try:
        get_worker()
    except ValueError:
        return
    if way == "exit":
        os._exit(1)
    if way == "abort":
        os.abort()
    os.kill(os.getpid(), signal.SIGKILL)


class Ends(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        end("exit")
        return g


class EndsForward(nn.Module):
    def forward(self, x):
        end("abort")
        return x


class EndsBackward(nn.Module):
    def forward(self, x):
        return Ends.apply(x)


class EndsStep(torch.optim.SGD):
    def step(self, closure=None):
        end("kill")
        return super().step(closure)


def ends_loss(output, target):
    end("exit")
    return F.mse_loss(output, target)


SGD = functools.partial(torch.optim.SGD, lr=0.1)
ENDS_STEP = functools.partial(EndsStep, lr=0.1)


def allow_failures(count, dask_scheduler):
    before, dask_scheduler.allowed_failures = dask_scheduler.allowed_failures, count
    return before


def lost(call, *texts):
    with pytest.raises(tg.WorkerLostError) as raised:
        call()
    message = str(raised.value)
    for text in (*texts, r"os\._exit, os\.abort"):
        assert re.search(text, message), message


def test_a_layer_that_ends_its_process(fresh):
    client = fresh(n_workers=2)
    layers = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Identity(), EndsForward())
    chain = tg.GraphChain(layers, client=client, placement=[0, 0, 1, 1])
    address = chain.placement[3].worker
    named = rf"worker 1 \({address}\) is gone.*had not finished 'forward:2..3'"
    lost(lambda: tg.collect(chain(torch.ones(1, 2))), named, "Make the chain again")
    other = tg.GraphChain(nn.Sequential(nn.Identity()), client=client, placement=[0])
    assert tg.collect(other(torch.ones(2))).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("last", "loss", "optimizer", "task"),
    [
        (EndsBackward(), F.mse_loss, SGD, r"'backward:1' in microbatch [01] of step 0"),
        *long_rows(
            (nn.Identity(), ends_loss, SGD, r"'forward:1' in microbatch [01] of step 0"),
            (nn.Identity(), F.mse_loss, ENDS_STEP, r"'update:\S+' of step 0"),
        ),
    ],
    ids=["backward", "loss", "optimizer"],
)
def test_what_trains_ends_its_process(fresh, last, loss, optimizer, task):
    client = fresh(n_workers=2)
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 1), last), client=client, placement=[0, 1])
    trainer = tg.Trainer(chain, loss, optimizer, microbatches=2)
    x, y = torch.ones(4, 2), torch.zeros(4, 1)
    lost(lambda: trainer.step(x, y).item(), rf"worker [01] \(tcp://.* is gone.*{task}")
    with pytest.raises(tg.TaskgradError, match="lost part of its model"):
        trainer.step(x, y)


def test_functions_that_end_every_process_they_run_in(fresh):
    client = fresh(n_workers=2)

    def ends(i):
        end("exit")

    with client.as_current():
        usual = client.run_on_scheduler(allow_failures, 0)
        lost(lambda: tg.collect(tg.spawn(ends, 1)), r"'forward:ends'.*1 worker.*worker [01] \(tcp")
        lost(lambda: tg.map(ends, range(4)), r"items [02] to [13] of the map of 'ends'")
        # Chunks of one item: the scheduler fails all that a lost worker had, in any order.
        lost(lambda: list(tg.imap(ends, range(4))), r"items ([0-3]) to \1 of the map of 'ends'")
        # The second chunk of imap may still end a worker that has been given the next map.
        client.run_on_scheduler(allow_failures, usual)
        client.wait_for_workers(1, timeout=60)  # the nannies start others
        assert tg.map(len, ["a", "bc"]) == [1, 2]
