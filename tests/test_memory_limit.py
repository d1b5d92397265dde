"""Workers that are nearly full: what fits trains, what does not is refused with a sentence."""

from __future__ import annotations

import functools
import re
import resource
import threading

import dask
import psutil
import pytest
import torch
import torch.nn.functional as F
from distributed import Nanny
from torch import nn

import taskgrad as tg
from conftest import wait_until
from helpers import assert_same, long
from taskgrad.worker.offload import CopiesInFiles, SpilledState

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)
LAYERS, WIDTH = 40, 2048  # 16 MiB of parameters each: 640 MiB
GIB = 2**30


def big():
    """Four numbers are needed for each parameter: itself, its gradient, AdamW's two. 2.5 GiB."""
    layers = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)]
    return nn.Sequential(*layers)


def peak_memory(dask_worker):
    """The most bytes that the process has used at any time."""
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def hold_up_to(dask_worker, megabytes):
    """Have the process use so much, by memory that Dask knows nothing of."""
    more = (megabytes << 20) - psutil.Process().memory_info().rss
    dask_worker.held_by_somebody = torch.ones(more, dtype=torch.uint8)


@pytest.mark.long
def test_what_needs_two_and_a_half_gib_trains_on_two_workers_of_one_and_a_half(fresh, tmp_path):
    client = fresh(n_workers=2, memory_limit="1.5GiB")
    before = set(client.nthreads())
    chain = tg.GraphChain(big, client=client)
    assert 4 * sum(chain.placement.column("bytes")) > 2.5 * GIB
    trainer = tg.Trainer(chain, F.mse_loss, ADAMW)
    torch.manual_seed(0)
    x, t = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    losses = [trainer.step(x, t).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert sum(chain.memory().column("optimizer")) < 1 << 20  # in files
    trainer.save(tmp_path)
    restored = tg.Trainer.restore(tmp_path, chain, F.mse_loss, ADAMW)
    assert restored.step(x, t).item() < losses[-1]
    assert set(client.nthreads()) == before  # the nanny has restarted none
    peaks = client.run(peak_memory).values()
    # Dask ends a worker there. What the allocator keeps makes a peak differ by 0.1 GiB.
    assert max(peaks) < 0.95 * 1.5 * GIB, peaks


@pytest.mark.long
def test_the_same_on_one_worker_is_refused_beforehand(fresh):
    client = fresh(n_workers=1, memory_limit="1.5GiB")
    chain = tg.GraphChain(big, client=client)
    with pytest.raises(tg.MemoryLimitError) as caught:
        tg.Trainer(chain, F.mse_loss, ADAMW)
    message = str(caught.value)
    for part in (
        r"may use 1\.\d\d GiB of memory and uses \S+ [MG]iB already, 640\.31 MiB of that for this",
        r"training adds 640\.31 MiB of gradients and 1\.25 GiB of optimizer state",
        r"\d+\.\d\d MiB are missing, even with the optimizer state in files",
    ):
        assert re.search(part, message), message
    assert chain.memory().column("optimizer") == [0]
    tg.Trainer(  # which needs a tenth of it
        tg.GraphChain(lambda: big()[:4], client=client), F.mse_loss, ADAMW
    )


class MostMemory(threading.Thread):
    """The most memory that this process uses while it runs, above what it used before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._before = self._most = self._process.memory_info().rss
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.02):
            self._most = max(self._most, self._process.memory_info().rss)

    def stop(self) -> int:
        self._end.set()
        self.join()
        return self._most - self._before


def llama():
    """596 MiB of parameters."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=1000,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.long
def test_a_captured_model_that_fits_no_worker_trains_over_two(fresh):
    llama()  # its code is imported before memory is looked at
    memory = MostMemory()
    memory.start()
    client = fresh(n_workers=2, memory_limit="1.6GiB")
    before = set(client.nthreads())
    chain = tg.GraphChain(llama, client=client)
    held = sum(chain.placement.column("bytes"))
    assert held > 590 << 20
    trainer = tg.Trainer(chain, None, ADAMW, microbatches=2)
    tokens = torch.randint(1000, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = [trainer.step({"input_ids": tokens, "labels": tokens}).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert set(client.nthreads()) == before  # the nanny has restarted none
    assert memory.stop() < held // 4  # the driver

    one = fresh(n_workers=1, memory_limit="1.6GiB")
    with pytest.raises(tg.MemoryLimitError, match="are missing"):
        tg.Trainer(tg.GraphChain(llama, client=one), None, ADAMW, microbatches=2)


def test_what_others_hold_counts(fresh):
    client = fresh(n_workers=1, memory_limit="1GiB")
    chain = tg.GraphChain(nn.Sequential(nn.Linear(WIDTH, WIDTH)), client=client)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    tg.Trainer(chain, F.mse_loss, sgd)
    client.run(hold_up_to, megabytes=940)
    with pytest.raises(tg.MemoryLimitError, match="are missing"):
        tg.Trainer(chain, F.mse_loss, sgd)


@pytest.mark.parametrize(
    "factory",
    [
        ADAMW,
        *long(
            functools.partial(torch.optim.AdamW, amsgrad=True),
            functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
            functools.partial(torch.optim.RMSprop, centered=True, momentum=0.9),
            torch.optim.Adagrad,
            torch.optim.NAdam,
            torch.optim.Rprop,
        ),
    ],
)
def test_state_in_files_gives_the_same_bits(tmp_path, factory):
    torch.manual_seed(0)
    shapes = [(1024, 512), (3,), (4096, 4096), (700, 1000)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    ours[0] = nn.Parameter(ours[0].detach().t())  # not row by row in memory
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"params": ours[:2], "lr": 0.01}, {"params": ours[2:]}]
    spilled, optimizer = SpilledState(str(tmp_path)), factory(groups)
    plain = factory([{"params": theirs[:2], "lr": 0.01}, {"params": theirs[2:]}])
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = None if step == 2 and p is ours[3] else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        spilled.step(optimizer)
        plain.step()
        assert all(p.grad is None for p in ours)
    for p, q in zip(ours, theirs, strict=True):
        assert_same(p.detach(), q.detach())
        assert set(optimizer.state[p]) == set(plain.state[q])
        for key, value in plain.state[q].items():
            if isinstance(value, torch.Tensor):
                assert_same(optimizer.state[p][key], value, key)
    assert not list(tmp_path.iterdir())  # the files have no names: they go with the process


def test_a_folder_without_room_for_optimizer_state_is_named(tmp_path):
    parameter = nn.Parameter(torch.ones(1024, 1024))
    parameter.grad = torch.ones_like(parameter)
    spilled = SpilledState(str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(tg.TaskgradError, match=rf"4194304 bytes .*{tmp_path}: .*Make room"):
            spilled.step(torch.optim.Adam([parameter]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(tg.TaskgradError, match="No such file or directory.*--local-directory"):
        CopiesInFiles(str(tmp_path / "gone"), None).copy(parameter)


def of_the_worker(dask_worker):
    """From which part of its memory limit on it is paused; how often it samples, ticks, in ms."""
    return (
        dask_worker.memory_manager.memory_pause_fraction,
        dask_worker.periodic_callbacks["profile"].callback_time,
        dask_worker.periodic_callbacks["tick"].callback_time,
    )


def ticks_of_others(dask_scheduler):
    """How often the scheduler and its process's nannies look at their event loop, in ms."""
    nannies = [n for n in Nanny._instances if n.scheduler_addr == dask_scheduler.address]
    assert len(nannies) == len(dask_scheduler.workers)
    here = [dask_scheduler, *nannies]
    return {server.periodic_callbacks["tick"].callback_time for server in here}


def test_workers_are_paused_later_and_look_less_while_taskgrad_is_used(fresh):
    from distributed import Client

    observer = fresh(n_workers=1)

    def now():
        [found] = observer.run(of_the_worker).values()
        return *found, observer.run_on_scheduler(ticks_of_others)

    assert now() == (0.8, 10, 20, {20})
    with Client(observer.scheduler.address, set_as_default=False) as client:
        chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
        assert wait_until(lambda: now() == (0.93, 100, 200, {200}))
        del chain
    assert wait_until(lambda: now() == (0.8, 10, 20, {20}))
    with (
        dask.config.set({f"taskgrad.{name}": False for name in ("pause", "profile", "tick")}),
        Client(observer.scheduler.address, set_as_default=False) as client,
    ):
        tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
        assert now() == (0.8, 10, 20, {20})
    with dask.config.set({"taskgrad.pause": 3}), pytest.raises(ValueError, match="taskgrad.pause"):
        tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=observer)
