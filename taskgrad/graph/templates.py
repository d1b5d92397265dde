"""The arguments of a call, pickled, with slots for its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cloudpickle

from taskgrad.graph import pack
from taskgrad.graph.pytree import Slot, Structure, flatten


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
        self._leaves, self._structure = pack.loads_arguments(data)

    @property
    def parameters(self) -> set[int]:
        """The positions of inputs that are Parameters of objects among the arguments."""
        leaves = [self._leaves[i] for i in self._structure.parameters]
        return {leaf.index for leaf in leaves if type(leaf) is Slot}

    def fill(self, inputs: Sequence[Any]) -> Any:
        """The arguments, with the inputs in their slots."""
        given = [inputs[x.index] if type(x) is Slot else x for x in self._leaves]
        return self._structure.build(given)
