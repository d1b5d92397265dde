"""Run a call with the torch settings that it was made with, and restore those of the worker.

Some settings are per thread, others per process, in which several threads run calls. Calls that
need the same process settings run together. A call that needs others waits until these are done,
and later calls queue behind it. A call that waits for another one, in a collective or for a lock,
releases the process settings while it waits. So every call that holds them makes progress.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from taskgrad.errors import ClusterMismatchError, TaskgradError
from taskgrad.graph import torch_settings as known
from taskgrad.graph.process_settings import SETTINGS, Setting, process_values
from taskgrad.graph.torch_settings import (
    TorchSettings,
    Values,
    differing,
    inside,
    thread_settings,
    thread_values,
)
from taskgrad.worker.randomness import paused
from taskgrad.worker_names import WorkerName

# How long a call that waits for the settings keeps its thread.
_KEEP_THREAD_S = 0.005
# How long it then keeps its place in the queue. After that it may go first: a running call may be
# waiting for it by means that release no settings.
_KEEP_PLACE_S = 1.0
# How long a call that waits for a lock keeps its thread.
_KEEP_THREAD_FOR_LOCK_S = 1.0

_BY_NAME = {setting.name: setting for setting in SETTINGS}
_thread = threading.local()  # `hold` is that of the call that the thread runs


class _Gate:
    """Lets calls run together if they need the same settings of the process. Thread-safe.

    Others wait in a queue, first in, first out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._held: Values = ()
        self._queue: deque[object] = deque()

    def enter(
        self, wanted: Values, where: WorkerName, give_thread_back: Callable[[], None]
    ) -> None:
        """Return when these settings hold; they do until `leave` is called."""
        ticket = object()
        with self._changed:
            if not self._queue and (not self._running or self._held == wanted):
                self._start(wanted, where)
                return
            self._queue.append(ticket)
        try:
            if not self._take(wanted, where, ticket, _KEEP_THREAD_S):
                give_thread_back()
                if not self._take(wanted, where, ticket, _KEEP_PLACE_S):
                    self._take(wanted, where, None, None)
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def leave(self) -> None:
        """One call is done; the last of them restores the settings."""
        with self._changed:
            self._running -= 1
            if not self._running:
                _put_back()
            self._changed.notify_all()

    def _take(
        self, wanted: Values, where: WorkerName, ticket: object | None, seconds: float | None
    ) -> bool:
        """Apply the settings, if possible within this time: in queue order if given a ticket."""

        def is_open() -> bool:
            fits = not self._running or self._held == wanted
            return fits and (ticket is None or self._queue[0] is ticket)

        with self._changed:
            if not self._changed.wait_for(is_open, seconds):
                return False
            self._start(wanted, where)
            return True

    def _start(self, wanted: Values, where: WorkerName) -> None:
        if not self._running:
            _put(wanted, where)
            self._held = wanted
        self._running += 1


_gate = _Gate()


def _put(wanted: Values, where: WorkerName) -> None:
    """Change the settings that differ from these values; raise if one cannot be set."""
    values = dict(wanted)
    missing = next((name for name in values if name not in _BY_NAME), None)
    if missing is not None:
        raise ClusterMismatchError(
            f"this call was made with {missing} = {values[missing]!r}, which torch "
            f"{torch.__version__} of worker {where} does not have. Use the same torch everywhere, "
            "or leave it as it was"
        )
    for setting, now in zip(SETTINGS, process_values(), strict=True):
        value = values.get(setting.name, setting.start)
        if value != now:
            try:
                _change(setting, now, value)
            except Exception as error:
                _put_back()
                raise TaskgradError(
                    f"this call was made with {setting.name} = {value!r}, which worker {where} "
                    f"refuses ({type(error).__name__}: {error}). Leave it as it was, or run the "
                    "call where it can be set"
                ) from error


def _change(setting: Setting, now: Any, value: Any) -> None:
    # Recorded first: another thread that reads it meanwhile finds the old value or the new one.
    known.replaced = {**known.replaced, setting.name: (now, value)}
    setting.set(value)
    known.replaced = {**known.replaced, setting.name: (now, setting.get())}


def _put_back() -> None:
    """Undo all changes, but for settings that other code has changed since."""
    for name, (before, value) in known.replaced.items():
        setting = _BY_NAME[name]
        if setting.get() == value:
            setting.set(before)
    known.replaced = {}


class _Hold:
    """One call's hold on the settings of the process."""

    def __init__(self, where: WorkerName, give_thread_back: Callable[[], None]) -> None:
        self._where = where
        self._give_thread_back = give_thread_back
        self._entered = False

    def enter(self, wanted: Values) -> None:
        _gate.enter(wanted, self._where, self._give_thread_back)
        self._entered = True

    def leave(self) -> None:
        if self._entered:
            self._entered = False
            _gate.leave()


class applied:
    """Run a call with its settings; a call that has to wait for them first returns its thread.

    Raises ClusterMismatchError if this worker's torch lacks one of the settings; TaskgradError if a
    setting cannot be applied here: there is no such device, for example.
    """

    __slots__ = ("_hold", "_of_thread", "_settings", "_token", "_where")

    def __init__(
        self, settings: TorchSettings, where: WorkerName, give_thread_back: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._where = where
        self._hold = _Hold(where, give_thread_back)

    def __enter__(self) -> None:
        self._hold.enter(self._settings.process)
        self._token = inside.set(True)
        _thread.hold = self._hold
        try:
            self._of_thread = in_thread(self._settings, self._where)
            self._of_thread.__enter__()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._of_thread.__exit__(*error)
        finally:
            self._leave()

    def _leave(self) -> None:
        _thread.hold = None
        inside.reset(self._token)
        self._hold.leave()


@contextmanager
def settings_released() -> Iterator[None]:
    """Release the settings of the process, and the random stream, while this thread waits."""
    hold: _Hold | None = getattr(_thread, "hold", None)
    with paused():
        if hold is None:
            yield
            return
        own = differing(process_values())
        _thread.hold = None
        hold.leave()
        try:
            yield
        finally:
            hold.enter(own)
            _thread.hold = hold


class YieldingLock:
    """A lock, reentrant or not; a thread that waits for it lets others run meanwhile.

    It releases the settings of the process at once and, when it has waited long, calls
    `give_thread_back`: what holds the lock may wait for tasks that are to run in that thread.
    """

    __slots__ = ("_give_thread_back", "_lock")

    def __init__(
        self, give_thread_back: Callable[[], None] = lambda: None, *, reentrant: bool = True
    ) -> None:
        self._lock: Any = threading.RLock() if reentrant else threading.Lock()
        self._give_thread_back = give_thread_back

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; False if another thread has it and `blocking` is False."""
        if self._lock.acquire(blocking=False):
            return True
        if not blocking:
            return False
        with settings_released():
            if not self._lock.acquire(timeout=_KEEP_THREAD_FOR_LOCK_S):
                self._give_thread_back()
                self._lock.acquire()
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> None:
        if not self._lock.acquire(False):
            self.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class JointLock:
    """Several locks as one. All threads take them in the order in which they are given here."""

    __slots__ = ("_locks",)

    def __init__(self, locks: Sequence[YieldingLock]) -> None:
        self._locks = tuple(locks)

    def acquire(self, blocking: bool = True) -> bool:
        """Take all locks; False if another thread has one of them and `blocking` is False."""
        taken: list[YieldingLock] = []
        try:
            for lock in self._locks:
                if not lock.acquire(blocking):
                    break
                taken.append(lock)
            else:
                taken = []
                return True
        finally:
            for lock in reversed(taken):
                lock.release()
        return False

    def release(self) -> None:
        """Release all locks."""
        for lock in reversed(self._locks):
            lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def in_thread(settings: TorchSettings, where: WorkerName) -> AbstractContextManager[None]:
    """Apply those settings that belong to a thread in this one."""
    if settings.of_thread == thread_values():
        return nullcontext()
    return _in_thread(settings, where)


@contextmanager
def _in_thread(settings: TorchSettings, where: WorkerName) -> Iterator[None]:
    now = thread_settings()
    with ExitStack() as stack:
        if settings.grad != now.grad:
            stack.enter_context(torch.set_grad_enabled(settings.grad))
        if settings.device != now.device:
            stack.enter_context(_default_device(settings.device or "cpu", where))
        if (settings.autocast, settings.autocast_cache) != (now.autocast, now.autocast_cache):
            stack.enter_context(_autocast(settings, now))
        if settings.flush_denormal != now.flush_denormal:
            if not torch.set_flush_denormal(settings.flush_denormal):
                raise TaskgradError(
                    "this call was made with torch.set_flush_denormal(True), which the processor "
                    f"of worker {where} cannot do. Leave it False"
                )
            stack.callback(torch.set_flush_denormal, now.flush_denormal)
        yield


def _default_device(name: str, where: WorkerName) -> torch.device:
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise TaskgradError(
            f"the default device where this call was made is {name}, and worker {where} has none "
            f"({type(error).__name__}: {error}). Make the call in "
            'torch.device("cpu"), or run it on workers that have one'
        ) from error
    return device


@contextmanager
def _autocast(settings: TorchSettings, now: TorchSettings) -> Iterator[None]:
    wanted = {kind: (on, dtype) for kind, on, dtype in settings.autocast}
    kinds = {*wanted, *(kind for kind, _, _ in now.autocast)}
    before = {k: (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds}
    torch.autocast_increment_nesting()
    torch.set_autocast_cache_enabled(settings.autocast_cache)
    _set_autocast({k: wanted.get(k, (False, known.AUTOCAST_DTYPES[k])) for k in kinds})
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(now.autocast_cache)
        _set_autocast(before)


def _set_autocast(regions: dict[str, tuple[bool, torch.dtype]]) -> None:
    for kind, (on, dtype) in regions.items():
        torch.set_autocast_enabled(kind, on)
        torch.set_autocast_dtype(kind, dtype)
