"""Send exceptions from one process to another.

Pickle drops an exception's cause, context and traceback, and cannot rebuild exceptions whose
``__init__`` takes other arguments than their ``args``. Dask replaces these, and those with a long
text, by a bare ``Exception``. Here every exception of a chain is pickled separately and joined to
the others on arrival. It keeps its type, attributes, notes, cause and context, and the first and
last frames of its traceback. Parts that are large or cannot be pickled are replaced by their text.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import torch
from tblib import Traceback

from taskgrad.errors import TaskgradError, TravelError

# Limits in characters: of a text within a message, of a traceback's text, of any other text. Dask
# itself cuts messages of more than 10,000 characters.
_SHORT_TEXT = 1500
_LONGEST_TRACEBACK = 4000
_LONGEST_TEXT = 8000
# Limit in bytes of one exception with all its attributes: errors pass through the scheduler.
_MOST_BYTES = 1 << 20
# Limits of exceptions in a chain, of notes, and of frames at the start and end of a traceback.
_MOST_ERRORS = 50
_MOST_NOTES = 50
_FIRST_FRAMES, _LAST_FRAMES = 10, 40
_HERE = str(Path(__file__).parent) + os.sep
# The attribute in which an unpickled exception keeps the others until it is joined to them.
_UNPACKING = "_taskgrad_unpacking"


class RemoteError(Exception):
    """A task raises this instead of its own exception; it is unpickled as that exception."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(text_of(error))
        self._pickled = dumps(error)

    def __reduce__(self) -> Any:
        # The last function runs after tblib's, by which Dask pickles exceptions, has set the cause.
        return _first_of, (self._pickled,), True, None, None, _join

    def __repr__(self) -> str:
        return str(self)


def dumps(error: BaseException) -> bytes:
    """An exception and all that it is chained to, as bytes. This never raises."""
    return pickle.dumps(_Packing(error).records)


def loads(data: bytes) -> BaseException:
    """Undo `dumps`. An exception whose class cannot be imported is a TravelError with its text."""
    error = _first_of(data)
    _join(error)
    return error


def is_portable(error: BaseException) -> bool:
    """True if an exception can be pickled and unpickled whole, by its own ``__reduce__``."""
    return _Packing(error).records[0].is_whole


def shorten(text: str, most: int = _SHORT_TEXT) -> str:
    """A text of at most about so many characters: its start and its end."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def message_of(error: BaseException) -> str:
    """The text of an exception, shortened, for use in another message."""
    try:
        return shorten(str(error))
    except BaseException as trouble:
        return f"<its __str__ raised {type(trouble).__name__}>"


def text_of(error: BaseException) -> str:
    """An exception's type and text, as in the last line of a traceback."""
    kind = type(error)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    message = message_of(error)
    return f"{module}{kind.__qualname__}: {message}" if message else f"{module}{kind.__qualname__}"


def own_frames(error: BaseException) -> str:
    """The frames of a traceback as text, without the first one, which is taskgrad's."""
    frames = [(file, line, name, None) for file, line, name in _frames(error)[1:]]
    return "".join(traceback.format_list(frames))[-_LONGEST_TRACEBACK:].rstrip()


_Frame = tuple[str, int, str]


class _Record(NamedTuple):
    """One exception; other exceptions by their numbers."""

    pickled: bytes | None
    text: str
    is_whole: bool
    notes: tuple[str, ...]
    frames: tuple[_Frame, ...]
    cause: int | None
    context: int | None
    suppress_context: bool


class _Packing:
    """The records of an exception and of those it is chained to, or has in its attributes."""

    def __init__(self, error: BaseException) -> None:
        self._errors: list[BaseException] = []
        self._numbers: dict[int, int] = {}
        self.records: list[_Record] = []
        self.number(error)
        while len(self.records) < len(self._errors):
            self.records.append(self._record(self._errors[len(self.records)]))

    def number(self, error: BaseException | None) -> int | None:
        """The number of an exception; None if there are too many."""
        if error is None or (id(error) not in self._numbers and len(self._errors) == _MOST_ERRORS):
            return None
        if id(error) not in self._numbers:
            self._numbers[id(error)] = len(self._errors)
            self._errors.append(error)
        return self._numbers[id(error)]

    def _record(self, error: BaseException) -> _Record:
        pickled, is_whole = self._pickled(error)
        return _Record(
            pickled,
            text_of(error),
            is_whole,
            tuple(_notes(error)),
            tuple(_sent_frames(error)),
            self.number(error.__cause__),
            self.number(error.__context__),
            error.__suppress_context__,
        )

    def _pickled(self, error: BaseException) -> tuple[bytes | None, bool]:
        """Its pickle, and whether its own ``__reduce__`` keeps all of it, apart from its size."""
        is_large = isinstance(error, TaskgradError) and len(str(error)) > _LONGEST_TEXT
        ways: list[Callable[[BaseException], Any]] = [_own_reduction, self._plain_reduction]
        forgets = type(error).__reduce__ is BaseException.__reduce__ and any(_slots(error))
        if forgets:
            ways = ways[1:]
        for way in ways[is_large:]:
            try:
                data = self._dump(error, way(error))
                again = _load(data, self._other)
                kinds = {(type(e).__module__, type(e).__qualname__) for e in (again, error)}
                if len(kinds) == 1 and (is_large or message_of(again) == message_of(error)):
                    return data, is_large or forgets or way is _own_reduction
            except _TooLarge:
                is_large = True
            except BaseException:  # it is the user's code that runs here
                continue
        return None, False

    def _other(self, number: Any) -> BaseException:
        return self._errors[number] if isinstance(number, int) else TravelError(str(number))

    def _dump(self, value: Any, reduction: Any = None) -> bytes:
        file = _Limited()
        _Pickler(file, value, reduction, self).dump(value)
        return file.getvalue()

    def _plain_reduction(self, error: BaseException) -> Any:
        """A reduction to arguments and attributes, without `__init__` and its own `__reduce__`."""
        state = {name: self._plain(value) for name, value in _attributes(error)}
        return _rebuild, (type(error), tuple(map(self._plain, error.args)), state)

    def _plain(self, value: Any) -> Any:
        """A value, if it can be pickled; else its text."""
        if isinstance(value, str):
            return shorten(value, _LONGEST_TEXT)
        try:
            _load(self._dump(value), self._other)
            return value
        except BaseException:
            return _described(value)


class _Pickler(cloudpickle.Pickler):
    """Pickles one exception by this reduction, or a value; other exceptions by their numbers."""

    def __init__(self, file: Any, root: Any, reduction: Any, packing: _Packing) -> None:
        super().__init__(file)
        self._root = root
        self._reduction = reduction
        self._packing = packing

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, BaseException) or (obj is self._root and self._reduction):
            return None
        number = self._packing.number(obj)
        return text_of(obj) if number is None else number

    def reducer_override(self, obj: Any) -> Any:
        if obj is self._root and self._reduction:
            return self._reduction
        if isinstance(obj, torch.Tensor) and obj.layout is torch.strided:
            if obj.nbytes > _MOST_BYTES:
                raise _TooLarge
            if type(obj) is torch.Tensor and obj.untyped_storage().nbytes() > obj.nbytes:
                return obj.detach().clone().__reduce_ex__(2)
        return super().reducer_override(obj)


class _TooLarge(Exception):
    """More bytes than an exception may have."""


class _Limited(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _MOST_BYTES:
            raise _TooLarge
        return super().write(data)


def _load(data: bytes, other: Callable[[Any], BaseException]) -> Any:
    unpickler = pickle.Unpickler(io.BytesIO(data))
    unpickler.persistent_load = other  # type: ignore[method-assign]
    return unpickler.load()


def _own_reduction(error: BaseException) -> Any:
    reduction = error.__reduce_ex__(4)
    if not isinstance(reduction, tuple):
        raise pickle.PicklingError("__reduce__ returned no tuple")
    return reduction


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    try:
        error = kind.__new__(kind, *args)
    except Exception:
        error = kind.__new__(kind)
    error.args = args
    for name, value in state.items():
        with contextlib.suppress(Exception):
            BaseException.__setattr__(error, name, value)
    return error


def _attributes(error: BaseException) -> Iterator[tuple[str, Any]]:
    yield from ((n, v) for n, v in vars(error).items() if n != "__notes__")
    yield from ((n, getattr(error, n)) for n in _slots(error))


def _slots(error: BaseException) -> Iterator[str]:
    for kind in type(error).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        yield from (n for n in names if n != "__dict__" and hasattr(error, n))


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    try:
        return shorten(repr(value))
    except BaseException:
        return f"a {type(value).__name__}"


def _notes(error: BaseException) -> list[str]:
    found = vars(error).get("__notes__", ())
    found = found if isinstance(found, list | tuple) else ()
    return [shorten(n, _LONGEST_TEXT) for n in found[:_MOST_NOTES] if isinstance(n, str)]


def _frames(error: BaseException) -> list[_Frame]:
    at = error.__traceback__
    found = []
    while at is not None:
        code = at.tb_frame.f_code
        found.append((code.co_filename, at.tb_lineno or 0, code.co_name))
        at = at.tb_next
    left_out = len(found) - _FIRST_FRAMES - _LAST_FRAMES
    if left_out > 0:
        found[_FIRST_FRAMES:-_LAST_FRAMES] = []
    return found


def _sent_frames(error: BaseException) -> list[_Frame]:
    """The frames to send. Those of taskgrad itself say nothing more than the text of its errors."""
    frames = _frames(error)
    return [f for f in frames if not (isinstance(error, TaskgradError) and f[0].startswith(_HERE))]


def _first_of(data: bytes) -> BaseException:
    unpacking = _Unpacking(pickle.loads(data))
    error = unpacking.make(0)
    vars(error)[_UNPACKING] = unpacking
    return error


def _join(error: BaseException, state: Any = None) -> None:
    vars(error).pop(_UNPACKING).join()


class _Unpacking:
    def __init__(self, records: list[_Record]) -> None:
        self._records = records
        self._made: dict[int, BaseException] = {}

    def make(self, number: Any) -> BaseException:
        """The exception of this number, or a stand-in with its text, joined to no other."""
        if not isinstance(number, int):
            return TravelError(str(number))
        if number not in self._made:
            record = self._records[number]
            stands_in = self._made[number] = TravelError(
                "this exception could not be sent to another process. It was:\n" + record.text
            )
            if record.pickled is not None:
                try:
                    self._made[number] = _load(record.pickled, self.make)
                except BaseException as trouble:
                    stands_in.add_note(f"It could not be unpickled: {text_of(trouble)}")
        return self._made[number]

    def join(self) -> None:
        """Give all exceptions their causes, contexts, notes and frames."""
        for number, record in enumerate(self._records):
            error = self.make(number)
            error.__cause__ = self._other(record.cause)
            error.__context__ = self._other(record.context)
            error.__suppress_context__ = record.suppress_context
            error.__traceback__ = _traceback(record.frames)
            if record.notes:
                error.__notes__ = list(record.notes)

    def _other(self, number: int | None) -> BaseException | None:
        return None if number is None else self.make(number)


def _traceback(frames: tuple[_Frame, ...]) -> Any:
    found: dict[str, Any] | None = None
    for filename, line, name in reversed(frames):
        code = {"co_filename": filename, "co_name": name}
        frame = {"f_code": code, "f_globals": {}, "f_locals": {}, "f_lineno": line}
        found = {"tb_frame": frame, "tb_lineno": line, "tb_next": found}
    return None if found is None else Traceback.from_dict(found).as_traceback()
