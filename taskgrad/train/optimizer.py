"""Optimizer steps where the parameters live."""

from __future__ import annotations

from collections.abc import Callable

import torch

from taskgrad.chain import GraphChain
from taskgrad.executors.futures import run
from taskgrad.graph.nodes import Node, Stage, StageCall, new_key


class Optimizer:
    """A torch optimizer for each stage of a chain, on the stage's worker.

    Parameters
    ----------
    chain : GraphChain
    factory : callable
        Makes an optimizer from a list of parameters: ``torch.optim.Adam``, or
        ``functools.partial(torch.optim.SGD, lr=0.1)``. It is called once on each worker, over the
        trainable parameters that live there; its state stays there.

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
        if not callable(factory):
            raise TypeError(
                "factory must make an optimizer from parameters, as "
                f"functools.partial(torch.optim.SGD, lr=0.1) does; got {type(factory).__name__}"
            )
        self._chain = chain
        by_stage: dict[Stage, list[str]] = {}
        for name, info in chain.named_parameters_info():
            if info.requires_grad:
                by_stage.setdefault(chain._home(name), []).append(name)
        if not by_stage:
            raise ValueError("the chain has no trainable parameters to optimize")
        self._stages = list(by_stage)
        run(
            [
                StageCall(
                    stage,
                    "make_optimizer",
                    {"factory": factory, "names": names},
                    key=new_key("optimizer", chain._title),
                )
                for stage, names in by_stage.items()
            ],
            chain._session,
        )

    def step(self) -> None:
        """One step on every stage, side by side; returns when all are done.

        Copies of parameters that are tied over two workers get the new values.
        """
        copies: dict[Stage, set[str]] = {}
        for stage in self._chain._stages.values():
            for name, home in stage.homes.items():
                copies.setdefault(home, set()).add(name)
        updates = {
            stage: StageCall(
                stage,
                "update",
                {"send": sorted(copies.get(stage, ()))},
                key=new_key("update", self._chain._title),
            )
            for stage in self._stages
        }
        targets: list[Node] = list(updates.values())
        for stage in self._chain._stages.values():
            homes = [updates[h] for h in dict.fromkeys(stage.homes.values()) if h in updates]
            if homes:
                key = new_key("update", f"{self._chain._title} copies")
                targets.append(StageCall(stage, "set_parameters", {}, key=key, after=homes))
        run(targets, self._chain._session)

    def zero_grad(self) -> None:
        """Drop the gradients on the workers."""
        self._chain.zero_grad()
