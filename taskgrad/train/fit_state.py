"""Where a call of `Trainer.fit` is: its epoch, its batches so far; as a checkpoint has it."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from taskgrad.train.loss import StepLoss

# As many of the last batches are remembered; at most three of them are not trained on yet.
_REMEMBERED = 8


@dataclass
class EpochMean:
    """The mean loss of batches: over samples, unless it is a sum over them (`weighted` is False).

    Of batches whose number of samples is not known each counts the same. Where losses have weights,
    the sums of these take the place of numbers of samples.
    """

    weighted: bool
    weighted_sum: float = 0.0
    samples: float = 0
    plain_sum: float = 0.0
    batches: int = 0
    sizes_known: bool = True

    def add(self, loss: float, size: float | None) -> None:
        """One more batch, of so many samples or of this weight."""
        self.weighted_sum += loss * (size or 0)
        self.samples += size or 0
        self.plain_sum += loss
        self.batches += 1
        self.sizes_known = self.sizes_known and size is not None

    @property
    def value(self) -> float:
        """The mean."""
        if not self.sizes_known:
            return self.plain_sum / self.batches
        return (self.weighted_sum if self.weighted else self.plain_sum) / self.samples


class _Drawn(NamedTuple):
    """A batch that the loader yielded, and the loader's own state then, if it has one."""

    number: int
    checksum: int | None
    loader: Any


_NONE_DRAWN = _Drawn(-1, None, None)


@dataclass
class FitState:
    """The state of a call of `Trainer.fit`.

    Attributes
    ----------
    first
        The number of the first step of this call in the epoch that runs, or that is next.
    epoch
        This epoch.
    skipped
        How many batches of this epoch were trained on before the fit was resumed.
    mean
        The mean loss of this epoch's batches, but those whose losses are in `waiting`.
    history
        The results of the epochs so far.
    random
        The random states at the beginning of this epoch; None between epochs.
    stopped
        True once the fit is to end.
    """

    mean: EpochMean
    first: int
    epoch: int = 0
    skipped: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    random: dict[str, Any] | None = None
    stopped: bool = False
    waiting: deque[StepLoss] = field(default_factory=deque)
    _resumed_at: _Drawn = _NONE_DRAWN
    _steps: list[int] = field(default_factory=list)  # the numbers of this epoch's steps
    _drawn: deque[_Drawn] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def drew(self, checksum: int | None, loader: Any) -> None:
        """The loader yielded one more batch."""
        number = self._drawn[-1].number + 1 if self._drawn else self.skipped
        self._drawn.append(_Drawn(number, checksum, loader))

    def submitted(self, loss: StepLoss) -> None:
        """A step was submitted on the last batch."""
        self.waiting.append(loss)
        self._steps.append(loss.step)

    def drop(self, losses: Iterable[StepLoss]) -> None:
        """These steps were submitted, and will not be taken."""
        dropped = set(map(id, losses))
        self.waiting = deque(loss for loss in self.waiting if id(loss) not in dropped)

    def next_epoch(self, results: dict[str, float]) -> None:
        """This epoch is over."""
        self.history = [*self.history, results]
        self.mean = EpochMean(self.mean.weighted)
        self.first = self._steps[-1] + 1 if self._steps else self.first
        self.epoch += 1
        self.skipped = 0
        self.random = None
        self._steps.clear()
        self._drawn.clear()

    def covers(self, taken: int) -> bool:
        """True if this is the state after so many steps: none was taken before or since."""
        return self.first <= taken <= (self._steps[-1] + 1 if self._steps else self.first)

    def saved(self, taken: int, random: dict[str, Any]) -> dict[str, Any]:
        """This as a checkpoint has it, in plain values and tensors, after so many steps.

        `random` are the random states at the beginning of the epoch.
        """
        batch = self.skipped + bisect_left(self._steps, taken)
        mean = replace(self.mean)
        for loss in self.waiting:
            if loss.done and loss.step < taken:
                mean.add(loss.item(), loss.weight)
        last = next((d for d in self._drawn if d.number == batch - 1), self._resumed_at)
        return {
            "epoch": self.epoch,
            "batch": batch,
            "mean": asdict(mean),
            "history": [dict(results) for results in self.history],
            "random": random,
            "checksum": last.checksum,
            "loader": last.loader,
        }

    @staticmethod
    def restored(saved: Mapping[str, Any], taken: int) -> FitState:
        """Inverse of `saved`."""
        last = _Drawn(saved["batch"] - 1, saved["checksum"], saved["loader"])
        return FitState(
            mean=EpochMean(**saved["mean"]),
            first=taken,
            epoch=saved["epoch"],
            skipped=saved["batch"],
            history=[dict(results) for results in saved["history"]],
            random=saved["random"],
            _resumed_at=last,
        )
