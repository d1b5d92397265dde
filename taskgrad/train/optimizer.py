"""Optimizer steps where the parameters live."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from taskgrad.chain import GraphChain
from taskgrad.cluster.session import check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.graph.nodes import Node
from taskgrad.graph.shards import ShardCall, copied_names
from taskgrad.train.chain_group import ChainGroup, group_of
from taskgrad.train.optimizer_factory import example_of, optimizers_on
from taskgrad.train.owner import check_owner, take_over
from taskgrad.worker import optimizing


class Optimizer:
    """A torch optimizer for each worker of a chain, or of several, over their parameters there.

    Parameters
    ----------
    chain : GraphChain, list or dict of GraphChain
        Several chains take a step together: all of them or none. In a dict they have names, with
        which messages begin the names of parameters.
    factory : callable
        Makes an optimizer from a list of parameters: ``torch.optim.Adam``, or
        ``functools.partial(torch.optim.SGD, lr=0.1)``. It is called once on each worker, over the
        trainable parameters that live there, all of which it has to be over; its state stays there.

    Raises
    ------
    TypeError
        `chain` is no chain or chains, or `factory` does not make an optimizer from a list of
        parameters, or one whose step needs a closure, as that of ``LBFGS`` does.
    ValueError
        The chains have no trainable parameters; or one of them is there twice.
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

    def __init__(
        self,
        chain: GraphChain | Sequence[GraphChain] | Mapping[str, GraphChain],
        factory: Callable[..., torch.optim.Optimizer],
    ) -> None:
        trained = group_of(chain) if isinstance(chain, list | tuple | Mapping) else chain
        if not isinstance(trained, GraphChain | ChainGroup):
            raise TypeError(f"an Optimizer updates a GraphChain; got {type(chain).__name__}")
        layout = trained.layout
        check_open(layout.session.client)
        example_of(factory, layout)
        if not layout.trainable:
            raise ValueError("the chain has no trainable parameters to optimize")
        self._chain = trained
        homes = {layout.home(name) for name in layout.trainable}
        self._shards = [shard for shard in layout.shards if shard in homes]
        self._number = 0
        self._unsettled = False  # a step was interrupted, and is yet to be taken back
        self._lock = threading.RLock()
        take_over(layout, self, optimizers_on(layout, factory, [(layout.trainable, {})]))

    def _tasks(self, function: Callable[..., Any], awaits: Sequence[Node] = ()) -> list[ShardCall]:
        """A task of the step under way on every shard with parameters to train."""
        layout, number = self._chain.layout, {"number": self._number}
        return [layout.task(s, function, number, awaits=awaits) for s in self._shards]

    def step(self) -> None:
        """One step on every shard, side by side; returns when all are done.

        All shards take it, or none. Copies of parameters that are tied over two workers get the new
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
            check_owner(self._chain, self, "Optimizer")
            if self._unsettled:
                self._roll_back()
            self._number += 1
            self._unsettled = True
            try:
                self._update()
            except BaseException as error:
                try:
                    self._roll_back()
                except TaskgradError as broken:
                    if not isinstance(error, WorkerLostError):
                        error.add_note(f"The step could not be taken back: {broken}")
                raise
            self._unsettled = False

    def _update(self) -> None:
        layout = self._chain.layout
        copied = copied_names(layout.shards)
        updates = {}
        for shard in self._shards:
            arguments = {"number": self._number, "send": copied.get(shard, [])}
            updates[shard] = layout.task(shard, optimizing.update, arguments)
        settles = self._tasks(optimizing.settle, awaits=list(updates.values()))
        layout.run([*layout.refreshes(updates).values(), *settles])

    def _roll_back(self) -> None:
        """Undo a step that some shards have not made, or keep one that all have."""
        layout = self._chain.layout
        made = any(layout.results(self._tasks(optimizing.settled)))
        layout.run(self._tasks(optimizing.settle if made else optimizing.revert))
        layout.copy_tied()
        self._unsettled = False

    def zero_grad(self) -> None:
        """Drop the gradients on the workers."""
        self._chain.zero_grad()
