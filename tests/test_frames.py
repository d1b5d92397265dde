"""Values as frames of bytes: what comes out is what went in."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_same
from taskgrad.cluster.channels.frames import FIRST_FRAME, pack, rest_of, tag_of, unpack
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


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_out_as_it_went_in(name):
    value = VALUES[name]
    first, *sent = pack(TAG, value)
    assert len(first) <= FIRST_FRAME
    assert tag_of(first) == TAG
    rest = rest_of(first)
    assert [frame.shape for frame in rest] == [frame.shape for frame in sent]
    for to, frame in zip(rest, sent, strict=True):
        to.copy_(frame)
    found = unpack([first, *rest])
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


def test_a_large_tensor_is_not_copied_to_be_sent():
    value = torch.randn(10_000)
    _, frame = pack(TAG, value)  # 40 kB
    assert frame.data_ptr() == value.data_ptr()


def test_a_value_does_not_keep_the_first_frame():
    first, *rest = pack(TAG, torch.ones(2))
    found = unpack([first, *rest])
    first.zero_()
    assert found.tolist() == [1, 1]
