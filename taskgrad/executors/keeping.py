"""Change shards on several workers: all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.futures import run
from taskgrad.graph.nodes import Node, Shard, ShardCall, new_key
from taskgrad.worker import keeping


@contextlib.contextmanager
def all_or_nothing(shards: Iterable[Shard], session: Session) -> Iterator[None]:
    """Restore the layers of all shards, and their optimizers, if the block raises.

    Each worker keeps copies of parameters and buffers until the block ends.
    """
    shards = list(shards)
    run(_on(shards, keeping.keep), session)
    try:
        yield
    except BaseException as error:
        try:
            run(_on(shards, keeping.take_back), session)
        except TaskgradError as broken:
            error.add_note(f"What was loaded could not be taken back: {broken}")
        raise
    run(_on(shards, keeping.settle), session)


def _on(shards: Iterable[Shard], function: Callable[..., None]) -> list[Node]:
    return [ShardCall(s, function, {}, key=new_key(function.__name__)) for s in shards]
