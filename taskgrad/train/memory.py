"""Whether what training needs fits the workers, before it starts."""

from __future__ import annotations

from dask.utils import format_bytes

from taskgrad.chain import GraphChain
from taskgrad.errors import MemoryLimitError


def check_fits(chain: GraphChain, state_per_parameter: float | None) -> None:
    """Raise if parameters, gradients and optimizer state are more than a worker may use.

    Activations come on top, and depend on the batch: they are not counted.

    Raises
    ------
    MemoryLimitError
        Says for each worker that is too small what it needs and how much is missing.
    """
    limits = chain._session.memory_limits()
    needs: dict[str, dict[str, int]] = {}
    for name, info in chain.named_parameters_info():
        for worker in {chain._home(n).worker for n in info.names}:
            need = needs.setdefault(worker, {"parameters": 0, "gradients": 0, "optimizer state": 0})
            need["parameters"] += info.nbytes
            if info.requires_grad:
                need["gradients"] += info.nbytes
                if worker == chain._home(name).worker:
                    need["optimizer state"] += int((state_per_parameter or 0) * info.nbytes)
    problems = []
    for worker, need in needs.items():
        total, limit = sum(need.values()), limits.get(worker, 0)
        if limit and total > limit:
            parts = ", ".join(f"{format_bytes(size)} of {what}" for what, size in need.items())
            problems.append(
                f"worker {worker} needs {format_bytes(total)} ({parts}) and has a memory limit of "
                f"{format_bytes(limit)}: {format_bytes(total - limit)} are missing"
            )
    if problems:
        raise MemoryLimitError(
            "; ".join(problems)
            + ". Spread the model over more workers, give them more memory, or take an optimizer "
            "that keeps less"
        )
