"""A function as calls take it: its bytes, what it closes over as inputs, and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import cloudpickle
import torch
from torch import nn

from taskgrad.graph import pack
from taskgrad.graph.pytree import Slot, Structure, flatten
from taskgrad.graph.sending import is_parametrized, refuse_cached, unpicklable_extra


class ClosedOver(NamedTuple):
    """A tensor that a function closes over; with `name` and `owner` if it is a parameter."""

    tensor: torch.Tensor
    name: str
    owner: nn.Module | None
    is_buffer: bool


class PackedFunction(NamedTuple):
    """A function's bytes, without the tensors that it closes over."""

    data: bytes
    closed_over: list[ClosedOver]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that it closes over."""
        return [found.tensor for found in self.closed_over]


def pack_function(
    fn: Callable[..., Any], title: str, *, what: str = "", advice: str = ""
) -> PackedFunction:
    """A function as it is sent.

    Raises TypeError if it cannot be pickled: the message names it `what`, or by its title, and ends
    in `advice`; TaskgradError if it has parametrizations, within ``parametrize.cached()``.
    """
    packed = pack.pickle_or_explain(
        lambda: pack.pack(fn),
        what or repr(title),
        f". Define it without what it holds on to (locks, open files, generators){advice}",
        culprit=lambda: unpicklable_extra([("", fn)], hooks=False),
    )
    if is_parametrized(packed.modules):
        refuse_cached(title)
    owners = {id(p): (name, m) for m in packed.modules for name, p in m.named_parameters()}
    buffers = {id(b) for m in packed.modules for b in m.buffers()}
    closed_over = []
    for tensor in packed.tensors:
        name, owner = owners.get(id(tensor), ("", None))
        closed_over.append(ClosedOver(tensor, name, owner, id(tensor) in buffers))
    return PackedFunction(packed.data, closed_over)


def template_of(leaves: Sequence[Any], structure: Structure) -> bytes:
    """Pickle arguments of this structure; leaves that are a `Slot` stand for inputs."""
    data: bytes = cloudpickle.dumps((list(leaves), structure))
    return data


def template(arguments: Any) -> bytes:
    """Pickle arguments that have slots for their inputs."""
    return template_of(*flatten(arguments))


class Template:
    """Unpickled arguments with slots."""

    def __init__(self, data: bytes) -> None:
        self._leaves, self._structure = pack.loads_plain(data)

    @classmethod
    def of(cls, data: bytes) -> Template:
        """The arguments, unpickled once where calls can share them: nothing in them can change."""
        return _shared(data) or cls(data)

    @property
    def is_constant(self) -> bool:
        """True if it has only inputs, numbers and texts, in built-in containers."""
        return self._structure.is_builtin and all(type(x) in _CONSTANT for x in self._leaves)

    @cached_property
    def parameters(self) -> set[int]:
        """The positions of inputs that are Parameters of objects among the arguments."""
        leaves = [self._leaves[i] for i in self._structure.parameters]
        return {leaf.index for leaf in leaves if type(leaf) is Slot}

    def fill(self, inputs: Sequence[Any] | Mapping[int, Any]) -> Any:
        """The arguments, with the inputs in their slots."""
        if self._positional is not None:
            return tuple([inputs[i] for i in self._positional]), {}
        given = [inputs[x.index] if type(x) is Slot else x for x in self._leaves]
        return self._structure.build(given)

    @cached_property
    def _positional(self) -> list[int] | None:
        """The slots' positions, if these are (args, kwargs) with nothing but inputs in args."""
        found = [x.index for x in self._leaves if type(x) is Slot]
        args = Structure("tuple", None, (Structure("leaf"),) * len(found))
        alone = Structure("tuple", None, (args, Structure("dict", ())))
        return found if self._structure == alone else None


_CONSTANT = frozenset(
    {
        *(Slot, type(None), bool, int, float, complex, str, bytes, slice, range, type(Ellipsis)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    }
)


@lru_cache(maxsize=1024)
def _shared(data: bytes) -> Template | None:
    found = Template(data)
    return found if found.is_constant else None
