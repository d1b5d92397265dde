"""Driver, scheduler, worker: taskgrad's settings in Dask's configuration; which hold on a cluster.

``taskgrad.yaml`` in this directory has the defaults and says what each is for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dask
from dask.utils import parse_timedelta

[_defaults] = dask.config.collect_yaml([str(Path(__file__).with_name("taskgrad.yaml"))])
dask.config.update_defaults(_defaults)


@dataclass(frozen=True)
class Settings:
    """What one client wants changed on a cluster; None leaves a setting to Dask."""

    latency: float | None = None  # seconds for which streams collect messages
    allocator: bool = False  # workers keep freed memory
    cross_memory: bool = False  # workers of one host read large tensors from each other's memory
    pause: float | None = None  # fraction of the memory limit at which a worker is paused
    profile: float | None = None  # seconds between two samples of a worker's profiler, at least
    tick: float | None = None  # seconds between an event loop's checks for delays, at least

    @classmethod
    def from_config(cls) -> Settings:
        """The settings of this process; ValueError names one that has no valid value."""
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


def merge(settings: Collection[Settings]) -> Settings:
    """Settings that satisfy all of these: the shortest latency, the highest lower bounds."""
    return Settings(
        latency=min((s.latency for s in settings if s.latency is not None), default=None),
        allocator=any(s.allocator for s in settings),
        cross_memory=any(s.cross_memory for s in settings),
        pause=max((s.pause for s in settings if s.pause is not None), default=None),
        profile=max((s.profile for s in settings if s.profile is not None), default=None),
        tick=max((s.tick for s in settings if s.tick is not None), default=None),
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


def device_groups() -> bool:
    """True if workers may form process groups for values that are on devices."""
    return _flag("taskgrad.nccl.enabled")


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
