"""Layouts of several chains: joined to be trained together, with the calls of a Python function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from torch import nn

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.graph.calls import Call, Draw
from taskgrad.graph.layers import Branches, Layer, Model, ParameterInfo, Path
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Element, Node, new_key, whole
from taskgrad.graph.shards import ChainRef, Shard, ShardCall, copied_names
from taskgrad.layout import Autocast, Extend, Layout, Select, Walk
from taskgrad.recording import RecordedCall, Recording, record
from taskgrad.thunk import Thunk
from taskgrad.worker import joining


class JoinedLayout(Layout):
    """The layers of several chains, whose shards on one worker are one shard here.

    The layers and parameters on the workers are those of the chains, which stay as they are. Names
    begin with the name of their chain. It makes no calls.

    Parameters
    ----------
    title
        A name for all of them, for messages and task keys.
    parts
        The layouts of the chains by name, in the order that their parameters get.
    session
        That of all of them.
    workers
        Workers that have a shard even if none of the layers is there.
    """

    def __init__(
        self,
        title: str,
        parts: Mapping[str, Layout],
        session: Session,
        workers: Iterable[str] = (),
    ) -> None:
        self._parts = dict(parts)
        self._first: dict[str, int] = {}
        layers: list[Layer] = []
        tensors: dict[str, ParameterInfo] = {}
        starts: set[int] = set()
        placed: list[str] = []
        for name, part in parts.items():
            first = self._first[name] = len(layers)
            layers += [_renamed(layer, name, first) for layer in part.layers]
            starts |= {first + i for i in part.starts}
            placed += [part.shard_of(layer).worker for layer in part.layers]
            for info in part.tensors.values():
                own = f"{name}.{info.name}"
                tensors[own] = replace(
                    info,
                    name=own,
                    layer=".".join(filter(None, (name, info.layer))),
                    names=tuple(f"{name}.{other}" for other in info.names),
                )
        model = Model((), layers, [], b"", tensors)
        super().__init__(title, model, placed, session, frozenset(starts))
        self.parametrized = any(part.parametrized for part in parts.values())
        alone = dict.fromkeys(w for w in workers if w not in placed)
        self.shards += tuple([Shard(self.ref, new_key("shard", title), w) for w in alone])
        self.devices = dict.fromkeys(alone, "cpu")
        for part in parts.values():
            self.devices |= part.devices

    @property
    def parts(self) -> Mapping[str, Layout]:
        return self._parts

    @property
    def refs(self) -> tuple[ChainRef, ...]:
        return (self.ref, *(part.ref for part in self.parts.values()))

    def path_of(self, name: str) -> Path:
        """The layers of a chain as a graph, as they are named here."""
        return _renamed_path(self.parts[name].path, name, self._first[name])

    def join(self) -> None:
        """Make the shards on the workers, of those of the chains."""
        copied = copied_names(self.shards)
        joins = []
        for shard in self.shards:
            parts = [
                joining.Part(own.token, self._first[name], f"{name}.")
                for name, part in self.parts.items()
                for own in part.shards
                if own.worker == shard.worker
            ]
            arguments = {"parts": parts, "copied": copied.get(shard, [])}
            joins.append(ShardCall(shard, joining.join, arguments, key=shard.token))
        self.run(joins)
        for call in joins:
            self.executor.hold(call.shard, call)


def _renamed(layer: Layer, part: str, first: int) -> Layer:
    name = ".".join(filter(None, (part, layer.name)))
    return replace(layer, index=first + layer.index, name=name)


def _renamed_path(path: Path, part: str, first: int) -> Path:
    found: list[Layer | Branches] = []
    for step in path:
        if isinstance(step, Layer):
            found.append(_renamed(step, part, first))
            continue
        paths = tuple(_renamed_path(branch, part, first) for branch in step.paths)
        found.append(Branches(f"{part}.{step.name}", paths, _renamed(step.connection, part, first)))
    return tuple(found)


@dataclass(frozen=True)
class _Placed:
    """One call of the function in its place.

    Attributes
    ----------
    chain
        The name of the chain; "" for a function.
    path
        The layers of the chain; () for a function.
    shard
        Where it takes its arguments.
    index
        The number of a function after those of layers.
    suffix
        What comes after its name, if it was called before.
    """

    chain: str
    path: Path
    shard: Shard
    index: int
    suffix: str


class FunctionLayout(JoinedLayout):
    """A layout whose calls are those of a Python function, which calls chains and spawns functions.

    The function is called anew for every microbatch, and has to make the same calls each time; the
    other arguments of these may change.

    Parameters
    ----------
    function
        Takes a thunk of the input, and returns a thunk.
    parts
        The layouts of the chains that it calls, by name. Modules that it calls are chains, too.
    modules
        The modules among them, by the name of their chain.
    recording
        Its calls; those of modules have the module as their target.
    workers
        The worker of each call in the recording; those of functions count.
    """

    is_traced = True
    takes_one_input = True

    def __init__(
        self,
        function: Callable[..., Any],
        title: str,
        parts: Mapping[str, Layout],
        modules: Mapping[str, nn.Module],
        recording: Recording,
        workers: Sequence[str],
        session: Session,
    ) -> None:
        used = recording.used()
        functions = [i for i in used if recording.calls[i].target is None]
        super().__init__(title, parts, session, [workers[i] for i in functions])
        self._function = function
        self._chain_of = {id(module): parts[name] for name, module in modules.items()}
        self._modules = tuple(modules.values())  # their ids are theirs for as long as we are here
        self._names = {part: name for name, part in self.parts.items()}
        self._described = self._describe(recording)
        on = {shard.worker: shard for shard in self.shards}
        counts: dict[Any, int] = {}
        self._calls: dict[int, _Placed] = {}
        for i in used:
            call = recording.calls[i]
            target = self._target(call)
            count = counts[target] = counts.get(target, 0) + 1
            suffix = "" if count == 1 else f" (call {count})"
            if isinstance(target, Layout):
                name = self._names[target]
                first = self.shard_of(self.layers[self._first[name]])
                self._calls[i] = _Placed(name, self.path_of(name), first, 0, suffix)
            else:
                index = len(self.layers) + i
                self._calls[i] = _Placed("", (), on[workers[i]], index, suffix)
        self._titles = [recording.calls[i].title for i in used]
        takes = next((i for i in used if -1 in recording.sources[i]), used[0])
        self._takes_input = self._calls[takes].shard

    @property
    def first(self) -> Shard:
        return self._takes_input

    @property
    def last(self) -> Shard:
        placed = self._calls[max(self._calls)]
        if not placed.path:
            return placed.shard
        end = placed.path[-1]
        return self.shard_of(end.connection if isinstance(end, Branches) else end)

    @property
    def called_again(self) -> Sequence[str]:
        again = {placed.chain for placed in self._calls.values() if placed.suffix}
        return [name for name in self.parts if name in again]

    @property
    def names(self) -> list[str]:
        return [*super().names, *dict.fromkeys(filter(None, self._titles))]

    def calls(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        mode: bool | None,
        autocast: Autocast = (),
        extend: Extend | None = None,
        select: Select | None = None,
        draw: Draw | None = None,
    ) -> list[Call]:
        self.refuse_modes()
        [given] = args
        x = given._node if isinstance(given, Thunk) else given
        if not isinstance(x, Node):
            x = Leaf(x, needs_grad=False, kept=True)
        found = record(self._function, x, self.title, self._known)
        self._compare(found)
        walk = Walk(self, mode, autocast, extend)
        values: dict[Node, Node] = {}
        for i, placed in self._calls.items():
            call = found.calls[i]
            inputs = tuple([values.get(node, node) for node in call.entry.inputs])
            entry = call.entry._replace(inputs=inputs, value=call.entry.value and inputs[0])
            walk.begin(call.settings, placed.suffix)
            last = call.value is found.output
            if placed.path:
                [values[call.value]] = walk.path(placed.path, entry, last=last).inputs
            else:
                [values[call.value]] = walk.call(
                    call.title,
                    ((placed.index, call.title, call.title),),
                    placed.shard,
                    entry,
                    last=last,
                    function=call.function,
                    tensor_slots=call.tensor_slots,
                ).inputs
        return walk.calls

    def _known(self, module: nn.Module) -> Layout | None:
        """The layout of a module, None for one that is sent as a function."""
        return self._chain_of.get(id(module))

    def _target(self, call: RecordedCall) -> Any:
        """The layout that is called, or the title of a function."""
        if isinstance(call.target, nn.Module):
            return self._chain_of[id(call.target)]
        return call.target or call.title

    def _describe(self, recording: Recording) -> list[tuple[str, tuple[int | None, ...]]]:
        """What the calls of a recording are: names, and where their arguments are from."""
        targets = [self._target(call) for call in recording.calls]
        names = [
            self._names.get(t, f"{t.title}, another chain") if isinstance(t, Layout) else t
            for t in targets
        ]
        return list(zip([*names, "the output"], recording.sources, strict=True))

    def _compare(self, found: Recording) -> None:
        """Raise TaskgradError if these are not the calls of the first recording."""
        then, now = self._described, self._describe(found)
        if then == now:
            return
        i, before, after = next(
            (i, a, b) for i, (a, b) in enumerate(zip_longest(then, now)) if a != b
        )
        change = (
            f"was {before[0]!r}, and is {after[0]!r} now"
            if before[0] != after[0]
            else f"is {after[0]!r} of other values"
        )
        raise TaskgradError(
            f"{self.title} makes other calls than when its trainer was made: number {i + 1} "
            f"{change}. Workers, schedule and optimizers are made for one sequence of calls: make "
            "decisions that change from batch to batch inside of a layer or of a function that is "
            "given to tg.spawn, or make another Trainer"
        )


def constants(calls: Sequence[Sequence[Call]], batch: Sequence[Node]) -> list[Leaf]:
    """The leaves that these calls take besides those of the batch, in order."""
    found = {n: None for c in calls for call in c for n in call.inputs if isinstance(n, Leaf)}
    return [leaf for leaf in found if leaf not in set(batch)]


def structure(calls: Sequence[Sequence[Call]], leaves: Sequence[Leaf]) -> tuple[Any, ...]:
    """All of these calls but the values of their inputs; equal for equal calls."""
    number: dict[Node, int] = {leaf: -1 - i for i, leaf in enumerate(leaves)}
    number |= {call: i for i, call in enumerate(c for part in calls for c in part)}

    def place(node: Node) -> Any:
        at = number.get(whole(node))
        return (at, node.position) if isinstance(node, Element) else at

    return tuple(
        (
            *(*call.spec[2:8], call.spec.needs_grad, call.tape.wanted, call.settings),
            tuple([place(node) for node in call.inputs]),
        )
        for part in calls
        for call in part
    )
