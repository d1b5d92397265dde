"""Worker: memory on a device that another process of the host reads: one slot for each tensor.

    sender                                          receiver
    copies the tensor into a slot, on its stream;
    records that it is written; sends the slot's
    number ───────────────────────────────────────▶ its stream waits for that, and copies the slot
                                                    to memory of its own; records that it is read
    may write the slot again, on a stream that  ◀── a receipt
    waits until it is read

No thread waits for the device, and no byte goes through the host. Slots are kept and written again:
opening another process's memory takes longer than copying it. NCCL and UCX do the same within a
host. A peer is offered a slot first, with bytes that it has to find in it; until it has, and where
it cannot, values go through the host's memory.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from taskgrad.cluster.channels.cuda_slot import CudaSlot, OpenCudaSlot

logger = logging.getLogger("taskgrad")

_ATTEMPTS = 3  # a peer that has not used its device yet cannot read
_OFFER_BYTES = 64
_MOST_FREE = 16  # slots that are kept while no value is in them


class Slot(Protocol):
    """Memory on a device of this process that others can open."""

    @property
    def nbytes(self) -> int:
        """How much there is."""

    @property
    def opening(self) -> tuple[Any, ...]:
        """What a receiver needs to open it, as plain data."""

    def write(self, flat: torch.Tensor) -> None:
        """Copy these bytes into it, after what this thread's stream has to do."""


class OpenSlot(Protocol):
    """A slot of another process."""

    def read(self, nbytes: int) -> torch.Tensor:
        """Its first bytes, on this process's device, for this thread's stream."""


KINDS: dict[str, tuple[Callable[[int, torch.device], Slot], Callable[..., OpenSlot]]] = {
    "cuda": (CudaSlot, OpenCudaSlot)
}
"""By type of device: what makes a slot of so many bytes, and what opens one."""


def shared_kind() -> str | None:
    """The type of devices that this process uses, of those with slots."""
    return "cuda" if torch.cuda.is_initialized() else None


class Reference(NamedTuple):
    """Where a tensor's bytes are, for the receiver; `dropped` are slots that it needs no more."""

    number: int
    nbytes: int
    device: str
    opening: tuple[Any, ...]
    dropped: tuple[int, ...] = ()


class Placed(NamedTuple):
    """A tensor's bytes in a slot, which is written again once it is given back."""

    slot: Slot
    device: torch.device
    reference: Reference


class DeviceSlots:
    """The slots for one peer, and those of that peer which are open here. Safe from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._free: list[Placed] = []  # the longest free first
        self._dropped: list[int] = []  # slots that the peer has not been told of
        self._open: dict[int, OpenSlot] = {}
        self._offered: Slot | None = None
        self._attempts = 0
        self._reads: bool | None = None  # whether the peer can

    # -- for what is sent ------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """True if the peer can read slots."""
        return bool(self._reads)

    @property
    def is_undecided(self) -> bool:
        """True if it may turn out that the peer can."""
        return self._reads is None and (self._offered is not None or self._attempts < _ATTEMPTS)

    def offer(self, device: torch.device) -> tuple[Reference, bytes] | None:
        """A slot and the bytes for the peer to find there, if it is to be asked whether it can.

        `answered` is to be called with its answer.
        """
        with self._lock:
            if self._reads is not None or self._offered or self._attempts >= _ATTEMPTS:
                return None
            self._attempts += 1
            content = os.urandom(_OFFER_BYTES)
            try:
                slot = self._offered = KINDS[device.type][0](_OFFER_BYTES, device)
                slot.write(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device))
            except Exception:
                logger.debug("memory of %s cannot be shared", device, exc_info=True)
                self._reads = False
                return None
        return Reference(next(self._numbers), _OFFER_BYTES, device.type, slot.opening), content

    def answered(self, reads: bool | None) -> None:
        """The peer's answer to an offer: whether it can; None if it may be able to later."""
        with self._lock:
            self._offered = None
            self._reads = reads

    def put(self, flat: torch.Tensor) -> Placed | None:
        """Copy a tensor of one dimension into a slot; None if it is to go through the host."""
        if not self.is_ready or flat.device.type not in KINDS:
            return None
        device, nbytes = flat.device, flat.nbytes
        try:
            number, slot = self._take(device, nbytes) or (
                next(self._numbers),
                KINDS[device.type][0](nbytes, device),
            )
            slot.write(flat.view(torch.uint8))
        except Exception:  # there is no memory left, for one
            logger.debug("no slot for %d bytes on %s", nbytes, device, exc_info=True)
            return None
        with self._lock:
            dropped, self._dropped = tuple(self._dropped), []
        reference = Reference(number, nbytes, device.type, slot.opening, dropped)
        return Placed(slot, device, reference)

    def _take(self, device: torch.device, nbytes: int) -> tuple[int, Slot] | None:
        with self._lock:
            for i, (slot, of, reference) in enumerate(self._free):
                if of == device and nbytes <= slot.nbytes <= 2 * nbytes:
                    del self._free[i]
                    return reference.number, slot
        return None

    def give_back(self, placed: Placed) -> None:
        """The peer has read this, or never will."""
        with self._lock:
            if self._reads:  # else they are closed
                self._free.append(placed)
            while len(self._free) > _MOST_FREE:
                self._dropped.append(self._free.pop(0).reference.number)

    # -- for what is received --------------------------------------------------------------------

    def check(self, reference: Reference, content: bytes) -> bool | None:
        """The answer to an offer."""
        if reference.device == "cuda" and not torch.cuda.is_initialized():
            return None
        try:
            return bytes(self.load(reference).cpu().tolist()) == content
        except Exception:
            logger.debug("another process's device memory cannot be read", exc_info=True)
            return False
        finally:
            with self._lock:
                self._open.pop(reference.number, None)  # the peer drops it, too

    def load(self, reference: Reference) -> torch.Tensor:
        """The bytes that were put into a slot, in memory of this process's device."""
        with self._lock:
            for number in reference.dropped:
                self._open.pop(number, None)
            slot = self._open.get(reference.number)
            if slot is None:
                slot = KINDS[reference.device][1](*reference.opening)
                self._open[reference.number] = slot
        return slot.read(reference.nbytes)

    def close(self) -> None:
        """Drop all slots."""
        with self._lock:
            self._reads = False
            self._free.clear()
            self._open.clear()
