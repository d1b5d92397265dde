"""Modules made by a function: first without values, then with those that constructors compute.

The function is called under ``torch.device("meta")``. What neither a file nor a method of the
module gives a value later, such as the frequencies of rotary embeddings, is only computed by
constructors on a real device. So the function is called again, if needed: with parameters put on
the meta device as soon as a module has them, all but those whose values are wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taskgrad.graph.deferred_init import named_tensors
from taskgrad.graph.layers import ParameterInfo, kind_of

# Parameters with more bytes in all are not made on the driver.
_MOST = 64 << 20

_lock = threading.RLock()  # held while `nn.Module.register_parameter` is another function


@dataclass(frozen=True)
class Made:
    """A module, and the function that made it on the meta device, if one did.

    `registered` are the parameters that modules were given meanwhile, in this order, each with the
    module and its name there.
    """

    module: Any
    seed: int = 0
    factory: Callable[[], Any] | None = None
    registered: tuple[tuple[nn.Module, str, nn.Parameter], ...] = ()

    def constructed(self, wanted: Iterable[ParameterInfo]) -> dict[str, torch.Tensor]:
        """The values that constructors give these tensors, by their first names.

        Those that cannot be had so are left out. Random ones are fixed by the seed.

        Raises what the function raises.
        """
        infos = {info.name: info for info in wanted}
        if self.factory is None or not infos:
            return {}
        ours = named_tensors(self.module)
        parameters = [name for name, info in infos.items() if not info.is_buffer]
        if sum(infos[name].nbytes for name in parameters) > _MOST:
            parameters = []
        kept = {id(ours[name]) for name in parameters}
        # Parametrizations compute their own parameters of the one that they replace.
        replaced = {name.partition(".parametrizations.")[::2] for name in parameters}
        places = {
            (id(self.module.get_submodule(outer)), inner.partition(".")[0])
            for outer, inner in replaced
            if inner
        }
        keep = {
            i
            for i, (module, name, parameter) in enumerate(self.registered)
            if id(parameter) in kept or (id(module), name) in places
        }
        count = 0

        def put_away(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
            nonlocal count
            count += 1
            return parameter if count - 1 in keep else _on_meta(parameter)

        with _seeded(self.seed), _registering(put_away):
            found = named_tensors(self.factory())
        # Else it does not make the same modules every time.
        if count != len(self.registered):
            return {}
        return {
            name: found[name].detach()
            for name, info in infos.items()
            if name in found
            and found[name].device.type != "meta"
            and (tuple(found[name].shape), found[name].dtype) == (info.shape, info.dtype)
        }


def construct(model: Any, seed: int) -> Made:
    """The module that a function makes, without values; a module as it is.

    What it draws, for tensors that are on a real device in spite of the meta device, is fixed by
    the seed.

    Raises TypeError if the function takes arguments, or does not return a module.
    """
    if isinstance(model, nn.Module) or not callable(model):
        return Made(model)
    registered: list[tuple[nn.Module, str, nn.Parameter]] = []

    def note(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        registered.append((module, name, parameter))
        return parameter

    try:
        with torch.device("meta"), _seeded(seed), _registering(note):
            made = model()
    except TypeError as error:
        raise TypeError(
            "GraphChain takes an nn.Module, or a function without arguments that makes one; got "
            f"{kind_of(model)}, which raised: {error}. For a function of tensors use "
            "tg.spawn(fn, ...)."
        ) from error
    if not isinstance(made, nn.Module):
        raise TypeError(
            "GraphChain takes an nn.Module, or a function that makes one; got "
            f"{kind_of(model)}, which gave a {type(made).__name__}"
        )
    return Made(made, seed, model, tuple(registered))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _registering(
    replace: Callable[[nn.Module, str, nn.Parameter], nn.Parameter],
) -> Iterator[None]:
    """Give modules that this thread makes the parameters that `replace` returns for theirs."""
    thread = threading.get_ident()
    with _lock:
        original = nn.Module.register_parameter

        def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            original(self, name, param)
            if param is not None and threading.get_ident() == thread:
                self._parameters[name] = replace(self, name, param)

        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.device.type == "meta" or nn.parameter.is_lazy(parameter):
        return parameter
    empty = torch.empty_like(parameter, device="meta")
    made = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    if type(parameter) is not nn.Parameter:
        made.__class__ = type(parameter)
    vars(made).update(vars(parameter))
    return made
