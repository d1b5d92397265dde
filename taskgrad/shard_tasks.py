"""Tasks on the shards of a chain, or of several chains that are trained together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.registry import executor_of
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.shards import Shard, ShardCall, copied_names
from taskgrad.worker import loading, shard_ops


class ShardTasks:
    """Shards, one a worker, and the means to run something there.

    Attributes
    ----------
    title : str
        The name of what they are of, for messages and task keys.
    session : Session
        The session of the client that the workers belong to.
    executor : Executor
        What runs the tasks.
    shards : tuple of Shard
    """

    def __init__(self, title: str, session: Session, shards: Iterable[Shard]) -> None:
        self.title = title
        self.session = session
        self.executor = executor_of(session)
        self.shards = tuple(shards)

    def task(
        self,
        shard: Shard,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        after: Sequence[Node] = (),
        awaits: Sequence[Node] = (),
        name: str = "",
    ) -> ShardCall:
        """A task that calls a function of `taskgrad.worker` on a shard; it does not run yet.

        `arguments` are keyword arguments, plain data; the values of the nodes in `after` are the
        positional ones. The nodes in `awaits` run before. `name` is the task's name on the
        dashboard, by default the function's.
        """
        key = new_key(name or function.__name__, self.title)
        return ShardCall(shard, function, dict(arguments), key=key, after=after, awaits=awaits)

    def tasks(
        self, function: Callable[..., Any], *, awaits: Sequence[Node] = (), **arguments: Any
    ) -> list[ShardCall]:
        """The same task on every shard."""
        return [self.task(shard, function, arguments, awaits=awaits) for shard in self.shards]

    def run(self, tasks: Sequence[ShardCall]) -> None:
        """Run tasks side by side; returns when all are done."""
        self.executor.run(tasks)

    def results(self, tasks: Sequence[ShardCall]) -> list[Any]:
        """Run tasks side by side; returns their results."""
        self.executor.run(tasks)
        return self.executor.values(tasks)

    @contextlib.contextmanager
    def all_or_nothing(self, shards: Iterable[Shard]) -> Iterator[None]:
        """Restore the layers of these shards, and their optimizers, if the block raises.

        Each worker keeps copies of parameters and buffers until the block ends.
        """
        shards = list(shards)
        self.run([self.task(shard, loading.begin, {}) for shard in shards])
        try:
            yield
        except BaseException as error:
            try:
                self.run([self.task(shard, loading.undo, {}) for shard in shards])
            except TaskgradError as broken:
                error.add_note(f"What was loaded could not be taken back: {broken}")
            raise
        self.run([self.task(shard, loading.finish, {}) for shard in shards])

    def refreshes(self, given: Mapping[Shard, Node]) -> dict[Shard, ShardCall]:
        """Tasks that write new values into copies of tied parameters, by the shard of the copies.

        `given` has for a shard the node whose value is the new values of what lives there.
        """
        found = {}
        for shard in self.shards:
            after = [given[h] for h in dict.fromkeys(shard.homes.values()) if h in given]
            if after:
                awaits = [given[shard]] if shard in given else []
                found[shard] = self.task(
                    shard, shard_ops.set_parameters, {}, after=after, awaits=awaits, name="update"
                )
        return found

    def copy_tied(self) -> None:
        """Give copies of tied parameters the values that they have where they live."""
        gives = {
            shard: self.task(shard, shard_ops.give, {"names": names}, name="tied")
            for shard, names in copied_names(self.shards).items()
        }
        self.run(list(self.refreshes(gives).values()))
