"""Estimate the bytes of each layer's parameters and activations before anything has run.

Activation bytes come from a dry run on torch's `meta` device, which computes shapes and no numbers.
Only torch's own modules are run: a user's forward runs on its worker and nowhere else, so a module
of the user's counts by the torch modules inside it, each on the newest value that it accepts. The
input's shape is guessed from the first module that has weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from taskgrad.graph.layers import Branches, Layer, Path
from taskgrad.graph.pytree import tensors

# A nominal batch and image side: only the proportion to parameter bytes depends on them.
_BATCH = 8
_SIDE = 64
_LENGTH = 128


class LayerCost(NamedTuple):
    """Bytes of one layer: of parameters and buffers, and of what backward keeps of a batch."""

    held: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.held + self.activations


def layer_costs(
    path: Path, modules: Sequence[Callable[..., Any]], kept: Sequence[int] | None = None
) -> list[LayerCost]:
    """What each layer takes, parameters and buffers counted once.

    `kept` are the bytes of activations, if they are known.
    """
    held = [
        sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) if isinstance(m, nn.Module) else 0
        for m in modules
    ]
    if kept is not None:
        return list(map(LayerCost, held, kept))
    activations = [0] * len(held)
    sample = _guess_input(modules) if path else None
    if sample is not None:
        with torch.enable_grad():
            _run_path(path, modules, sample, activations)
    return list(map(LayerCost, held, activations))


def _guess_input(modules: Sequence[Callable[..., Any]]) -> torch.Tensor | None:
    for module in modules:
        for inner in module.modules() if isinstance(module, nn.Module) else ():
            if isinstance(inner, nn.Linear):
                return torch.empty(_BATCH, inner.in_features, device="meta")
            if isinstance(inner, nn.Embedding):
                return torch.empty(_BATCH, _LENGTH, dtype=torch.long, device="meta")
            if isinstance(inner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                sides = [_SIDE] * len(inner.kernel_size)
                return torch.empty(_BATCH, inner.in_channels, *sides, device="meta")
    return None


def _run_path(path: Path, modules: Sequence[Any], value: Any, costs: list[int]) -> Any:
    for part in path:
        if isinstance(part, Branches):
            ends = [_run_path(inner, modules, value, costs) for inner in part.paths]
            value = _run_layer(part.connection, modules, ends, costs)
        else:
            value = _run_layer(part, modules, [value], costs)
    return value


def _run_layer(layer: Layer, modules: Sequence[Any], args: list[Any], costs: list[int]) -> Any:
    fn = modules[layer.index]
    value, kept = args[0], 0
    if _is_torchs_own(fn):
        value, kept = _try(fn, args) or (value, 0)
    elif isinstance(fn, nn.Module):
        values = [value]
        for inner in _outermost_torch_modules(fn):
            found = next((r for r in (_try(inner, [v]) for v in reversed(values)) if r), None)
            if found:
                values.append(found[0])
                kept += found[1]
        value = values[-1]
    costs[layer.index] += kept
    return value


def _try(fn: Callable[..., Any], args: list[Any]) -> tuple[Any, int] | None:
    """Output and bytes kept for backward; None if it does not take these arguments."""
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, nn.Parameter):
            kept[id(t)] = t.numel() * t.element_size()
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            value = _on_meta(fn)(*args)
    except Exception:  # it wants another shape: the guess is only a guess
        return None
    outputs = sum(t.numel() * t.element_size() for t in tensors(value))
    return value, max(sum(kept.values()), outputs)


def _is_torchs_own(fn: Callable[..., Any]) -> bool:
    if not isinstance(fn, nn.Module):
        home = getattr(fn, "__module__", None) or "torch"
        return home.partition(".")[0] in ("torch", "_operator")
    return all(
        type(m).__module__.startswith("torch.nn.")
        and not m._forward_hooks
        and not m._forward_pre_hooks
        for m in fn.modules()
    )


def _outermost_torch_modules(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_torchs_own(child) and not isinstance(child, nn.Sequential | nn.ModuleList):
            yield child
        else:
            yield from _outermost_torch_modules(child)


def _on_meta(fn: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(fn, nn.Module):
        return fn
    shadows: dict[str, torch.Tensor] = {}
    for name, t in [*fn.named_parameters(), *fn.named_buffers()]:
        shadow = t.detach().to("meta")
        shadows[name] = (
            nn.Parameter(shadow, t.requires_grad) if isinstance(t, nn.Parameter) else shadow
        )
    return lambda *args: torch.func.functional_call(fn, shadows, args)
