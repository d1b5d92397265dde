"""After a step that did not come to its end: every shard at the same step again."""

from __future__ import annotations

from taskgrad.layout import Layout
from taskgrad.worker import training


def recover(layout: Layout, *, seconds: float | None = None) -> int | None:
    """Have every shard go back to the last step that all of them have taken.

    Returns the number of batches taken; with `seconds` None if the shards are busy for longer, and
    nothing is changed then. Of a chain without a trainer there is nothing to take back.
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
    done: int = min(taken)
    layout.run(layout.tasks(training.roll_back, done=done))
    layout.copy_tied()
    return done
