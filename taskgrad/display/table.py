"""Tables of plain rows that print well: where layers are, what workers hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from typing import Any, Generic, TypeVar, overload

from taskgrad.worker_names import WorkerName

Row = TypeVar("Row")

# A field that is printed beside the address of the worker, and is no column of its own.
_BESIDE_WORKER = {"beside": "worker"}


@dataclass(frozen=True)
class PlacementRow:
    """One layer: where it is, and what it takes.

    Attributes
    ----------
    layer, kind : str
        Its name in the model, and its class.
    worker, device : str
        The address of its worker, and the torch device there.
    parameters, bytes : int
        The number of its parameters, and the bytes of those and its buffers.
    activations : int or None
        Bytes that a backward keeps of a nominal batch, estimated; None for a placement that the
        user gave, which needs no estimate.
    share : float
        Of the model's `bytes` and `activations` together, from 0 to 1.
    worker_name
        The name that the worker was started with.
    """

    layer: str
    kind: str
    worker: str
    device: str
    parameters: int
    bytes: int
    activations: int | None = None
    share: float = 0.0
    worker_name: Any = field(default=None, metadata=_BESIDE_WORKER)


@dataclass(frozen=True)
class MemoryRow:
    """Bytes that a chain holds on one worker, by what holds them.

    `device_used` are the bytes in use on its device by all processes, without what torch keeps
    there for later; `device_total` are those that it has. Both are None where that is the CPU.
    """

    worker: str
    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    tapes: int
    device_used: int | None = None
    device_total: int | None = None
    worker_name: Any = field(default=None, metadata=_BESIDE_WORKER)


class Table(Sequence[Row], Generic[Row]):
    """Rows of one dataclass; a sequence of them that prints as a table.

    A fraction prints as a percentage, a worker's address with its name. A column of which no row
    has a value is left out. `note` is a line below the table.

    Examples
    --------
    >>> print(Table(MemoryRow, [MemoryRow("w", 1000, 0, 1000, 2000, 64)]))
    worker  parameters  buffers  gradients  optimizer  tapes
    ------  ----------  -------  ---------  ---------  -----
    w            1,000        0      1,000      2,000     64
    """

    def __init__(self, kind: type[Row], rows: Sequence[Row], note: str = "") -> None:
        columns = [f for f in fields(kind) if not f.metadata]  # type: ignore[arg-type]
        self._rows = tuple(rows)
        self._heading = [
            f.name for f in columns if any(getattr(row, f.name) is not None for row in rows)
        ]
        self.note = note

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def column(self, name: str) -> list[Any]:
        """One value of every row."""
        return [getattr(row, name) for row in self._rows]

    def _cells(self) -> list[list[str]]:
        return [[_cell(row, name) for name in self._heading] for row in self._rows]

    def __repr__(self) -> str:
        cells = self._cells()
        columns = list(zip(self._heading, *cells, strict=True))
        widths = [max(map(len, column)) for column in columns]
        numeric = [
            all(isinstance(getattr(row, name), int | float) for row in self._rows)
            for name in self._heading
        ]

        def line(row: Sequence[str]) -> str:
            padded = [
                c.rjust(w) if right else c.ljust(w)
                for c, w, right in zip(row, widths, numeric, strict=True)
            ]
            return "  ".join(padded)

        lines = [line(self._heading), line(["-" * w for w in widths]), *map(line, cells)]
        return "\n".join([*lines, self.note] if self.note else lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(c)}</th>" for c in self._heading)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in self._cells()
        )
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f"<table><tr>{head}</tr>{rows}</table>{note}"


def _cell(row: Any, name: str) -> str:
    value = getattr(row, name)
    if name == "worker":
        return str(WorkerName(value, row.worker_name))
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
