"""The table of which layer is where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from html import escape
from typing import overload


@dataclass(frozen=True)
class PlacementRow:
    """One layer: where it is, its number of parameters, and the bytes of those and its buffers."""

    layer: str
    kind: str
    worker: str
    device: str
    parameters: int
    bytes: int


class Placement(Sequence[PlacementRow]):
    """Rows of (layer, kind, worker, device, parameters, bytes), one a layer; prints as a table."""

    def __init__(self, rows: Sequence[PlacementRow]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> PlacementRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PlacementRow]: ...
    def __getitem__(self, index: int | slice) -> PlacementRow | Sequence[PlacementRow]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[PlacementRow]:
        return iter(self._rows)

    @property
    def workers(self) -> list[str]:
        """The address of each layer's worker."""
        return [row.worker for row in self._rows]

    def _cells(self) -> list[list[str]]:
        heading = [f.name for f in fields(PlacementRow)]
        body = [[f"{v:,}" if isinstance(v, int) else v for v in astuple(r)] for r in self._rows]
        return [heading, *body]

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            text = [c.ljust(w) for c, w in zip(row[:4], widths[:4], strict=True)]
            numbers = [c.rjust(w) for c, w in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join(text + numbers))
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heading, *body = self._cells()
        head = "".join(f"<th>{escape(c)}</th>" for c in heading)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in r)}</tr>" for r in body)
        return f"<table><tr>{head}</tr>{rows}</table>"
