"""The official kernels on a CPU, behind this package's own calls.

From the source distributions of mamba-ssm and causal-conv1d come the Python functions, the autograd functions among
them, the host code of the extensions (``host.cpp`` has plain loops for the CUDA launches) and the Triton kernels, which
run in Triton's interpreter. So what a call computes, refuses or misreads on a GPU, it does here, except for the
arithmetic inside the two CUDA kernels. ``.ci/official`` downloads the sources and runs these tests; elsewhere they are
skipped. Where RECBOLE_HOLO_OFFICIAL names their folder, what is missing is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from recbole_holo.ops import backend

SOURCES = os.environ.get("RECBOLE_HOLO_OFFICIAL")
HERE = Path(__file__).parent
EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")


def install(folder: Path) -> None:
    """Makes ``mamba_ssm``, ``causal_conv1d`` and their extensions importable, for this process."""
    os.environ["TRITON_INTERPRET"] = "1"  # before triton
    names = ("mamba_ssm", "causal_conv1d")
    mamba, convolution = (next(found for found in folder.glob(f"{name}-*") if found.is_dir()) for name in names)
    sys.path.append(str(convolution))
    for extension in EXTENSIONS:
        loader = ExtensionFileLoader(extension, str(compiled(folder, mamba, convolution)))
        spec = importlib.util.spec_from_file_location(extension, loader.path, loader=loader)
        assert spec is not None
        sys.modules[extension] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules[extension])
    package = ModuleType("mamba_ssm")  # its own __init__ imports language models, and with them transformers
    package.__path__ = [str(mamba / "mamba_ssm")]
    package.__spec__ = ModuleSpec("mamba_ssm", None, is_package=True)
    sys.modules["mamba_ssm"] = package
    multiply_bfloat16()
    run_few_programs()
    autocast = importlib.import_module("mamba_ssm.utils.torch")
    for name in ("custom_fwd", "custom_bwd"):  # they follow the autocast of CUDA
        setattr(autocast, name, on_cpu(getattr(torch.amp, name)))


def on_cpu(decorator: Callable[..., Callable]) -> Callable[[Callable], Callable]:
    return lambda function: decorator(function, device_type="cpu")


def compiled(folder: Path, mamba: Path, convolution: Path) -> Path:
    """host.cpp, compiled for this Python and this torch unless it lies in ``folder`` already."""
    inputs = [HERE / "host.cpp", *sorted((HERE / "include").rglob("*.h"))]
    key = hashlib.sha256("".join([sys.version, torch.__version__, *(file.read_text() for file in inputs)]).encode())
    target = folder / f"host-{key.hexdigest()[:20]}.so"
    if not target.exists():
        from torch.utils.cpp_extension import include_paths, library_paths

        searched = [HERE / "include", mamba, convolution, *include_paths(), sysconfig.get_path("include")]
        libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        making = target.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *(f"-I{path}" for path in searched)]
        subprocess.run([*command, str(HERE / "host.cpp"), "-o", str(making), *libraries], check=True)
        making.replace(target)
    return target


def multiply_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as 16-bit integers, and multiplies matrices of them as such."""
    from triton import language
    from triton.runtime import interpreter

    def widened(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    multiply = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest)


def run_few_programs() -> None:
    """What makes the interpreter ten times as fast: no check of every sum of addresses, and the largest blocks."""
    from triton.runtime import interpreter

    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    determinism = importlib.import_module("mamba_ssm.utils.determinism")
    cost = determinism._estimate_config_cost
    determinism._estimate_config_cost = lambda configuration: -cost(configuration)


if SOURCES is not None:
    install(Path(SOURCES).resolve())


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation chooses as for CUDA tensors, and the official code finds what it asks of a GPU."""
    backend.set_backend("auto")
    torch.manual_seed(0)
    monkeypatch.setattr(backend, "_used", {})

    def choose(op: str, tensor: torch.Tensor) -> str:
        implementation, why = backend._choose_kernel(op, tensor)
        backend.note(op, implementation, why)
        return implementation

    asked, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    monkeypatch.setattr(backend, "choose", choose)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2, name="")
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))
    monkeypatch.setattr(torch, "get_autocast_gpu_dtype", lambda: dtype("cpu"))
