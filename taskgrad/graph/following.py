"""Follow one run of a model's own forward on the driver, and write down what it does.

Layers do not run: a call of one gives activations, tensors without values that know their shape.
Operations on these become functions of the graph. What is computed of the inputs alone is computed
at once, so that a forward may ask for shapes and for values of its inputs as it likes.

The idea is that of torch.fx's symbolic tracing, with the shapes of fake tensors, and with values
where there are some.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import CheckpointFunction

from taskgrad.errors import TaskgradError
from taskgrad.graph.functions import pack_function, template_of
from taskgrad.graph.known_values import KnownValues
from taskgrad.graph.layer_graph import FUNCTION, Expected, GraphStep, LayerGraph, Value
from taskgrad.graph.layers import kind_of
from taskgrad.graph.pytree import Slot, Structure, flatten
from taskgrad.graph.stand_ins import follower, meaningless, run_with_values
from taskgrad.graph.swapping import contents, restore, swap
from taskgrad.graph.torch_settings import TorchSettings, settings_now

_fake_log = logging.getLogger("torch._subclasses.fake_tensor")
_Tensor: Any = torch.Tensor
# They read the values of their argument.
_READS = {
    *(_Tensor.item, _Tensor.tolist, _Tensor.numpy, _Tensor.__array__, _Tensor.__bool__),
    *(_Tensor.__int__, _Tensor.__float__, _Tensor.__complex__, _Tensor.__index__),
    *(_Tensor.__contains__, torch.equal, torch.allclose, torch.is_nonzero, _Tensor.equal),
    *(_Tensor.allclose, _Tensor.is_nonzero, _Tensor.__reversed__),
}
# They would do nothing that lasts.
_LOST = {
    *(_Tensor.register_hook, _Tensor.retain_grad, _Tensor.backward, torch.autograd.grad),
    *(_Tensor.register_post_accumulate_grad_hook, torch.autograd.backward, _Tensor.set_),
    *(_Tensor.data_ptr, _Tensor.untyped_storage, _Tensor.storage, _Tensor.share_memory_),
}
_NO_SHAPES = (
    *(DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException),
    NotImplementedError,
)


class CannotFollowError(TaskgradError):
    """A forward that cannot be followed; `module` is the name of the one that is at fault.

    If it is a layer that has to be cut further, `cut_further` is True.
    """

    def __init__(self, message: str, module: str, cut_further: bool = False) -> None:
        super().__init__(message)
        self.module = module
        self.cut_further = cut_further


class Activation(torch.Tensor):
    """A tensor between layers, while a forward is followed: its shape, and no values."""

    fake: torch.Tensor
    value: int
    following: Following

    @staticmethod
    def of(fake: torch.Tensor, value: int, following: Following) -> Activation:
        """One that looks like a fake tensor, and stands for a value of the graph."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: Activation = make(
            Activation,
            fake.shape,
            strides=fake.stride(),
            storage_offset=fake.storage_offset(),
            dtype=fake.dtype,
            device=fake.device,
            requires_grad=fake.requires_grad,
        )
        made.fake, made.value, made.following = fake, value, following
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(t for t in _tensors((args, kwargs or {})) if isinstance(t, Activation))
        return found.following.operation(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        found = next(t for t in _tensors((args, kwargs or {})) if isinstance(t, Activation))
        raise found.following.cannot(f"{func} is called by other means than torch's functions")

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        shape = list(self.fake.shape)
        return f"activation(shape={shape}, dtype={self.fake.dtype}, values on a worker)"

    def __format__(self, spec: str) -> str:
        return repr(self) if not spec else format(self.following.read(self), spec)

    def __deepcopy__(self, memo: Any) -> Any:
        return torch.clone(self)


@dataclass
class _Step:
    """A step whose values have the numbers that they get while a forward is followed."""

    layer: int
    name: str
    kind: str
    target: str | bytes | None
    leaves: list[Any] | None
    structure: Structure | None
    results: list[tuple[int, int]]
    settings: TorchSettings
    expected: Expected | None = None
    written: list[tuple[int, int]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    saved: int = 0  # bytes that autograd would keep
    has_effects: bool = False

    @property
    def gives(self) -> list[int]:
        """The numbers of the values that it gives."""
        return [number for _, number in (*self.results, *self.written)]


@dataclass(frozen=True)
class Parts:
    """What a followed model consists of, its stand-ins.

    Attributes
    ----------
    layers
        The index and name of each layer, by the id of the module.
    opened
        The name of each module that is cut, by its id.
    tensors
        Of each fake parameter and buffer, by its id: layer's index, name there, full name, whether
        it is a buffer.
    hooks
        For each layer, by its id, the keys of the hooks that it came with: these run on its worker.
    mode
        Of the fake tensors.
    unknown_shapes
        The classes of layers of which the shapes cannot be inferred.
    """

    layers: Mapping[int, tuple[int, str]]
    opened: Mapping[int, str]
    tensors: Mapping[int, tuple[int, str, str, bool]]
    hooks: Mapping[int, frozenset[int]]
    mode: FakeTensorMode
    unknown_shapes: set[type] = field(default_factory=set)


class Following(TorchFunctionMode):
    """Follows one call of a model.

    Parameters
    ----------
    parts
        The model's stand-ins.
    known
        Records what is computed of the inputs.
    read
        Returns the value of an activation, if it can be had.
    """

    def __init__(
        self,
        parts: Parts,
        known: KnownValues,
        read: Callable[[Following, Activation], torch.Tensor],
    ) -> None:
        super().__init__()
        self.paused = False
        self.known = known
        self.used: list[int] = []  # layers in the order of their first calls
        self.saved: Counter[int] = Counter()  # bytes for the backward, by layer
        self._parts = parts
        self._read = read
        self._settings = settings_now()
        self._steps: list[_Step] = []
        self._begin = 0  # steps before this one are calls already
        self._nodes: dict[int, Any] = {}  # of what these give
        self._values: dict[int, Value] = {}
        self._inputs: dict[Any, tuple[int, torch.Tensor]] = {}  # numbers below zero
        self._given: list[torch.Tensor] = []
        self._versions: list[tuple[torch.Tensor, int | None]] = []
        self._fakes: dict[int, Any] = {}  # what each fake tensor stands for
        self._alive: list[Any] = []
        self._parameters: dict[int, Activation] = {}
        self._together: list[set[int]] = []
        self._by_storage: dict[int, list[Activation]] = {}
        self._calls: Counter[Any] = Counter()
        self._stack: list[str] = [""]

    # -- calls of modules -------------------------------------------------------------------------
    def inside(self, module: nn.Module, run: Callable[[], Any]) -> Any:
        self._stack.append(self._parts.opened[id(module)])
        try:
            return run()
        finally:
            self._stack.pop()

    def layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, name = self._parts.layers[id(module)]
        self._calls[index] += 1
        if index not in self.used:
            self.used.append(index)
        if self._calls[index] > 1:
            name = f"{name} (call {self._calls[index]})"
        kind = type(module).__name__
        step = _Step(index, name, kind, None, None, None, [], settings_now())
        has_buffers = next(module.buffers(), None) is not None
        step.has_effects = has_buffers and any(m.training for m in module.modules())
        own = self._parts.hooks[id(module)]
        added = _hooks_added(module, own)
        for hook, takes_kwargs in added[0]:
            found = hook(module, args, kwargs) if takes_kwargs else hook(module, args)
            if takes_kwargs and found is not None:
                args, kwargs = found
            elif found is not None:
                args = found if isinstance(found, tuple) else (found,)
        with _without(module, own):
            result = self._step(
                step, module, args, kwargs, lambda a, k: run_with_values(module, a, k)
            )
        for hook, takes_kwargs in added[1]:
            given = (args, kwargs) if takes_kwargs else (args,)
            found = hook(module, *given, result)
            result = result if found is None else found
        return result

    # -- operations -------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or not self._concerns(args, kwargs):
            if not self.paused and func in _READS:
                for tensor in _tensors((args, kwargs)):
                    self.known.read(tensor)
            return func(*args, **kwargs)
        return self.operation(func, args, kwargs)

    def _concerns(self, args: Any, kwargs: Any) -> bool:
        return any(
            isinstance(t, Activation) or id(t) in self._parts.tensors
            for t in _tensors((args, kwargs))
        )

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of torch on activations or parameters."""
        if follower.get() is not self:
            raise TaskgradError("an activation is used after the call in which it was made")
        if func in _LOST:
            raise self.cannot(f"{kind_of(func)}() of an activation has no effect here")
        if func is _Tensor.__iter__:
            return iter(torch.unbind(args[0], 0))
        if func is _Tensor.__hash__:
            return id(args[0])
        if func in _READS:
            return self._values_of(func, args, kwargs)
        name = getattr(func, "__name__", type(func).__name__)
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__
            if name == "__set__":
                raise self.cannot(f"the attribute {attribute!r} of an activation is set")
            kind, target, args = attribute, getattr, (args[0], attribute)
        else:
            kind, target = name.strip("_") or name, func
        self._refuse_writing_known(func, name, args, kwargs)
        step = _Step(FUNCTION, "", kind, b"", None, None, [], settings_now())
        return self._step(step, target, args, kwargs, lambda a, k: target(*a, **k))

    def function(self, kind: str, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function that is not one of torch's operations is called with activations."""
        step = _Step(FUNCTION, "", kind, b"", None, None, [], settings_now())
        return self._step(step, target, args, kwargs, lambda a, k: target(*a, **k))

    def _refuse_writing_known(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        writes = (name.endswith("_") and not name.endswith("__")) or name in (
            *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__"),
            *("__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__"),
        )
        target = kwargs.get("out") if kwargs.get("out") is not None else None
        if writes and args:
            target = args[0]
        for tensor in _tensors(target):
            if id(tensor) in self._parts.tensors:
                raise self.cannot(
                    f"it writes into {self._parts.tensors[id(tensor)][2]!r}, one of its own "
                    "parameters or buffers"
                )
            if not isinstance(tensor, Activation):
                raise self.cannot(
                    f"{name} writes an activation into a tensor that was made in forward(), of "
                    "which the values are here"
                )

    # -- steps ------------------------------------------------------------------------------------
    def _step(
        self,
        step: _Step,
        target: Any,
        args: Any,
        kwargs: Any,
        with_values: Callable[[Any, Any], Any],
    ) -> Any:
        """Add a step to the graph; returns what stands for its result."""
        with self._not_followed():
            return self._added(step, target, args, kwargs, with_values)

    def _added(
        self,
        step: _Step,
        target: Any,
        args: Any,
        kwargs: Any,
        with_values: Callable[[Any, Any], Any],
    ) -> Any:
        leaves, structure = flatten((args, kwargs))
        self._refuse_foreign(leaves)
        was = contents((args, kwargs))
        held = _held(structure)
        given = [self._activation_of(_as_it_is(leaf)) for leaf in leaves]
        fakes = [self._fake_of(leaf) for leaf in given]
        before = {id(f): f._version for f in fakes if isinstance(f, FakeTensor)}
        args, kwargs = self._swap_in((args, kwargs))
        touched: set[int] = set()
        saved, infers, changed = 0, True, set[int]()
        kind = type(target)
        try:
            if kind in self._parts.unknown_shapes:
                raise NotImplementedError(kind)
            result, saved = self._run(target, args, kwargs, touched)
        except CannotFollowError:
            raise
        except Exception as error:
            # The fake run may fail where the layer does not; if that does too, it is the user's.
            infers = False
            restore(was)
            if step.layer != FUNCTION:
                args, kwargs = self._swap_in((args, kwargs))
                name = self._parts.layers[id(target)][1]
                result, args, kwargs, changed = self._shaped_by_running(
                    name, args, kwargs, with_values, touched
                )
                self._parts.unknown_shapes.add(kind)
            elif isinstance(error, _NO_SHAPES):
                args, kwargs = self._swap_out((args, kwargs))
                result = self._shaped_by_values(target, args, kwargs)
                args, kwargs = self._swap_in((args, kwargs))
            else:
                raise
        changed |= {id(f) for f in _written(before, fakes)}
        found, _ = flatten(result)
        has_tensors = any(isinstance(leaf, torch.Tensor) for leaf in found)
        if step.layer == FUNCTION and not has_tensors and not changed:
            self._swap_out((args, kwargs))
            return result  # a shape, or another property
        self._add(step, target)
        written = changed
        self._clone_if_shared(step, given, written)
        number = len(self._steps) - 1
        if not isinstance(target, nn.Module):
            held = set()
        for i in held:
            leaf = given[i]
            if isinstance(leaf, Activation) and id(leaf.fake) not in touched | written:
                shape, dtype = tuple(leaf.fake.shape), leaf.fake.dtype
                given[i] = torch.empty(shape, dtype=dtype, device="meta")
        step.leaves = [self._slot_of(leaf) for leaf in given]
        step.structure = structure
        step.inputs = list(dict.fromkeys(x.index for x in step.leaves if type(x) is Slot))
        step.saved = saved
        self.saved[step.layer] += saved
        passed = {id(f) for f in fakes if isinstance(f, FakeTensor)}
        if not infers:
            step.expected = Expected(
                tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in found),
                tuple(None if isinstance(x, torch.Tensor) else x for x in found),
            )
        for i, leaf in enumerate(found):
            if isinstance(leaf, FakeTensor) and (id(leaf) not in passed or id(leaf) in written):
                step.results.append((i, self._new_value(leaf, number)))
                written.discard(id(leaf))
        after = flatten((args, kwargs))[0]
        for i, leaf in enumerate(after):
            if isinstance(leaf, FakeTensor) and (
                id(leaf) in written or (id(leaf) not in self._fakes)
            ):
                step.written.append((i, self._new_value(leaf, number)))
                written.discard(id(leaf))
        self._swap_out((args, kwargs))
        return self._swap_out(result)

    def _run(self, target: Any, args: Any, kwargs: Any, touched: set[int]) -> tuple[Any, int]:
        """Run on fake tensors; returns the result, and the bytes that autograd would keep."""
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                kept[id(tensor)] = tensor.nbytes
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        made: list[torch.Tensor] = []
        was, _fake_log.disabled = _fake_log.disabled, True  # it logs what is an exception, too
        try:
            with self._not_followed(), self._parts.mode, _Touched(touched, made), hooks:
                result = target(*args, **kwargs)
        finally:
            _fake_log.disabled = was
        if isinstance(target, nn.Module):
            name = self._parts.layers[id(target)][1]
            for tensor in made:
                self.known.foreign[tensor.untyped_storage()._cdata] = tensor, name
        return result, sum(kept.values())

    def _refuse_foreign(self, leaves: Sequence[Any]) -> None:
        """Raise if one of these was made inside of a layer, and is not what that returned."""
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or isinstance(leaf, Activation):
                continue
            strided = leaf.layout is torch.strided
            if not strided or id(leaf) in self._fakes or id(leaf) in self._parts.tensors:
                continue
            _, layer = self.known.foreign.get(leaf.untyped_storage()._cdata, (None, ""))
            if layer or isinstance(leaf, FakeTensor):
                raise _inside(layer or self._stack[-1])

    @contextlib.contextmanager
    def _not_followed(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            with self.known.pause():
                yield
        finally:
            self.paused = before

    def _shaped_by_running(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        run: Callable[[Any, Any], Any],
        touched: set[int],
    ) -> tuple[Any, Any, Any, set[int]]:
        """The result of a layer, as fake tensors, from a run on values of no meaning.

        Also its arguments after that, and the ids of those that it has written.
        """
        real: dict[int, torch.Tensor] = {}
        fakes: dict[int, torch.Tensor] = {}

        def to_real(fake: torch.Tensor) -> torch.Tensor:
            if id(fake) not in real:
                known = self._fakes.get(id(fake))
                if isinstance(known, torch.Tensor) and not isinstance(known, Activation):
                    value = known.detach().clone()
                else:
                    value = meaningless(fake)
                real[id(fake)] = value.requires_grad_(fake.requires_grad)
                if fake.requires_grad:  # not a leaf: it may be written
                    real[id(fake)] = real[id(fake)].clone()
                fakes[id(real[id(fake)])] = fake
            return real[id(fake)]

        def to_fake(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor):
                return tensor
            if id(tensor) not in fakes:
                made = self._parts.mode.from_tensor(tensor.detach().clone())
                fakes[id(tensor)] = made.requires_grad_(tensor.requires_grad)
                real[id(made)] = tensor
            return fakes[id(tensor)]

        with self._not_followed():
            args, kwargs = swap((args, kwargs), to_real)
            versions = {key: value._version for key, value in real.items()}
            state = torch.get_rng_state()
            made: list[torch.Tensor] = []
            used: set[int] = set()
            try:
                with _Touched(used, made):
                    result = run(args, kwargs)
            finally:
                torch.set_rng_state(state)
            for tensor in made:
                self.known.foreign[tensor.untyped_storage()._cdata] = tensor, name
            touched |= {key for key, value in real.items() if id(value) in used}
            changed = {key for key, seen in versions.items() if real[key]._version != seen}
            result = swap(result, to_fake)
            args, kwargs = swap((args, kwargs), to_fake)
            self._alive.append((real, fakes))
        return result, args, kwargs, changed

    def _shaped_by_values(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function, as fake tensors, whose shapes depend on values."""
        grad = torch.is_grad_enabled()
        with self._values_read(args, kwargs) as (real_args, real_kwargs):
            with torch.set_grad_enabled(grad):
                return self._as_fakes(target(*real_args, **real_kwargs))

    def _as_fakes(self, result: Any) -> Any:
        mode = self._parts.mode

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor):
                return tensor
            made = mode.from_tensor(tensor.detach().clone())
            return made.requires_grad_(tensor.requires_grad)

        leaves, structure = flatten(result)
        return structure.build([fake(x) if isinstance(x, torch.Tensor) else x for x in leaves])

    @contextlib.contextmanager
    def _values_read(self, args: Any, kwargs: Any) -> Iterator[Any]:
        leaves, structure = flatten((args, kwargs))
        real = []
        for leaf in leaves:
            found = self._activation_of(leaf)
            if isinstance(found, Activation):
                value = self.read(found).detach()
                found = value.requires_grad_(found.fake.requires_grad)
            real.append(found)
        with self._not_followed(), torch.no_grad():
            yield structure.build(real)

    def _values_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._values_read(args, kwargs) as (args, kwargs):
            return func(*args, **kwargs)

    def read(self, activation: Activation) -> torch.Tensor:
        """The value of an activation."""
        self.known.repeatable = False
        return self._read(self, activation)

    # -- values -----------------------------------------------------------------------------------
    def _activation_of(self, leaf: Any) -> Any:
        """An activation in the place of a parameter; other leaves as they are."""
        if isinstance(leaf, Activation) and leaf.following is not self:
            raise TaskgradError(
                "an activation of an earlier call is used: the model's forward kept it in an "
                "attribute, and its value is not here. Have the forward return what it is to keep"
                f"{line_of_user()}"
            )
        about = self._parts.tensors.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
        if about is None:
            return leaf
        found = self._parameters.get(id(leaf))
        if found is None:
            index, local, full, is_buffer = about
            kind = "Buffer" if is_buffer else "Parameter"
            step = _Step(index, full, kind, local, None, None, [], settings_now())
            if index not in self.used:
                self.used.append(index)
            self._steps.append(step)
            found = Activation.of(leaf, len(self._values), self)
            self._values[found.value] = _value_of(leaf, len(self._steps) - 1)
            step.results.append((0, found.value))
            self._parameters[id(leaf)] = found
            self._fakes[id(leaf)] = found
        return found

    def _fake_of(self, leaf: Any) -> Any:
        if isinstance(leaf, Activation):
            return leaf.fake
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            with self._not_followed():
                fake = self._parts.mode.from_tensor(leaf)
            if id(fake) not in self._fakes:
                self._fakes[id(fake)] = leaf
                self._alive.append((fake, leaf))
            return fake
        return leaf

    def _swap_in(self, value: Any) -> Any:
        return swap(value, lambda tensor: self._fake_of(self._activation_of(tensor)))

    def _swap_out(self, value: Any) -> Any:
        def real(tensor: torch.Tensor) -> torch.Tensor:
            return self._fakes.get(id(tensor), tensor) if isinstance(tensor, FakeTensor) else tensor

        return swap(value, real)

    def _new_value(self, fake: torch.Tensor, step: int) -> int:
        """The number of the value that a step gives here."""
        number = len(self._values)
        self._values[number] = _value_of(fake, step)
        known = self._fakes.get(id(fake))
        storage = fake.untyped_storage()._cdata
        self.known.foreign.pop(storage, None)
        if isinstance(known, Activation):  # it was written in place
            known.value = number
        else:
            made = Activation.of(fake, number, self)
            self._fakes[id(fake)] = made
            self._alive.append((fake, made))
            self._by_storage.setdefault(storage, []).append(made)
        return number

    def _clone_if_shared(self, step: _Step, given: list[Any], written: set[int]) -> None:
        """Keep what earlier steps took from being written: the step writes into a copy.

        If there are views of it, all that sees them has to be in one stage instead.
        """
        for leaf in dict.fromkeys(x for x in given if isinstance(x, Activation)):
            if id(leaf.fake) not in written:
                continue
            source = self._values[leaf.value].step
            if source is not None and isinstance(self._steps[source].target, str):
                raise self.cannot(
                    f"{step.name or step.kind} writes into {self._steps[source].name!r}, one of "
                    "its own parameters or buffers"
                )
            storage = leaf.fake.untyped_storage()._cdata
            views = [a for a in self._by_storage.get(storage, []) if a is not leaf]
            if not views:
                users = [s for s in self._steps[:-1] if leaf.value in s.inputs]
                if users:
                    self._insert_clone(leaf)
                continue
            numbers = {leaf.value, *(a.value for a in views)}
            group = {len(self._steps) - 1}
            for i, other in enumerate(self._steps[:-1]):
                if numbers & {*other.gives, *other.inputs}:
                    group.add(i)
            self._together.append(group)

    def _insert_clone(self, leaf: Activation) -> None:
        """Have the newest step take a copy of an activation."""
        newest = self._steps.pop()
        clone = _Step(FUNCTION, "", "clone", b"", None, None, [], newest.settings)
        number = self._add(clone, torch.clone)
        clone.leaves, clone.structure = flatten(((leaf,), {}))
        clone.leaves = [Slot(leaf.value)]
        clone.inputs = [leaf.value]
        leaf.value = len(self._values)
        self._values[leaf.value] = _value_of(leaf.fake, number)
        clone.results.append((0, leaf.value))
        self._steps.append(newest)

    def _slot_of(self, leaf: Any) -> Any:
        if isinstance(leaf, Activation):
            return Slot(leaf.value)
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            return Slot(self._input(leaf))
        return leaf

    def _input(self, tensor: torch.Tensor) -> int:
        """The number of a tensor of the driver's that a step takes."""
        key = id(tensor)
        if key not in self._inputs:
            self._inputs[key] = (-1 - len(self._inputs), tensor)
            version = None if tensor.is_inference() else tensor._version
            self._versions.append((tensor, version))
        return self._inputs[key][0]

    def _add(self, step: _Step, target: Any) -> int:
        """Add a step; a function gets its name, and is packed. Returns the step's number."""
        if step.layer == FUNCTION:
            container = self._stack[-1]
            name = f"{container}.{step.kind}" if container else step.kind
            self._calls[name] += 1
            step.name = name if self._calls[name] == 1 else f"{name}_{self._calls[name] - 1}"
            step.target = _packed(target, step.name)
        self._steps.append(step)
        return len(self._steps) - 1

    # -- the result -------------------------------------------------------------------------------
    def graph(self, output: Any) -> tuple[LayerGraph, list[Any]]:
        """The graph of what was followed, with this output, and the values of its inputs.

        These are tensors; and nodes of what the steps gave that have run.
        """
        leaves, structure = flatten(((output,), {}))
        self._refuse_foreign(leaves)
        slots = [self._slot_of(self._activation_of(leaf)) for leaf in leaves]
        needed = [slot.index for slot in slots if type(slot) is Slot]
        numbers, values, given = self._numbered(needed)
        found = LayerGraph(
            values,
            len(given),
            self._placed(numbers),
            template_of([_at(slot, numbers) for slot in slots], structure),
            tuple(dict.fromkeys(numbers[n] for n in needed)),
            self._groups(),
            self._settings,
            self._effects(),
        )
        return found, given

    def part(self) -> tuple[LayerGraph, list[Any], dict[int, int]]:
        """The graph of the steps that have not run yet; all that they give is kept.

        Also the values of its inputs, and the graph's number for each value that the steps give.
        """
        numbers, values, given = self._numbered([])
        made = [n for step in self._steps[self._begin :] for n in step.gives]
        kept = {number: numbers[number] for number in made}
        found = LayerGraph(
            values,
            len(given),
            self._placed(numbers),
            b"",
            (),
            self._groups(),
            self._settings,
            self._effects(),
            tuple(kept.values()),
        )
        return found, given, kept

    def have_run(self, nodes: Mapping[int, Any]) -> None:
        """The steps so far are calls now, with these nodes of what they give."""
        self._nodes |= nodes
        self._begin = len(self._steps)

    def node_of(self, activation: Activation) -> Any:
        """The node of an activation that steps which have run gave."""
        return self._nodes[activation.value]

    def _numbered(
        self, needed: Sequence[int]
    ) -> tuple[dict[int, int], tuple[Value, ...], list[Any]]:
        """The numbers that values have in the graph, the values, and those of the inputs."""
        for tensor, version in self._versions:
            if version is not None and tensor._version != version:
                raise self.cannot(
                    "it writes into a tensor of its inputs after it gave it to a layer: give the "
                    "layer a .clone()"
                )
        steps = self._steps[self._begin :]
        taken = dict.fromkeys([n for step in steps for n in step.inputs] + list(needed))
        numbers: dict[int, int] = {}
        values: list[Value] = []
        given: list[Any] = []
        for number, tensor in self._inputs.values():
            numbers[number] = len(values)
            values.append(Value(None, tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
            given.append(tensor)
        for number in taken:
            if number in self._nodes:
                numbers[number] = len(values)
                values.append(replace(self._values[number], step=None))
                given.append(self._nodes[number])
        for number, value in self._values.items():
            if value.step is not None and value.step >= self._begin:
                numbers[number] = len(values)
                values.append(replace(value, step=value.step - self._begin))
        return numbers, tuple(values), given

    def _placed(self, numbers: Mapping[int, int]) -> tuple[GraphStep, ...]:
        return tuple(
            GraphStep(
                step.layer,
                step.name,
                step.kind,
                step.target,
                b""
                if step.leaves is None or step.structure is None
                else self._template(step, [_at(leaf, numbers) for leaf in step.leaves]),
                tuple([numbers[n] for n in step.inputs]),
                tuple([(i, numbers[n]) for i, n in step.results]),
                step.settings,
                step.expected,
                tuple([(i, numbers[n]) for i, n in step.written]),
            )
            for step in self._steps[self._begin :]
        )

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        found = []
        for group in self._together:
            late = [number for number in group if number >= self._begin]
            if late and len(late) < len(group):
                raise self.cannot(
                    "it writes in place into a value that has been computed already, as another "
                    "value was read meanwhile: write into a .clone()"
                )
            if late:
                found.append(tuple(sorted(number - self._begin for number in late)))
        return tuple(found)

    def _effects(self) -> tuple[int, ...]:
        return tuple(i for i, step in enumerate(self._steps[self._begin :]) if step.has_effects)

    def _template(self, step: _Step, leaves: Sequence[Any]) -> bytes:
        assert step.structure is not None
        try:
            return template_of(leaves, step.structure)
        except Exception as error:
            raise self.cannot(
                f"an argument of {step.name!r} cannot be pickled ({type(error).__name__}: {error})"
            ) from error

    def from_inside(self, layer: str) -> CannotFollowError:
        """The error for a value that leaves the inside of a layer."""
        return _inside(layer)

    def cannot(self, why: str) -> CannotFollowError:
        """The error for a forward that cannot be followed."""
        module = self._stack[-1]
        return CannotFollowError(f"{why}{line_of_user()}", module)


class _Touched(TorchDispatchMode):
    """Notes the tensors that operations take, and those that they make."""

    def __init__(self, touched: set[int], made: list[torch.Tensor]) -> None:
        super().__init__()
        self._touched = touched
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._touched.update(id(t) for t in _tensors((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        given = {id(t) for t in _tensors((args, kwargs or {}))}
        self._made += [
            t
            for t in _tensors(result)
            if t.layout is torch.strided and id(t) not in given and not func.is_view
        ]
        return result


def _at(leaf: Any, numbers: Mapping[int, int]) -> Any:
    """A leaf of arguments, with the number that a value has in the graph."""
    if type(leaf) is _Pickled:
        return cloudpickle.loads(leaf.data)
    return Slot(numbers[leaf.index]) if type(leaf) is Slot else leaf


def _inside(layer: str) -> CannotFollowError:
    return CannotFollowError(
        f"a value from inside of {layer!r} is used outside of it, as by a hook on a part of it",
        layer,
        cut_further=True,
    )


_Hooks = list[tuple[Callable[..., Any], bool]]


def _hooks_added(module: nn.Module, own: frozenset[int]) -> tuple[_Hooks, _Hooks]:
    """The hooks before and after the forward that the model has added since it was copied."""
    before = [
        (hook, key in module._forward_pre_hooks_with_kwargs)
        for key, hook in module._forward_pre_hooks.items()
        if key not in own
    ]
    after = [
        (hook, key in module._forward_hooks_with_kwargs)
        for key, hook in module._forward_hooks.items()
        if key not in own
    ]
    return before, after


@contextlib.contextmanager
def _without(module: nn.Module, own: frozenset[int]) -> Iterator[None]:
    """Leave a module only its own hooks in the block."""
    tables: list[Any] = [module._forward_pre_hooks, module._forward_hooks]
    was = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key in table if key not in own]:
            del table[key]
    try:
        yield
    finally:
        for table, entries in zip(tables, was, strict=True):
            table.update(entries)


@dataclass(frozen=True)
class _Pickled:
    """An object among the arguments as it was when it was given."""

    data: bytes


_FIXED = (
    *(torch.Tensor, str, bytes, int, float, complex, type(None), type(Ellipsis), slice, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, FunctionType, Slot),
    *(BuiltinFunctionType, ModuleType, nn.Module),
)


def _as_it_is(leaf: Any) -> Any:
    """A leaf, or what is known of it now if it may change."""
    if isinstance(leaf, _FIXED):
        return leaf
    try:
        return _Pickled(cloudpickle.dumps(leaf))
    except Exception:  # an error when the whole is pickled
        return leaf


def _held(structure: Structure) -> set[int]:
    """The positions of leaves that are held by objects, and not by built-in containers."""
    found: set[int] = set()
    position = 0

    def walk(part: Structure, inside: bool) -> None:
        nonlocal position
        if part.kind == "leaf":
            if inside:
                found.add(position)
            position += 1
            return
        for child in part.children:
            walk(child, inside or part.kind not in ("tuple", "list", "dict"))

    walk(structure, False)
    return found


def _written(before: Mapping[int, int], fakes: Sequence[Any]) -> list[torch.Tensor]:
    found = {id(f): f for f in fakes if isinstance(f, FakeTensor)}
    return [f for key, f in found.items() if f._version != before[key]]


def _value_of(fake: torch.Tensor, step: int) -> Value:
    return Value(step, tuple(fake.shape), fake.dtype, fake.requires_grad)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]


_functions: dict[Any, bytes] = {}


def _packed(target: Any, name: str) -> bytes:
    try:
        known = _functions.get(target)
    except TypeError:
        return pack_function(target, name).data
    if known is None:
        packed = pack_function(target, name)
        known = packed.data
        if getattr(target, "__module__", "").startswith("torch") or target is getattr:
            _functions[target] = known
    return known


_OURS = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent
_PYTHON = Path(contextlib.__file__).parent


def line_of_user() -> str:
    """The line of code that is running and is neither torch's nor ours, for a message."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inner = {_OURS, _TORCH} & set(path.parents) or path.parent == _PYTHON
        if not inner and path.exists():
            return f" ({path.name}, line {frame.f_lineno}, in {frame.f_code.co_name})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


class _Applied:
    """``apply`` of a class of torch.autograd.Function, as a function that can be sent."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.__name__ = kind.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind.apply(*args, **kwargs)  # type: ignore[attr-defined]


@contextlib.contextmanager
def functions_followed() -> Iterator[None]:
    """Let the calls of torch.autograd.Function in the block be followed: torch does not say them.

    They are those of this thread only.
    """

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        following = follower.get()
        if not isinstance(following, Following) or following.paused:
            return _apply(cls, *args, **kwargs)
        if issubclass(cls, CheckpointFunction):
            return args[0](*args[2:])
        if not following._concerns(args, kwargs):
            return _apply(cls, *args, **kwargs)
        return following.function(cls.__name__, _Applied(cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment]
