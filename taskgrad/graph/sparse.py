"""The dense tensors behind one of any layout.

Imports no torch: Dask loads this module, by way of `taskgrad.cluster.sizes`, while it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_COMPONENTS = {
    "torch.sparse_coo": ("_indices", "_values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def components(t: torch.Tensor) -> list[torch.Tensor]:
    """The indices and values of a sparse tensor; a dense one itself; nothing for other layouts."""
    layout = str(t.layout)
    if layout == "torch.strided":
        return [t]
    t = t.detach()
    return [getattr(t, name)() for name in _COMPONENTS.get(layout, ())]
