"""After a step that did not come to its end: every shard at the same step again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskgrad.chain import GraphChain
from taskgrad.executors.deploy import copy_tied
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.shards import ShardCall
from taskgrad.worker import training


def recover(chain: GraphChain, *, seconds: float | None = None) -> int | None:
    """Have every shard go back to the last step that all of them have taken.

    Returns the number of batches taken; with `seconds` None if the shards are busy for longer, and
    nothing is changed then. Of a chain without a trainer there is nothing to take back.
    """
    asked = _on_all(chain, training.progress, {})
    executor = chain._executor
    executor.run(asked, wait=False)
    error = executor.wait(asked, seconds=seconds)
    if isinstance(error, TimeoutError):
        executor.cancel(asked)
        return None
    if error is not None:
        raise error
    taken = executor.values(asked)
    if None in taken:
        return 0
    done: int = min(taken)
    executor.run(_on_all(chain, training.roll_back, {"done": done}))
    copy_tied(list(chain._shards.values()), executor)
    return done


def _on_all(
    chain: GraphChain, function: Callable[..., Any], arguments: dict[str, Any]
) -> list[Node]:
    return [
        ShardCall(shard, function, arguments, key=new_key(function.__name__, chain._title))
        for shard in chain._shards.values()
    ]
