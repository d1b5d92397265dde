"""Worker: how values on devices reach one peer: by slots, a process group, or the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskgrad.cluster.channels.device_group import DeviceGroup, Outgoing
from taskgrad.cluster.channels.device_slots import DeviceSlots, Reference, shared_kind
from taskgrad.cluster.channels.frames import Arriving
from taskgrad.worker.devices import home


class PeerDevices:
    """One worker's end; the other worker has its own.

    Parameters
    ----------
    place
        0 if this worker has the lower rank of the two, else 1.
    shares
        True if the peer may open this process's memory.
    groups
        True if process groups may be formed.
    tell
        Sends a message to the other end, whose `hear` is to get it; any thread may call.
    """

    def __init__(
        self, place: int, shares: bool, groups: bool, tell: Callable[[tuple[Any, ...]], None]
    ) -> None:
        self.slots = DeviceSlots()
        self.group = DeviceGroup(place, tell) if groups else None
        self._shares = shares
        self._tell = tell

    @property
    def is_busy(self) -> bool:
        """True if an end waits for a message of the other."""
        return self.group is not None and self.group.is_busy

    def carrier(self) -> DeviceSlots | Outgoing | None:
        """For the tensors of the next value; None: the host. Asks the peer what it can."""
        kind = shared_kind()
        if self._shares and kind is not None:
            if self.slots.is_ready:
                return self.slots
            offered = self.slots.offer(home(kind))
            if offered is not None:
                self._tell(("offer", *offered))
            if self.slots.is_undecided:
                return None
        return None if self.group is None else self.group.outgoing()

    def came(self, value: Arriving) -> list[Arriving]:
        """A value is here, perhaps but for memory on a device; returns it if it can be read."""
        if value.is_placed:
            value.load = self.slots.load
        if value.is_grouped:
            if self.group is None:
                raise ConnectionError("a worker sends over a group that was never formed")
            return self.group.came(value)
        return [value]

    def hear(self, message: tuple[Any, ...]) -> list[Arriving]:
        """A message of the other end; returns the values that can be read from now on."""
        match message:
            case ("offer", reference, content):
                able = self.slots.check(Reference(*reference), content) if self._shares else False
                self._tell(("answer", able))
            case ("answer", able):
                self.slots.answered(able)
            case _ if self.group is not None:
                return self.group.hear(message)
            case ("join", _):
                self._tell(("join", None))
        return []

    def close(self) -> None:
        """Drop all."""
        self.slots.close()
        if self.group is not None:
            self.group.close()
