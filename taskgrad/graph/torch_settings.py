"""Torch's settings where a call is made, which have to hold where it runs.

`settings_now` reads those that change numbers or errors, of the process and of the thread. Settings
of the process that have torch's default are left out. `refuse_modes` refuses modes and hooks that
would have to be active there too, and cannot be sent.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from taskgrad.errors import TaskgradError
from taskgrad.graph.process_settings import SETTINGS, process_values

_C: Any = torch._C

_NORMAL = sys.float_info.min  # half of it is denormal

_KINDS = tuple(getattr(_C, "_autocast_supported_devices", lambda: ("cpu", "cuda"))())
_KNOWN = {"cpu": torch.bfloat16, "cuda": torch.float16}
AUTOCAST_DTYPES = {kind: torch.get_autocast_dtype(kind) for kind in _KINDS} | _KNOWN
"""Autocast's default dtype by type of device."""

Values = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class TorchSettings:
    """The settings of one call; plain data.

    Attributes
    ----------
    process
        (name, value) of those settings of the process that differ from torch's defaults.
    grad
        Torch's grad mode.
    autocast
        (device type, whether it is on, dtype) of ``torch.autocast``, without torch's defaults;
        `autocast_cache` is whether it keeps the weights that it has cast.
    device
        The default device; None for the CPU.
    flush_denormal
        Whether denormal numbers are flushed to zero.
    """

    process: Values = ()
    grad: bool = True
    autocast: tuple[tuple[str, bool, torch.dtype], ...] = ()
    autocast_cache: bool = True
    device: str | None = None
    flush_denormal: bool = False

    @property
    def of_thread(self) -> tuple[Any, ...]:
        """The values of those settings that belong to a thread."""
        return self.grad, self.autocast, self.autocast_cache, self.device, self.flush_denormal

    def under_autocast(self, regions: tuple[tuple[str, torch.dtype], ...]) -> TorchSettings:
        """The same settings within these regions of autocast, each (device type, dtype)."""
        if not regions:
            return self
        return replace(self, autocast=tuple((kind, True, dtype) for kind, dtype in regions))

    def outside_autocast(self) -> TorchSettings:
        """The same settings outside of all regions of autocast."""
        return replace(self, autocast=(), autocast_cache=True)

    def without_device(self) -> TorchSettings:
        """The same settings with torch's own default device, the CPU."""
        return self if self.device is None else replace(self, device=None)

    def without_grad(self) -> TorchSettings:
        """The same settings with autograd off."""
        return replace(self, grad=False)

    def __reduce__(self) -> Any:
        if self is STARTING:
            return "STARTING"
        given = (self.process, self.grad, self.autocast, self.autocast_cache)
        return TorchSettings, (*given, self.device, self.flush_denormal)


STARTING = TorchSettings()
"""Torch's defaults."""

inside: ContextVar[bool] = ContextVar("taskgrad_settings", default=False)
"""True while this thread runs a call for which settings were applied."""

replaced: dict[str, tuple[Any, Any]] = {}
"""The settings that running calls have changed in this process: (before, now) by name.

Never changed in place, but replaced, so that other threads may read it.
"""

own_levels = 0
"""How many of the levels of forward-mode differentiation taskgrad has opened for its ranks."""

_last: tuple[tuple[Any, ...], TorchSettings] = ((), STARTING)


def settings_now() -> TorchSettings:
    """The settings of this thread now; the same object as last time if nothing changed."""
    global _last
    found = (*_own_values(), *thread_values())
    values, settings = _last
    if found != values:
        settings = TorchSettings(differing(found[: len(SETTINGS)]), *found[len(SETTINGS) :])
        if settings == STARTING:
            settings = STARTING
        _last = found, settings
    return settings


def differing(values: tuple[Any, ...]) -> Values:
    """(name, value) of those settings of the process that differ from torch's defaults."""
    return tuple(
        (setting.name, value)
        for setting, value in zip(SETTINGS, values, strict=True)
        if value != setting.start
    )


def _own_values() -> tuple[Any, ...]:
    """The process's settings, without the changes that calls in other threads have applied."""
    while True:
        changed = replaced
        values = process_values()
        if changed is replaced:
            break
    if not changed or inside.get():
        return values
    own = []
    for setting, value in zip(SETTINGS, values, strict=True):
        before, now = changed.get(setting.name, (value, value))
        own.append(before if value == now else value)
    return tuple(own)


def thread_values() -> tuple[Any, ...]:
    """What `TorchSettings.of_thread` is for this thread now."""
    return (
        torch.is_grad_enabled(),
        _autocast(),
        torch.is_autocast_cache_enabled(),
        default_device(),
        _NORMAL * 0.5 == 0.0,
    )


def thread_settings() -> TorchSettings:
    """The settings of this thread, without those of the process."""
    return TorchSettings((), *thread_values())


def _autocast() -> tuple[tuple[str, bool, torch.dtype], ...]:
    if (
        not _C._is_any_autocast_enabled()
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and torch.get_autocast_dtype("cuda") is torch.float16
    ):
        return ()
    found = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in _KINDS]
    return tuple((k, on, dtype) for k, on, dtype in found if on or dtype != AUTOCAST_DTYPES[k])


def default_device() -> str | None:
    """The device of ``torch.set_default_device`` or ``with torch.device(...)``; None for a CPU."""
    if not _C._len_torch_function_stack():
        return None
    modes = _get_current_function_mode_stack()
    device = next((m.device for m in reversed(modes) if isinstance(m, DeviceContext)), None)
    return None if device is None or device.type == "cpu" else str(device)


def refuse_modes(title: str, *, process: bool = True) -> None:
    """Raise TaskgradError if a mode, transform or global hook is active that cannot be sent.

    These are objects of one thread or process. Without them a call would compute other numbers, or
    not call a hook. With `process` False the call runs in another thread of this process.
    """
    if (
        _C._len_torch_function_stack()
        or _C._len_torch_dispatch_stack()
        or _C._functorch.peek_interpreter_stack() is not None
    ):
        _refuse_modes_of_thread(title)
    if process:
        _refuse_modes_of_process(title)


def _refuse_modes_of_thread(title: str) -> None:
    modes: list[Any] = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    mode = next((m for m in modes if not isinstance(m, DeviceContext)), None)
    if mode is not None:
        _refuse(
            title,
            f"the mode {type(mode).__module__}.{type(mode).__qualname__}",
            "Open it inside the function or the layer, or leave it for this call",
        )
    if _C._functorch.peek_interpreter_stack() is not None:
        _refuse(
            title,
            "a transform of torch.func (vmap, grad, jvp, ...)",
            "Use the transform inside the function that is sent, or tg.vjp",
        )


def _refuse_modes_of_process(title: str) -> None:
    if forward_ad._current_level >= own_levels:
        _refuse(
            title,
            "torch.autograd.forward_ad.dual_level()",
            "Tangents stay on the driver: open it inside the function that is sent",
        )
    refuse_module_hooks(title)
    if optimizers._global_optimizer_pre_hooks or optimizers._global_optimizer_post_hooks:
        _refuse(
            title,
            "the scope of a hook for all optimizers (register_optimizer_step_...)",
            "Register it on the optimizer where that is made, or remove it for this call",
        )


def refuse_module_hooks(title: str) -> None:
    """Raise TaskgradError if this process has hooks on all modules."""
    if modules._has_any_global_hook():
        _refuse(
            title,
            "the scope of hooks on all modules (torch.nn.modules.module.register_module_...)",
            "Remove them, or register them on the modules themselves",
        )


def _refuse(title: str, what: str, instead: str) -> None:
    raise TaskgradError(
        f"{title!r} is called inside {what}, which does not reach where it runs. {instead}"
    )
