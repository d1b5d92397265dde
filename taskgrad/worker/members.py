"""The ranks that take part in a collective: those along some named axes, or a group of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from taskgrad.arguments import shown, whole
from taskgrad.worker.communicator import Communicator, running
from taskgrad.worker.mailbox import Message


class Members:
    """The ranks that take part in a collective, with the one that calls it.

    `index` is this rank's place among them, `ranks` are their indices in the whole group. `over`
    says which they are, where that is not all, as a part of the collective's title.
    """

    def __init__(self, comm: Communicator, ranks: tuple[int, ...], over: str = "") -> None:
        self.comm = comm
        self.ranks = ranks
        self.index = ranks.index(comm.index)
        self.size = len(ranks)
        self._over = over

    def exchange(self, what: str, wants: bool, payloads: Sequence[list[Any]]) -> list[Message]:
        """As `Communicator.exchange`, among these."""
        return self.comm.exchange(what + self._over, wants, payloads, self.ranks)

    def group(self, groups: Sequence[Sequence[int]]) -> Members:
        """Those of one group with this rank; groups are lists of places among these."""
        mine = next(group for group in groups if self.index in group)
        ranks = tuple([self.ranks[i] for i in mine])
        return Members(self.comm, ranks, f"{self._over} in groups {list(map(list, groups))}")


def along(axis_name: Hashable) -> Members:
    """The ranks along the axis of this name, or along a tuple of them, with that of this thread.

    Raises NameError if this thread runs no rank on such an axis; ValueError if one is named twice.
    """
    comm = running()
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    mesh = None if comm is None else comm.rank.group.mesh
    known = [] if mesh is None else [name for name in mesh.names if name is not None]
    for name in names:
        if name not in known:
            raise NameError(f"unbound axis name: {name!r} ({_what_is_bound(comm, known)})")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a collective is over different axes; got the names {axis_name!r}")
    if comm is None or mesh is None:
        raise NameError(_what_is_bound(comm, known))
    over = "" if len(mesh.sizes) == 1 else f" over {', '.join(map(repr, names))}"
    return Members(comm, mesh.along(comm.index, names), over)


def in_group(axis_name: Hashable, groups: Any, *, equal: bool = False) -> Members:
    """As `along`, or the group with this rank, of groups that cover the axis.

    Raises ValueError if they do not, or differ in length and shall be `equal`, or there are several
    axes; TypeError if they are no lists of whole numbers.
    """
    members = along(axis_name)
    if groups is None:
        return members
    if isinstance(axis_name, tuple | list):
        raise ValueError(f"axis_index_groups are groups of one axis; got the names {axis_name!r}")
    try:
        found = [[whole("a rank", i) for i in group] for group in groups]
    except TypeError as error:
        raise TypeError(f"axis_index_groups has lists of places on the axis: {error}") from None
    if sorted(i for group in found for i in group) != list(range(members.size)):
        raise ValueError(
            f"axis_index_groups={shown(groups)} do not have each of the {members.size} places on "
            f"the axis {axis_name!r} once"
        )
    if equal and len(set(map(len, found))) > 1:
        raise ValueError(
            f"axis_index_groups={shown(groups)} differ in length; this collective takes groups of "
            "one length, so that its results have one shape"
        )
    return members.group(found)


def _what_is_bound(comm: Communicator | None, known: Sequence[Hashable]) -> str:
    if comm is None:
        return "it is not called inside a function that tg.pmap runs, in that function's thread"
    if not known:
        return "this tg.pmap has no axis_name"
    if len(known) == 1:
        return f"the axis here is {known[0]!r}"
    return f"the axes here are {', '.join(map(repr, known))}"
