"""Initialization that a model's class defines for its modules, as transformers' models do.

Such a class has a method ``_init_weights(module)``, which is called for every module, inner ones
first, and may set values of the module's parts too. Here each call is made for the tensors of one
module at a time, the others being on the meta device. So a value does not depend on which layers
the model is cut into, nor on where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from taskgrad.graph import pack
from taskgrad.graph.memory_layout import View


@dataclass(frozen=True)
class OnMeta:
    """A module or object packed with the shapes of its tensors only."""

    data: bytes
    specs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, obj: Any) -> OnMeta:
        """Pack an object; its tensors may have values, which are left out."""
        packed = pack.pack(obj)
        likes = [torch.empty_like(t, device="meta") for t in packed.tensors]
        return cls(packed.data, tuple((tuple(t.shape), t.stride(), t.dtype) for t in likes))

    def unpack(self) -> Any:
        """A new object, its tensors on the meta device."""
        values: list[torch.Tensor | View] = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in self.specs
        ]
        return pack.unpack(self.data, values, own=True)


@dataclass(frozen=True)
class InitCall:
    """A call that sets tensors which one module has itself.

    Attributes
    ----------
    owner
        The name of the module with the tensors, in the layer.
    tensors
        The tensors, by their names in it.
    stream
        The name of the random stream.
    root
        The number, in the plan, of the object whose ``_init_weights`` is called; None if it is the
        module's own ``reset_parameters``.
    module
        The module that the call is for: the owner, or one that it is a part of.
    path
        The owner's name in that module.
    """

    owner: str
    tensors: tuple[str, ...]
    stream: str
    root: int | None
    module: OnMeta
    path: str


@dataclass
class Initializers:
    """The calls of ``_init_weights`` that set a model's tensors.

    `writers` has for each tensor that a call writes, by its first name, the modules that these
    calls are for, in order; `root_of` for each module the name of the one whose method it is.
    """

    model: nn.Module
    writers: dict[str, list[str]] = field(default_factory=dict)
    root_of: dict[str, str] = field(default_factory=dict)
    _packed: dict[str, OnMeta] = field(default_factory=dict)

    def packed(self, name: str) -> OnMeta:
        """The module of this name."""
        if name not in self._packed:
            self._packed[name] = OnMeta.of(self.model.get_submodule(name))
        return self._packed[name]

    def root(self, name: str) -> OnMeta:
        """The object of this name whose ``_init_weights`` is called, without its parts."""
        return OnMeta.of(bare(self.model.get_submodule(name)))


def is_root(module: nn.Module) -> bool:
    """True if a module's class initializes its modules, as those of transformers do."""
    kind = type(module)
    methods = all(callable(getattr(kind, n, None)) for n in ("_init_weights", "save_pretrained"))
    return methods and "config" in vars(module)


def bare(module: nn.Module) -> nn.Module:
    """A module of the same class with the same attributes, but without parts and tensors."""
    made: nn.Module = object.__new__(type(module))
    empty: dict[str, Any] = {"_modules": {}, "_parameters": {}, "_buffers": {}}
    vars(made).update({**vars(module), **empty})
    return made


def initializers(model: nn.Module, first_names: Mapping[int, str]) -> Initializers:
    """Find out which calls of ``_init_weights`` write which tensors, on a copy without values.

    `first_names` has the first name of each tensor by its id. A call that raises writes nothing: it
    needs values, or parts of the model that are elsewhere.
    """
    found = Initializers(model)
    if not any(is_root(module) for module in model.modules()):
        return found
    copy: nn.Module = OnMeta.of(model).unpack()
    names: dict[int, str] = {}
    for (prefix, ours), theirs in zip(model.named_modules(), copy.modules(), strict=True):
        outer = prefix.rpartition(".")[0]
        root = prefix if is_root(ours) else found.root_of.get(outer) if prefix else None
        if root is not None:
            found.root_of[prefix] = root
        others = {**theirs._parameters, **theirs._buffers}
        for name, tensor in {**ours._parameters, **ours._buffers}.items():
            other = others.get(name)
            if other is not None and id(tensor) in first_names:
                names[other.untyped_storage()._cdata] = first_names[id(tensor)]
    bares = {name: bare(model.get_submodule(name)) for name in {*found.root_of.values()}}
    for prefix, module in reversed(list(copy.named_modules())):
        if prefix not in found.root_of:
            continue
        writes = _Writes()
        method: Any = bares[found.root_of[prefix]]._init_weights
        try:
            with torch.no_grad(), writes:
                method(module)
        except Exception:
            continue
        for storage in writes.storages:
            if storage in names:
                found.writers.setdefault(names[storage], []).append(prefix)
    return found


class _Writes(TorchDispatchMode):
    """Notes the storages that operations write into."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            info = argument.alias_info
            if info is not None and info.is_write and isinstance(value, torch.Tensor):
                self.storages[value.untyped_storage()._cdata] = None
        return func(*args, **(kwargs or {}))


def calls_for(
    inits: Initializers, owner: str, inner: str, tensors: Iterable[str], roots: dict[str, int]
) -> list[InitCall]:
    """The calls that set tensors of the module `owner`, whose name in its layer is `inner`.

    `roots` has the numbers of the objects that the calls need; new ones are added.
    """
    found: dict[str, list[str]] = {}
    dot = f"{owner}." if owner else ""
    for name in tensors:
        for module in inits.writers.get(dot + name, ()):
            found.setdefault(module, []).append(name)
    order = sorted(found, key=lambda name: name.count(".") + bool(name), reverse=True)
    return [
        InitCall(
            inner,
            tuple(found[module]),
            owner if module == owner else f"{owner} of {module}",
            roots.setdefault(inits.root_of[module], len(roots)),
            inits.packed(module),
            owner[len(module) + 1 :] if module else owner,
        )
        for module in order
        if not module or owner == module or owner.startswith(f"{module}.")
    ]
