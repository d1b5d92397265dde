"""Pickle an object apart from its tensors.

One mechanism for three needs: a layer travels to its worker with its tensors as separate buffers;
a function's closed-over tensors become inputs of its call, so that gradients reach them; a model's
skeleton stays on the driver without a copy of the weights.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cloudpickle
import torch
from torch import nn
from torch.nn.utils import parametrize

from taskgrad.errors import TaskgradError
from taskgrad.graph.memory_layout import View, with_bases, without_bases
from taskgrad.graph.output_capturing import reduce_recording
from taskgrad.graph.parameter_extras import TensorExtras, extras_of, set_extras

T = TypeVar("T")
Persist = Callable[[Any], Any]


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, persist: Persist) -> None:
        super().__init__(file)
        self._persist = persist

    def persistent_id(self, obj: Any) -> Any:
        return self._persist(obj)

    def reducer_override(self, obj: Any) -> Any:
        """Called for all but numbers, strings and built-in containers."""
        reduced: Any = NotImplemented
        if isinstance(obj, nn.Module):
            reduced = _reduce_module(obj)
        elif isinstance(obj, torch.Tensor) and obj.is_leaf and obj.requires_grad:
            reduced = _again_a_leaf, obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL)[:2]
        return super().reducer_override(obj) if reduced is NotImplemented else reduced


def _again_a_leaf(build: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> torch.Tensor:
    """Unpickle a tensor that was a leaf: torch does not make a leaf of a subclass's instance."""
    found = build(*arguments)
    if found.is_leaf:
        return found
    made = found.detach().requires_grad_()
    vars(made).update(vars(found))
    return made


def dumps(obj: Any, persist: Persist) -> bytes:
    """Pickle `obj`, with `persist(part)` in place of each part for which that is not None."""
    file = io.BytesIO()
    _Pickler(file, persist).dump(obj)
    return file.getvalue()


def loads(data: bytes, load: Callable[[Any], Any]) -> Any:
    """Inverse of `dumps`; `load` turns what `persist` returned back into the part.

    Raises TaskgradError if the code of a class or function cannot be imported.
    """
    unpickler = pickle.Unpickler(io.BytesIO(data))
    unpickler.persistent_load = load  # type: ignore[method-assign]
    try:
        return unpickler.load()
    except (ImportError, AttributeError) as error:
        raise missing_code(error) from None


def loads_plain(data: bytes) -> Any:
    """Undo plain pickling; raises as `loads` does."""
    try:
        return pickle.loads(data)
    except (ImportError, AttributeError) as error:
        raise missing_code(error) from None


def missing_code(error: Exception) -> TaskgradError:
    """The error for code that cannot be imported where it is to run."""
    return TaskgradError(
        f"code that a layer or function needs is not on this worker ({error}). Install its "
        "package there, send the file with client.upload_file(path), or define it in the "
        "script or notebook itself, whose functions and classes are sent along"
    )


def is_plain(obj: Any) -> bool:
    """Tensors that can be taken out; subclasses and uninitialized ones pickle in their own way."""
    return type(obj) in (torch.Tensor, nn.Parameter) and obj.layout is torch.strided


@dataclass(frozen=True)
class Packed:
    """An object's bytes; its tensors in the order in which they were met; its outermost modules."""

    data: bytes
    tensors: list[torch.Tensor]
    modules: list[nn.Module]

    def laid_out(self) -> list[torch.Tensor | View]:
        """The tensors in the form in which they are sent to a process that will own them."""
        return with_bases(self.tensors)


def pack(obj: Any, *, hooks: bool = False) -> Packed:
    """Pickle without tensors.

    A tensor met twice is stored once, so that tied parameters stay tied. Attributes of tensors are
    in the pickle. With `hooks` the hooks on their gradients are too. Without, hooks run on the
    tensors of this process, when these get their gradients.
    """
    tensors: list[torch.Tensor] = []
    index: dict[int, int] = {}
    modules: list[nn.Module] = []
    inside: set[int] = set()

    def persist(part: Any) -> Any:
        if isinstance(part, nn.Module) and id(part) not in inside:
            modules.append(part)
            inside.update(id(m) for m in part.modules())
        if not is_plain(part):
            return None
        carried = None
        if id(part) not in index:
            index[id(part)] = len(tensors)
            tensors.append(part)
            carried = extras_of(part, hooks=hooks)
        kind = "parameter" if isinstance(part, nn.Parameter) else "tensor"
        return kind, index[id(part)], part.requires_grad, carried

    return Packed(dumps(obj, persist), tensors, modules)


def pickle_or_explain(
    pickle: Callable[[], T],
    what: str | Callable[[], str],
    advice: str = "",
    *,
    culprit: Callable[[], str | None] = lambda: None,
    kind: type[Exception] = TypeError,
) -> T:
    """Return `pickle()`, or raise an error of this kind which says what cannot be pickled.

    Parameters
    ----------
    what
        What is pickled, for the message, which ends in `advice`; or a function that says it.
    culprit
        Looks for the part of it that is the cause; returns None if it finds none.
    """
    try:
        return pickle()
    except Exception as error:
        whole, part = what if isinstance(what, str) else what(), culprit()
        raise kind(
            f"{whole} cannot be sent to a worker, because {f'the {part}' if part else 'it'} cannot "
            f"be pickled ({type(error).__name__}: {error}){advice}"
        ) from error


def unpack(data: bytes, values: Sequence[Any], *, own: bool) -> Any:
    """Undo `pack`, with these tensors' values.

    With `own`, every tensor becomes a fresh leaf (a Parameter where it was one), for an object that
    will own them; else the values themselves are put in, autograd history included.
    """
    values = without_bases(values)
    made: dict[int, torch.Tensor] = {}

    def load(pid: tuple[str, int, bool, TensorExtras | None]) -> torch.Tensor:
        kind, i, requires_grad, carried = pid
        if i not in made:
            made[i] = values[i] if not own else _leaf(kind, values[i].detach(), requires_grad)
        if carried is not None:
            set_extras(made[i], carried)
        return made[i]

    return loads(data, load)


def _leaf(kind: str, value: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    if kind == "parameter":
        return nn.Parameter(value, requires_grad)
    return value.requires_grad_(requires_grad)


def parametrized_names(module: nn.Module) -> list[str]:
    """The tensors of a module itself, not of its parts, that have parametrizations."""
    # `parametrize.is_parametrized` is also true of a compiled wrapper of such a module.
    refuses = vars(type(module)).get("__getstate__")
    if getattr(refuses, "__module__", None) != parametrize.__name__:
        return []
    found = module._modules["parametrizations"]
    return list(found) if isinstance(found, nn.ModuleDict) else []


def _reduce_module(module: nn.Module) -> Any:
    """A module as pickle's (function, arguments, state) if it needs care; else NotImplemented.

    It does if it is parametrized, or if transformers has noted its class; see `reduce_recording`.
    ``torch.nn.utils.parametrize`` gives each of these modules a new class, which refuses to be
    pickled. The class only adds properties, which can be made again from the names of the
    parametrized tensors; the tensors behind them are ordinary parameters and buffers.
    """
    names = parametrized_names(module)
    if not names:
        return reduce_recording(module)
    kind: Any = parametrize.type_before_parametrizations(module)
    if (kind.__reduce__, kind.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__):
        return NotImplemented
    return _bare, (kind, names), kind.__getstate__(module)


def _bare(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """A module without state, of a class as `register_parametrization` makes it."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name in names:
        made.register_buffer(name, torch.empty(0))
        parametrize.register_parametrization(made, name, nn.Identity(), unsafe=True)
    vars(made).clear()
    return made
