"""The arguments of a call, pickled, with slots for its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cloudpickle

from taskgrad.graph import pack
from taskgrad.graph.pytree import Slot, Structure, flatten


def template_of(leaves: Sequence[Any], structure: Structure) -> bytes:
    """Arguments of this structure; those leaves that are a `Slot` stand for an input."""
    data: bytes = cloudpickle.dumps((list(leaves), structure))
    return data


def template(arguments: Any) -> bytes:
    """The same for arguments with slots in them."""
    return template_of(*flatten(arguments))


class Template:
    """What was pickled, again."""

    def __init__(self, data: bytes) -> None:
        self._leaves, self._structure = pack.loads_arguments(data)

    @property
    def parameters(self) -> set[int]:
        """The inputs that are a Parameter of an object among the arguments."""
        leaves = [self._leaves[i] for i in self._structure.parameters]
        return {leaf.index for leaf in leaves if type(leaf) is Slot}

    def fill(self, inputs: Sequence[Any]) -> Any:
        """The arguments, with the inputs in their slots."""
        given = [inputs[x.index] if type(x) is Slot else x for x in self._leaves]
        return self._structure.build(given)
