"""Adapters of peft's in a model: which modules they are, and how they are initialized."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

_LORA = re.compile(r"lora_(embedding_)?[AB](\.|$)")
# Others compute an adapter's first values from the weights that it adapts.
_FROM_SHAPES = (True, False, "gaussian")


@dataclass(frozen=True)
class Adapters:
    """The modules of a model that are parts of adapters.

    Attributes
    ----------
    wrapped
        For each module that has adapters its name and that of the module in it which is adapted,
        with dots at their ends.
    lora
        By the name of a layer with low-rank adapters the names of these, each with the argument
        that says how it is initialized.
    """

    wrapped: tuple[tuple[str, str], ...]
    lora: dict[str, tuple[tuple[str, Any], ...]]

    @classmethod
    def of(cls, model: nn.Module) -> Adapters:
        """Those of a model; there are none if peft has not changed it."""
        how: dict[str, Any] = {}
        for module in model.modules():
            for name, config in dict(vars(module).get("peft_config") or {}).items():
                how.setdefault(name, getattr(config, "init_lora_weights", True))
        wrapped, lora = [], {}
        for name, module in model.named_modules() if how else ():
            if "base_layer" in module._modules:
                wrapped.append((f"{name}.", f"{name}.base_layer."))
            if callable(getattr(type(module), "reset_lora_parameters", None)):
                parts = (getattr(module, part, ()) for part in ("lora_A", "lora_embedding_A"))
                names = dict.fromkeys(adapter for part in parts for adapter in part)
                lora[name] = tuple((adapter, how.get(adapter, True)) for adapter in names)
        return cls(tuple(wrapped), lora)

    def has(self, name: str) -> bool:
        """True if the module of this name is part of an adapter."""
        return any(
            name.startswith(outer) and not f"{name}.".startswith(inner)
            for outer, inner in self.wrapped
        )

    def sets(self, name: str, layer: str | None = None) -> bool:
        """True if a layer with low-rank adapters, any or this one, sets what this module has.

        Raises ValueError if it does so from the weights that it adapts.
        """
        those = self.lora if layer is None else [layer]
        for one in those:
            if not name.startswith(f"{one}.") or not _LORA.match(name[len(one) + 1 :]):
                continue
            for adapter, how in self.lora[one]:
                if how not in _FROM_SHAPES:
                    raise ValueError(
                        f"the adapter {adapter!r} of {one!r} has init_lora_weights={how!r}, which "
                        "computes it from weights that are not on the driver. Give True, False or "
                        "'gaussian', or a model with values"
                    )
            return True
        return False
