"""Tensors on a GPU: between workers and the driver, in functions, maps and ranks; random streams.

Everything here also runs on the CPU: some of it always, the rest with TASKGRAD_TEST_DEVICE=cpu.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import dask
import pytest
import torch
from torch import nn

import hostmem
import taskgrad as tg
from helpers import assert_same
from taskgrad.cluster.channels.frames import Stream, pack
from taskgrad.cluster.wire.tensors import is_ready_to_send
from taskgrad.worker.activation_checkpoint import recomputed
from taskgrad.worker.communicator import running, running_as
from test_wire import DTYPES, LAYOUTS, assert_arrived, make, plain

# -- on the wire ---------------------------------------------------------------------------------


def on_device(device: str, layout: str) -> list[torch.Tensor]:
    """A tensor of each dtype, made from the same bits everywhere."""
    torch.manual_seed(0)
    host = [make(dtype, [4, 5], layout) for dtype in DTYPES]
    return [moved(t, device) for t in host]


def moved(t: torch.Tensor, device: str) -> torch.Tensor:
    """On the device, with the strides that it has: `to` packs what is expanded."""
    count = t.untyped_storage().nbytes() // t.itemsize
    whole = t.as_strided((count,), (1,), 0).to(device)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def check_arrived(device: str, layout: str, found: list[torch.Tensor]) -> list[torch.Tensor]:
    for back, t in zip(found, on_device("cpu", layout), strict=True):
        assert back.device.type == device
        assert layout == "strided" or back.stride() == t.stride()
        # As integers: not every dtype can be packed on every device.
        assert_arrived(plain(back).cpu().view(back.dtype), t)
    return found


@pytest.mark.parametrize("layout", ["plain", "reversed", "channels_last", "strided", "expanded"])
def test_every_dtype_travels(client, device, layout):
    """From worker to worker to the driver, with what each dtype has of bits."""
    assert layout in LAYOUTS
    first, second = client.nthreads()
    made = client.submit(on_device, device, layout, workers=[first], pure=False)
    seen = client.submit(check_arrived, device, layout, made, workers=[second], pure=False)
    check_arrived(device, layout, seen.result())


def test_what_is_expanded_is_sent_once(device):
    t = torch.arange(1000.0, device=device).unsqueeze(0).expand(1000, 1000)
    packed = pack((0, 0, 0), t)
    assert sum(map(len, packed.buffers)) < 10_000
    assert not is_ready_to_send(t)


def test_sparse_empty_and_leaf(client, device):
    def values(device: str) -> list[torch.Tensor]:
        leaf = nn.Parameter(torch.ones(2, device=device))
        leaf.grad = torch.full_like(leaf, 3.0)
        return [torch.eye(3, device=device).to_sparse(), torch.empty(0, 3, device=device), leaf]

    sparse, empty, leaf = client.submit(values, device, pure=False).result()
    assert {t.device.type for t in (sparse, empty, leaf, leaf.grad)} == {device}
    assert_same(sparse.to_dense().cpu(), torch.eye(3))
    assert empty.shape == (0, 3)
    assert type(leaf) is nn.Parameter
    assert_same(leaf.grad.cpu(), torch.full((2,), 3.0))


def test_channels_between_workers(device):
    """A channel lends no memory of a device, nor pinned memory: what is lent is a copy."""
    t = torch.randn(300, 70)
    sent = pack((0, 1, 2), [moved(t, device)], lend=1 << 30)
    assert not sent.lent
    stream = Stream()
    found = []
    data = b"".join(sent.buffers)
    while data:
        room = stream.room()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        found.extend(stream.received(room, count))
        data = data[count:]
    [[back]] = [one.value() for one in found]
    assert back.device.type == device
    assert_same(back.cpu(), t)


def test_pinned_memory_is_sent_as_a_copy(gpu):
    if gpu == hostmem.NAME:
        pytest.skip("the device 'hostmem' has no pinned memory")
    t = torch.randn(300, 70)
    pinned = t if gpu == "cpu" else t.pin_memory()
    assert is_ready_to_send(pinned) == (gpu == "cpu")
    sent = pack((0, 1, 2), pinned)
    assert bytes(t.numpy().data.cast("B")) in b"".join(sent.buffers)


def test_the_default_device_changes_nothing_on_the_way(client, device):
    """What arrives is on the device where it was, whatever the default device is."""
    with torch.device(device):
        x = torch.ones(2, 3, device="cpu")
        y = tg.collect(tg.spawn(torch.add, x, torch.empty(0, 3, device="cpu").sum()))
    assert y.device.type == "cpu"
    assert_same(y, x)


# -- functions, maps, ranks ----------------------------------------------------------------------


class There:
    """A function that computes on a device, as a user writes it."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        here = x.to(self.device)
        return (here @ w.to(self.device)).tanh()


def plainly(device: str, x: torch.Tensor, w: torch.Tensor) -> tuple[Any, ...]:
    """The value, and the gradients of its sum, of plain torch."""
    x, w = (t.clone().requires_grad_() for t in (x, w))
    y = There(device)(x, w)
    return y.detach().cpu(), *torch.autograd.grad(y.sum(), (x, w))


def test_a_function_on_a_device(client, device):
    torch.manual_seed(0)
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    value, gx, gw = plainly(device, x, w)
    x.requires_grad_(), w.requires_grad_()
    y = tg.collect(tg.spawn(There(device), x, w))
    assert y.device.type == "cpu"  # results are on the host
    assert_same(y.detach(), value)
    y.sum().backward()
    assert_same(x.grad, gx)
    assert_same(w.grad, gw)


def test_inputs_that_are_on_a_device(client, gpu):
    torch.manual_seed(0)
    x, w = (torch.randn(4, 4, device=gpu).requires_grad_() for _ in range(2))
    y = tg.collect(tg.spawn(There(gpu), x, w))
    y.sum().backward()
    value, gx, gw = plainly(gpu, x.detach(), w.detach())
    assert_same(y.detach().cpu(), value)
    assert x.grad.device == x.device
    assert_same(x.grad.cpu(), gx.cpu())
    assert_same(w.grad.cpu(), gw.cpu())


def test_map(client, device):
    torch.manual_seed(0)
    w = torch.randn(4, 2)
    xs = [torch.randn(3, 4) for _ in range(5)]
    expected = [plainly(device, x, w) for x in xs]
    ours = w.clone().requires_grad_()
    there = There(device)
    found = tg.map(lambda x: there(x, ours), xs)
    for y, (value, _, _) in zip(found, expected, strict=True):
        assert_same(y.detach().cpu(), value)
    sum(y.sum() for y in found).backward()
    torch.testing.assert_close(ours.grad, sum(gw for *_, gw in expected))


def test_ranks(client, device):
    """Collectives of tensors on devices, and gradients through them."""
    torch.manual_seed(0)
    x = torch.randn(2, 6)

    def f(x: torch.Tensor) -> Any:
        here = x.to(device)
        total = tg.psum(here * (tg.axis_index("i") + 1), "i")
        assert total.device.type == device
        gathered = tg.all_gather(here, "i")
        shifted = tg.ppermute(here, "i", [(0, 1), (1, 0)])
        assert shifted.device == gathered.device == here.device
        return total, gathered, shifted

    ours = x.clone().requires_grad_()
    total, gathered, shifted = tg.pmap(f, axis_name="i", client=client)(ours)
    for rank in range(2):
        assert_same(total[rank].detach().cpu(), x[0] + x[1] * 2)
        assert_same(gathered[rank].detach().cpu(), x)
    assert_same(shifted.detach().cpu(), x.flip(0))
    total.sum().backward()
    assert_same(ours.grad, torch.tensor([[2.0], [4.0]]).expand(2, 6).clone())


def test_gradients_through_collectives_of_several_ranks_on_a_worker(client, device):
    """Their backward passes share torch's one thread for the device, and wait for each other."""

    def f(x: torch.Tensor) -> torch.Tensor:
        here = x.to(device)
        total = tg.psum(tg.psum(here * here, "i") * here, "i")
        assert total.device == here.device
        return total

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (y,) = torch.autograd.grad(f(x).sum(), x)
        return y

    x = torch.arange(8.0).reshape(4, 2).requires_grad_()
    expected = torch.autograd.grad(((x * x).sum(0) * x).sum() * 4, x)[0]
    with dask.config.set({"taskgrad.collective-deadline": "20s"}):
        tg.pmap(f, axis_name="i", client=client)(x).sum().backward()
        within = tg.pmap(gradient, axis_name="i", client=client)(x.detach())
    assert_same(x.grad, expected)
    assert_same(within, expected)


def test_a_backward_in_a_thread_of_torchs_within_a_rank(client):
    """As that of a device. A rank that waits there lets others on its worker draw from theirs."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        total = tg.psum(x * x, "i").sum()
        thread = threading.Thread(target=total.backward)
        thread.start()
        thread.join()
        return x.grad, torch.rand(1)

    x = torch.arange(8.0).reshape(4, 2)
    with dask.config.set({"taskgrad.collective-deadline": "20s"}):
        grads, drawn = tg.pmap(f, axis_name="i", client=client)(x)
        _, again = tg.pmap(f, axis_name="i", client=client)(x)
    assert_same(grads, 8 * x)
    assert len(set(drawn.flatten().tolist())) == 4
    assert drawn.shape == again.shape


class Rank:
    """Stands for the communicator of a rank."""


def test_what_runs_again_in_a_thread_of_torchs_belongs_to_its_rank():
    """Where the backward of a device runs; batch norm over replicas asks for the rank."""
    seen: list[Any] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(running())
        return x * x

    rank: Any = Rank()
    x = torch.ones(2, requires_grad=True)
    with running_as(rank):
        y = recomputed(layer, [], x)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert seen == [rank, rank]
    assert torch.equal(x.grad, torch.full((2,), 2.0))


# -- random streams ------------------------------------------------------------------------------

DRAW = """
import sys, torch, taskgrad as tg
device, first = sys.argv[1:]
if first == "before":
    torch.rand(1, device=device)
torch.manual_seed(5)
with tg.random_stream(0, step=3, microbatch=1, layer="drop"):
    inside = torch.rand(4, device=device)
after = torch.rand(4, device=device)
print(inside.tolist(), after.tolist())
"""


@pytest.mark.parametrize("first", ["before", "inside"])
def test_a_stream_is_the_same_where_it_is_the_first_to_use_the_device(gpu, tmp_path, first):
    """Torch seeds a device when it is first used: with the stream's seed, and afterwards not."""
    script = tmp_path / "draw.py"
    script.write_text(DRAW)
    found = subprocess.run(
        [sys.executable, str(script), gpu, first],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    torch.manual_seed(5)
    with tg.random_stream(0, step=3, microbatch=1, layer="drop"):
        inside = torch.rand(4, device=gpu)
    after = torch.rand(4, device=gpu)
    assert found.stdout.strip() == f"{inside.tolist()} {after.tolist()}"


def test_a_stream_on_a_device_is_that_of_its_names(device):
    def draw(layer: str) -> torch.Tensor:
        with tg.random_stream(0, step=0, microbatch=0, layer=layer):
            return torch.rand(100, device=device)

    before = torch.rand(1, device=device)
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    assert_same(draw("a"), draw("a"))
    assert not torch.equal(draw("a"), draw("b"))
    assert_same(torch.rand(3, device=device), expected)
    assert before.device.type == device


def test_deterministic_algorithms_reach_the_workers(client, gpu):
    """The fixture has switched them on here."""

    def on_worker(x: torch.Tensor) -> torch.Tensor:
        assert torch.are_deterministic_algorithms_enabled()
        return x

    assert_same(tg.collect(tg.spawn(on_worker, torch.ones(2))), torch.ones(2))
