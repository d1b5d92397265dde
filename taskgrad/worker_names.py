"""How messages, tables and drawings name a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkerName:
    """A worker: the address of its process, and the name that it was started with.

    Examples
    --------
    >>> print(WorkerName("tcp://10.0.0.7:4040", "left"))
    left (tcp://10.0.0.7:4040)
    >>> print(WorkerName("tcp://10.0.0.7:4040"))  # a worker without a name of its own
    tcp://10.0.0.7:4040
    """

    address: str
    name: Any = None

    @property
    def short(self) -> str:
        """The name; the address if it has none of its own."""
        return self.address if self.name is None else str(self.name)

    def __str__(self) -> str:
        return self.address if self.short == self.address else f"{self.short} ({self.address})"
