"""Make copies of a transformers model without the hooks with which it captures its own outputs.

transformers installs them in the first call that asks for hidden states, attentions or the like.
They cannot be pickled, and are installed again where they are needed. Which outputs there are is
noted where a model is constructed: a copy in another process would have none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_MODULE = "transformers.utils.output_capturing"
_NOTED = "_CAN_RECORD_REGISTRY"
_INSTALLED = "_output_capturing_hooks_installed"


@contextlib.contextmanager
def without_output_capturing(model: Any) -> Iterator[None]:
    """Take these hooks off a model in the block."""
    before: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for module in model.modules() if isinstance(model, nn.Module) else ():
        hooks = module._forward_hooks
        found = [k for k, h in hooks.items() if getattr(h, "__module__", "") == _MODULE]
        if found or _INSTALLED in vars(module):
            before += [(hooks, dict(hooks)), (vars(module), dict(vars(module)))]
            for key in found:
                del hooks[key]
            vars(module).pop(_INSTALLED, None)
    try:
        yield
    finally:
        for table, was in before:
            table.clear()
            table.update(was)


def reduce_recording(module: nn.Module) -> Any:
    """A transformers model as pickle's (function, arguments, state), with the outputs it captures.

    NotImplemented for other modules.
    """
    noted: Any = getattr(sys.modules.get(_MODULE), _NOTED, None)
    outputs = noted.get(module) if noted else None
    kind: Any = type(module)
    if not outputs or (kind.__reduce__, kind.__reduce_ex__) != (
        object.__reduce__,
        object.__reduce_ex__,
    ):
        return NotImplemented
    return _recording, (kind, outputs), kind.__getstate__(module)


def _recording(kind: type[nn.Module], outputs: Any) -> nn.Module:
    made = kind.__new__(kind)
    getattr(importlib.import_module(_MODULE), _NOTED)[made] = outputs
    return made
