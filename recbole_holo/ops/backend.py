"""Which implementation of an operation runs, chosen in one place and said in the log.

Every operation of :mod:`recbole_holo.ops` has a plain reference, a fast CPU form and, for CUDA, the fused kernel of
mamba-ssm or causal-conv1d. :func:`choose` picks one from the device and type of a tensor and from the setting
``backend``, once per process and case, and logs the choice once: a slow path is never silent.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from recbole_holo.errors import ConfigError, nearest
from recbole_holo.ops import native

BACKENDS = ("auto", "cuda", "cpu", "reference")
INSTALL_KERNELS = "pip install --no-build-isolation 'mamba-ssm>=2.2.5,<2.4' 'causal-conv1d>=1.5.1,<2' (torch first)"

_logger = logging.getLogger("recbole_holo")


@dataclass(frozen=True)
class _Kernel:
    """A fused CUDA function: where it is, and the compiled extensions without which it cannot run.

    The extensions are looked for first because a module of mamba-ssm may import and its function then raise when it is
    called: releases after 2.3.2 build ``selective_scan_cuda`` only on request.
    """

    package: str
    module: str
    function: str
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class _Operation:
    """The implementations of one operation: on CUDA, on a CPU (the best first), and where none can be used."""

    kernel: _Kernel
    cpu: tuple[str, ...]
    plain: str


_SCAN_MODULE = "mamba_ssm.ops.selective_scan_interface"
_SSD_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_STEP_MODULE = "mamba_ssm.ops.triton.selective_state_update"
_STEP = _Operation(
    _Kernel("mamba-ssm", _STEP_MODULE, "selective_state_update", ("triton", "causal_conv1d_cuda")),
    ("native", "composed"),
    "composed",
)
_OPERATIONS = {
    "selective_scan": _Operation(
        _Kernel("mamba-ssm", _SCAN_MODULE, "selective_scan_fn", ("selective_scan_cuda",)),
        ("native", "numba"),
        "reference",
    ),
    "causal_conv1d": _Operation(
        _Kernel("causal-conv1d", "causal_conv1d", "causal_conv1d_fn", ("causal_conv1d_cuda",)),
        ("native", "torch"),
        "torch",
    ),
    "state_space_dual": _Operation(
        _Kernel("mamba-ssm", _SSD_MODULE, "mamba_chunk_scan_combined", ("triton",)), ("native", "torch"), "torch"
    ),
    "mamba_block": _Operation(
        _Kernel("mamba-ssm", _SCAN_MODULE, "mamba_inner_fn", ("selective_scan_cuda", "causal_conv1d_cuda")),
        ("native", "composed"),
        "composed",
    ),
    "mamba2_block": _Operation(
        _Kernel("mamba-ssm", _SSD_MODULE, "mamba_split_conv1d_scan_combined", ("triton", "causal_conv1d_cuda")),
        ("native", "composed"),
        "composed",
    ),
    "mamba_step": _STEP,
    "mamba2_step": _STEP,
    "causal_conv1d_step": _Operation(
        _Kernel("causal-conv1d", "causal_conv1d", "causal_conv1d_update", ("causal_conv1d_cuda",)), (), "reference"
    ),
}
_PRODUCTS = ("state_space_dual", "mamba2_block")  # are matrix products in Triton
_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)

_backend = "auto"
_chosen: dict[tuple[str, str, torch.dtype], str] = {}
_used: dict[str, list[str]] = {}
_said: set[str] = set()
_excluded: set[str] = set()


def set_backend(name: str) -> None:
    """Sets the implementation of all operations for this process.

    Args:
        name: ``auto`` takes the fused kernels for CUDA tensors and the fast CPU form for CPU tensors; ``cuda`` insists
            on the kernels; ``cpu`` does without them on every device; ``reference`` takes the plain form.

    Raises:
        ConfigError: ``name`` is not one of :data:`BACKENDS`.
    """
    global _backend
    if name not in BACKENDS:
        raise ConfigError("backend", name, nearest(name, BACKENDS))
    _backend = name
    _chosen.clear()


@contextmanager
def excluding(*forms: str) -> Iterator[None]:
    """Chooses as if these CPU forms (``native``, ``numba``) were not there, to compare the others."""
    before = set(_excluded)
    _excluded.update(forms)
    _chosen.clear()
    try:
        yield
    finally:
        _excluded.clear()
        _excluded.update(before)
        _chosen.clear()


def get_backend() -> str:
    """The setting last given to :func:`set_backend`; ``auto`` before that."""
    return _backend


def choose(op: str, tensor: Tensor) -> str:
    """The implementation of ``op`` for tensors like ``tensor``.

    Returns:
        ``mamba-ssm`` or ``causal-conv1d`` (fused CUDA kernels), ``native``, ``numba`` or ``torch`` (CPU forms),
        ``composed`` (a whole block put together from other operations, each chosen for itself), or ``reference``.

    Raises:
        ConfigError: the backend ``cuda`` is set and cannot be had; the message says why.
    """
    case = (op, tensor.device.type, tensor.dtype)
    chosen = _chosen.get(case)
    if chosen is None:
        chosen = _chosen[case] = _choose(op, tensor)
    return chosen


def kernel(op: str) -> Callable[..., Any]:
    """The fused CUDA function of ``op``; only after :func:`choose` named its package."""
    function, reason = _load_kernel(op)
    if function is None:
        raise RuntimeError(f"{op}: {reason}")
    return function


def report() -> dict[str, str]:
    """What each operation ran on since the process began, or :func:`forget_report`: ``{"mamba_block": "native"}``."""
    return {op: ", ".join(used) for op, used in list(_used.items())}


def forget_report() -> None:
    """From here on a new report, and everything is logged anew: a run begins."""
    _used.clear()
    _said.clear()
    _chosen.clear()


def kernel_status() -> dict[str, str]:
    """For mamba-ssm, causal-conv1d, the C++ kernels and numba: what was found, or why it cannot be used."""
    status = {}
    for package in ("mamba-ssm", "causal-conv1d"):
        mine = [op for op, operation in _OPERATIONS.items() if operation.kernel.package == package]
        reasons = dict.fromkeys(reason for _, reason in map(_load_kernel, mine) if reason)
        status[package] = "; ".join(reasons) or _version(package)
    status["native"] = native.problem() or "compiled"
    status["numba"] = _numba_problem() or _version("numba")
    return status


def note(op: str, implementation: str, why: str = "") -> None:
    """Logs, once, that ``op`` runs on ``implementation``, and keeps it for :func:`report`."""
    named = _version(implementation)
    used = _used.setdefault(op, [])
    if named not in used:
        used.append(named)
        _logger.info("%s: %s%s", op, named, f" ({why})" if why else "")


def working(tensor: Tensor) -> Tensor:
    """``tensor`` in the type that recurrences are computed in: float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def runs_native(tensor: Tensor) -> bool:
    """Whether the C++ kernels that only CPUs have (losses, dropout, feed-forward layers) run for ``tensor``."""
    wanted = tensor.device.type == "cpu" and _backend != "reference" and "native" not in _excluded
    return wanted and not native.problem()


def product_type(tensor: Tensor) -> torch.dtype:
    """The type that a matrix product with ``tensor`` would have: autocast's, if that is on."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def adjacent(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy, with a stride of 1 at its last axis.

    Of an axis of size 1 ``contiguous()`` leaves any stride; the CUDA kernels take it at its word and refuse it, or read
    another layout out of it.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def dense(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy: contiguous, :func:`adjacent`, and at an address where 16 bytes can be loaded at once.

    A CUDA kernel that loads so from another address ends in an error after which the process cannot use the GPU.
    """
    fits = tensor.is_contiguous() and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def with_gradient(y: Tensor, layout: Callable[[Tensor], Tensor] = dense) -> Tensor:
    """``y``, the output of a CUDA kernel, whose backward pass gets the gradient in a ``layout`` that it can read."""
    if y.requires_grad:
        y.register_hook(layout)
    return y


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on ``tensor``'s device keep the types they are given."""
    return torch.autocast(tensor.device.type, enabled=False)


def _choose(op: str, tensor: Tensor) -> str:
    operation = _OPERATIONS[op]
    device = tensor.device.type
    if _backend == "reference":
        implementation, why = _reference(operation), "backend: reference"
    elif _backend == "cuda" or (_backend == "auto" and device == "cuda"):
        implementation, why = _choose_kernel(op, tensor)
    elif device == "cpu":
        implementation, why = _choose_cpu(operation, tensor.dtype)
    else:
        implementation, why = operation.plain, f"no kernels for device {device}, backend: {_backend}"
    note(op, implementation, why)
    return implementation


def _choose_kernel(op: str, tensor: Tensor) -> tuple[str, str]:
    operation, insisted = _OPERATIONS[op], _backend == "cuda"
    if insisted and tensor.device.type != "cuda":
        remedy = f"{op} was given a {tensor.device.type} tensor: move the model to a GPU, or set backend: auto"
        raise ConfigError("backend", _backend, remedy)
    if tensor.dtype not in _KERNEL_TYPES:
        if insisted:
            raise ConfigError("backend", _backend, f"the kernels do not take {tensor.dtype}: use float32 or bfloat16")
        return _reference(operation), f"the kernels do not take {tensor.dtype}"
    function, reason = _load_kernel(op)
    if function is not None:
        if op in _PRODUCTS and tensor.dtype == torch.float32 and os.environ.get("TRITON_F32_DEFAULT") != "ieee":
            _say_once(
                f"{op}: float32 is multiplied in TF32; TRITON_F32_DEFAULT=ieee does it exactly", level=logging.INFO
            )
        return operation.kernel.package, ""
    if insisted:
        raise ConfigError(
            "backend", _backend, f"{reason}. Install the kernels: {INSTALL_KERNELS}; or set backend: auto"
        )
    _say_once(f"No fused CUDA kernel, a much slower form runs instead: {reason}. Install: {INSTALL_KERNELS}", reason)
    return operation.plain, reason


def _choose_cpu(operation: _Operation, dtype: torch.dtype) -> tuple[str, str]:
    if dtype == torch.float64:
        return _reference(operation), "the fast CPU forms are float32, the tensors float64"
    problems = {"native": native.problem, "numba": _numba_problem}
    reasons: list[str] = []
    for form in operation.cpu:
        reason = f"{form} is excluded" if form in _excluded else problems[form]() if form in problems else ""
        if not reason:
            if reasons:
                _say_once(f"A slower form runs on the CPU ({form}): {'; '.join(reasons)}", reasons[0])
            return form, "; ".join(reasons)
        reasons.append(reason)
    _say_once(f"No fast CPU kernel, a much slower form runs instead: {'; '.join(reasons)}", reasons[-1])
    return operation.plain, "; ".join(reasons)


def _reference(operation: _Operation) -> str:
    """A composed block stays one: the operations inside it turn to their references."""
    return "composed" if operation.plain == "composed" else "reference"


@cache
def _load_kernel(op: str) -> tuple[Callable[..., Any] | None, str]:
    """The fused function of ``op``, or None and the reason.

    Importing mamba-ssm fails without CUDA, and a wrong pairing of its own dependencies raises other things than
    ImportError (an AttributeError in a mismatched tvm-ffi), so nothing is imported before it is needed and every
    exception is taken as "not usable".
    """
    wanted = _OPERATIONS[op].kernel
    try:
        for needed in (wanted.module.partition(".")[0], *wanted.extensions):
            if find_spec(needed) is None:
                package = "causal-conv1d" if needed.startswith("causal_conv1d") else wanted.package
                return None, f"{package} is not usable: its module {needed} is not installed"
        return getattr(importlib.import_module(wanted.module), wanted.function), ""
    except Exception as error:
        return None, f"{wanted.package} is not usable: {type(error).__name__}: {error}"


@cache
def _numba_problem() -> str:
    """Why the numba kernels cannot be used; empty if they can."""
    try:
        importlib.import_module("recbole_holo.ops._selective_scan_numba")
    except Exception as error:
        return f"numba is not usable: {type(error).__name__}: {error}"
    return ""


@cache
def _version(implementation: str) -> str:
    try:
        return f"{implementation} {version(implementation)}"
    except PackageNotFoundError:
        return implementation


def _say_once(message: str, reason: str = "", level: int = logging.WARNING) -> None:
    """Logs a message, but no second one of the same reason."""
    if (reason or message) not in _said:
        _said.add(reason or message)
        _logger.log(level, message)
