"""Every kernel looks at its tensors' device, layout, dtype and memory before it reads them."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import func

import taskgrad as tg

add = tg.vectorize(lambda a, b: a + b)
times = tg.vectorize(lambda a, b: a * b)
square = tg.vectorize(lambda x: x * x)
X = torch.ones(3)


def freed():
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    return x


UNREADABLE = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo: use x.to_dense"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([X, X[:2]]), "a nested tensor"),
    "freed": (freed, "memory was freed"),
    "zeros": (lambda: torch._efficientzerotensor(3), "no memory: use x.clone"),
    "uint16": (lambda: X.to(torch.uint16), "kernels take tensors of bool, .*; got torch.uint16"),
    "complex": (lambda: X.to(torch.complex64), "got torch.complex64"),
    "quantized": (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), "got torch.quint8"),
    "float8": (lambda: X.to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_refused_everywhere(kind):
    make, said = UNREADABLE[kind]
    for way in (add.reduce, lambda x: add.reduce(x, 0), add.scan, square, lambda x: add(1.0, x)):
        way(X)  # known from before: what is looked at again has to differ
        with pytest.raises((TypeError, RuntimeError)) as caught:
            way(make())
        if kind != "freed" or way != add.scan:
            caught.match(said)
    with pytest.raises((TypeError, RuntimeError), match=said):
        add(X, make())
    with pytest.raises((TypeError, RuntimeError), match=said):
        square(make(), out=torch.empty(3))


def test_meta_has_shapes_and_no_values():
    meta = torch.empty(2, 3, device="meta")
    assert add.reduce(meta).shape == ()
    assert add.reduce(meta, 0, keepdim=True).shape == (1, 3)
    assert add.reduce(meta, 1, start=1.0).is_meta
    assert add.scan(meta).shape == (2, 3)
    assert add(meta, 1.0).is_meta
    assert add(torch.tensor(1.0), meta).is_meta
    assert add(meta, meta, out=torch.empty(2, 3, device="meta")).is_meta
    for pair in ((meta, torch.ones(2, 3)), (torch.ones(3), meta)):
        with pytest.raises(ValueError, match="on meta and on the CPU"):
            add(*pair)
    with pytest.raises(ValueError, match="out= is on cpu; the result is on meta"):
        square(meta, out=torch.empty(2, 3))
    with pytest.raises(TypeError, match="out= must be a dense tensor of the CPU"):
        square(torch.ones(2, 3), out=meta)


def test_a_process_survives_all_of_it():
    code = """
import torch, taskgrad as tg
add = tg.vectorize(lambda a, b: a + b)
largest = tg.vectorize(lambda a, b: max(a, b))
low = torch.tensor([torch.iinfo(torch.int64).min])
print(tg.vectorize(lambda a, b: a // b)(low, low // low * -1).item() == low.item())
meta = torch.empty(3, device="meta")
for fn in (add, largest):
    print(fn.reduce(meta).is_meta, fn.scan(meta).is_meta)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 5


def negative():
    """A tensor whose sign is still to come: [-1, -2, -3]."""
    made = torch.tensor([1 + 1j, 1 + 2j, 1 + 3j]).conj().imag
    assert made.is_neg()
    return made


def test_signs_to_come_are_taken_everywhere():
    assert add.reduce(negative()).item() == -6
    assert add.scan(negative()).tolist() == [-1, -3, -6]
    for fn, expected in (
        (square, [-2, -4, -6]),
        (add.scan, [-6, -5, -3]),
        (times.scan, [-6, -5, -3]),
        (lambda x: add(x, 1.0), [-1, -2, -3]),
    ):
        leaf = X.clone().requires_grad_()
        fn(leaf).backward(negative())
        assert leaf.grad.tolist() == expected
    assert func.jvp(square, (X,), (negative(),))[1].tolist() == [-2, -4, -6]
    assert func.jvp(times.reduce, (X,), (negative(),))[1].item() == -6


def test_out_counts_as_a_change():
    kept, leaf = torch.zeros(3), torch.ones(3, requires_grad=True)
    product = leaf * kept
    add(X, X, out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        made = torch.zeros(3)
        assert add(X, X, out=made).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="made in torch.inference_mode"):
        add(X, X, out=made)


def test_out_that_shares_memory_by_another_way():
    buffer = np.arange(6, dtype=np.float32)
    first, second = torch.from_numpy(buffer)[:5], torch.from_numpy(buffer[1:])
    expected = first + first
    assert torch.equal(add(first, first, out=second), expected)
    with pytest.raises(RuntimeError, match="single memory location"):
        add(X, X, out=torch.zeros(1).expand(3))


def test_out_in_a_compiled_graph():
    compiled = torch.compile(lambda x, out: add(x, x, out=out))
    out = torch.zeros(3)
    assert compiled(X, out).tolist() == out.tolist() == [2, 2, 2]


ODD = {
    "scan of all": (lambda: add.scan(X, dim=None), TypeError, "along one dimension: .* got None"),
    "scan of several": (lambda: add.scan(X, (0,)), TypeError, "along one dimension"),
    "dim of text": (lambda: add.reduce(X, "0"), TypeError, "dim must be an integer, several"),
    "dim of a float": (lambda: add.reduce(X, 1.0), TypeError, "dim must be an integer"),
    "dim of a bool": (lambda: add.reduce(X, True), TypeError, "dim must be an integer"),
    "keepdim of text": (lambda: add.reduce(X, keepdim="no"), TypeError, "keepdim must be True or"),
    "start of text": (lambda: add.reduce(X, start="1"), TypeError, "start must be a number"),
    "start that is cut": (lambda: add.reduce(X.int(), start=1.5), TypeError, "start=1.5 does not"),
    "reduce a number": (lambda: add.reduce(3.0), TypeError, "reduces a tensor; got float"),
    "outer of a number": (lambda: add.outer(1, X), TypeError, "outer takes two tensors; got int"),
    "fuse None": (lambda: tg.fuse(None), TypeError, "fuse takes a function; got NoneType"),
    "Elementwise None": (lambda: tg.Elementwise(None), TypeError, "takes a function; got NoneType"),
    "of C": (lambda: tg.vectorize(torch.sin), TypeError, "sin does not say how many arguments"),
    "derivative": (
        lambda: tg.vectorize(lambda x: x, 3),
        TypeError,
        "derivative= must be a function",
    ),
    "derivative of another": (
        lambda: tg.vectorize(lambda x, y: x, lambda x: x),
        TypeError,
        "derivative= must take the function's arguments, of which there are 2",
    ),
    "out of text": (lambda: add(X, X, out="x"), TypeError, "out= must be a tensor; got str"),
    "out of a thunk": (
        lambda: add(X, X, out=tg.spawn(torch.ones, 3)),
        TypeError,
        "out= must be a tensor; got",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_arguments(what, client):
    call, kind, said = ODD[what]
    with pytest.raises(kind, match=said):
        call()


def test_a_vectorized_function_again():
    assert tg.vectorize(square)(X).tolist() == [1, 1, 1]
    assert tg.vectorize(math.sin)(0 * X).tolist() == [0, 0, 0]
