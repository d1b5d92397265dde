"""How many items a chunk has: pure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskgrad.streaming.chunk_size import LEAST_SECONDS, MOST_SECONDS, NBYTES, SECONDS, Sizing


@given(
    st.floats(1e-7, 10),
    st.integers(1, 10**8),
    st.integers(1, 64),
    st.integers(1, 10**6) | st.none(),
)
def test_sizes_grow_to_what_they_shall_take_and_not_beyond(
    each: float, nbytes: int, threads: int, remaining: int | None
) -> None:
    sizing = Sizing(None, threads)
    assert sizing.next(remaining) == 1
    largest = 1
    for _ in range(12):
        sizing.ran(largest, largest * each, largest * nbytes)
        size = sizing.next(remaining)
        assert 1 <= size <= max(8 * largest, 1)
        assert size == 1 or size * each <= SECONDS * 1.001
        assert size == 1 or size * nbytes <= NBYTES
        largest = max(largest, size)
    if remaining is None:  # it is as large as it may be
        assert (size + 1) * each > SECONDS * 0.999 or (size + 1) * nbytes > NBYTES


@given(st.floats(1e-5, 1), st.integers(1, 16), st.integers(1, 500))
def test_chunks_at_the_end_are_even_and_small(each: float, threads: int, count: int) -> None:
    sizing = Sizing(None, threads)
    sizing.ran(10**6, 10**6 * each, 0)
    sizes = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, sizing.next(left)))
        assert sizes[-1] <= max(-(-left // (2 * threads)), LEAST_SECONDS / each, 1)
    assert sizes[-1] * each <= max(2 * LEAST_SECONDS, each)


def test_chunks_of_a_long_map_take_longer() -> None:
    sizing = Sizing(None, 2)
    took = []
    for _ in range(200):
        size = sizing.next(None)
        sizing.ran(size, size * 1e-3, 0)
        took.append(size * 1e-3)
    assert took[5] == SECONDS
    assert took[-1] == MOST_SECONDS
    assert all(t <= max(SECONDS, sum(took[:i]) / 2 / 16) for i, t in enumerate(took))


def test_a_size_that_was_given_stays() -> None:
    sizing = Sizing(7, 2)
    assert sizing.next(None) == 7
    sizing.ran(7, 100.0, 10**9)
    assert sizing.next(3) == 7


def test_one_chunk_that_took_long_is_forgotten() -> None:
    sizing = Sizing(None, 1)
    sizing.ran(100, 0.1, 0)
    usual = sizing.next(None)
    sizing.ran(100, 10.0, 0)  # the machine was busy
    assert sizing.next(None) < usual / 10
    for _ in range(12):
        sizing.ran(100, 0.1, 0)
    assert sizing.next(None) > 0.9 * usual
