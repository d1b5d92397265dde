"""The owner of a chain: the one trainer or optimizer that its shards have, and its last step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from taskgrad.chain import GraphChain
from taskgrad.errors import TaskgradError
from taskgrad.graph.shards import ShardCall
from taskgrad.layout import Layout
from taskgrad.worker import optimizing, training


def take_over(chain: GraphChain, owner: Any, makes: Sequence[ShardCall]) -> list[Any]:
    """Make `owner` the owner of a chain, once what it needs is made on all shards.

    The steps of the previous owner are finished first. If that one no longer exists, a step that
    it left unfinished is taken back. Returns the results of `makes`.
    """
    layout = chain.layout
    layout.refuse_averages("a new Trainer or Optimizer")
    before = layout.ref.trained_by()
    if hasattr(before, "wait"):
        with contextlib.suppress(TaskgradError):  # a failed step's: raised when its loss is read
            before.wait()
    elif before is None and isinstance(layout.ref.trained_by, weakref.ref):
        recover(layout)
    layout.run(layout.tasks(optimizing.use, awaits=makes))
    answers = layout.results(makes)
    layout.ref.trained_by = weakref.ref(owner)
    return answers


@contextlib.contextmanager
def restored_owner(chain: GraphChain) -> Iterator[None]:
    """Restore the chain's owner if the block raises."""
    before = chain.layout.ref.trained_by
    try:
        yield
    except BaseException:
        chain.layout.ref.trained_by = before
        raise


def check_owner(chain: GraphChain, owner: Any, kind: str) -> None:
    """Raise TaskgradError if something else trains the chain now."""
    if chain.layout.ref.trained_by() is not owner:
        raise TaskgradError(
            f"{chain!r} has another Trainer or Optimizer since this {kind} was "
            "made, whose optimizers have taken the place of this one's on the workers: use that "
            "one, or make a new one"
        )


def recover(layout: Layout, *, seconds: float | None = None, done: int | None = None) -> int | None:
    """Take every shard back to the last step that all of them have taken, or to `done` steps.

    Returns the number of batches taken, 0 for a chain without a trainer; None if the shards are
    busy for longer than `seconds`, and nothing is changed then.
    """
    asked = layout.tasks(training.progress)
    layout.executor.run(asked, wait=False)
    error = layout.executor.wait(asked, seconds=seconds)
    if isinstance(error, TimeoutError):
        layout.executor.cancel(asked)
        return None
    if error is not None:
        raise error
    taken = layout.executor.values(asked)
    if None in taken:
        return 0
    if done is None:
        done = min(taken)
    layout.run(layout.tasks(training.roll_back, done=done))
    layout.copy_tied()
    return done
