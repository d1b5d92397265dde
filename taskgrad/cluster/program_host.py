"""Worker: what a resident program has around it: its driver's connection, and its channels.

A driver opens one connection to each worker of its chain, with the operation `PROGRAM`, and both
sides then send messages until it closes: on it, or on the channels once they are joined, if these
are sockets and the driver reaches them. Each is a dictionary with its kind under "op":

from the driver
    ``listen``, ``connect``  join the workers' channels
    ``load``, ``unload``     keep a program; drop it
    ``drop``                 drop inputs that were to be kept
    ``step``                 take a step
    ``rest``                 end the task that takes steps, when there are none left
    ``settle``               all workers have made a step
    ``stop``                 end the steps of earlier epochs
    ``cut_off``              another worker's messages to ranks here may be lost
    ``close``                end; as does the end of the connection
from the worker
    ``listening``, ``connected``  where the channels meet; that they are joined
    ``done``, ``failed``     a step
    ``stopped``              nothing of earlier epochs runs any more
    ``ended``                the task that takes steps has ended, after so many of them
    ``peer_lost``            the channel to another worker has ended
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from distributed import Worker
from distributed.comm.addressing import get_address_host
from distributed.comm.core import Comm

from taskgrad import remote_errors
from taskgrad.cluster import internals
from taskgrad.cluster.actions import title_of
from taskgrad.cluster.channels.dask_comms import DaskChannels
from taskgrad.cluster.channels.frames import Tag
from taskgrad.cluster.channels.links import Link
from taskgrad.cluster.channels.rank_mail import RankMail
from taskgrad.cluster.channels.sockets import DRIVER, SocketChannels
from taskgrad.cluster.channels.step_mail import StepMail
from taskgrad.cluster.config import deadline
from taskgrad.cluster.nested import give_thread_back
from taskgrad.cluster.wire.message_values import serialized_if_large
from taskgrad.cluster.wire.peers import registry_at
from taskgrad.cluster.wire.picklable import check_picklable
from taskgrad.cluster.wire.serialize import dumps_whole
from taskgrad.errors import TaskgradError, TravelError
from taskgrad.graph import pack
from taskgrad.graph.parts import StoredPart
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.remote_errors import text_of
from taskgrad.worker import parts
from taskgrad.worker.failures import exit_error
from taskgrad.worker.rank_forward import RANKS, KeptInput, RankForward
from taskgrad.worker.resident import Resident, StepInputs
from taskgrad.worker.settings import applied
from taskgrad.worker.step_program import StoredResult
from taskgrad.worker.store import Store
from taskgrad.worker_names import WorkerName

# How long a worker that closes its channels waits for each other one to do the same.
_CLOSE_S = 5.0
# How long a driver's last messages are read after its connection has ended.
_LAST_S = 1.0


class ProgramHost:
    """One program on one worker (a `taskgrad.worker.resident.Host`)."""

    def __init__(
        self,
        worker: Worker,
        store: Store,
        comm: Comm,
        name: str,
        *,
        client: str,
        rank: int,
        addresses: Sequence[str],
        tokens: Sequence[str],
        sockets: bool,
        groups: bool,
        links: bool,
    ) -> None:
        self._worker = worker
        self._store = store
        self._comm = comm
        self.client = client
        self.is_connected = False  # to the other workers, who may not be connected yet
        self._addresses = list(addresses)
        self._loop: Any = worker.loop
        self._thread = threading.get_ident()  # of the event loop
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._driver: int | None = None  # its place among the channels, if it takes part
        self._driver_left = asyncio.Event()  # all that came from there has been read
        self._gave_thread_back = False
        self._runs_ranks = False
        self._kept: dict[int, Any] = {}  # inputs of later steps, too
        self._settings: TorchSettings | None = None  # those that hold now
        self._applied = contextlib.ExitStack()
        self.resident = Resident(store, self, tokens)
        self.link: Link | None = None
        self.channels: SocketChannels | DaskChannels
        if sockets:
            lends = registry_at(worker.address) is not None
            self.channels = SocketChannels(
                name, rank, len(addresses), lends, groups, self._deliver, self._lost, self._sent
            )
            if links:
                self.link = Link(self.channels, addresses, store.mailboxes)
        else:
            self.channels = DaskChannels(worker, name, rank, self._deliver, self._lost)
        self._mail = RankMail(self.channels)
        self._step_mail = StepMail(self.channels, addresses, store.mailboxes)

    async def serve(self) -> None:
        """Do what the driver's messages say until it closes the connection, or is gone."""
        writer = asyncio.create_task(self._write())
        try:
            while True:
                message: Any = await self._comm.read()
                op = message.pop("op")
                if op == "close":
                    break
                if op == "connect":
                    await self._connect(**message)
                else:
                    self._do(op, message)
                del message
        except OSError:
            pass
        finally:
            writer.cancel()
        if self._driver is not None:  # there may be messages that came before the end
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._driver_left.wait(), _LAST_S)

    def _do(self, op: str, message: dict[str, Any]) -> None:
        """Do what a message says, in the event loop or a thread of the channels."""
        try:
            getattr(self, f"_{op}")(**message)
        except Exception as error:  # unpickling a program, say
            self.tell({"op": "failed", "step": -1, "error": error})

    def hang_up(self) -> None:
        """End the connection to the driver, as if that had."""
        self._driver_left.set()
        self._comm.abort()

    def worker_closes(self) -> None:
        """Take no more steps."""
        self.resident.close()
        self._driver_left.set()

    async def close(self) -> None:
        """Close the channels."""
        channels = self.channels
        if self.link is not None:
            self.link.close()
        self._mail.close()
        self._step_mail.close()
        if isinstance(channels, SocketChannels):
            await self._in_thread(channels.close, _CLOSE_S)
        else:
            await channels.close()

    def _listen(self) -> None:
        assert isinstance(self.channels, SocketChannels)
        host = get_address_host(self._worker.address)
        self.tell({"op": "listening", "port": self.channels.listen(host)})

    async def _connect(
        self, seconds: float, ports: Sequence[int] = (), driver: bool = False
    ) -> None:
        channels = self.channels
        try:
            if isinstance(channels, SocketChannels):
                hosts = map(get_address_host, self._addresses)
                where = list(zip(hosts, ports, strict=True))
                await self._in_thread(channels.connect, where + [("", 0)] * driver, seconds)
            else:
                await channels.connect(self._addresses, seconds)
        except Exception as error:
            self.tell({"op": "connected", "error": f"{type(error).__name__}: {error}"})
        else:
            self.is_connected = True
            self.tell({"op": "connected", "error": ""})
            if driver:
                self._driver = len(self._addresses)

    async def _in_thread(self, function: Any, *args: Any) -> None:
        await self._loop.asyncio_loop.run_in_executor(None, function, *args)

    def _load(self, number: int, program: bytes) -> None:
        self.resident.load(number, pack.loads_plain(program))

    def _unload(self, number: int) -> None:
        self.resident.unload(number)

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._kept.pop(number, None)

    def _step(self, number: int, program: int, inputs: list[Any], settle: int) -> None:
        if settle >= 0:
            self.resident.settle(settle)
        self.resident.add(StepInputs(number, program, list(map(self._input, inputs))))

    def _input(self, given: Any) -> Any:
        if isinstance(given, StoredResult):
            return self._stored(given.key)
        if isinstance(given, StoredPart):
            return parts.read(self._store, given)
        if not isinstance(given, KeptInput):
            return given
        if given.value is not None:
            self._kept[given.number] = given.value
        return self._kept[given.number]

    def _settle(self, step: int) -> None:
        if not self.resident.settle(step):
            self._in_loop(self._loop.asyncio_loop.run_in_executor, None, self.resident.settle_now)

    def _rest(self) -> None:
        self.resident.rest()

    def _cut_off(self, address: str, worker: str) -> None:
        error = TaskgradError(
            f"the connection to worker {worker} was lost, which the driver still reaches: look at "
            "the network between the workers, then call again"
        )
        self._store.mailboxes.cut_off(address, error)

    def _stop(self, epoch: int) -> None:
        self.resident.stop(epoch)

    def _stored(self, key: str) -> Any:
        """The result of a task; Dask's own thread reads it."""
        data = self._worker.data
        if threading.get_ident() == self._thread:
            return data[key]

        async def read() -> Any:
            return data[key]

        found = asyncio.run_coroutine_threadsafe(read(), self._loop.asyncio_loop)
        return found.result(deadline("answer"))

    def _in_loop(self, function: Callable[..., Any], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the worker
            self._loop.asyncio_loop.call_soon_threadsafe(function, *args)

    def _deliver(self, tag: Tag, arrived: Any) -> None:
        if tag == DRIVER:
            self._hear(arrived)
        elif self.link is not None:
            self.link.deliver(arrived)
        elif StepMail.is_for(tag):
            self._step_mail.deliver(tag, arrived)
        elif RankMail.is_for(tag):
            self._mail.deliver(tag, arrived)
        else:
            self.resident.deliver(tag, arrived)

    def _hear(self, arrived: Any) -> None:
        """The driver's message has come over the channels."""
        try:
            message = self.channels.unpack(arrived)
        except Exception as error:
            name = WorkerName(self._worker.address, self._worker.name)
            problem = TravelError(
                f"what a step takes cannot be unpickled on worker {name} ({text_of(error)}): the "
                "classes of a batch have to be importable there, and to unpickle without an error"
            )
            problem.__cause__ = error
            self.tell({"op": "failed", "step": -1, "error": problem})
        else:
            self._do(message.pop("op"), message)

    def _sent(self) -> None:
        if self.link is not None:
            self.link.sent()

    def _lost(self, peer: int) -> None:
        if peer == len(self._addresses):  # the driver
            self._in_loop(self.hang_up)
            return
        if self.link is not None:
            self.link.lost(peer)
        self.tell({"op": "peer_lost", "address": self._addresses[peer]})

    def execute(self, action: Any, settings: TorchSettings | None, inputs: list[Any]) -> Any:
        """Run an action on the worker's store; see `Host`."""
        try:
            now = self._settings
            if settings is not None and settings is not now and settings != now:
                self.release()
                self._applied.enter_context(
                    applied(settings, self._store.worker, self.give_thread_back)
                )
                self._settings = settings
            self._runs_ranks = isinstance(action, RANKS)
            # The ranks of a block have no channels of their own.
            mail = isinstance(action, RankForward) and len(self._addresses) > 1
            call = self.resident.call
            with self._mail.call(*call) if mail else self._step_mail.during(action, *call):
                result = action.run(self._store, *inputs)
            check_picklable(result)
            return result
        except Exception:
            raise
        except BaseException as error:
            failed = exit_error(error, self._store.worker, title_of(action))
        raise failed  # with its cause

    def release(self) -> None:
        """Put torch's settings back: the program waits, and others may need other ones."""
        if self._settings is not None:
            self._settings = None
            self._applied.close()

    def send(self, peer: int, tag: Tag, value: Any) -> None:
        """Send a value to another worker's program."""
        self.channels.send(peer, tag, value)

    def unpack(self, arrived: Any) -> Any:
        """The value of what a channel delivered."""
        return self.channels.unpack(arrived)

    def forget(self, epoch: int) -> None:
        """Nobody waits any more for what was sent in earlier epochs."""
        self.channels.forget(epoch)

    def wait(self, seconds: float) -> None:
        """Wait until a value has come, or `wake` was called since the last time, or so long."""
        self.channels.wait(seconds)

    def wake(self) -> None:
        """End the program's wait."""
        self.channels.wake()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the driver; any thread may call."""
        if "error" in message and isinstance(message["error"], BaseException):
            message["error"] = remote_errors.dumps(message["error"])
        if self._driver is None:
            self._in_loop(self._outgoing.put_nowait, message)
            return
        self._pack_reports(message, None)
        self.channels.send(self._driver, DRIVER, message)

    def _pack_reports(self, message: dict[str, Any], comm: Comm | None) -> None:
        if "reports" in message:
            # What steps report may be memory that the next one writes.
            found = message["reports"]
            ranks = self._runs_ranks
            message["reports"] = serialized_if_large(found, comm) if ranks else dumps_whole(found)

    async def _write(self) -> None:
        with contextlib.suppress(OSError):  # the driver is gone, as `serve` finds
            while True:
                message = await self._outgoing.get()
                self._pack_reports(message, self._comm)
                with internals.writing_at_once(self._comm):  # all is bytes already
                    await self._comm.write(message)

    def begin(self) -> None:
        """A task begins to take steps."""
        self._gave_thread_back = False
        self.channels.attend(True)

    def end(self) -> None:
        """The task has ended."""
        self.channels.attend(False)

    def is_wanted(self) -> bool:
        """True if other tasks wait for the thread of this one."""
        return not self._gave_thread_back and internals.tasks_wait(self._worker)

    def give_thread_back(self) -> None:
        """Let the worker start another task in place of this one."""
        self._gave_thread_back = True
        give_thread_back()
