"""Optimizer steps where the parameters live."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from taskgrad.chain import GraphChain
from taskgrad.cluster.session import check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.deploy import copy_tied
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.shards import Shard, ShardCall, copied_names
from taskgrad.train.factories import attributes_of, example_of
from taskgrad.train.owner import acquire_ownership, check_owner
from taskgrad.worker import optimizing, shard_ops


class Optimizer:
    """A torch optimizer for each shard of a chain, on the shard's worker.

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
        by_shard: dict[Shard, list[str]] = {}
        for name, info in chain.named_parameters_info():
            if info.requires_grad:
                by_shard.setdefault(chain._home(name), []).append(name)
        if not by_shard:
            raise ValueError("the chain has no trainable parameters to optimize")
        self._shards = list(by_shard)
        self._number = 0
        self._unsettled = False  # a step was interrupted, and is yet to be taken back
        self._lock = threading.RLock()
        with acquire_ownership(chain, self):
            makes = [
                self._on(
                    shard, optimizing.make, {"factory": factory, "names": by_shard.get(shard, [])}
                )
                for shard in chain._shards.values()
            ]
            uses = [
                self._on(shard, optimizing.use, {}, awaits=makes)
                for shard in chain._shards.values()
            ]
            chain._executor.run(uses)

    def _on(
        self,
        shard: Shard,
        function: Callable[..., Any],
        arguments: dict[str, Any],
        *,
        awaits: Sequence[Node] = (),
    ) -> ShardCall:
        word = "optimizer" if function is optimizing.make else function.__name__
        key = new_key(word, self._chain._title)
        return ShardCall(shard, function, arguments, key=key, awaits=awaits)

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
            check_owner(self._chain, self)
            if self._unsettled:
                self._take_back()
            self._number += 1
            self._unsettled = True
            try:
                self._chain._executor.run(self._targets(self._number))
            except BaseException as error:
                try:
                    self._take_back()
                except TaskgradError as broken:
                    if not isinstance(error, WorkerLostError):
                        error.add_note(f"The step could not be taken back: {broken}")
                raise
            self._unsettled = False

    def _targets(self, number: int) -> list[Node]:
        copied = copied_names(self._chain._shards.values())
        updates = {
            shard: self._on(
                shard, optimizing.update, {"number": number, "send": copied.get(shard, [])}
            )
            for shard in self._shards
        }
        targets: list[Node] = []
        for shard in self._chain._shards.values():
            homes = [updates[h] for h in dict.fromkeys(shard.homes.values()) if h in updates]
            if homes:
                key = new_key("update", f"{self._chain._title} copies")
                targets.append(ShardCall(shard, shard_ops.set_parameters, {}, key=key, after=homes))
        done = list(updates.values())
        for shard in self._shards:
            settle = self._on(shard, optimizing.settle, {"number": number}, awaits=done)
            targets.append(settle)
        return targets

    def _take_back(self) -> None:
        """Undo a step that some shards have not made, or keep one that all have."""
        executor, number = self._chain._executor, {"number": self._number}
        asked = [self._on(shard, optimizing.settled, number) for shard in self._shards]
        executor.run(asked)
        made = any(executor.values(asked))
        end = optimizing.settle if made else optimizing.take_back
        executor.run([self._on(shard, end, number) for shard in self._shards])
        copy_tied(list(self._chain._shards.values()), executor)
        self._unsettled = False

    def zero_grad(self) -> None:
        """Drop the gradients on the workers."""
        self._chain.zero_grad()
