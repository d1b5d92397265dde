"""Optimizer steps where the parameters live."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from taskgrad.chain import GraphChain
from taskgrad.cluster.session import check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.deploy import copy_tied
from taskgrad.executors.futures import run, values_of
from taskgrad.graph.nodes import Node, Stage, StageCall, new_key
from taskgrad.train.factories import attributes_of, example_of
from taskgrad.train.owner import acquire_ownership, check_owner


class Optimizer:
    """A torch optimizer for each stage of a chain, on the stage's worker.

    Parameters
    ----------
    chain : GraphChain
    factory : callable
        Makes an optimizer from a list of parameters: ``torch.optim.Adam``, or
        ``functools.partial(torch.optim.SGD, lr=0.1)``. It is called once on each worker, over the
        trainable parameters that live there, all of which it has to be over; its state stays there.

    Raises
    ------
    TypeError
        `chain` is none, or `factory` does not make an optimizer from a list of parameters, or one
        whose step needs a closure, as that of ``LBFGS`` does.
    ValueError
        The chain has no trainable parameters.
    LayerError
        The factory raised on a worker, or made an optimizer over other parameters than it was
        given, or over fewer; an optimizer that the chain had before is still in use.

    Examples
    --------
    >>> import functools, torch, taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
    >>> optimizer = tg.Optimizer(chain, functools.partial(torch.optim.SGD, lr=0.1))
    >>> loss = tg.spawn(torch.nn.functional.mse_loss, chain(torch.ones(4, 2)), torch.ones(4, 1))
    >>> loss.backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    >>> client.close()
    """

    def __init__(self, chain: GraphChain, factory: Callable[..., torch.optim.Optimizer]) -> None:
        if not isinstance(chain, GraphChain):
            raise TypeError(f"an Optimizer updates a GraphChain; got {type(chain).__name__}")
        check_open(chain._session.client)
        example_of(factory, attributes_of(chain._tensors.values()))
        self._chain = chain
        by_stage: dict[Stage, list[str]] = {}
        for name, info in chain.named_parameters_info():
            if info.requires_grad:
                by_stage.setdefault(chain._home(name), []).append(name)
        if not by_stage:
            raise ValueError("the chain has no trainable parameters to optimize")
        self._stages = list(by_stage)
        self._number = 0
        self._unsettled = False  # a step was interrupted, and is yet to be taken back
        self._lock = threading.RLock()
        with acquire_ownership(chain, self):
            makes = [
                self._on(stage, "make", {"factory": factory, "names": by_stage.get(stage, [])})
                for stage in chain._stages.values()
            ]
            uses = [self._on(stage, "use", {}) for stage in chain._stages.values()]
            for use in uses:
                use.awaits = tuple(makes)
            run(uses, chain._session)

    def _on(self, stage: Stage, action: str, arguments: dict[str, Any]) -> StageCall:
        word = {"make": "optimizer"}.get(action, action)
        key = new_key(word, self._chain._title)
        return StageCall(stage, f"optimizing.{action}", arguments, key=key)

    def step(self) -> None:
        """One step on every stage, side by side; returns when all are done.

        All stages take it, or none. Copies of parameters that are tied over two workers get the new
        values.

        Raises
        ------
        LayerError
            The optimizer raised on a worker. Parameters, gradients and the state of the optimizers
            are as they were before, on all workers.
        TaskgradError
            The chain has another `Optimizer`, or a `Trainer`, since.
        WorkerLostError
            A worker is gone, and with it its layers.
        """
        with self._lock:
            check_owner(self._chain, self)
            if self._unsettled:
                self._take_back()
            self._number += 1
            self._unsettled = True
            try:
                run(self._targets(self._number), self._chain._session)
            except BaseException as error:
                try:
                    self._take_back()
                except TaskgradError as broken:
                    if not isinstance(error, WorkerLostError):
                        error.add_note(f"The step could not be taken back: {broken}")
                raise
            self._unsettled = False

    def _targets(self, number: int) -> list[Node]:
        copies: dict[Stage, set[str]] = {}
        for stage in self._chain._stages.values():
            for name, home in stage.homes.items():
                copies.setdefault(home, set()).add(name)
        updates = {
            stage: self._on(
                stage, "update", {"number": number, "send": sorted(copies.get(stage, ()))}
            )
            for stage in self._stages
        }
        targets: list[Node] = []
        for stage in self._chain._stages.values():
            homes = [updates[h] for h in dict.fromkeys(stage.homes.values()) if h in updates]
            if homes:
                key = new_key("update", f"{self._chain._title} copies")
                targets.append(StageCall(stage, "set_parameters", {}, key=key, after=homes))
        for stage in self._stages:
            settle = self._on(stage, "settle", {"number": number})
            settle.awaits = tuple(updates.values())
            targets.append(settle)
        return targets

    def _take_back(self) -> None:
        """Undo a step that some stages have not made, or keep one that all have."""
        session, number = self._chain._session, {"number": self._number}
        asked = [self._on(stage, "settled", number) for stage in self._stages]
        run(asked, session)
        action = "settle" if any(values_of(asked, session)) else "take_back"
        run([self._on(stage, action, number) for stage in self._stages], session)
        copy_tied(list(self._chain._stages.values()), session)
        self._unsettled = False

    def zero_grad(self) -> None:
        """Drop the gradients on the workers."""
        self._chain.zero_grad()
