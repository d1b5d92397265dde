"""Build the graph of a model's layers, step by step, as its forward is followed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import cloudpickle
import torch
from torch import nn

from taskgrad.graph.activation import Activation
from taskgrad.graph.functions import pack_function, template_of
from taskgrad.graph.layer_graph import FUNCTION, Expected, GraphStep, LayerGraph, Value
from taskgrad.graph.pytree import Slot, Structure, flatten
from taskgrad.graph.torch_settings import TorchSettings


@dataclass
class RecordedStep:
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
    has_effects: bool = False

    def takes(self, leaves: list[Any], structure: Structure) -> None:
        """Its arguments have these leaves, with slots for values."""
        self.leaves, self.structure = leaves, structure
        self.inputs = list(dict.fromkeys(x.index for x in leaves if type(x) is Slot))

    @property
    def gives(self) -> list[int]:
        """The numbers of the values that it gives."""
        return [number for _, number in (*self.results, *self.written)]


class GraphBuilder:
    """The steps so far, with the values that they take and give.

    Values have numbers of their own here: those of steps from 0 on, those of inputs below.

    Parameters
    ----------
    settings
        Torch's where the model was called.
    cannot
        Makes the error for what a graph cannot have.

    Attributes
    ----------
    steps, values, together
        As in a `LayerGraph`, except for the numbers.
    by_storage
        The activations that show the same memory, by the storage of the fake tensors.
    """

    def __init__(self, settings: TorchSettings, cannot: Callable[[str], Exception]) -> None:
        self.steps: list[RecordedStep] = []
        self.values: dict[int, Value] = {}
        self.together: list[set[int]] = []
        self.by_storage: dict[int, list[Activation]] = {}
        self._names: Counter[str] = Counter()
        self._settings = settings
        self._cannot = cannot
        self._begin = 0  # steps before this one are calls already
        self._nodes: dict[int, Any] = {}  # of what these give
        self._inputs: dict[int, tuple[int, torch.Tensor]] = {}
        self._versions: list[tuple[torch.Tensor, int | None]] = []

    def add_value(self, like: torch.Tensor, step: int) -> int:
        """The number of a new value that a step gives, with the shape of a fake tensor."""
        number = len(self.values)
        self.values[number] = Value(step, tuple(like.shape), like.dtype, like.requires_grad)
        return number

    def copy_shared(self, given: Sequence[Any], written: set[int], container: str) -> None:
        """Keep what earlier steps took from being written: the newest step writes into a copy.

        If there are views of it, all that sees them has to be in one stage instead.
        """
        newest = self.steps[-1]
        seen: list[set[int]] = []  # the values that show the same memory, if there are views
        for leaf in dict.fromkeys(x for x in given if isinstance(x, Activation)):
            if id(leaf.fake) not in written:
                continue
            source = self.values[leaf.value].step
            if source is not None and isinstance(self.steps[source].target, str):
                raise self._cannot(
                    f"{newest.name or newest.kind} writes into {self.steps[source].name!r}, one of "
                    "its own parameters or buffers"
                )
            storage = leaf.fake.untyped_storage()._cdata
            views = [a for a in self.by_storage.get(storage, []) if a is not leaf]
            if views:
                seen.append({leaf.value, *(a.value for a in views)})
            elif any(leaf.value in step.inputs for step in self.steps[:-1]):
                self._insert_clone(leaf, container)
        for numbers in seen:
            users = [
                i for i, step in enumerate(self.steps[:-1]) if numbers & {*step.gives, *step.inputs}
            ]
            self.together.append({*users, len(self.steps) - 1})

    def _insert_clone(self, leaf: Activation, container: str) -> None:
        """Have the newest step take a copy of an activation."""
        newest = self.steps.pop()
        clone = RecordedStep(FUNCTION, "", "clone", b"", None, None, [], newest.settings)
        number = self.add(clone, torch.clone, container)
        clone.takes([Slot(leaf.value)], flatten(((leaf,), {}))[1])
        leaf.value = self.add_value(leaf.fake, number)
        clone.results.append((0, leaf.value))
        self.steps.append(newest)

    def add(self, step: RecordedStep, target: Any, container: str) -> int:
        """Add a step that calls a layer or a function; returns the step's number.

        A function is packed, and gets a name that begins with that of its container.
        """
        if step.layer == FUNCTION:
            name = f"{container}.{step.kind}" if container else step.kind
            self._names[name] += 1
            step.name = name if self._names[name] == 1 else f"{name}_{self._names[name] - 1}"
            step.target = _packed(target, step.name)
        self.steps.append(step)
        return len(self.steps) - 1

    def slot_of(self, leaf: Any) -> Any:
        """The slot of an activation or a tensor of the driver's; other leaves as they are."""
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

    def graph(self, leaves: Sequence[Any], structure: Structure) -> tuple[LayerGraph, list[Any]]:
        """The graph whose output has these leaves, and the values of its inputs.

        These are tensors; and nodes of what the steps gave that have run.
        """
        slots = [self.slot_of(leaf) for leaf in leaves]
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
        made = [n for step in self.steps[self._begin :] for n in step.gives]
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
        self._begin = len(self.steps)

    def node_of(self, activation: Activation) -> Any:
        """The node of an activation that steps which have run gave."""
        return self._nodes[activation.value]

    def _numbered(
        self, needed: Sequence[int]
    ) -> tuple[dict[int, int], tuple[Value, ...], list[Any]]:
        """The numbers that values have in the graph, the values, and those of the inputs."""
        for tensor, version in self._versions:
            if version is not None and tensor._version != version:
                raise self._cannot(
                    "it writes into a tensor of its inputs after it gave it to a layer: give the "
                    "layer a .clone()"
                )
        steps = self.steps[self._begin :]
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
                values.append(replace(self.values[number], step=None))
                given.append(self._nodes[number])
        for number, value in self.values.items():
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
            for step in self.steps[self._begin :]
        )

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        found = []
        for group in self.together:
            late = [number for number in group if number >= self._begin]
            if late and len(late) < len(group):
                raise self._cannot(
                    "it writes in place into a value that has been computed already, as another "
                    "value was read meanwhile: write into a .clone()"
                )
            if late:
                found.append(tuple(sorted(number - self._begin for number in late)))
        return tuple(found)

    def _effects(self) -> tuple[int, ...]:
        return tuple(i for i, step in enumerate(self.steps[self._begin :]) if step.has_effects)

    def _template(self, step: RecordedStep, leaves: Sequence[Any]) -> bytes:
        assert step.structure is not None
        try:
            return template_of(leaves, step.structure)
        except Exception as error:
            raise self._cannot(
                f"an argument of {step.name!r} cannot be pickled ({type(error).__name__}: {error})"
            ) from error


@dataclass(frozen=True)
class _Pickled:
    """An object among the arguments as it was when it was given."""

    data: bytes


_FIXED = (
    *(torch.Tensor, str, bytes, int, float, complex, type(None), type(Ellipsis), slice, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, FunctionType, Slot),
    *(BuiltinFunctionType, ModuleType, nn.Module),
)


def as_it_is(leaf: Any) -> Any:
    """A leaf, or what is known of it now if it may change."""
    if isinstance(leaf, _FIXED):
        return leaf
    try:
        return _Pickled(cloudpickle.dumps(leaf))
    except Exception:  # an error when the whole is pickled
        return leaf


def _at(leaf: Any, numbers: Mapping[int, int]) -> Any:
    """A leaf of arguments, with the number that a value has in the graph."""
    if type(leaf) is _Pickled:
        return cloudpickle.loads(leaf.data)
    return Slot(numbers[leaf.index]) if type(leaf) is Slot else leaf


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
