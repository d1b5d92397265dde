"""The owner of a chain: the one trainer or optimizer that its shards have."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from taskgrad.chain import GraphChain
from taskgrad.errors import TaskgradError
from taskgrad.train.recovery import recover


@contextlib.contextmanager
def acquire_ownership(chain: GraphChain, owner: Any) -> Iterator[None]:
    """Make `owner` the owner of a chain, unless the block raises.

    The steps of the owner before are finished first. If that one no longer exists, a step that it
    left unfinished is taken back.
    """
    before = _owner_of(chain)
    if hasattr(before, "wait"):
        with contextlib.suppress(TaskgradError):  # a failed step's: raised when its loss is read
            before.wait()
    elif before is None and isinstance(chain._ref.trained_by, weakref.ref):
        recover(chain)
    yield
    chain._ref.trained_by = weakref.ref(owner)


@contextlib.contextmanager
def keeping_owner(chain: GraphChain) -> Iterator[None]:
    """If what is done meanwhile raises, the one that trains the chain is the one from before."""
    before = chain._ref.trained_by
    try:
        yield
    except BaseException:
        chain._ref.trained_by = before
        raise


def _owner_of(chain: GraphChain) -> Any:
    return chain._ref.trained_by()


def check_owner(chain: GraphChain, owner: Any) -> None:
    """Raise TaskgradError if something else trains the chain now."""
    if _owner_of(chain) is not owner:
        raise TaskgradError(
            f"{chain!r} has another Trainer or Optimizer since this {type(owner).__name__} was "
            "made, whose optimizers have taken the place of this one's on the workers: use that "
            "one, or make a new one"
        )
