"""The calls of a `pmap`: one a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from taskgrad.graph.calls import Call, ProcessGroup, Rank
from taskgrad.graph.functions import pack_function, template
from taskgrad.graph.layers import kind_of
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.pytree import Slot, Structure, flatten
from taskgrad.graph.torch_settings import refuse_modes, settings_now
from taskgrad.spmd.splitting import Split


def rank_calls(
    fn: Callable[..., Any],
    split: Split,
    group: ProcessGroup,
    first: int,
    keys: Sequence[str],
    peers: Sequence[str],
    parts: Sequence[tuple[Any, ...]],
    kind: type[Call] = Call,
    leaf: Callable[..., Leaf] = Leaf,
) -> list[Call]:
    """The calls of the ranks of a group from `first` on, one for each of the arguments' `parts`.

    Each is pinned to its worker. `keys` are theirs, `peers` those of all ranks of the group. A call
    returns the leaves and the structure of the function's result, and for each leaf whether a
    gradient can flow into it.

    With `KeptCall` as their `kind` what it returns stays on its worker. ``leaf(tensor, name=...,
    owner=...)`` makes the leaf of a tensor that the function closes over, for calls with a tape.
    """
    title = group.title
    program = _Program(fn, split.leaves, split.structure)
    packed = pack_function(program, title, what=f"{title!r}, or an argument of it,")
    taken = [*packed.tensors, *(part for of_rank in parts for part in of_rank)]
    taped = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in taken)
    made = leaf if taped else Leaf
    shared = [made(t, name=name, owner=module) for t, name, module, _ in packed.closed_over]
    # Buffers that a module writes are returned by rank 0, as with torch's DDP.
    buffers = tuple([i for i, found in enumerate(packed.closed_over) if found.is_buffer])
    given = {id(part): part for of_rank in parts for part in of_rank}
    inputs = {
        known: part if isinstance(part, Node) else Leaf(part) for known, part in given.items()
    }
    counts = {len(of_rank) for of_rank in parts}
    templates = {
        n: template((tuple([Slot(len(shared) + i) for i in range(n)]), {})) for n in counts
    }
    kind_of_step = kind_of(fn)
    refuse_modes(title)
    settings = settings_now()
    calls = []
    for at, (key, of_rank) in enumerate(zip(keys, parts, strict=True)):
        rank = Rank(group, first + at)
        calls.append(
            kind(
                title=str(rank),
                steps=((0, str(rank), kind_of_step),),
                inputs=[*shared, *(inputs[id(part)] for part in of_rank)],
                template=templates[len(of_rank)],
                function=packed.data,
                tensor_slots=tuple(range(len(shared))),
                buffers=() if at else buffers,
                worker=group.workers[rank.index].address,
                key=key,
                rank=rank,
                peers=tuple(peers),
                settings=settings,
            )
        )
    return calls


def as_there(leaves: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """The leaves of a rank's output; those without a gradient where it ran are detached."""
    return [
        leaf if flag or not isinstance(leaf, torch.Tensor) else leaf.detach()
        for leaf, flag in zip(leaves, flags, strict=True)
    ]


class _Program:
    """The function, with what is the same on all ranks put in: what is sent to them."""

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], structure: Structure) -> None:
        self._fn = fn
        self._leaves = leaves
        self._structure = structure

    def __call__(self, *parts: Any) -> Any:
        args, kwargs = self._structure.build(
            [parts[leaf.index] if type(leaf) is Slot else leaf for leaf in self._leaves]
        )
        leaves, structure = flatten(self._fn(*args, **kwargs))
        return leaves, structure, [isinstance(x, torch.Tensor) and x.requires_grad for x in leaves]
