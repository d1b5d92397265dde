"""The adjoint of a graph of calls: reverse-mode differentiation, as data.

Walks calls from the newest to the oldest, as torch's own engine does, so that cotangents which meet
are summed in torch's order and to torch's bits. Nothing runs here: the result is more nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from taskgrad.errors import TapeError
from taskgrad.graph.calls import Call
from taskgrad.graph.leaves import Leaf, Primal
from taskgrad.graph.nodes import Element, Node, ancestors, new_key, sum_of, walk, whole
from taskgrad.graph.pullback import CotangentCheck, ParameterGrad, Pullback
from taskgrad.graph.shards import Shard

Seeds = Sequence[tuple[Node, Node | None]]
"""(output, its cotangent); a cotangent of None means ones."""


@dataclass(frozen=True)
class Adjoint:
    """What one backward consists of.

    Attributes
    ----------
    pullbacks
        One for each call that a cotangent reaches, newest first.
    leaves
        For every leaf or primal that a cotangent reaches: the cotangents to sum, in order.
    parameters
        For every (home shard, parameter name): the gradients to sum, in order.
    apart
        Those of them that no pullback adds up, if the pullbacks were to: the oldest call that uses
        the parameter is on another worker than its home, or there are replicas.
    """

    pullbacks: tuple[Pullback, ...]
    leaves: dict[Leaf | Primal, tuple[Node, ...]]
    parameters: dict[tuple[Shard, str], tuple[ParameterGrad, ...]]
    apart: dict[tuple[Shard, str], tuple[ParameterGrad, ...]] = field(default_factory=dict)

    def leaf_grad(self, leaf: Leaf | Primal) -> Node | None:
        """One node for a leaf's gradient; None if no cotangent reaches it."""
        return sum_of(self.leaves.get(leaf, ()), leaf.name if isinstance(leaf, Leaf) else "")


def calls_behind(outputs: Iterable[Node]) -> list[Call]:
    """The calls that outputs are differentiated through, newest first.

    Stops at leaves and primals, and where nothing upstream can take a gradient.
    """
    found = walk(
        _calls_of(outputs),
        lambda call: _calls_of(call.inputs),
    )
    return sorted(found, key=lambda call: call.order, reverse=True)


def _calls_of(nodes: Iterable[Node]) -> list[Call]:
    """The calls that give these values, where a gradient can be taken."""
    return [call for n in nodes if isinstance(call := whole(n), Call) and n.needs_grad]


def adjoint(
    seeds: Seeds,
    *,
    retain: bool = False,
    keep: frozenset[Call] = frozenset(),
    scale: tuple[float, Node | None] = (1.0, None),
    accumulate: bool = False,
) -> Adjoint:
    """Differentiate from these seeds.

    Parameters
    ----------
    retain
        Keep every tape for another backward.
    keep
        Calls whose tapes are still to be used by another backward.
    scale
        The factor of cotangents of ones: a number, and the node of another factor, if any.
    accumulate
        Let the last pullback that computes a part of a parameter's gradient add all parts to the
        gradient, if it runs where the parameter lives. For others see `Adjoint.apart`.

    Raises TapeError if an output cannot be differentiated, or a tape was already used.
    """
    calls = _differentiable_calls([output for output, _ in seeds])
    arriving: defaultdict[Node, list[tuple[int | None, Node | None]]] = defaultdict(list)
    leaves: defaultdict[Leaf | Primal, list[Node]] = defaultdict(list)
    parameters: defaultdict[tuple[Shard, str], list[ParameterGrad]] = defaultdict(list)
    for output, cotangent in seeds:
        arriving[whole(output)].append((_position_of(output), cotangent))
        if isinstance(output, Leaf | Primal) and cotangent is not None:  # it is an output itself
            leaves[output].append(cotangent)
    pullbacks: list[Pullback] = []
    completes = _completing(calls) if accumulate else {}
    peers = _peers(calls)
    checks = _checks(seeds)
    behind = _Behind()
    onward = _onward(calls, behind)
    carried: defaultdict[Call, list[tuple[int, Node]]] = defaultdict(list)
    for call in calls:
        wanted = tuple([i for i, node in enumerate(call.inputs) if node.needs_grad])
        key, keys = peers.get(call, ("", ()))
        cotangents = [cotangent for _, cotangent in arriving[call]]
        includes = _included(call, parameters, behind)
        pullback = Pullback(
            call,
            cotangents,
            wanted,
            retain or call in keep,
            positions=tuple([position for position, _ in arriving[call]]),
            carried=tuple(carried[call]),
            includes={name: _parts_at(call, parts) for name, parts in includes.items()},
            scale=scale if None in cotangents else (1.0, None),
            accumulate={
                name: [] if name in includes else _parts_at(call, parameters.get((home, name), ()))
                for home, name in completes.get(call, ())
            },
            key=key,
            peers=keys,
            awaits=checks.get(call, ()),
        )
        pullbacks.append(pullback)
        for position, slot in enumerate(wanted):
            source = call.inputs[slot]
            part: Node = pullback
            if len(wanted) > 1:
                part = Element(pullback, position, key=new_key("cotangent", call.title))
            if (call, slot) in onward:
                other, at = onward[call, slot]
                carried[other].append((at, part))
            elif isinstance(source, Leaf | Primal):
                leaves[source].append(part)
            else:
                arriving[whole(source)].append((_position_of(source), part))
        if call.shard is not None:
            for name in call.parameters:
                parts = parameters[call.shard.home(name), name]
                if name in includes:
                    parts.clear()
                parts.append(ParameterGrad(pullback, name))
        if not pullback.retain:
            call.tape.spend()
    found = {key: tuple(parts) for key, parts in parameters.items()}
    added = {key for keys in completes.values() for key in keys}
    return Adjoint(
        tuple(pullbacks),
        {leaf: tuple(parts) for leaf, parts in leaves.items()},
        found,
        {key: parts for key, parts in found.items() if accumulate and key not in added},
    )


class _Behind:
    """The calls that wait for the backward of a call, as all behind it do; found once."""

    def __init__(self) -> None:
        self._found: dict[Call, set[Call]] = {}

    def of(self, call: Call) -> set[Call]:
        """All calls whose backwards take part in what this one's gives."""
        if call not in self._found:
            self._found[call] = set(calls_behind(call.inputs))
        return self._found[call]


def _parts_at(call: Call, parts: Sequence[ParameterGrad]) -> list[Node]:
    """Gradients as the pullback of a call takes them: those on its worker by their pullbacks."""
    return [part.pullback if part.worker == call.worker else part for part in parts]


def _included(
    call: Call, parameters: Mapping[tuple[Shard, str], list[ParameterGrad]], behind: _Behind
) -> dict[str, list[ParameterGrad]]:
    """The gradients from newer stages to which that of this one is added, use by use.

    They are those of parameters that the stage of a graph has, where its backward waits for that of
    the newer ones anyway.
    """
    shard = call.shard
    if shard is None or not call.spec.segment:
        return {}
    found = {name: parameters.get((shard.home(name), name), []) for name in call.parameters}
    return {
        name: list(parts)
        for name, parts in found.items()
        if parts and all(call in behind.of(part.pullback.call) for part in parts)
    }


def _onward(calls: Sequence[Call], behind: _Behind) -> dict[tuple[Call, int], tuple[Call, int]]:
    """For input slots of stages of a graph, the slot of another call that takes the same value.

    That is the newest of the older calls that wait for this one's backward anyway. The cotangent
    goes there first, to be summed with those of the uses within that stage: so all are summed one
    by one, from the newest use to the oldest, as torch's engine does.
    """
    users: defaultdict[Node, list[tuple[Call, int]]] = defaultdict(list)
    for call in calls:
        for slot, node in enumerate(call.inputs if call.spec.segment else ()):
            if node.needs_grad:
                users[node].append((call, slot))
    found: dict[tuple[Call, int], tuple[Call, int]] = {}
    for places in users.values():
        for i, (call, slot) in enumerate(places[:-1]):
            others = behind.of(call)
            older = next((place for place in places[i + 1 :] if place[0] in others), None)
            if older is not None:
                found[call, slot] = older
    return found


def _position_of(node: Node) -> int | None:
    """Which of the outputs of a call this is; None for all of it."""
    return node.position if isinstance(node, Element) else None


def _differentiable_calls(outputs: Sequence[Node]) -> list[Call]:
    """The calls behind these outputs, newest first; TapeError if one has no tape to be used."""
    for output in outputs:
        if not output.needs_grad:
            raise TapeError(_why_not(output))
    calls = calls_behind(outputs)
    used = next((call for call in calls if call.tape.spent), None)
    if used is not None:
        raise TapeError(
            f"backward through {used.title!r} a second time: its tape was used by the first "
            "backward. Pass retain_graph=True to the first one if you need two"
        )
    return calls


def _completing(calls: Sequence[Call]) -> dict[Call, list[tuple[Shard, str]]]:
    """For each call the parameters, and their homes, that no later backward has a gradient of.

    Without parameters whose home is on another worker, or a replica's.
    """
    last: dict[tuple[Shard, str], Call] = {}
    for call in calls:
        if call.shard is not None:
            last |= {(call.shard.home(name), name): call for name in call.parameters}
    found: dict[Call, list[tuple[Shard, str]]] = {}
    for parameter, call in last.items():
        home = parameter[0]
        if home.worker != call.worker or home.replica_of is not None:
            continue
        found.setdefault(call, []).append(parameter)
    return found


def _checks(seeds: Seeds) -> dict[Node, tuple[CotangentCheck, ...]]:
    """The checks that each output's pullback awaits before it uses a tape: do all cotangents fit?

    A pullback checks its own. A cotangent of a collected output was checked on the driver.
    """
    if len(seeds) < 2:
        return {}
    checks = tuple(
        CotangentCheck(output, cotangent)
        for output, cotangent in seeds
        if isinstance(output, Call)
        and cotangent is not None
        and not (isinstance(cotangent, Leaf) and cotangent.checked)
    )
    return {output: checks for output, _ in seeds}


def _peers(calls: Iterable[Call]) -> dict[Call, tuple[str, tuple[str, ...]]]:
    """The key of the pullback of each call that is a rank, and those of its group, in order.

    The backwards of one group's ranks exchange values, as its forwards did. In a training step each
    of them is in the adjoint of another microbatch, and call and pullback have one name.
    """
    found: dict[Call, tuple[str, tuple[str, ...]]] = {}
    groups: dict[int, dict[int, tuple[Call, str]]] = {}
    for call in calls:
        rank = call.spec.rank
        if rank is not None and call.spec.context is not None:
            keys = tuple([key.replace("forward", "backward", 1) for key in call.spec.peers])
            found[call] = keys[rank.index], keys
        elif rank is not None:
            key = new_key("backward", call.title)
            groups.setdefault(id(rank.group), {})[rank.index] = call, key
    for ranks in groups.values():
        keys = tuple(ranks[i][1] for i in sorted(ranks))
        found |= {call: (key, keys) for call, key in ranks.values()}
    return found


def _why_not(output: Node) -> str:
    if any(isinstance(n, Call) and n.tape.wanted and not n.tape.kept for n in ancestors([output])):
        return (
            "backward through a thunk made (or first collected) under torch.no_grad() or "
            "torch.inference_mode(): it kept no tape. Make it again in grad mode"
        )
    return (
        "backward through a thunk that needs no gradient: neither an input nor a parameter "
        "behind it has requires_grad=True"
    )
