"""Make copies of a transformers model without the hooks with which it captures its own outputs.

transformers installs them in the first call that asks for hidden states, attentions or the like.
They cannot be pickled, and are installed again where they are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_MODULE = "transformers.utils.output_capturing"
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
