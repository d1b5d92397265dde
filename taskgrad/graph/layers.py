"""A model as a list of layers: flattened Sequentials, opened Parallels, original names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from taskgrad.graph import pack
from taskgrad.graph.parallel import Parallel
from taskgrad.graph.signature import Signature, signature_of


@dataclass(frozen=True)
class Layer:
    """One node of the model: its index in the running order, its name, and its type.

    The module itself lives on a worker. `passes` is True if it returns its input unchanged, `holds`
    if it only holds what a module that is cut has of its own.
    """

    index: int
    name: str
    kind: str
    passes: bool = False
    holds: bool = False


@dataclass(frozen=True)
class Branches:
    """An opened `Parallel`: paths that all start from one value and meet in `connection`."""

    name: str
    paths: tuple[tuple[Layer | Branches, ...], ...]
    connection: Layer


Path = tuple[Layer | Branches, ...]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter or buffer that lives on a worker, as the driver knows it."""

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    device: torch.device
    requires_grad: bool
    is_buffer: bool
    persistent: bool
    attributes: Mapping[str, Any]  # set by the user; optimizers may group parameters by them
    hooked: bool  # whether there are hooks on its gradient
    # All of its names, the first one included; more than one where it is tied.
    names: tuple[str, ...]


@dataclass
class Model:
    """A model as a list of layers.

    `path` is there if it is made of Sequentials and Parallels; else its forward says in which order
    the layers run. `takes` are the arguments of the forward, of a Sequential's first layer; None if
    they are not known.
    """

    path: Path
    layers: list[Layer]
    modules: list[Callable[..., Any]]
    skeleton: bytes
    tensors: dict[str, ParameterInfo] = field(default_factory=dict)
    activations: list[int] | None = None  # bytes that the backward of each layer needs, if known
    takes: Signature | None = None


CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
# A module that overrides one of these cannot be replaced by its parts.
STATE_METHODS = (
    *("train", "state_dict", "load_state_dict", "_save_to_state_dict"),
    *("_load_from_state_dict", "get_extra_state", "set_extra_state"),
)
_METHODS = ("forward", "__call__", *STATE_METHODS)


def hooked(module: nn.Module, names: Iterable[str] = CALL_HOOKS) -> bool:
    """True if a module has hooks of these kinds."""
    return any(getattr(module, name, None) for name in names)


def _opens(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if a container can be replaced by its parts: it does nothing else, nor do hooks."""
    own_tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return (
        isinstance(module, kind)
        and all(getattr(type(module), name) is getattr(kind, name) for name in _METHODS)
        and not any(name in vars(module) for name in _METHODS)
        and not hooked(module, (*CALL_HOOKS, *STATE_HOOKS))
        and not own_tensors
    )


def is_sequential(model: nn.Module) -> bool:
    """True if a model is a Sequential or a Parallel that can be replaced by its parts."""
    return _opens(model, nn.Sequential) or _opens(model, Parallel)


class OwnTensors(nn.Module):
    """A layer that holds the parameters and buffers of a module that is cut, without its parts."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            persistent = name not in module._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)


def kind_of(fn: Any) -> str:
    """A short name for what a layer is: ``Linear``, ``relu``."""
    if isinstance(fn, nn.Module):
        return type(fn).__name__
    inner = getattr(fn, "func", None)  # functools.partial
    if inner is not None and not hasattr(fn, "__name__"):
        return kind_of(inner)
    return str(getattr(fn, "__name__", type(fn).__name__))


def flatten_model(model: nn.Module) -> Model:
    """List the layers of a model in the order in which it runs them.

    Nested ``nn.Sequential`` and `Parallel` containers are opened unless they carry hooks or methods
    of their own for forward, mode or state; every other module is one layer. Names are the model's.

    Raises TypeError if the model is not an ``nn.Module``; ValueError if there are no layers, or a
    parameter has no shape yet: a lazy module never run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"GraphChain takes an nn.Module (an nn.Sequential, say); got {type(model).__name__}. "
            "For a function use tg.spawn(fn, ...)."
        )
    layers: list[Layer] = []
    modules: list[Callable[..., Any]] = []

    def add(name: str, fn: Callable[..., Any]) -> Layer:
        passes = type(fn) is nn.Identity and not hooked(fn)
        layer = Layer(len(layers), name, kind_of(fn), passes)
        layers.append(layer)
        modules.append(fn)
        return layer

    def walk(name: str, module: nn.Module) -> Iterator[Layer | Branches]:
        prefix = f"{name}." if name else ""
        if _opens(module, nn.Sequential):
            for child_name, child in module._modules.items():
                if child is not None:
                    yield from walk(prefix + child_name, child)
        elif isinstance(module, Parallel) and _opens(module, Parallel):
            paths = tuple(
                tuple(walk(f"{prefix}branches.{i}", branch))
                for i, branch in enumerate(module.branches)
            )
            for i, path in enumerate(paths):
                if not path:
                    raise ValueError(
                        f"branch {i} of the Parallel layer {name!r} is empty; "
                        "use nn.Identity() for a skip"
                    )
            yield Branches(name, paths, add(f"{prefix}connection", module.connection))
        else:
            yield add(name, module)

    path = tuple(walk("", model))
    if not layers:
        raise ValueError(
            "the chain is empty: GraphChain needs a model of at least one layer, "
            f"and this {type(model).__name__} has none"
        )
    tensors = _inventory(model, layers)
    first = modules[path[0].index] if isinstance(path[0], Layer) else None
    takes = signature_of(first) if isinstance(first, nn.Module) else None
    if takes is not None and len(layers) > 1:  # the loss is not the first layer's
        takes = takes._replace(shifts_labels=False)
    skeleton = _skeleton(model, modules)
    return Model(path, layers, modules, skeleton, tensors, takes=takes)


def model_in_pieces(model: nn.Module, parts: Iterable[tuple[str, nn.Module]]) -> Model:
    """A model whose layers are these, by the names of submodules, in this order.

    Those that are `OwnTensors` hold what the module of that name has itself.

    Raises ValueError if a parameter has no shape yet.
    """
    layers: list[Layer] = []
    modules: list[Callable[..., Any]] = []
    for name, module in parts:
        holds = isinstance(module, OwnTensors)
        layers.append(Layer(len(layers), name, kind_of(module), holds=holds))
        modules.append(module)
    skeleton, tensors = _skeleton(model, modules), _inventory(model, layers)
    return Model((), layers, modules, skeleton, tensors, takes=signature_of(model))


def _inventory(model: nn.Module, layers: list[Layer]) -> dict[str, ParameterInfo]:
    """Parameters and buffers by their first name, tied ones once, in the model's order."""
    by_name = {layer.name: layer for layer in reversed(layers)}
    names: dict[int, list[str]] = {}
    found: list[tuple[str, torch.Tensor, bool, bool]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, p in module._parameters.items():
            if p is not None:
                found.append((dot + name, p, False, True))
        for name, b in module._buffers.items():
            if b is not None:
                found.append((dot + name, b, True, name not in module._non_persistent_buffers_set))
    # A module that is at two places of the model is one layer, with the first name.
    found = [entry for entry in found if _has_owner(entry[0], by_name)]
    for name, tensor, _, _ in found:
        names.setdefault(id(tensor), []).append(name)
    tensors: dict[str, ParameterInfo] = {}
    for name, tensor, is_buffer, persistent in found:
        if names[id(tensor)][0] != name:
            continue
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{name!r} is uninitialized (a lazy module): run the model once on a sample, "
                "then make the chain"
            )
        tensors[name] = ParameterInfo(
            name=name,
            layer=owner_of(name, by_name).name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            nbytes=tensor.numel() * tensor.element_size(),
            device=tensor.device,
            requires_grad=tensor.requires_grad,
            is_buffer=is_buffer,
            persistent=persistent,
            attributes=dict(vars(tensor)),
            hooked=bool(tensor._backward_hooks),
            names=tuple(names[id(tensor)]),
        )
    return tensors


def owner_of(name: str, layers: Mapping[str, Layer]) -> Layer:
    """The layer, of those by name, that a parameter's full name belongs to."""
    prefix = name
    while prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in layers:
            return layers[prefix]
    raise KeyError(name)


def _has_owner(name: str, layers: Mapping[str, Layer]) -> bool:
    try:
        owner_of(name, layers)
    except KeyError:
        return False
    return True


def local_name(name: str, layer: Layer) -> str:
    """A parameter's name inside its layer."""
    return name[len(layer.name) + 1 :] if layer.name else name


def _skeleton(model: nn.Module, modules: list[Callable[..., Any]]) -> bytes:
    """The model's containers pickled, with the index of each layer in its place: no weights.

    What a layer only holds for another module has its index and name there.
    """
    marks: dict[int, Any] = {id(module): i for i, module in enumerate(modules)}
    for i, module in enumerate(modules):
        if isinstance(module, OwnTensors):
            named = {**module._parameters, **module._buffers}
            marks |= {id(t): (i, name) for name, t in named.items() if t is not None}

    def culprit() -> str | None:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                try:
                    pack.dumps(value, lambda part: marks.get(id(part)))
                except Exception:
                    if not key.startswith("_"):
                        return f"attribute {key!r} of {name or kind_of(model)!r}"
        return None

    return pack.pickle_or_explain(
        lambda: pack.dumps(model, lambda part: marks.get(id(part))),
        f"the model {kind_of(model)}",
        ". Take what cannot be pickled (locks, open files, generators) out of it, or make it in "
        "forward()",
        culprit=culprit,
    )


def rebuild_model(
    skeleton: bytes, modules: list[Callable[..., Any]], tensors: Iterable[ParameterInfo]
) -> nn.Module:
    """The model again, of its containers and these layers; what was tied is tied again."""

    def load(mark: Any) -> Any:
        if isinstance(mark, int):
            return modules[mark]
        index, name = mark
        return getattr(modules[index], name)

    model: nn.Module = pack.loads(skeleton, load)
    for info in tensors:
        table, name = _place_of(model, info.name)
        for other in info.names[1:]:
            others, there = _place_of(model, other)
            others[there] = table[name]
    return model


def _place_of(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The table, of a module's parameters or buffers, that has a tensor, and its name there."""
    prefix, _, name = name.rpartition(".")
    owner = model.get_submodule(prefix)
    return owner._parameters if name in owner._parameters else owner._buffers, name
