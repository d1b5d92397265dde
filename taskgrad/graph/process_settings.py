"""Torch's settings of a process that change numbers or errors: how to read them and set them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.backends import mha, opt_einsum
from torch.distributions import Distribution

_C: Any = torch._C


class Setting(NamedTuple):
    """One setting: its name for users, torch's default, its getter and setter."""

    name: str
    start: Any
    get: Callable[[], Any]
    set: Callable[[Any], object]


def _bound(name: str, start: Any, getter: str, setter: str) -> Setting | None:
    """A setting with functions of torch._C; None if this torch does not have it."""
    get, put = getattr(_C, getter, None), getattr(_C, setter, None)
    return None if get is None or put is None else Setting(name, start, get, put)


def _plain(name: str, start: Any, of: str) -> Setting | None:
    return _bound(name, start, f"_get_{of}", f"_set_{of}")


def _backend(path: str, start: Any, of: str = "") -> Setting | None:
    """A setting of torch.backends, which torch._C mostly calls by its path there."""
    return _plain(f"torch.backends.{path}", start, of or path.replace(".", "_"))


def _sdp(kernel: str, start: bool = True) -> Setting | None:
    name = f"torch.backends.cuda.{kernel}_sdp_enabled()"
    return _bound(name, start, f"_get_{kernel}_sdp_enabled", f"_set_sdp_use_{kernel}")


def _sdp_order() -> Setting | None:
    found = _plain("the priority of sdpa_kernel()", None, "sdp_priority_order")
    if found is None:
        return None
    get, put = found.get, found.set
    return found._replace(
        start=tuple(get()), get=lambda: tuple(get()), set=lambda order: put(list(order))
    )


def _reduced(name: str) -> Setting | None:
    """If cuBLAS may reduce in this precision; in newer versions of torch also if in parts."""
    found = _backend(f"cuda.matmul.{name}", True, f"cublas_{name}")
    if found is None or not isinstance(found.get(), tuple):
        return found
    put = found.set
    return found._replace(start=(True, True), set=lambda value: put(*value))


def _library(kind: str, start: str) -> Setting | None:
    """The preferred library for CUDA's linear algebra: only torch with CUDA has a choice."""
    found = _backend(f"cuda.preferred_{kind}_library()", start, f"{kind}_preferred_backend")
    if found is None or not torch.backends.cuda.is_built():
        return None
    get, put = found.get, found.set
    return found._replace(
        get=lambda: get().name, set=lambda value: put(type(get()).__members__[value])
    )


def _get_deterministic() -> tuple[bool, bool]:
    return _C._get_deterministic_algorithms(), _C._get_deterministic_algorithms_warn_only()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    # Like torch.use_deterministic_algorithms, but without loading Inductor, which takes a second.
    inductor = sys.modules.get("torch._inductor.config")
    if inductor is not None:
        inductor.deterministic = value[0]  # type: ignore[attr-defined]
    _C._set_deterministic_algorithms(value[0], warn_only=value[1])


def _get_anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


# Settings from which others inherit while these are "none" come first.
_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_PRECISIONS = (
    *_PARENTS,
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")),
)
_PRECISION_OF = (
    [partial(_C._get_fp32_precision_getter, *of) for of in _PRECISIONS]
    if hasattr(_C, "_get_fp32_precision_getter")
    else []
)
_OF_OPERATIONS = _PRECISION_OF[len(_PARENTS) :]


_NEWER = ["tf32" if of in (("cuda", "conv"), ("cuda", "rnn")) else "none" for of in _PRECISIONS]
_START = "highest", True, *_NEWER[: len(_PRECISION_OF)]
_START_OF_OPERATIONS = list(_START[-len(_OF_OPERATIONS) :]) if _OF_OPERATIONS else None


def _get_precision() -> tuple[Any, ...]:
    """As torch's older and newer functions say it; None where the older ones refuse to."""
    if [get() for get in _OF_OPERATIONS] == _START_OF_OPERATIONS:
        return _START
    try:
        matmul = _C._get_float32_matmul_precision()
    except RuntimeError:
        matmul = None
    try:
        cudnn = _C._get_cudnn_allow_tf32()
    except RuntimeError:
        cudnn = None
    return matmul, cudnn, *[get() for get in _PRECISION_OF]


def _set_precision(value: tuple[Any, ...]) -> None:
    matmul, cudnn, *newer = value
    if matmul is not None:
        _C._set_float32_matmul_precision(matmul)
    if cudnn is not None:
        _C._set_cudnn_allow_tf32(cudnn)
    if _PRECISION_OF:
        for of, get, wanted in zip(_PRECISIONS, _PRECISION_OF, newer, strict=True):
            _C._set_fp32_precision_setter(*of, "none")
            if get() != wanted:
                _C._set_fp32_precision_setter(*of, wanted)


# What users assign is in the first, what `flags` sets in the second.
_EINSUM, _EINSUM_FLAGS = vars(opt_einsum), vars(vars(opt_einsum)["m"])


def _get_einsum() -> tuple[bool, str | None]:
    return (
        _EINSUM.get("enabled", _EINSUM_FLAGS["enabled"]),
        _EINSUM.get("strategy", _EINSUM_FLAGS["strategy"]),
    )


def _set_einsum(value: tuple[bool, str | None]) -> None:
    if value[0] and not opt_einsum.is_available():
        raise ValueError("opt_einsum is not installed")
    for name, new in zip(("enabled", "strategy"), value, strict=True):
        (_EINSUM if name in _EINSUM else _EINSUM_FLAGS)[name] = new


def _starting_einsum() -> tuple[bool, str | None]:
    return (True, "auto") if opt_einsum.is_available() else (False, None)


def _starting_engine() -> int:
    """Torch takes the engine for x86 if it can, else oneDNN."""
    supported = _C._supported_qengines()
    return next((engine for engine in (4, 3) if engine in supported), 0)


_FOUND = (
    Setting("the default dtype", torch.float32, torch.get_default_dtype, torch.set_default_dtype),
    Setting(
        "torch.use_deterministic_algorithms()",
        (False, False),
        _get_deterministic,
        _set_deterministic,
    ),
    _plain(
        "torch.utils.deterministic.fill_uninitialized_memory",
        True,
        "deterministic_fill_uninitialized_memory",
    ),
    Setting(
        "torch.autograd.set_detect_anomaly()",
        (False, True),
        _get_anomaly,
        lambda value: torch.set_anomaly_enabled(*value),
    ),
    Setting("the float32 precision", _START, _get_precision, _set_precision),
    _backend("cpu.allow_fp16_reduced_precision_reduction", False),
    _reduced("allow_fp16_reduced_precision_reduction"),
    _reduced("allow_bf16_reduced_precision_reduction"),
    _backend("cuda.matmul.allow_fp16_accumulation", False, "cublas_allow_fp16_accumulation"),
    _library("linalg", "Default"),
    _library("blas", "Cublas"),
    _backend("cudnn.enabled", True),
    _backend("cudnn.benchmark", False),
    _bound(
        "torch.backends.cudnn.benchmark_limit",
        10,
        "_cuda_get_cudnn_benchmark_limit",
        "_cuda_set_cudnn_benchmark_limit",
    ),
    _backend("cudnn.deterministic", False),
    _backend("cudnn.depthwise_kernel", "auto"),
    _backend("miopen.immediate", False),
    _backend("mkldnn.enabled", True),
    _backend("mkldnn.deterministic", False),
    _backend("nnpack.flags()", True, "nnpack_enabled"),
    _backend("quantized.engine", _starting_engine(), "qengine"),
    _sdp("flash"),
    _sdp("mem_efficient"),
    _sdp("math"),
    _sdp("cudnn"),
    _sdp("overrideable"),
    _sdp("fa3", False),
    _sdp_order(),
    _backend(
        "cuda.allow_fp16_bf16_reduction_math_sdp()",
        False,
        "math_sdp_allow_fp16_bf16_reduction",
    ),
    Setting(
        "torch.backends.mha.set_fastpath_enabled()",
        True,
        lambda: mha._is_fastpath_enabled,
        mha.set_fastpath_enabled,
    ),
    Setting("torch.backends.opt_einsum", _starting_einsum(), _get_einsum, _set_einsum),
    _bound(
        "torch.sparse.check_sparse_tensor_invariants",
        False,
        "_check_sparse_tensor_invariants",
        "_set_check_sparse_tensor_invariants",
    ),
    Setting(
        "Distribution.set_default_validate_args()",
        __debug__,
        lambda: Distribution._validate_args,
        Distribution.set_default_validate_args,
    ),
)

SETTINGS = tuple(setting for setting in _FOUND if setting is not None)
"""All settings that this version of torch has."""

_GETTERS = tuple(setting.get for setting in SETTINGS)


def process_values() -> tuple[Any, ...]:
    """The values of all settings, in their order."""
    return tuple([get() for get in _GETTERS])
