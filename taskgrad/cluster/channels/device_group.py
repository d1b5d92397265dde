"""Worker: values on devices to and from one peer over process groups of torch: NCCL between GPUs.

    sender                                          receiver
    copies a value's tensors to one piece of
    memory; sends the rest of the value, and
    how many bytes there are  ────────────────────▶ has memory for them; posts its receive, if it
    posts its send, on a stream that waits for  ◀── is to be first
    the copy ─────────────────────────────────────▶ posts its receive, if it is to be second

What is posted waits on the device for its counterpart. Whatever waits for the whole device then (as
freeing memory does) waits too, and may keep this process from posting what another device waits
for. So of two workers the one with the higher rank always posts first: a device never waits
for one of a higher rank, hence no two for each other. Each direction has a group of its own, in
which both ends post in the same order; and memory is there before anything is posted.

The groups are formed beside the training, when a value with tensors on a device is first sent and
one is in use at both ends. They are used once each end has received what the other sent; until then
values go through the host's memory.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from taskgrad.cluster.channels.device_slots import Reference
from taskgrad.cluster.channels.frames import Arriving

logger = logging.getLogger("taskgrad")

_ATTEMPTS = 3  # a peer that has not used its device yet cannot join
_CHECK_BYTES = 64
_FORM_S = 60.0  # where a firewall is in between, NCCL may try for long
# Of each tensor in the memory of its value: any dtype can be viewed there.
_ALIGNMENT = 256

Message = tuple[Any, ...]


class Posted(Protocol):
    """A receive."""

    def take(self) -> torch.Tensor:
        """The memory, for this thread's stream once the bytes are there."""


class Pair(Protocol):
    """Process groups of two workers, one for each direction."""

    device: torch.device

    def gather(self, parts: Sequence[tuple[int, torch.Tensor]], nbytes: int) -> Any:
        """Copy tensors of bytes to these offsets of new memory, on this thread's stream."""

    def send(self, gathered: Any) -> None:
        """Post a send; no thread waits for it."""

    def room(self, nbytes: int) -> torch.Tensor:
        """Memory to receive in."""

    def receive(self, memory: torch.Tensor) -> Posted:
        """Post a receive."""

    def abort(self) -> None:
        """End what is posted, and the groups; any thread may call."""


class Kind(NamedTuple):
    """Of a type of devices: what two workers have to agree on, and what forms their pair.

    `identity` returns (the device, what has to be the same at both ends). `form` gets a torch store
    and this worker's place of the two, 0 or 1.
    """

    identity: Callable[[], tuple[str, Any]]
    form: Callable[[Any, int], Pair]


def _nccl() -> Kind:
    from taskgrad.cluster.channels import nccl_pair

    return Kind(nccl_pair.identity, nccl_pair.NcclPair)


KINDS: dict[str, Callable[[], Kind]] = {"cuda": _nccl}
"""By type of device."""


def grouped_kind() -> str | None:
    """The type of devices that this process uses, of those whose workers can form groups."""
    found = torch.distributed
    usable = torch.cuda.is_initialized() and found.is_available() and found.is_nccl_available()
    return "cuda" if usable else None


class Part(NamedTuple):
    """A tensor's place in the memory that goes with a value."""

    reference: Reference


class Outgoing:
    """The tensors of one value, which go in one piece; `pair` is None until there is one."""

    def __init__(self, group: DeviceGroup, pair: Pair | None) -> None:
        self._group = group
        self._pair = pair
        self._parts: list[tuple[int, torch.Tensor]] = []
        self._nbytes = 0

    def put(self, flat: torch.Tensor) -> Part | None:
        """Have these bytes sent with the value; None if they are to go through the host."""
        if self._pair is None:
            if flat.device.type == grouped_kind():
                self._group.ask()
            return None
        if flat.device != self._pair.device:
            return None
        start = self._nbytes
        self._parts.append((start, flat))
        self._nbytes = start + -(-flat.nbytes // _ALIGNMENT) * _ALIGNMENT
        return Part(Reference(start, flat.nbytes, flat.device.type, ()))

    def give_back(self, part: Part) -> None:
        """The value is pickled once more."""
        self._parts.clear()
        self._nbytes = 0

    def announce(self) -> tuple[int, int]:
        """Copy the tensors; returns their number among the peer's values, and how many bytes."""
        assert self._pair is not None
        gathered = self._pair.gather(self._parts, self._nbytes)
        return self._group.keep(gathered), self._nbytes


class DeviceGroup:
    """One worker's end.

    Parameters
    ----------
    place
        0 if this worker has the lower rank of the two, else 1.
    tell
        Sends a message to the other end, whose `hear` is to get it; any thread may call.
    """

    def __init__(self, place: int, tell: Callable[[Message], None]) -> None:
        self._place = place
        self._tell = tell
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._gathered: dict[int, Any] = {}  # sends that the peer has not asked for
        self._awaited: dict[int, tuple[Arriving, torch.Tensor]] = {}  # receives to be posted second
        self._attempts = 0
        self._asked = False
        self._closed = False
        self._store: Any = None
        self._pair: Pair | None = None
        self._formed: dict[bool, bool] = {}  # by whether it is this end

    @property
    def is_ready(self) -> bool:
        """True if values can go this way."""
        return self._pair is not None and self._formed == {True: True, False: True}

    @property
    def is_busy(self) -> bool:
        """True if an end waits for a message of the other."""
        return bool(self._gathered or self._awaited)

    def outgoing(self) -> Outgoing | None:
        """For the tensors of the next value; None if no device is in use."""
        if grouped_kind() is None:
            return None
        return Outgoing(self, self._pair if self.is_ready else None)

    def ask(self) -> None:
        """Ask the peer to join, if it may."""
        with self._lock:
            if self._asked or self._store is not None or self._attempts >= _ATTEMPTS:
                return
            self._asked = True
            self._attempts += 1
        self._tell(("join", _identity(grouped_kind())))

    def keep(self, gathered: Any) -> int:
        """What is to be sent when the peer asks for this number."""
        with self._lock:
            number = next(self._numbers)
            self._gathered[number] = gathered
        return number

    # -- in the thread that looks after the connections ------------------------------------------

    def came(self, value: Arriving) -> list[Arriving]:
        """All of a value is here but its memory on the device; returns it if it can be read."""
        number, nbytes = value.announced
        pair = self._pair
        try:
            if pair is None:
                raise RuntimeError("the group has ended")
            memory = pair.room(nbytes)
        except Exception as error:  # the device is full, for one
            value.load = functools.partial(_fail, error)
            self._tell(("refused", number))
            return [value]
        if self._place == 0:
            self._awaited[number] = value, memory
            self._tell(("ready", number))
            return []
        value.load = functools.partial(_part, pair.receive(memory))
        self._tell(("ready", number))
        return [value]

    def hear(self, message: Message) -> list[Arriving]:
        """A message of the other end; returns the values that can be read from now on."""
        match message:
            case ("join", identity):
                self._join(identity)
            case ("store", key, value):
                self._store.put(key, value)
            case ("formed", able):
                self._conclude(False, able)
            case ("refused", number):
                self._gathered.pop(number)
            case ("ready", number):
                assert self._pair is not None
                self._pair.send(self._gathered.pop(number))
                if self._place == 1:
                    self._tell(("go", number))
            case ("go", number):
                assert self._pair is not None
                value, memory = self._awaited.pop(number)
                value.load = functools.partial(_part, self._pair.receive(memory))
                return [value]
        return []

    def close(self) -> None:
        """End the groups, and what waits for the other end."""
        with self._lock:
            self._closed = True
            pair, self._pair = self._pair, None
            store = self._store
        if store is not None:
            store.close()
        if pair is not None:
            pair.abort()
        self._gathered.clear()
        self._awaited.clear()

    # -- forming ---------------------------------------------------------------------------------

    def _join(self, theirs: tuple[str, str, Any] | None) -> None:
        if self._store is not None:
            return
        kind = grouped_kind()
        mine = _identity(kind)
        with self._lock:
            asked, self._asked = self._asked, False
            if kind is not None and theirs is not None:
                from taskgrad.cluster.channels.pair_store import PairStore  # torch may lack stores

                self._store = PairStore(lambda key, value: self._tell(("store", key, value)))
        if not asked:
            self._tell(("join", mine))
        if kind is None or mine is None or theirs is None:
            return
        # NCCL refuses two ranks on one GPU, and its versions need not understand each other.
        if mine[0] == theirs[0] and mine[1] != theirs[1] and mine[2] == theirs[2]:
            threading.Thread(
                target=self._form, args=(kind,), name="taskgrad-device-group", daemon=True
            ).start()

    def _form(self, kind: str) -> None:
        """Form the groups, and send and receive once in each: that is when NCCL connects."""
        late = threading.Timer(_FORM_S, self.close)
        late.daemon = True
        late.start()
        try:
            pair = KINDS[kind]().form(self._store, self._place)
            with self._lock:
                if not self._closed:
                    self._pair = pair
            if self._closed:
                pair.abort()
                return
            able = self._check(pair)
        except Exception:
            logger.debug("a group of devices cannot be formed", exc_info=True)
            able = False
        late.cancel()
        able = able and not self._closed
        self._tell(("formed", able))
        self._conclude(True, able)

    def _check(self, pair: Pair) -> bool:
        found = True
        for sender in (0, 1):
            name = f"content{sender}"
            if sender == self._place:
                content = os.urandom(_CHECK_BYTES)
                self._store.set(name, content)
                flat = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(pair.device)
                pair.send(pair.gather([(0, flat)], _CHECK_BYTES))
            else:
                posted = pair.receive(pair.room(_CHECK_BYTES))
                found = bytes(posted.take().cpu().tolist()) == self._store.get(name)
        return found

    def _conclude(self, mine: bool, able: bool) -> None:
        """This end, or the other one, has checked the groups."""
        self._formed[mine] = able
        if not able:
            self.close()  # what the other end still waits for does not come


def _identity(kind: str | None) -> tuple[str, str, Any] | None:
    """(type, the device, what has to be the same at both ends); None if no device is in use."""
    return None if kind is None else (kind, *KINDS[kind]().identity())


def _part(posted: Posted, reference: Reference) -> torch.Tensor:
    memory = posted.take()
    return memory[reference.number : reference.number + reference.nbytes]


def _fail(error: Exception, reference: Reference) -> torch.Tensor:
    raise error
