"""The adjoint of a graph of calls: reverse-mode differentiation, as data.

Walks calls from the newest to the oldest, as torch's own engine does, so that cotangents which meet
are summed in torch's order and to torch's bits. Nothing runs here: the result is more nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from taskgrad.errors import TapeError
from taskgrad.graph.nodes import (
    Call,
    CotangentCheck,
    Element,
    Leaf,
    Node,
    Primal,
    Pullback,
    Shard,
    Sum,
    ancestors,
    new_key,
    walk,
)
from taskgrad.graph.reads import ParameterGrad


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
    """

    pullbacks: tuple[Pullback, ...]
    leaves: dict[Leaf | Primal, tuple[Node, ...]]
    parameters: dict[tuple[Shard, str], tuple[ParameterGrad, ...]]

    def leaf_grad(self, leaf: Leaf | Primal) -> Node | None:
        """One node for a leaf's gradient; None if no cotangent reaches it."""
        parts = self.leaves.get(leaf, ())
        if len(parts) > 1:
            return Sum(parts, leaf.name if isinstance(leaf, Leaf) else "", parts[0].worker)
        return parts[0] if parts else None


def calls_behind(outputs: Iterable[Node]) -> list[Call]:
    """The calls that outputs are differentiated through, newest first.

    Stops at leaves and primals, and where nothing upstream can take a gradient.
    """
    found = walk(
        (n for n in outputs if isinstance(n, Call) and n.needs_grad),
        lambda n: (i for i in n.inputs if isinstance(i, Call) and i.needs_grad),
    )
    calls = [n for n in found if isinstance(n, Call)]
    return sorted(calls, key=lambda call: call.order, reverse=True)


def adjoint(
    seeds: Sequence[tuple[Node, Node | None]],
    *,
    retain: bool = False,
    keep: frozenset[Call] = frozenset(),
) -> Adjoint:
    """Differentiate: seeds are (output, its cotangent); a cotangent of None means ones.

    Parameters
    ----------
    retain
        Keep every tape for another backward.
    keep
        Calls whose tapes somebody else is still to use.

    Raises
    ------
    TapeError
        An output cannot be differentiated, or a tape was already used.
    """
    for output, _ in seeds:
        if not output.needs_grad:
            raise TapeError(_why_not(output))
    calls = calls_behind([output for output, _ in seeds])
    used = next((call for call in calls if call.spent), None)
    if used is not None:
        raise TapeError(
            f"backward through {used.title!r} a second time: its tape was used by the first "
            "backward. Pass retain_graph=True to the first one if you need two"
        )
    arriving: dict[int, list[Node | None]] = {}
    for output, cotangent in seeds:
        arriving.setdefault(id(output), []).append(cotangent)

    pullbacks: list[Pullback] = []
    leaves: dict[Leaf | Primal, list[Node]] = {}
    parameters: dict[tuple[Shard, str], list[ParameterGrad]] = {}
    # A leaf or primal may be an output itself.
    for output, cotangent in seeds:
        if isinstance(output, Leaf | Primal) and cotangent is not None:
            leaves.setdefault(output, []).append(cotangent)
    for call in calls:
        cotangents = arriving.get(id(call))
        if not cotangents:
            continue
        wanted = tuple(i for i, node in enumerate(call.inputs) if node.needs_grad)
        pullback = Pullback(call, cotangents, wanted, retain or call in keep)
        pullbacks.append(pullback)
        for position, slot in enumerate(wanted):
            source = call.inputs[slot]
            part: Node = pullback
            if len(wanted) > 1:
                part = Element(pullback, position, key=new_key("cotangent", call.title))
            if isinstance(source, Leaf | Primal):
                leaves.setdefault(source, []).append(part)
            else:
                arriving.setdefault(id(source), []).append(part)
        if call.shard is not None:
            for name in call.parameters:
                home = call.shard.homes.get(name, call.shard)
                parameters.setdefault((home, name), []).append(ParameterGrad(pullback, name))
        if not pullback.retain:
            call.spent = True
    _introduce(pullbacks)
    _check_all_first(seeds, pullbacks)
    return Adjoint(
        tuple(pullbacks),
        {leaf: tuple(parts) for leaf, parts in leaves.items()},
        {key: tuple(parts) for key, parts in parameters.items()},
    )


def _check_all_first(
    seeds: Sequence[tuple[Node, Node | None]], pullbacks: Sequence[Pullback]
) -> None:
    """Make pullbacks wait, before they use a tape, until the cotangents of all outputs are checked.

    A pullback checks its own. A cotangent of a collected output was checked on the driver.
    """
    if len(seeds) < 2:
        return
    checks = tuple(
        CotangentCheck(output, cotangent)
        for output, cotangent in seeds
        if isinstance(output, Call)
        and cotangent is not None
        and not (isinstance(cotangent, Leaf) and cotangent.checked)
    )
    outputs = {output for output, _ in seeds}
    for pullback in pullbacks:
        if pullback.call in outputs:
            pullback.awaits = checks


def _introduce(pullbacks: Iterable[Pullback]) -> None:
    """The backwards of one gang's ranks meet, as its forwards did."""
    gangs: dict[int, dict[int, Pullback]] = {}
    for pullback in pullbacks:
        if pullback.call.rank is not None:
            rank = pullback.call.rank
            gangs.setdefault(id(rank.gang), {})[rank.index] = pullback
    for ranks in gangs.values():
        peers = tuple(ranks[i].key for i in sorted(ranks))
        for pullback in ranks.values():
            pullback.peers = peers


def _why_not(output: Node) -> str:
    recorded = any(
        isinstance(n, Call) and not n.taped and n._needs_grad for n in ancestors([output])
    )
    if recorded:
        return (
            "backward through a thunk made (or first collected) under torch.no_grad() or "
            "torch.inference_mode(): it kept no tape. Make it again in grad mode"
        )
    return (
        "backward through a thunk that needs no gradient: neither an input nor a parameter "
        "behind it has requires_grad=True"
    )
