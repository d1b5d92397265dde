"""Tensors between workers: bit for bit, none copied on the way, refused in time if they cannot."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from dask.sizeof import sizeof
from distributed import Client
from distributed.protocol import (
    deserialize,
    deserialize_bytes,
    serialize,
    serialize_bytes,
    to_serialize,
)
from distributed.protocol.core import dumps, loads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taskgrad as tg
from leasing import leasing, needs_call
from taskgrad.cluster.wire import message_leases, process_memory, thresholds
from taskgrad.cluster.wire import serialize as _family  # noqa: F401  registers it
from taskgrad.cluster.wire.picklable import check_picklable

DTYPES = sorted(
    {
        d
        for d in vars(torch).values()
        if isinstance(d, torch.dtype) and "q" not in str(d).removeprefix("torch.")
    },
    key=str,
)
LAYOUTS = ["plain", "reversed", "channels_last", "strided", "sliced", "expanded", "overlapping"]
CONTAINERS = ["tensor", "tuple", "list", "dict", "named", "dataclass", "object", "deep", "odd_keys"]


@dataclass
class Batch:
    name: str
    x: Any


Pair = namedtuple("Pair", ["name", "x"])


class Holder:
    def __init__(self, x: Any) -> None:
        self.x = x


def wrap(kind: str, x: Any) -> Any:
    return {
        "tensor": lambda: x,
        "tuple": lambda: (1, x),
        "list": lambda: ["a", [None, x]],
        "dict": lambda: {"n": 1, "x": {"y": x}},
        "named": lambda: Pair("n", x),
        "dataclass": lambda: Batch("n", x),
        "object": lambda: Holder(x),
        "deep": lambda: (1, [2, Batch("n", {"k": (3, Pair("m", Holder(x)))})]),
        "odd_keys": lambda: {(1, 2): x},
    }[kind]()


def unwrap(kind: str, value: Any) -> Any:
    return {
        "tensor": lambda: value,
        "tuple": lambda: value[1],
        "list": lambda: value[1][1],
        "dict": lambda: value["x"]["y"],
        "named": lambda: value.x,
        "dataclass": lambda: value.x,
        "object": lambda: value.x,
        "deep": lambda: value[1][1].x["k"][1].x.x,
        "odd_keys": lambda: value[(1, 2)],
    }[kind]()


def through(value: Any) -> Any:
    """As Dask's comms do it: the message's frames, each in memory of its own on the other side."""
    frames = dumps({"data": to_serialize(value)}, context={"recipient": {}})
    received = [bytes(f) if i == 0 else bytearray(f) for i, f in enumerate(frames)]
    return loads(received)["data"]


@contextmanager
def everything_lent() -> Iterator[None]:
    """In this block messages leave every buffer where it is, and the reader takes it from there."""
    with pytest.MonkeyPatch.context() as patch, leasing():
        patch.setattr(thresholds, "LEASE_MESSAGE_MIN", 1)
        patch.setattr(thresholds, "LEASE_BUFFER_MIN", 1)
        yield


@pytest.fixture(params=["wire", pytest.param("lent", marks=needs_call)])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The two ways in which a tensor gets from one worker to another."""
    with everything_lent() if request.param == "lent" else nullcontext():
        yield


def plain(t: torch.Tensor) -> torch.Tensor:
    """As integers of the same width: some dtypes cannot be copied."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(widths[t.itemsize]) if t.itemsize in widths else t


def bits(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().resolve_conj().resolve_neg()
    t = plain(t).clone(memory_format=torch.contiguous_format).view(-1)
    return t.view(torch.uint8) if t.numel() else torch.empty(0, dtype=torch.uint8)


def assert_arrived(back: torch.Tensor, t: torch.Tensor) -> None:
    assert type(back) is type(t)
    assert (back.dtype, back.shape, back.requires_grad) == (t.dtype, t.shape, t.requires_grad)
    assert (back.is_conj(), back.is_neg()) == (t.is_conj(), t.is_neg())
    assert torch.equal(bits(back), bits(t))


def make(dtype: torch.dtype, shape: list[int], layout: str) -> torch.Tensor:
    """Random bits: every NaN there is must come through unchanged."""
    if layout == "channels_last":
        shape = ([*shape, 2, 3, 1, 2])[:4]
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    if layout == "reversed":
        return t.permute(list(reversed(range(t.dim()))))
    if layout == "channels_last":
        return plain(t).permute(0, 2, 3, 1).clone().permute(0, 3, 1, 2).view(dtype)
    if layout == "strided" and t.dim():
        return t[::2]
    if layout == "sliced" and t.dim():
        return t[..., 1:]
    if layout == "expanded":
        return t.unsqueeze(0).expand(3, *t.shape)
    if layout == "overlapping" and t.dim() and t.shape[0] > 2:
        return t.unfold(0, 2, 1)
    return t


@settings(max_examples=400)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    layout=st.sampled_from(LAYOUTS),
    container=st.sampled_from(CONTAINERS),
    leaf=st.sampled_from(["tensor", "requires_grad", "parameter"]),
    lent=st.booleans() if process_memory.available() else st.just(False),
)
def test_any_tensor_anywhere_arrives_bit_for_bit(dtype, shape, layout, container, leaf, lent):
    t = make(dtype, shape, layout)
    differentiable = dtype.is_floating_point or dtype.is_complex
    if leaf == "requires_grad" and differentiable:
        t = t.detach().requires_grad_()
    elif leaf == "parameter":
        t = nn.Parameter(t.detach(), requires_grad=differentiable)
    before = message_leases.bytes_read()
    with everything_lent() if lent else nullcontext():
        back = unwrap(container, through(wrap(container, t)))
    assert (message_leases.bytes_read() > before) == (lent and t.numel() > 0)
    assert_arrived(back, t)
    if layout in ("plain", "reversed", "channels_last", "expanded"):
        assert back.stride() == t.stride()
    spilled = unwrap(container, deserialize_bytes(serialize_bytes(wrap(container, t))))
    assert_arrived(spilled, t)
    check_picklable(wrap(container, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_travels(way, dtype):
    t = make(dtype, [3, 5], "plain")
    assert_arrived(through((1, t))[1], t)
    assert_arrived(through(t[1, 2]), t[1, 2])


def test_every_dtype_travels_where_torch_fills_new_memory(device):
    """With deterministic algorithms it does, and cannot for some dtypes. They are sent as bytes."""
    made = [make(dtype, [3, 5], "plain") for dtype in DTYPES]
    there = [t.view(torch.uint8).to(device).view(t.dtype) for t in made]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        back = through(there)
        empty = through([t[:0] for t in there])
    finally:
        torch.use_deterministic_algorithms(before)
    for found, t in zip(back, made, strict=True):
        assert found.device.type == device
        assert_arrived(found.view(torch.uint8).cpu().view(t.dtype), t)
    for found, t in zip(empty, made, strict=True):
        assert (found.device.type, found.dtype, found.shape) == (device, t.dtype, (0, 5))


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_frame_is_the_memory_of_the_tensor(container):
    t = torch.randn(300, 100)
    for sent in (t, t.T, t[20:80]):
        _, frames = serialize(to_serialize(wrap(container, sent)))
        large = [memoryview(f) for f in frames if memoryview(f).nbytes > 1000]
        assert [f.nbytes for f in large] == [sent.numel() * 4]
        assert np.frombuffer(large[0], "u1").ctypes.data == sent.data_ptr()


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_tensor_that_arrives_lies_in_the_buffer_that_was_read(container):
    t = torch.randn(300, 100)
    header, frames = serialize(to_serialize(wrap(container, t)))
    buffers = [np.frombuffer(bytes(f), "u1").copy().data for f in frames]
    back = unwrap(container, deserialize(header, buffers))
    assert back.data_ptr() in [np.frombuffer(b, "u1").ctypes.data for b in buffers if len(b)]


def test_a_large_frame_is_not_cut_and_joined_again():
    t = torch.zeros(70 << 20, dtype=torch.uint8)
    frames = dumps({"data": to_serialize({"a": (1, t)})})
    assert max(memoryview(f).nbytes for f in frames) == t.numel()


def test_conjugate_and_negative_views_stay_views_and_are_not_copied(way):
    z = torch.randn(30, dtype=torch.complex64)
    for t in (z.conj(), z.conj().imag, z.to(torch.complex32).conj(), z.conj()[::2]):
        assert_arrived(through((1, t))[1], t)
    _, frames = serialize(z.conj())
    assert np.frombuffer(frames[-1], "u1").ctypes.data == z.data_ptr()


def test_what_a_value_shows_is_sent_and_nothing_else():
    big = torch.randn(1000, 1000)
    for t, size in (
        (big[3], 4000),
        (big[:, 3], 4000),
        (torch.ones(1).expand(1000, 1000), 4),
        (big[:, :1].expand(1000, 1000), 4000),
    ):
        _, frames = serialize((1, t), iterate_collection=False)
        assert sum(memoryview(f).nbytes for f in frames[1:]) == size
        assert_arrived(through(t), t)


def test_small_tensors_in_one_read_do_not_end_up_at_odd_addresses():
    t = torch.randn(10)
    header, frames = serialize(t)
    together = bytearray(b"x" + bytes(frames[1]))
    back = deserialize(header, [frames[0], memoryview(together)[1:]])
    assert back.data_ptr() % 16 == 0
    assert_arrived(back, t)


def test_sparse_layouts(way):
    dense = torch.randn(4, 6) * (torch.rand(4, 6) > 0.5)
    loose = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2), check_invariants=True)
    coo = dense.to_sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = [dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((2, 2))]
    for t in (coo, loose, *others, coo.detach().requires_grad_()):
        check_picklable((1, t))
        back = through((1, t))[1]
        assert (back.layout, back.dtype, back.requires_grad) == (t.layout, t.dtype, t.requires_grad)
        assert torch.equal(back.detach().to_dense(), t.detach().to_dense())
    assert through(coo).is_coalesced()
    assert not through(loose).is_coalesced()
    assert torch.equal(through(loose)._values(), loose._values())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_meta_quantized_and_nested_tensors(way):
    meta = through((1, torch.empty(2, 3, device="meta", dtype=torch.bfloat16)))[1]
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", (2, 3), torch.bfloat16)
    quantized = torch.quantize_per_tensor(torch.randn(5), 0.1, 2, torch.qint8)
    assert torch.equal(through((1, quantized))[1].int_repr(), quantized.int_repr())
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
        parts = through((1, nested))[1].unbind()
        assert [p.shape for p in parts] == [(2,), (3,)]


class Tagged(torch.Tensor):
    """A subclass without a reduce of its own."""


class Strict(torch.Tensor):
    """One that says itself how it is pickled."""

    def __reduce_ex__(self, protocol):
        return _strict, (self.as_subclass(torch.Tensor),)


def _strict(t):
    return t.as_subclass(Strict)


def test_subclasses_and_attributes(way):
    tagged = torch.randn(50, 50).as_subclass(Tagged)
    tagged.tag = "left"
    for t in (tagged, torch.randn(50, 50).as_subclass(Strict)):
        for back in (through(t), through((1, t))[1]):
            assert type(back) is type(t)
            assert torch.equal(
                bits(back.as_subclass(torch.Tensor)), bits(t.as_subclass(torch.Tensor))
            )
        _, frames = serialize(Holder(t))
        assert max(memoryview(f).nbytes for f in frames) == 10_000
    assert through(tagged).tag == "left"
    assert isinstance(through([1, nn.Buffer(torch.ones(2))])[1], nn.Buffer)


def test_a_leaf_keeps_its_gradient_and_a_value_inside_a_graph_arrives_without_the_graph(way):
    w = nn.Parameter(torch.randn(3))
    y = w * 2
    y.sum().backward()
    for back in (through(w), through((1, w))[1]):
        assert torch.equal(back.grad, w.grad)
        assert back.is_leaf
    for back in (through(y), through((1, y))[1]):
        assert torch.equal(back, y.detach())
        assert not back.requires_grad


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(30, 30, bias=False)
        self.b = nn.Linear(30, 30, bias=False)
        self.b.weight = self.a.weight
        self.bn = nn.BatchNorm1d(30)


def test_modules_and_optimizers_keep_what_they_share(way):
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.bn(model.b(model.a(torch.ones(3, 30)))).sum().backward()
    optimizer.step()
    back, its = through((1, model, optimizer))[1:]
    assert back.a.weight is back.b.weight
    assert list(back.state_dict()) == list(model.state_dict())
    for name, t in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], t)
    assert its.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    both = through(OrderedDict(model=model, optimizer=optimizer))
    assert both["optimizer"].param_groups[0]["params"][0] is both["model"].a.weight


def test_values_without_tensors_are_pickled_as_dask_does(way):
    for value in (1, "a", [1, 2], {"a": {1, 2}}, np.arange(5), Batch("n", np.arange(5))):
        back = through(value)
        assert type(back) is type(value)
        if not isinstance(value, Batch):
            assert np.array_equal(np.asarray(back), np.asarray(value))
    assert through((lambda a: a + 1, torch.ones(1)))[0](1) == 2


def test_plain_pickle_copy_and_save_do_not_notice():
    t = torch.randn(10)
    assert b"taskgrad" not in pickle.dumps(t, protocol=5)
    buffers: list[Any] = []
    pickle.dumps(t, protocol=5, buffer_callback=buffers.append)
    assert not buffers
    assert torch.equal(copy.deepcopy(t), t)
    file = io.BytesIO()
    torch.save({"t": t}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["t"], t)


def test_a_process_without_our_family_reads_what_it_wrote(tmp_path):
    file = tmp_path / "message"
    value = {"a": (1, torch.arange(50_000, dtype=torch.int32).bfloat16())}
    file.write_bytes(serialize_bytes(value))
    body = f"""
        import sys, torch
        from distributed.protocol import deserialize_bytes
        t = deserialize_bytes(open({str(file)!r}, "rb").read())["a"][1]
        assert torch.equal(t, torch.arange(50_000, dtype=torch.int32).bfloat16())
        assert "taskgrad.cluster.wire.serialize" not in sys.modules
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (threading.Lock(), "lock"),
        ((1, [torch.ones(2), {"k": threading.Lock()}]), r"\[1\]\[1\]\['k'\]"),
        (Batch("n", (i for i in ())), r"\.x.*generator"),
        ([Pair(1, Holder(threading.Lock()))], r"\[0\]\.x\.x"),
        ((1, torch.ones(4, 4).to_mkldnn()), r"\[1\].*mkldnn"),
    ],
)
def test_what_cannot_travel_is_named(value, named):
    with pytest.raises(tg.TravelError, match=named):
        check_picklable(value)


def test_what_lives_only_inside_a_transform_cannot_travel():
    with pytest.raises(tg.TravelError, match="torch.func"):
        torch.func.vmap(lambda x: (check_picklable((1, x)), x)[1])(torch.ones(2))


def test_the_check_takes_all_that_travels():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    for value in (None, 1, model, {"m": (model, lambda: 1)}, np.ones(3), range(3), Batch("n", [])):
        check_picklable(value)


# Between two real workers.


def make_all(container: str) -> Any:
    torch.manual_seed(0)
    tensors = [make(d, [4, 5], layout) for d in DTYPES for layout in LAYOUTS]
    return wrap(container, tensors)


def check_all(container: str, value: Any) -> bool:
    want = unwrap(container, make_all(container))
    got = unwrap(container, value)
    for back, t in zip(got, want, strict=True):
        assert_arrived(back, t)
    return True


@pytest.mark.parametrize("container", ["tensor", "tuple", "deep"])
def test_from_worker_to_worker_as_results(client: Client, container):
    a, b = client.nthreads()
    there = client.submit(make_all, container, workers=[a], pure=False)
    assert client.submit(check_all, container, there, workers=[b], pure=False).result()
    assert check_all(container, there.result())


def aligned_and_writable(batch: Batch) -> tuple[int, bool]:
    x = batch.x["x"][1]
    x.add_(1)
    return x.data_ptr() % 16, bool((x == 2).all())


@pytest.mark.parametrize("size", [10, 1 << 15, 1 << 18, 20 << 20], ids=lambda n: f"{4 * n} bytes")
def test_what_arrives_is_aligned_and_writable(client: Client, size):
    a, b = client.nthreads()
    there = client.submit(big_batch, size, workers=[a], pure=False)
    assert client.submit(aligned_and_writable, there, workers=[b], pure=False).result() == (0, True)


def big_batch(size: int) -> Batch:
    return Batch("n", {"i": 1, "x": ("odd" * 5, torch.ones(size))})


# Sizes.


def test_sizes_are_true():
    t = torch.zeros(1000, 1000)
    assert 4_000_000 <= sizeof(t) < 4_001_000
    assert 4_000 <= sizeof(t[0]) < 5_000
    assert sizeof(torch.zeros(1, 1000).expand(1000, 1000)) < 5_000
    assert sizeof(torch.empty(1000, 1000, device="meta")) < 1_000
    assert 2_000_000 <= sizeof(t.bfloat16()) < 2_001_000
    assert 8_000_000 <= sizeof(t.to(torch.complex64)) < 8_001_000


def test_views_of_one_storage_are_not_counted_twice():
    t = torch.zeros(1000, 1000)
    for views in (
        [t, t],
        (t, t[0]),
        {"a": t, "b": [t.T, {"c": t[5:]}]},
        Pair(t, t),
        {1: t, 2: (t,)},
    ):
        assert 4_000_000 <= sizeof(views) < 4_010_000
    assert 8_000_000 <= sizeof([t, t.clone()]) < 8_010_000
    assert 4_000_000 <= sizeof([t[:500], t[500:]]) < 4_010_000  # nor is what differs left out
    assert 2_000_000 <= sizeof([t[:250], t[250:500]]) < 2_010_000
    assert 4_000 <= sizeof([t[0]]) < 10_000
    assert sizeof([t, t]) == sizeof([t, t])  # nothing is remembered
    assert 4_000_000 <= sizeof(t) < 4_001_000
    assert sizeof([1, "a", {2: 3.0}]) == sum(
        (sys.getsizeof([1, "a", {2: 3.0}]), sizeof(1), sizeof("a"), sizeof({2: 3.0}))
    )
    shared = nn.Module()
    shared.register_buffer("whole", t)
    shared.register_buffer("row", t[3])
    assert 4_000_000 <= sizeof(shared) < 4_010_000
    assert 4_000_000 <= sizeof([shared, t]) < 4_010_000


def test_sizes_of_parameters_modules_and_sparse():
    p = nn.Parameter(torch.zeros(1000))
    assert 4_000 <= sizeof(p) < 5_000
    p.grad = torch.zeros(1000)
    assert 8_000 <= sizeof(p) < 9_000
    assert 3_600 <= sizeof(Tied()) < 3_600 + 480 + 2_000  # the tied weight once
    assert 3_600 <= sizeof({"m": Tied()}) < 7_000
    coo = torch.eye(100).to_sparse()
    assert 2_000 <= sizeof(coo) < 3_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        csr = torch.eye(100).to_sparse_csr()
    assert 101 * 8 + 100 * 8 + 400 <= sizeof(csr) < 3_000
