"""Match the tensors in files with those of a model, as the library that wrote them does it.

Names are the model's own as a rule. transformers' files may have others: a class has mappings of
names, with converters of values, for what older versions called the weights; the files may be of
the base model only, or of a model with another head; and a class says which names may be missing,
or are superfluous. A model with adapters of peft's has its base model's weights in the files.
"""

from __future__ import annotations

import pickle
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taskgrad.errors import CheckpointError
from taskgrad.formats.conversions import Conversion, Converted, Source
from taskgrad.formats.weights import Stored
from taskgrad.graph.class_init import is_root
from taskgrad.graph.layers import Model

# Once buffers that were saved, which old files have.
_SUPERFLUOUS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def match(model: nn.Module, flat: Model, stored: Mapping[str, Stored]) -> dict[str, Source]:
    """Where each tensor's value is read: by those of its names that the files have.

    Raises CheckpointError if the files lack tensors of the model, have others, or of another shape.
    """
    expected = {n: info for info in flat.tensors.values() if info.persistent for n in info.names}
    found: dict[str, Source] = dict(stored)
    optional: set[str] = set()
    warned: set[str] = set()
    if set(stored) != set(expected):
        found, optional, warned = _of_library(model, expected, stored)
    lacking = [
        name
        for name, info in flat.tensors.items()
        if info.persistent and not any(n in found for n in info.names)
    ]
    missing = [name for name in lacking if name not in optional]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name}: the model has {list(info.shape)}, the file has {list(found[name].shape)}"
        for name, info in expected.items()
        if name in found and found[name].shape != info.shape
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"the weights do not fit this model. Missing: {missing or 'none'}. Unexpected: "
            f"{unexpected or 'none'}. Wrong shape: {wrong or 'none'}"
        )
    new = [name for name in lacking if name in warned]
    if new:
        warnings.warn(
            f"the weights lack {new}, which are initialized at random: train them before use",
            stacklevel=3,
        )
    return found


def _of_library(
    model: nn.Module, expected: Iterable[str], stored: Mapping[str, Stored]
) -> tuple[dict[str, Source], set[str], set[str]]:
    """What the files have by the model's names; names that may be missing; those of a new head."""
    base = _base_of(model, expected)
    found: dict[str, Source] = dict(stored)
    theirs = set(base.names.values())
    head: set[str] = set()
    may_lack = re.compile(r"(?!)")
    if is_root(base.module):
        found = _converted(base.module, theirs, stored)
        prefix = f"{base.module.base_model_prefix}."
        if not any(name.startswith(prefix) for name in theirs):  # it is such a base model
            if any(name.startswith(prefix) for name in stored):
                found = {name: s for name, s in found.items() if name in theirs}
        elif not any(name in theirs and not name.startswith(prefix) for name in found):
            head = {name for name in theirs if not name.startswith(prefix)}
        superfluous = _patterns(base.module, "_keys_to_ignore_on_load_unexpected", _SUPERFLUOUS)
        may_lack = _patterns(base.module, "_keys_to_ignore_on_load_missing")
        found = {n: s for n, s in found.items() if n in theirs or not superfluous.search(n)}
    ours = {name: source for name, source in found.items() if name not in theirs}
    ours |= {name: found[other] for name, other in base.names.items() if other in found}
    new = {name for name, other in base.names.items() if other in head}
    lackable = {name for name, other in base.names.items() if may_lack.search(other)}
    adapters = set(expected) - set(base.names)
    return ours, adapters | lackable | new, new


@dataclass(frozen=True)
class _Base:
    """A model as its library saves it: the module, and its names for this model's tensors."""

    module: Any
    names: Mapping[str, str]


def _base_of(model: nn.Module, names: Iterable[str]) -> _Base:
    """The base model of one with adapters of peft's; another model as it is."""
    if not callable(getattr(type(model), "get_base_model", None)):
        return _Base(model, {name: name for name in names})
    base = model.get_base_model()  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is base) + "."
    adapted: list[tuple[str, str]] = []  # each name of a wrapped module, and of its wrapper
    for name, module in model.named_modules():
        for inner in ("base_layer", "original_module"):
            if inner in module._modules:
                adapted.append((f"{name}.{inner}.", f"{name}."))
        adapted += [
            (f"{name}.modules_to_save.{copy}.", f"{name}.")
            for copy in getattr(module, "modules_to_save", None) or ()
            if "original_module" in module._modules
        ]
    found = {}
    for name in names:
        inside = [(whole, outer) for whole, outer in adapted if name.startswith(whole)]
        if name.startswith(prefix) and (inside or not any(name.startswith(o) for _, o in adapted)):
            plain = name
            for whole, outer in reversed(inside):
                plain = plain.replace(whole, outer, 1)
            found[name] = plain.removeprefix(prefix)
    return _Base(base, found)


def _patterns(model: Any, attribute: str, more: Iterable[str] = ()) -> re.Pattern[str]:
    given = [*(getattr(model, attribute, None) or ()), *more]
    return re.compile("|".join(f"({pattern})" for pattern in given) or r"(?!)")


def _converted(model: Any, names: set[str], stored: Mapping[str, Stored]) -> dict[str, Source]:
    """Tensors of files by the names of a model of transformers', which converts some of them."""
    core: Any = sys.modules.get("transformers.core_model_loading")
    mappings: Any = sys.modules.get("transformers.conversion_mapping")
    if core is None or mappings is None:  # an older version has none
        return dict(stored)
    transforms = mappings.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, core.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, core.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, there = model.base_model_prefix, dict.fromkeys(names, True)
    found: dict[str, Source] = {}
    groups: dict[str, tuple[Any, list[tuple[str, str, Stored]]]] = {}
    for key in sorted(stored, key=core.dot_natural_key):
        name, pattern = core.rename_source_key(key, renamings, converters, prefix, there)
        if name not in there and key in there:
            name, pattern = core.rename_source_key(key, [], [], prefix, there)
        if name not in there:
            found[key] = stored[key]
        elif pattern is None:
            found[name] = stored[key]
        else:
            group = groups.setdefault(name, (deepcopy(by_pattern[pattern]), []))
            group[1].append((pattern, key, stored[key]))
    for first, (converter, sources) in groups.items():
        packed = pickle.dumps((converter, model.config))
        conversion = Conversion(packed, first, tuple(sources))
        try:
            made = conversion.run(lambda source: torch.empty(source.shape, device="meta"))
        except Exception as error:
            keys = [key for _, key, _ in sources]
            raise CheckpointError(
                f"{keys} in the files cannot be converted to {first!r} of the model "
                f"({type(error).__name__}: {error})"
            ) from error
        found |= {n: Converted(conversion, n, tuple(t.shape)) for n, t in made.items()}
    return found
