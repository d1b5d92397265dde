"""The owner of chains: the one trainer or optimizer that their shards have, and its last step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

from taskgrad.chain import GraphChain
from taskgrad.errors import TaskgradError
from taskgrad.graph.shards import ChainRef, ShardCall
from taskgrad.layout import Layout
from taskgrad.shard_tasks import ShardTasks
from taskgrad.train.chain_group import ChainGroup
from taskgrad.worker import optimizing, training


def take_over(layout: Layout, owner: Any, makes: Sequence[ShardCall]) -> list[Any]:
    """Make `owner` the owner of a layout's chains, once what it needs is made on all shards.

    The steps of previous owners are finished first. If one no longer exists, a step that it left
    unfinished is taken back. Returns the results of `makes`.
    """
    layout.refuse_averages("a new Trainer or Optimizer")
    for ref in layout.refs:
        before = ref.trained_by()
        if hasattr(before, "wait"):
            with contextlib.suppress(TaskgradError):  # a failed step's: raised when it is read
                before.wait()
        elif before is None:
            ref.recover()
    layout.run(layout.tasks(optimizing.use, awaits=makes))
    answers = layout.results(makes)
    # Not the layout itself if it is not the chain's own: of several it has the user's function.
    together = ShardTasks(layout.title, layout.session, layout.shards)
    for ref in layout.refs:
        ref.trained_by = weakref.ref(owner)
        ref.replicas = WeakSet(s for s in layout.shards if s.replica_of is not None)
        # A layout refers to its own chain; a reference to it from there would keep both.
        own = ref is layout.ref and not ref.replicas
        of = weakref.ref(layout) if own else together
        ref.recover = partial(_recover_once, ref, of)
    return answers


def _recover_once(ref: ChainRef, of: ShardTasks | weakref.ref[Layout]) -> None:
    """Take back what the owner of a chain left unfinished, which no longer exists."""
    shards = of() if isinstance(of, weakref.ref) else of
    if shards is not None:
        recover(shards)
    ref.recover = lambda: None


@contextlib.contextmanager
def restored_owner(layout: Layout) -> Iterator[None]:
    """Restore the owners of a layout's chains if the block raises."""
    before = [(ref, ref.trained_by, ref.recover, ref.replicas) for ref in layout.refs]
    try:
        yield
    except BaseException:
        for ref, owner, recover_it, replicas in before:
            ref.trained_by, ref.recover, ref.replicas = owner, recover_it, replicas
        raise


def check_owner(chain: GraphChain | ChainGroup, owner: Any, kind: str) -> None:
    """Raise TaskgradError if something else trains the chain, or one of several, now."""
    for ref in chain.layout.refs:
        if ref.trained_by() is not owner:
            named = {part.ref: f"chain {name!r}" for name, part in chain.layout.parts.items()}
            raise TaskgradError(
                f"{named.get(ref, repr(chain))} has another Trainer or Optimizer since this {kind} "
                "was made, whose optimizers have taken the place of this one's on the workers: use "
                "that one, or make a new one"
            )


def recover(
    layout: ShardTasks, *, seconds: float | None = None, done: int | None = None
) -> int | None:
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
