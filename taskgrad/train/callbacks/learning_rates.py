"""Keep the learning rates of all steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from taskgrad.train.callbacks.base import Callback
from taskgrad.train.loss import StepLoss


class LearningRateMonitor(Callback):
    """Keeps the learning rates of all steps, also when a training is restored.

    Attributes
    ----------
    steps : list of int
        The numbers of the steps.
    rates : dict of str to list of float
        For each group of parameters, named by its pattern in `param_groups` or ``"default"``, the
        learning rate of each of the steps; NaN in steps that had no such group.

    Examples
    --------
    >>> import functools, torch, taskgrad as tg
    >>> from torch.optim.lr_scheduler import StepLR
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
    >>> monitor = tg.LearningRateMonitor()
    >>> trainer = tg.Trainer(
    ...     chain,
    ...     torch.nn.functional.mse_loss,
    ...     functools.partial(torch.optim.SGD, lr=0.5),
    ...     lr_scheduler=functools.partial(StepLR, step_size=1, gamma=0.5),
    ...     callbacks=[monitor],
    ... )
    >>> history = trainer.fit([(torch.ones(4, 2), torch.zeros(4, 1))], epochs=3, progress=False)
    >>> monitor.steps, monitor.rates["default"]  # for plt.plot(steps, rates)
    ([0, 1, 2], [0.5, 0.25, 0.125])
    >>> client.close()
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rates: dict[str, list[float]] = {}

    def on_step(self, trainer: Any, loss: StepLoss) -> None:
        """Keep the learning rates of this step."""
        while self.steps and self.steps[-1] >= loss.step:  # of another training
            self.steps.pop()
            for values in self.rates.values():
                values.pop()
        if not self.steps:
            self.rates = {}
        rates = loss.report["learning_rates"]
        for name in rates:
            self.rates.setdefault(name, [math.nan] * len(self.steps))
        for name, values in self.rates.items():
            values.append(rates.get(name, math.nan))
        self.steps.append(loss.step)

    def state_dict(self) -> dict[str, Any]:
        """Steps and rates, as tensors."""
        rates = {n: torch.tensor(v, dtype=torch.float64) for n, v in self.rates.items()}
        return {"steps": torch.tensor(self.steps, dtype=torch.int64), "rates": rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with steps and rates that were saved."""
        self.steps = state["steps"].tolist()
        self.rates = {name: values.tolist() for name, values in state["rates"].items()}
