"""What a worker does with the chunks of a map: run them, and take cotangents back through them.

A chunk leaves a tape in its worker's store, under its key, as a forward of a chain does. One
backward a worker uses the tapes of all chunks there, and gives one gradient for each tensor that
the chunks share.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.graph import pack
from taskgrad.graph.pytree import Slot, Structure, flatten, sequence
from taskgrad.graph.torch_settings import thread_settings
from taskgrad.item_errors import portable
from taskgrad.mapping.cotangents import decode
from taskgrad.mapping.eager import differentiate_at_once
from taskgrad.mapping.items import share
from taskgrad.mapping.segments import (
    Gradient,
    ItemError,
    Piece,
    Rows,
    Task,
    differentiate,
    run_pieces,
    total,
)
from taskgrad.mapping.spec import Reply, Work
from taskgrad.mapping.threads import threads_here
from taskgrad.worker.failures import backward_error
from taskgrad.worker.settings import in_thread
from taskgrad.worker.store import Store, Tape


@dataclass
class ChunkTape(Tape):
    """The tape of a chunk: its pieces; its reply, should Dask ask again; its eager gradients."""

    pieces: list[Piece] = field(default_factory=list)
    reply: Reply | None = None
    eager_shared: list[Gradient] | None = None


@dataclass(frozen=True)
class GiveShared:
    """The value of a `Shared`."""

    def run(self, store: Store, value: Any) -> Any:
        """The same value."""
        return value


@dataclass(frozen=True)
class RunChunk:
    """Run a `Chunk`."""

    key: str
    work: Work
    start: int
    wanted: tuple[bool, ...]
    alone: bool

    def run(self, store: Store, shared: list[Any], items: list[Any]) -> Reply:
        """Its reply; its tape, if any, is in the store under its key.

        Raises
        ------
        ItemError
            An item raised.
        """
        known = store.get(self.key)
        if isinstance(known, ChunkTape) and known.reply is not None:
            return known.reply
        work = self.work
        data, *tensors = shared
        leaves = [
            t.detach().requires_grad_() if wanted and work.taped else t.clone() if buffer else t
            for t, wanted, buffer in zip(tensors, work.wanted, work.is_buffer, strict=True)
        ]
        task = Task(
            pack.unpack(data, leaves, own=False),
            *(work.grad, work.taped, work.seed, work.reduce),
            shared=leaves,
        )
        threads = threads_here() if work.threads else 1
        parts = self._parts(items, threads)
        start = time.perf_counter()
        try:
            pieces = run_pieces(task, parts, threads, lambda: not store.is_let_go(self.key))
        except ItemError as failed:
            raise ItemError(failed.index, portable(failed.error), failed.frames) from None
        seconds = time.perf_counter() - start
        self._check_buffers(tensors, leaves)
        reply = _reply(pieces)
        if not work.taped:
            reply.flags, reply.entries = [False] * len(reply.flags), []
            return reply
        takers = [t for t, wanted in zip(leaves, work.wanted, strict=True) if wanted]
        for piece in pieces:
            piece.shared = takers
        tape = _tape(work.title, pieces, reply)
        # A backward comes after the region of autocast that the map may be in.
        with in_thread(thread_settings().outside_autocast(), store.address):
            eager = differentiate_at_once(work, pieces, seconds, threads, store.address)
        if eager is not None:
            reply.leads, reply.eager_items = eager.leads, [_home(g) for g in eager.items]
            tape.eager_shared = [_home(g) for g in eager.shared]
            reply.eager_shared = tape.eager_shared if self.alone else None
        store.put(self.key, tape)
        return reply

    def _parts(self, items: list[Any], threads: int) -> list[Rows]:
        """The rows for each thread."""
        data, *tensors = items
        rows = pack.loads_arguments(data)
        parts = []
        for r in share(len(rows), [1] * min(threads, len(rows))):
            mine = rows[r.start : r.stop]
            leaves = [leaf for leaves, _ in mine for leaf in leaves]
            structure = sequence([structure for _, structure in mine])
            slots = [leaf.index if isinstance(leaf, Slot) else None for leaf in leaves]
            parts.append(
                Rows(
                    self.start + r.start,
                    [x if s is None else tensors[s] for x, s in zip(leaves, slots, strict=True)],
                    structure,
                    [s is not None and self.wanted[s] for s in slots],
                    copied=True,
                )
            )
        return parts

    def _check_buffers(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
        for old, new, is_buffer in zip(before, after, self.work.is_buffer, strict=True):
            if is_buffer and not torch.equal(old, new.to(old.device)):
                raise TaskgradError(
                    f"{self.work.title!r} changed a buffer of a module that it closes over (batch "
                    "norm in training mode?): each chunk has a copy of its own, and yours would "
                    'not change. Put the module in evaluation mode, or use over="threads"'
                )


def _reply(pieces: Sequence[Piece]) -> Reply:
    leaves: list[Any] = []
    structures: list[Structure] = []
    flags: list[bool] = []
    entries: list[int] = []
    for piece in pieces:
        entries += [len(structures) + e for e in piece.entries]
        leaves += map(_home, piece.leaves)
        structures += piece.structures
        flags += piece.flags
    return Reply(uuid.uuid4().hex, leaves, structures, flags, entries)


def _home(leaf: Any) -> Any:
    """A leaf as it can be sent: on the host."""
    if isinstance(leaf, torch.Tensor) and leaf.device.type not in ("cpu", "meta"):
        return leaf.cpu()
    return leaf


def _tape(title: str, pieces: list[Piece], reply: Reply) -> ChunkTape:
    outputs = [output for piece in pieces for output in piece.outputs]
    inputs: list[list[Gradient]] = [[*pieces[0].shared]]
    inputs += [[*piece.taken] for piece in pieces]
    return ChunkTape(
        title, inputs, [], outputs, flatten(outputs)[1], {}, None, pieces=pieces, reply=reply
    )


@dataclass(frozen=True)
class GiveSharedGradient:
    """The value of a `SharedGradient`."""

    keys: tuple[str, ...]

    def run(self, store: Store, *after: Any) -> list[Gradient] | None:
        """The sum; None if one of the chunks was not eager, or is gone."""
        tapes = [store.get(key) for key in self.keys]
        parts = [t.eager_shared if isinstance(t, ChunkTape) else None for t in tapes]
        found = [part for part in parts if part is not None]
        return total(found) if len(found) == len(parts) else None


@dataclass(frozen=True)
class GoBack:
    """Run a `ChunksBackward`."""

    keys: tuple[str, ...]
    attempts: tuple[str, ...]
    outputs: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    title: str
    threads: bool
    retain: bool

    def run(
        self, store: Store, distinct: list[torch.Tensor]
    ) -> tuple[list[Gradient] | None, list[list[Gradient] | None]]:
        """Gradients of what the chunks share, and of each chunk's items.

        Raises
        ------
        LayerError
            Autograd raised.
        WorkerLostError
            A tape is not here, or of another attempt: the worker was restarted.
        """
        rest = iter(decode(self.runs, distinct))
        cotangents = {
            key: [next(rest) for _ in range(count)]
            for key, count in zip(self.keys, self.outputs, strict=True)
        }
        used = [k for k, given in cotangents.items() if any(c is not None for c in given)]
        attempts = dict(zip(self.keys, self.attempts, strict=True))
        tapes = [self._tape(store, key, attempts[key]) for key in used]
        pieces = [piece for tape in tapes for piece in tape.pieces]
        rest = iter([c for key in used for c in cotangents[key]])
        seeds = [[next(rest) for _ in piece.outputs] for piece in pieces]
        threads = threads_here() if self.threads else 1
        with contextlib.ExitStack() as stack:
            for tape in tapes:
                stack.enter_context(tape.lock)
            try:
                shared, taken = differentiate(pieces, seeds, threads, retain=self.retain)
            except BaseException as error:
                raise backward_error(error, store.address, self.title, None) from error
        by_piece = iter(taken)
        items = {
            key: [_home(g) for _ in tape.pieces for g in next(by_piece)]
            for key, tape in zip(used, tapes, strict=True)
        }
        return [_home(g) for g in total(shared)], [items.get(key) for key in self.keys]

    def _tape(self, store: Store, key: str, attempt: str) -> ChunkTape:
        tape = store.get(key)
        # Another attempt may have drawn other random numbers: the results are not of its tape.
        reply = tape.reply if isinstance(tape, ChunkTape) else None
        if not isinstance(tape, ChunkTape) or reply is None or reply.attempt != attempt:
            raise WorkerLostError(
                f"worker {store.address} does not hold what the map of {self.title!r} left there: "
                "it was restarted since. Run the map again"
            )
        return tape
