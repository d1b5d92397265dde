"""Compiled scalar functions against torch, torch.compile, numexpr, NumPy and a loop in Numba.

Ten million float32, two threads. Each contestant allocates its result, on a heap that keeps freed
memory, as in a worker. The contestants are called alternately. torch, Numba and numexpr have thread
pools that spin for some milliseconds after a call and slow down the next contestant; so each
measurement is a pause in which they fall asleep, a call that is not measured, and one that is. The
loop is the one that a user would write by hand: `@njit(parallel=True, fastmath=True)`, a `prange`,
`math.exp`, gradients by hand. NumPy and numexpr have no gradients, so they take part in the forward
only. `_latency` uses 1,000 elements.

Our sums read the memory backwards if its last reader went forwards, and forwards if that was one of
our sums that went backwards: part of what was read last is still in the caches. As each contestant
is called twice, `sum_forward` shows the second case. `sum_after_copy` shows the first: the call
before it is a copy of the same tensor by torch.

`_into_vs_copy` is our time for a byte over that of `torch.Tensor.copy_`, with out=, so without
allocating a result; the loop's is given for comparison. Transposed operands are also compared with
a copy of the transposed tensor, which takes torch several times as long.
`_sum_backward` of torch and ours is an expanded view, for which no memory is written; the loop
writes it.

`matmul_vs_torch` computes a product of two 256 x 256 matrices as an outer product and a sum of
ours: it shows why matrix products stay torch's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numba
import numexpr
import numpy as np
import torch
from numba import njit, prange

import taskgrad as tg
from benchmarks._heap import keep_freed_memory
from benchmarks._report import Report, arguments

COUNT = 10_000_000
ROWS, COLUMNS = 4_000, 2_500
THREADS = 2
ROUNDS = 31
PAUSE = 0.01  # seconds in which the threads of the contestant before fall asleep
CALLS = 2_000
CUBE, SCALE = 0.044715, 0.7978845608

Call = Callable[[], Any]
loop = njit(parallel=True, fastmath=True)


@tg.vectorize
def fma(x, y, z):
    return x * y + z


@tg.vectorize
def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@tg.vectorize
def gelu8(x):
    return 0.5 * x * (1 + math.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))


@tg.vectorize
def product(x, y):
    return x * y


@tg.vectorize
def add(x, y):
    return x + y


def torch_gelu8(x):
    return 0.5 * x * (1 + torch.tanh(SCALE * (x + CUBE * x * x * x)))


def numpy_gelu8(x):
    return 0.5 * x * (1 + np.tanh(SCALE * (x + CUBE * x * x * x)))


@loop
def loop_fma(x, y, z):
    out = np.empty_like(x)
    for i in prange(x.size):
        out[i] = x[i] * y[i] + z[i]
    return out


@loop
def loop_fma_backward(g, x, y, z):
    gx, gy, gz = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for i in prange(x.size):
        gx[i] = g[i] * y[i]
        gy[i] = g[i] * x[i]
        gz[i] = g[i]
    return gx, gy, gz


@loop
def loop_sigmoid(x):
    out = np.empty_like(x)
    for i in prange(x.size):
        out[i] = 1 / (1 + math.exp(-x[i]))
    return out


@loop
def loop_sigmoid_backward(g, x):
    out = np.empty_like(x)
    for i in prange(x.size):
        s = 1 / (1 + math.exp(-x[i]))
        out[i] = g[i] * s * (1 - s)
    return out


@loop
def loop_gelu8(x):
    out = np.empty_like(x)
    for i in prange(x.size):
        v = x[i]
        out[i] = 0.5 * v * (1 + math.tanh(SCALE * (v + CUBE * v * v * v)))
    return out


@loop
def loop_gelu8_backward(g, x):
    out = np.empty_like(x)
    for i in prange(x.size):
        v = x[i]
        t = math.tanh(SCALE * (v + CUBE * v * v * v))
        out[i] = g[i] * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * SCALE * (1 + 3 * CUBE * v * v))
    return out


@loop
def loop_sum(x):
    total = np.float32(0)
    for i in prange(x.size):
        total += x[i]
    return total


@loop
def loop_sum_backward(g, x):
    out = np.empty_like(x)
    for i in prange(x.size):
        out[i] = g
    return out


@loop
def loop_transposed(x, y):
    out = np.empty(x.shape, np.float32)
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * y[i, j]
    return out


@loop
def loop_transposed_backward(g, x, y):
    gx, gy = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            gx[i, j] = g[i, j] * y[i, j]
            gy[i, j] = g[i, j] * x[i, j]
    return gx, gy


@loop
def loop_broadcast(x, y):
    out = np.empty(x.shape, np.float32)
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * y[j]
    return out


@loop
def loop_broadcast_backward(g, x, y):
    gx, gy = np.empty(x.shape, np.float32), np.zeros(y.shape, np.float32)
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            gx[i, j] = g[i, j] * y[j]
        gy += g[i] * x[i]
    return gx, gy


@loop
def loop_fma_into(x, y, z, out):
    for i in prange(x.size):
        out[i] = x[i] * y[i] + z[i]


@loop
def loop_transposed_into(x, y, out):
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * y[i, j]


@loop
def loop_broadcast_into(x, y, out):
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * y[j]


LOOPS_INTO = {
    "fma": loop_fma_into,
    "transposed": loop_transposed_into,
    "broadcast": loop_broadcast_into,
}


class Case:
    """One expression, as each contestant computes it, and its inputs."""

    def __init__(
        self,
        ours: Call,
        eager: Call,
        expression: str | None,
        numpy: Call,
        loops: tuple[Call, Call],
        *inputs: torch.Tensor,
    ) -> None:
        self.ours, self.eager, self.expression, self.numpy = ours, eager, expression, numpy
        self.loops, self.inputs = loops, inputs
        self.arrays = [x.numpy() for x in inputs]

    def forward(self) -> dict[str, Call]:
        """The forward of each contestant."""
        compiled = torch.compile(self.eager, dynamic=False)
        names = dict(zip("xyz", self.arrays, strict=False))
        calls = {
            "ours": lambda: self.ours(*self.inputs),
            "torch": lambda: self.eager(*self.inputs),
            "torch_compile": lambda: compiled(*self.inputs),
            "numpy": lambda: self.numpy(*self.arrays),
            "loop": lambda: self.loops[0](*self.arrays),
        }
        if self.expression is not None:
            calls["numexpr"] = lambda: numexpr.evaluate(self.expression, names)
        return calls

    def backward(self) -> dict[str, Call]:
        """The gradients of all inputs, from the same cotangent."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        compiled = torch.compile(self.eager, dynamic=False)
        calls: dict[str, Call] = {}
        for name, fn in (("ours", self.ours), ("torch", self.eager), ("torch_compile", compiled)):
            y = fn(*leaves)
            g = torch.ones_like(y)
            calls[name] = lambda y=y, g=g: torch.autograd.grad(y, leaves, g, retain_graph=True)
        array = g.numpy() if g.dim() else np.float32(1)
        calls["loop"] = lambda: self.loops[1](array, *self.arrays)
        return calls


def cases(count: int, rows: int, columns: int) -> dict[str, Case]:
    """All cases, with inputs of these sizes."""
    x, y, z = (torch.randn(count) for _ in range(3))
    table, columnwise = torch.randn(rows, columns), torch.randn(columns, rows).t()
    transposed = loop_transposed, loop_transposed_backward
    broadcast = loop_broadcast, loop_broadcast_backward
    times = lambda x, y: x * y  # noqa: E731
    gelu = f"0.5 * x * (1 + tanh({SCALE} * (x + {CUBE} * x * x * x)))"
    return {
        "fma": Case(
            fma,
            lambda x, y, z: x * y + z,
            "x * y + z",
            lambda x, y, z: x * y + z,
            (loop_fma, loop_fma_backward),
            *(x, y, z),
        ),
        "sigmoid": Case(
            sigmoid,
            torch.sigmoid,
            "1 / (1 + exp(-x))",
            lambda x: 1 / (1 + np.exp(-x)),
            (loop_sigmoid, loop_sigmoid_backward),
            x,
        ),
        "gelu8": Case(gelu8, torch_gelu8, gelu, numpy_gelu8, (loop_gelu8, loop_gelu8_backward), x),
        "sum": Case(add.reduce, torch.sum, "sum(x)", np.sum, (loop_sum, loop_sum_backward), x),
        "transposed": Case(product, times, "x * y", times, transposed, table, columnwise),
        "broadcast": Case(product, times, "x * y", times, broadcast, table, table[0].clone()),
    }


def in_turns(
    calls: dict[str, Call], rounds: int, repeat: int = 1, before: Call | None = None
) -> dict[str, list[float]]:
    """Seconds a call of each, all of them in every round, after the same call or another."""
    for call in calls.values():
        for _ in range(3):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if repeat == 1:  # small calls use no threads but Numba's, and stay warm by themselves
                time.sleep(PAUSE)
            (before or call)()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            seconds[name].append((time.perf_counter() - start) / repeat)
    return seconds


def compare(
    report: Report,
    key: str,
    calls: dict[str, Call],
    rounds: int,
    repeat: int = 1,
    before: Call | None = None,
) -> None:
    """Measure all and add figures and ratios."""
    seconds = in_turns(calls, rounds, repeat, before)
    for name, found in seconds.items():
        report.figure(f"{key}_{name}", found)
    for name, found in seconds.items():
        if name != "ours":
            report.ratio(f"{key}_vs_{name}", seconds["ours"], found)


def bandwidth(report: Report, found: dict[str, Case]) -> None:
    """The memory-bound loops, by their bytes, against a copy."""
    source = torch.randn(COUNT)
    target, table = torch.empty_like(source), torch.empty(ROWS, COLUMNS)
    for name, streams in (("fma", 4), ("broadcast", 2), ("transposed", 3)):
        case = found[name]
        out = target if case.inputs[0].dim() == 1 else table
        arrays = [*case.arrays, out.numpy()]
        calls = {
            "ours": lambda case=case, out=out: case.ours(*case.inputs, out=out),
            "copy": lambda: target.copy_(source),
            "loop": lambda name=name, arrays=arrays: LOOPS_INTO[name](*arrays),
        }
        if name == "transposed":
            calls["transposed_copy"] = lambda: table.copy_(found["transposed"].inputs[1])
        seconds = in_turns(calls, ROUNDS)
        each = {
            who: [s / (2 if "copy" in who else streams) for s in seconds[who]] for who in seconds
        }
        for who, found_seconds in each.items():
            rates = [4e-9 * COUNT / s for s in found_seconds]
            report.figure(f"{name}_into_{who}_gb_s", rates, "GB/s")
            if who != "ours":
                report.ratio(f"{name}_into_vs_{who}", each["ours"], found_seconds)


def main() -> None:
    """Measure, print, write."""
    options = arguments("kernels")
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    numba.set_num_threads(min(THREADS, numba.config.NUMBA_NUM_THREADS))
    numexpr.set_num_threads(THREADS)
    report = Report("kernels")
    large = cases(COUNT, ROWS, COLUMNS)
    for name, case in large.items():
        compare(report, f"{name}_forward", case.forward(), ROUNDS)
        compare(report, f"{name}_backward", case.backward(), ROUNDS)
    case = large["sum"]
    copied = torch.empty(COUNT)
    copy = lambda: copied.copy_(large["sum"].inputs[0])  # noqa: E731
    compare(report, "sum_after_copy", case.forward(), ROUNDS, before=copy)
    bandwidth(report, large)
    small = cases(1_000, 40, 25)
    for name, case in small.items():
        compare(report, f"{name}_latency", case.forward(), ROUNDS, CALLS // ROUNDS)
    (x, y, z), out = small["fma"].inputs, torch.empty(1_000)
    into = lambda: torch.addcmul(z, x, y, out=out)  # noqa: E731
    calls = {"ours": lambda: fma(x, y, z, out=out), "torch": into}
    compare(report, "fma_into_latency", calls, ROUNDS, CALLS // ROUNDS)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    calls = {
        "ours": lambda: add.reduce(product(a[:, :, None], b), 1),
        "torch": lambda: a @ b,
    }
    compare(report, "matmul", calls, ROUNDS)
    report.finish(options.json)


if __name__ == "__main__":
    main()
