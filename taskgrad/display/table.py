"""Tables of plain rows that print well: where layers are, what workers hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from html import escape
from typing import Any, Generic, TypeVar, overload

Row = TypeVar("Row")


@dataclass(frozen=True)
class PlacementRow:
    """One layer: where it is, its number of parameters, and the bytes of those and its buffers."""

    layer: str
    kind: str
    worker: str
    device: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class MemoryRow:
    """Bytes that a chain holds on one worker, by what holds them."""

    worker: str
    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    tapes: int


class Table(Sequence[Row], Generic[Row]):
    """Rows of one dataclass; a sequence of them that prints as a table.

    Examples
    --------
    >>> print(Table(MemoryRow, [MemoryRow("w", 1000, 0, 1000, 2000, 64)]))
    worker  parameters  buffers  gradients  optimizer  tapes
    ------  ----------  -------  ---------  ---------  -----
    w            1,000        0      1,000      2,000     64
    """

    def __init__(self, kind: type[Row], rows: Sequence[Row]) -> None:
        self._heading = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        self._rows = tuple(rows)

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
        return [
            [f"{v:,}" if isinstance(v, int) else str(v) for v in astuple(row)]  # type: ignore[call-overload]
            for row in self._rows
        ]

    def __repr__(self) -> str:
        cells = self._cells()
        columns = list(zip(self._heading, *cells, strict=True))
        widths = [max(map(len, column)) for column in columns]
        numeric = [all(isinstance(getattr(r, h), int) for r in self._rows) for h in self._heading]

        def line(row: Sequence[str]) -> str:
            padded = [
                c.rjust(w) if right else c.ljust(w)
                for c, w, right in zip(row, widths, numeric, strict=True)
            ]
            return "  ".join(padded)

        return "\n".join([line(self._heading), line(["-" * w for w in widths]), *map(line, cells)])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(c)}</th>" for c in self._heading)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in self._cells()
        )
        return f"<table><tr>{head}</tr>{rows}</table>"
