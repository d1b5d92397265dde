"""Change shards on several workers: all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from taskgrad.errors import TaskgradError
from taskgrad.executors.base import Executor
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.shards import Shard, ShardCall
from taskgrad.worker import keeping


@contextlib.contextmanager
def all_or_nothing(shards: Iterable[Shard], executor: Executor) -> Iterator[None]:
    """Restore the layers of all shards, and their optimizers, if the block raises.

    Each worker keeps copies of parameters and buffers until the block ends.
    """
    shards = list(shards)
    executor.run(_on(shards, keeping.keep))
    try:
        yield
    except BaseException as error:
        try:
            executor.run(_on(shards, keeping.take_back))
        except TaskgradError as broken:
            error.add_note(f"What was loaded could not be taken back: {broken}")
        raise
    executor.run(_on(shards, keeping.settle))


def _on(shards: Iterable[Shard], function: Callable[..., None]) -> list[Node]:
    return [ShardCall(s, function, {}, key=new_key(function.__name__)) for s in shards]
