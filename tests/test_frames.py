"""Values as frames of bytes: what comes out is what went in."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from helpers import assert_same
from taskgrad.cluster.channels.frames import Stream, pack
from taskgrad.cluster.wire import thresholds
from taskgrad.graph.pytree import flatten

TAG = (3, 2**32 - 1, 7)

VALUES = {
    "small": torch.randn(3, 4),
    "large": torch.randn(300, 70),
    "number": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "bfloat16": torch.randn(9).bfloat16(),
    "flags": torch.tensor([True, False]),
    "complex": torch.randn(2, 2, dtype=torch.complex64).conj(),
    "transposed": torch.randn(40, 30).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.ones(1).expand(1000),
    "sparse": torch.eye(3).to_sparse(),
    "tuple": (torch.randn(600), None, "text", 7, [torch.randn(2)]),
    "none": None,
    "many": [torch.full((n,), float(n)) for n in range(1000)],
    "long text": "x" * 10_000,
}


def through(stream: Stream, sent: bytes, most: int):
    """The values of these bytes, of which at most so many come at a time."""
    found = []
    while sent:
        room = stream.room()
        count = min(len(room), len(sent), most)
        room[:count] = sent[:count]
        found.extend(stream.received(room, count))
        sent = sent[count:]
    return found


@pytest.mark.parametrize("most", [7, 1_000, 10**9])
def test_many_values_in_a_row(most):
    values = [v for v in VALUES.values() if isinstance(v, torch.Tensor) and v.is_contiguous()]
    sent = b"".join(b for i, v in enumerate(values) for b in pack((0, i, 0), v).buffers)
    stream = Stream()
    found = through(stream, sent, most)
    assert [value.tag for value in found] == [(0, i, 0) for i in range(len(values))]
    for our, their in zip(found, values, strict=True):
        assert_same(our.value(), their)
    assert not stream.is_halfway


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_out_as_it_went_in(name):
    value = VALUES[name]
    stream = Stream()
    [arrived] = through(stream, b"".join(pack(TAG, value).buffers), 10**9)
    assert arrived.tag == TAG
    assert not stream.is_halfway
    found = arrived.value()
    ours, theirs = flatten(found)[0], flatten(value)[0]
    assert flatten(found)[1] == flatten(value)[1]
    for our, their in zip(ours, theirs, strict=True):
        if isinstance(their, torch.Tensor):
            assert_same(our.to_dense(), their.to_dense())
        else:
            assert our == their
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        assert found.stride() == value.stride()
        assert found.dtype == value.dtype


def test_a_tensor_is_not_copied_to_be_sent():
    value = torch.zeros(100)
    _, part = pack(TAG, value).buffers
    value += 1
    assert torch.frombuffer(part, dtype=torch.float32).tolist() == [1] * 100


def test_a_value_has_memory_of_its_own():
    stream = Stream()
    sent = [*pack(TAG, torch.ones(2)).buffers, *pack(TAG, (1, 2)).buffers]
    first, second = through(stream, b"".join(sent), 10**9)
    first.value().zero_()
    stream.room()[:] = bytes([255]) * len(stream.room())  # where both came
    assert first.value().tolist() == [0, 0]
    assert second.value() == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_large_part_the_address_may_be_sent(dtype):
    value = [torch.randn(1000, 1000).to(dtype), torch.randn(10), torch.zeros(1 << 20)]
    for given in (value, value[0]):
        packed = pack(TAG, given, lend=thresholds.LEND_MIN)
        assert sum(map(len, packed.buffers)) < 5_000 < len(packed.lent[0])
        [arrived] = through(Stream(), b"".join(packed.buffers), 100)
        assert arrived.is_lent
        guard = ctypes.create_string_buffer(b"guard")
        assert arrived.read(os.getpid(), ctypes.addressof(guard), 5) == b"guard"
        assert not arrived.is_lent
        for our, their in zip(flatten(arrived.value())[0], flatten(given)[0], strict=True):
            assert_same(our, their)
