"""taskgrad's settings, and whose of them hold on a cluster.

The settings live in Dask's own configuration; ``taskgrad.yaml`` beside this file has the defaults
and says what each is for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dask
from dask.utils import parse_timedelta

[_defaults] = dask.config.collect_yaml([str(Path(__file__).with_name("taskgrad.yaml"))])
dask.config.update_defaults(_defaults)


@dataclass(frozen=True)
class Settings:
    """What somebody wants changed on a cluster; by default nothing."""

    latency: float | None = None
    """Seconds for which messages are collected; None leaves it to Dask."""
    allocator: bool = False
    """Whether workers keep the memory that they free."""
    cross_memory: bool = False
    """Whether workers of one host read large tensors from each other's memory."""
    pause: float | None = None
    """From which part of its memory limit on a worker is paused; None leaves it to Dask."""
    profile: float | None = None
    """Seconds between two samples of a worker's profiler, at least; None leaves it to Dask."""
    tick: float | None = None
    """Seconds between two looks of an event loop at itself, at least; None leaves it to Dask."""

    @classmethod
    def from_config(cls) -> Settings:
        """The settings of this process.

        Raises
        ------
        ValueError
            A setting makes no sense; the message names it.
        """
        fast = _flag("taskgrad.latency.enabled")
        return cls(
            latency=_duration("taskgrad.latency.interval") if fast else None,
            allocator=_flag("taskgrad.allocator.enabled"),
            cross_memory=_flag("taskgrad.cross-memory.enabled"),
            pause=_fraction("taskgrad.pause"),
            profile=_duration("taskgrad.profile") if _get("taskgrad.profile") else None,
            tick=_duration("taskgrad.tick") if _get("taskgrad.tick") else None,
        )

    def message(self) -> dict[str, Any]:
        """As plain data for a message; ``Settings(**message)`` is the same settings again."""
        return asdict(self)


class Users:
    """Who uses taskgrad on a scheduler, by client id, and what they want there together.

    Only what the scheduler itself sees decides who is a user: a client joins with a message and
    leaves when its connection is gone. So a driver that was killed leaves like any other.
    """

    def __init__(self) -> None:
        self._wishes: dict[str, Settings] = {}

    def join(self, client: str, settings: Settings) -> None:
        """Count this client; if it is counted already, with these settings from now on."""
        self._wishes[client] = settings

    def leave(self, client: str) -> bool:
        """Count this client no more; returns whether it was."""
        return self._wishes.pop(client, None) is not None

    def __len__(self) -> int:
        return len(self._wishes)

    @property
    def settings(self) -> Settings:
        """What holds now; with no users, nothing is changed."""
        return together(self._wishes.values())


def together(wishes: Iterable[Settings]) -> Settings:
    """All of these at once: what any wants, and the shortest interval."""
    wishes = list(wishes)
    return Settings(
        latency=min((w.latency for w in wishes if w.latency is not None), default=None),
        allocator=any(w.allocator for w in wishes),
        cross_memory=any(w.cross_memory for w in wishes),
        pause=max((w.pause for w in wishes if w.pause is not None), default=None),
        profile=max((w.profile for w in wishes if w.profile is not None), default=None),
        tick=max((w.tick for w in wishes if w.tick is not None), default=None),
    )


def _get(key: str) -> Any:
    # Not from Dask alone: leaving a `with dask.config.set(...)` in which this module was imported
    # sets back what was there before, which was nothing.
    return dask.config.get(key, default=dask.config.get(key, config=_defaults))


def _flag(key: str) -> bool:
    value = _get(key)
    if not isinstance(value, bool):
        raise ValueError(f"the Dask setting {key!r} is true or false; got {value!r}")
    return value


def deadline(name: str) -> float:
    """How many seconds the setting ``taskgrad.<name>-deadline`` allows."""
    return _duration(f"taskgrad.{name}-deadline", unit="s")


def _fraction(key: str) -> float | None:
    value = _get(key)
    if value is None or value is False:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"the Dask setting {key!r} is a number up to 1, or false; got {value!r}")
    return float(value)


def _duration(key: str, unit: str = "ms") -> float:
    value = _get(key)
    try:
        seconds = float(parse_timedelta(value, default=unit))
    except (TypeError, ValueError, KeyError):
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"the Dask setting {key!r} is a duration, such as '2ms'; got {value!r}")
    return seconds
