"""Non-temporal stores: the same bits as ordinary ones, wherever a result begins and ends."""

from __future__ import annotations

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels.codegen import nontemporal
from taskgrad.kernels.runtime import thread_team

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


@pytest.fixture
def past(monkeypatch):
    """Makes functions whose results all count as larger than the caches."""

    def make(fn) -> tg.Vectorized:
        monkeypatch.setattr(nontemporal, "last_level_cache", lambda: 0)
        return tg.vectorize(fn)

    return make


def along(fn: tg.Vectorized, part: str = "forward") -> list[str]:
    return [row.along for row in fn.explain().kernels if row.part == part]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_from_every_offset(past, dtype, count):
    """A row has elements before its first line, pieces, and a rest; or too few for a piece."""
    copy = past(lambda x: x)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for size in (256, 1_000, 70_001):
            x = (torch.randn(size) * 100).to(dtype)
            for offset in (0, 1, 3, 31):
                held = torch.full((size + 64,), 1, dtype=dtype)
                out = held[offset : offset + size]
                copy(x, out=out)
                assert torch.equal(out, x)
                held[offset : offset + size] = 1
                assert held.to(torch.float64).eq(1).all()  # nothing was written beside it
    finally:
        torch.set_num_threads(before)
    assert along(copy) == ["up"]


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_memory_at_odd_addresses(past, offset):
    """A store of a line that is not one would end the process."""
    copy = past(lambda x: x)
    x = torch.randn(1_000)
    held = bytearray(4 * 1_000 + 64)
    out = torch.frombuffer(held, dtype=torch.float32, count=1_000, offset=offset)
    assert torch.equal(copy(x, out=out), x)
    assert along(copy) == ["up"]


def test_rows_that_do_not_end_with_a_line(past):
    times = past(lambda x, y: x * y)
    x, y = torch.randn(301, 1_003), torch.randn(1_003)
    assert torch.equal(times(x, y), x * y)
    assert torch.equal(times(x[:, :1_000], y[:1_000]), x[:, :1_000] * y[:1_000])
    assert torch.equal(times(x[:, :1], y), x[:, :1] * y)
    assert set(along(times)) == {"uup", "zup"}


def test_strided_results_and_those_in_place_use_ordinary_stores(past):
    plus = past(lambda x, y: x + y)
    x, y = torch.randn(300, 300), torch.randn(300, 300)
    assert torch.equal(plus(x[:, :100], y[:, :100]), x[:, :100] + y[:, :100])
    out = torch.empty(300, 600)[:, ::2]
    assert torch.equal(plus(x, y, out=out), x + y)
    expected = x + y
    assert torch.equal(plus(x, y, out=x), expected)  # in place, its lines are in the caches
    assert not any("p" in letters for letters in along(plus))


def test_several_gradients_with_nontemporal_stores(past):
    fn = past(lambda x, y: x * y * y)
    x = torch.randn(40_000, requires_grad=True)
    y = torch.randn(40_000, requires_grad=True)
    g = torch.randn(40_000)
    ours = torch.autograd.grad(fn(x, y), (x, y), g)
    theirs = torch.autograd.grad(x * y * y, (x, y), g)
    torch.testing.assert_close(ours, theirs)
    (letters,) = along(fn, "pullback(0,1)")
    assert letters == "uuupp"
    # Of two sizes, only one can: their lines begin at different elements.
    half = x.detach().to(torch.bfloat16).requires_grad_()
    ours = torch.autograd.grad(fn(half, y), (half, y), g)
    theirs = torch.autograd.grad(half * y * y, (half, y), g)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert along(fn, "pullback(0,1)")[1:] == ["uuupu"]


def test_a_summed_gradient_beside_one_that_is_not(past):
    fn = past(lambda x, y: x * y)
    x, y = (torch.randn(size, requires_grad=True) for size in ((200, 1_001), (1_001,)))
    ours = torch.autograd.grad(fn(x, y).sum(), (x, y))
    theirs = torch.autograd.grad((x * y).sum(), (x, y))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert along(fn, "pullback(0,1)") == ["zuupr"]


def test_outputs_whose_lines_begin_elsewhere(past):
    """Launches never allocate such memory, so the kernel is called directly."""
    fn = past(lambda x, y: x * y)
    x, y = torch.randn(5_000, requires_grad=True), torch.randn(5_000, requires_grad=True)
    g = torch.randn(5_000)
    torch.autograd.grad(fn(x, y), (x, y), g)
    launcher = fn._operation.derived("pullback", (0, 1)).launcher
    (plan,) = launcher.plans.values()
    results = [torch.empty(5_001)[1:], torch.empty(5_003)[3:]]
    operands = (g, x, y, *results)
    thread_team.run(
        plan.kernel,
        plan.loops.items,
        [t.data_ptr() for t in operands],
        meta=plan.meta_address,
        scratch=plan.scratch,
    )
    assert torch.equal(results[0], (g * y).detach())
    assert torch.equal(results[1], (g * x).detach())


def test_integer_divisions_in_a_branch(past):
    fn = past(lambda x, y: x // y if y else 0)
    x, y = torch.arange(5_000), torch.arange(5_000) % 3
    assert torch.equal(fn(x, y), torch.where(y != 0, x // y.clamp(min=1), 0))
    assert along(fn) == ["uup"]


def test_small_results_stay_in_the_caches():
    fn = tg.vectorize(lambda x: x + 1)
    fn(torch.zeros(100_000))
    assert along(fn) == ["uu"]
    count = nontemporal.last_level_cache() // 8 + 1_000  # read and written, a little more than fits
    assert torch.equal(fn(torch.zeros(count)), torch.ones(count))
    assert along(fn) == ["uu", "up"]
