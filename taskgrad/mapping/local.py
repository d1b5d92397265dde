"""A map over threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from taskgrad.graph import pack
from taskgrad.graph.pytree import builds, flatten
from taskgrad.item_errors import is_ctrl_c, item_error
from taskgrad.mapping.closed_over import closed_over_tensors, title_of
from taskgrad.mapping.items import Row, cut, share
from taskgrad.mapping.joining import Recording, join
from taskgrad.mapping.segments import (
    Gradient,
    ItemError,
    Piece,
    Rows,
    Task,
    differentiate,
    rows_of,
    run_pieces,
    total,
)
from taskgrad.mapping.threads import worker_here
from taskgrad.worker.failures import backward_error


def map_here(
    fn: Callable[..., Any],
    rows: Sequence[Row],
    *,
    threads: int,
    chunksize: int | None,
    reduce: bool,
    seed: int | None,
) -> list[Any]:
    """The results, or their sums by chunk, attached to autograd's graph."""
    if chunksize is None:
        ranges = share(len(rows), [1] * min(threads, len(rows)))
    else:
        ranges = cut(len(rows), chunksize)
    taped = torch.is_grad_enabled()
    function, originals = _cut_off(fn) if taped else (fn, {})
    task = Task(function, taped, taped, seed, reduce)
    parts = [rows_of(r.start, [rows[i] for i in r]) for r in ranges]
    try:
        pieces = run_pieces(task, parts, threads)
    except ItemError as failed:
        error, index = failed.error, failed.index
    else:
        if not any(flag for piece in pieces for flag in piece.flags):
            return [r for piece in pieces for r in builds(piece.leaves, piece.structures)]
        return _attach(fn, pieces, parts, originals, threads)
    raise item_error(error, index, fn, _where())


def _where() -> str:
    worker = worker_here()
    return worker.address if worker else "none: a thread of this process"


def _attach(
    fn: Callable[..., Any],
    pieces: list[Piece],
    parts: Sequence[Rows],
    originals: dict[int, torch.Tensor],
    threads: int,
) -> list[Any]:
    taken = {id(t) for piece in pieces for t in piece.taken}
    shared = [t for t in leaves_behind(o for p in pieces for o in p.outputs) if id(t) not in taken]
    for piece in pieces:
        piece.shared = shared
    recording = _Recorded(title_of(fn), pieces, threads)
    items = [
        leaf
        for part in parts
        for leaf, wanted in zip(part.leaves, part.wanted, strict=True)
        if wanted
    ]
    inputs = [*(originals.get(id(t), t) for t in shared), *items]
    flags = [flag for piece in pieces for flag in piece.flags]
    leaves = [leaf for piece in pieces for leaf in piece.leaves]
    structures = [structure for piece in pieces for structure in piece.structures]
    return join(recording, leaves, structures, flags, inputs)


def _cut_off(fn: Callable[..., Any]) -> tuple[Callable[..., Any], dict[int, torch.Tensor]]:
    """The function, cut off from the graph behind what it closes over, where there is one.

    Several pieces would go back through that graph, each on its own, and hooks of a tensor would be
    called by each. Such tensors are replaced, in a copy of the function, by leaves; returned with
    it are the originals by the leaves' identities.
    """
    if all(t.is_leaf and not t._backward_hooks for t in closed_over_tensors(fn)):
        return fn, {}
    packed = pack.pack(fn)
    values, originals = [], {}
    for tensor in packed.tensors:
        if tensor.requires_grad:
            leaf = tensor.detach().requires_grad_()
            originals[id(leaf)] = tensor
            values.append(leaf)
        else:
            values.append(tensor)
    return pack.unpack(packed.data, values, own=False), originals


def leaves_behind(outputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves of autograd's graph behind these tensors, each once."""
    found: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    stack: list[Any] = []
    for output in outputs:
        if output.grad_fn is None:
            found.setdefault(id(output), output)
        else:
            stack.append(output.grad_fn)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # it accumulates into a leaf
            found.setdefault(id(node.variable), node.variable)
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return list(found.values())


class _Recorded(Recording):
    """Pieces in this process. Inputs are what they share, then what each one took."""

    def __init__(self, title: str, pieces: Sequence[Piece], threads: int) -> None:
        entries, before = [], 0
        for piece in pieces:
            entries += [before + e for e in piece.entries]
            before += len(piece.structures)
        super().__init__(title, entries)
        self.pieces = pieces
        self.threads = threads
        # A second derivative goes through the graphs of the first as well: none frees them then.
        self.lasts = False

    def backward(self, cotangents: Sequence[Gradient], retain: bool) -> list[Gradient]:
        """Every piece's in a thread."""
        self.claim(cotangents, retain)
        shared, taken = self._differentiate(self._by_piece(cotangents), retain=retain or self.lasts)
        return [*total(shared), *(grad for grads in taken for grad in grads)]

    def differentiable(
        self, inputs: Sequence[torch.Tensor], cotangents: Sequence[Gradient]
    ) -> list[Gradient]:
        """The backward, recorded in its turn: more pieces, joined to the caller's graph."""
        self.claim(cotangents, True)
        self.lasts = True
        given = self._by_piece(cotangents)
        seeds = [[None if c is None else c.detach().requires_grad_() for c in cs] for cs in given]
        found = self._differentiate(seeds, retain=True, create=True)
        pieces, flags, joined = [], [], list(inputs[: len(self.pieces[0].shared)])
        rest = iter(inputs[len(joined) :])
        for piece, cs, ss, shared, taken in zip(self.pieces, given, seeds, *found, strict=True):
            gradients = [*shared, *taken]
            flagged = [g is not None and g.requires_grad for g in gradients]
            outputs = [
                g for g, flag in zip(gradients, flagged, strict=True) if flag and g is not None
            ]
            leaves = [*piece.taken, *(s for s in ss if s is not None)]
            shape = flatten(gradients)[1]
            detached = [None if g is None else g.detach() for g in gradients]
            pieces.append(
                Piece(detached, [shape], flagged, leaves, outputs, [0] * len(outputs), piece.shared)
            )
            flags += flagged
            joined += [next(rest) for _ in piece.taken]
            joined += [c for c in cs if c is not None]
        recording = _Recorded(f"the backward of {self.title}", pieces, self.threads)
        recording.lasts = True
        results = join(
            recording,
            [leaf for piece in pieces for leaf in piece.leaves],
            [structure for piece in pieces for structure in piece.structures],
            flags,
            joined,
        )
        count = len(self.pieces[0].shared)
        return [
            *total([grads[:count] for grads in results]),
            *(grad for grads in results for grad in grads[count:]),
        ]

    def _differentiate(self, seeds: Sequence[Sequence[Gradient]], **kwargs: bool) -> Any:
        try:
            return differentiate(self.pieces, seeds, self.threads, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            raise backward_error(error, _where(), self.title, None) from error

    def _by_piece(self, cotangents: Sequence[Gradient]) -> list[list[Gradient]]:
        rest = iter(cotangents)
        return [[next(rest) for _ in piece.outputs] for piece in self.pieces]
