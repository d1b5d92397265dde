"""Take cotangents back through a tape."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.errors import CotangentError
from taskgrad.graph.pytree import Structure, carries_gradient, describe, flatten
from taskgrad.worker.store import Store, Tape

Gradient = torch.Tensor | None


@dataclass(frozen=True)
class Backward:
    """One backward task; `key` is its own, `token` that of the forward whose tape it uses.

    `sources` says where each cotangent is: a position among the task's values, or None for ones.
    `wanted` are the input slots whose cotangents are given back.
    """

    key: str
    token: str
    sources: tuple[int | None, ...]
    wanted: tuple[int, ...]
    retain: bool

    def run(self, store: Store, *values: Any) -> Any:
        """Cotangents of the wanted slots (one, or a tuple); parameters' gradients are stored."""
        tape = store.tape(self.token, keep=self.retain)
        with tape.stage.lock if tape.stage else contextlib.nullcontext():
            seeds = self._sum(tape, store.address, values)
            slots = {i: tape.inputs[i] for i in self.wanted}
            found, parameters = _differentiate(tape, seeds, slots, self.retain)
        store.put(self.key, parameters)
        given = tuple(
            tape.input_structures[i].build(found[i])
            if any(g is not None for g in found[i])
            else None
            for i in self.wanted
        )
        return given[0] if len(given) == 1 else given

    def _sum(self, tape: Tape, address: str, values: tuple[Any, ...]) -> list[Gradient]:
        """The cotangents of the output's leaves, those that meet summed in the order given."""
        total: list[Gradient] = [None] * len(tape.outputs)
        for source in self.sources:
            if source is None:
                part: list[Gradient] = [_ones(tape, address)]
            else:
                part = match(
                    values[source],
                    tape.outputs,
                    tape.output_structure,
                    f"{tape.title!r} on {address}",
                )
            total = [_add(a, b) for a, b in zip(total, part, strict=True)]
        return total


def _ones(tape: Tape, address: str) -> torch.Tensor:
    (output, *more) = tape.outputs
    if more or not isinstance(output, torch.Tensor) or output.numel() != 1:
        value = tape.output_structure.build(tape.outputs)
        raise CotangentError(
            f"backward() without a cotangent needs a scalar output; {tape.title!r} on worker "
            f"{address} gave {describe(value)}. Pass a cotangent of that shape"
        )
    return torch.ones_like(output)


def _add(a: Gradient, b: Gradient) -> Gradient:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def match(cotangent: Any, outputs: list[Any], structure: Structure, where: str) -> list[Gradient]:
    """A cotangent's leaves beside the output's, checked.

    `outputs` are tensors, or anything with the shape, dtype and description of one. None stands for
    no cotangent, at a leaf or for the whole value.

    Raises
    ------
    CotangentError
        Structure, shape or dtype differ.
    """
    if cotangent is None:
        return [None] * len(outputs)
    leaves, given = flatten(cotangent)
    if given != structure:
        raise CotangentError(
            f"the cotangent for {where} has another structure than the output: expected "
            f"{describe(structure.build(outputs))}, got {describe(cotangent)}"
        )
    for leaf, output in zip(leaves, outputs, strict=True):
        if leaf is None:
            continue
        if not isinstance(leaf, torch.Tensor):
            raise CotangentError(
                f"the cotangent for {where} holds a {type(leaf).__name__}; expected tensors or None"
            )
        if not carries_gradient(output):
            raise CotangentError(
                f"the cotangent for {where} has {describe(leaf)} where the output is "
                f"{describe(output)}, which carries no gradient; give None there"
            )
        if leaf.shape != output.shape or leaf.dtype != output.dtype:
            raise CotangentError(
                f"the cotangent for {where} is {describe(leaf)}; the output is {describe(output)}. "
                "Shape and dtype must be the same"
            )
    return leaves


def _differentiate(
    tape: Tape, seeds: list[Gradient], slots: dict[int, list[Gradient]], retain: bool
) -> tuple[dict[int, list[Gradient]], dict[str, Gradient]]:
    pairs = [
        (output, seed.to(output.device))
        for output, seed in zip(tape.outputs, seeds, strict=True)
        if seed is not None and output.requires_grad
    ]
    takers = [leaf for leaves in slots.values() for leaf in leaves if leaf is not None]
    takers += tape.parameters.values()
    if pairs and takers:
        grads: Sequence[Gradient] = torch.autograd.grad(
            [output for output, _ in pairs],
            takers,
            [seed for _, seed in pairs],
            retain_graph=retain,
            allow_unused=True,
        )
    else:
        grads = (None,) * len(takers)
    rest = iter(grads)
    found = {
        i: [next(rest) if leaf is not None else None for leaf in leaves]
        for i, leaves in slots.items()
    }
    # A gradient may be the very tensor that came in, which is Dask's memory: copy before keeping.
    foreign = {
        seed.untyped_storage().data_ptr() for _, seed in pairs if seed.layout is torch.strided
    }
    parameters = {name: _own(next(rest), foreign) for name in tape.parameters}
    return found, parameters


def _own(grad: Gradient, foreign: set[int]) -> Gradient:
    if grad is None or grad.layout is not torch.strided:
        return grad
    return grad.clone() if grad.untyped_storage().data_ptr() in foreign else grad
