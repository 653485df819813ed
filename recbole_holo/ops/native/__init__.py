"""The CPU kernels in C++, compiled on first use with the machine's own compiler and kept in the user's cache.

Compiling here, not when the package is installed, lets one pure-Python wheel use all instructions of the processor it
lands on (the width of a vector decides the speed), also from a checkout and in an editable install; it takes some
seconds once. Without a compiler the numba scan and PyTorch's products run instead, two to four times slower for a whole
layer (results/layers-cpu.md), and the log says so.

What is kept ends in a checksum of itself: a file that a full disk or a crash of the machine left incomplete is compiled
anew. It is loaded only where none but the user and root could have written it.

``RECBOLE_HOLO_SANITIZE=1`` compiles in checks of every address and of undefined behaviour, which end the process with a
report. The address checks have to be in the process from its start, so the kernels' tests run under them as ::

    RECBOLE_HOLO_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \\
        LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" \\
        python -m pytest tests/ops tests/layers
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

SOURCES = (
    "mamba.cpp",
    "selective_scan.cpp",
    "cross_entropy.cpp",
    "cross_entropy_half.cpp",
    "dropout.cpp",
    "feed_forward.cpp",
    "ssd.cpp",
    "mamba2.cpp",
    "convolution.cpp",
    "step.cpp",
    "superposition.cpp",
    "quantization.cpp",
)
LOG2_E = 1.4426950408889634  # the kernels take decays as powers of two
_DIGEST = hashlib.sha256().digest_size
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-exceptions", "-fno-math-errno", "-shared", "-fPIC")
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
SECONDS = 600  # that a compiler may take in all; it takes some fifteen, on a very busy machine some minutes


class NativeError(Exception):
    """The kernels could not be built or loaded; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        NativeError: there is no compiler, or it failed or did not end.
    """
    if _sanitized() and not hasattr(ctypes.CDLL(None), "__asan_init"):  # loading them would end the process
        raise NativeError("RECBOLE_HOLO_SANITIZE wants LD_PRELOAD (recbole_holo/ops/native/__init__.py says how)")
    try:
        return load(build())
    except OSError as error:
        raise NativeError(f"{type(error).__name__}: {error}") from error


def load(path: Path) -> ctypes.CDLL:
    """A library of kernels, with the types of what its functions return."""
    loaded = ctypes.CDLL(str(path))
    for name in ("lanes", "stretch", "states_together", "ssd_segment"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


@cache
def problem() -> str:
    """Why the kernels cannot be used; empty if they can."""
    try:
        library()
    except NativeError as error:
        return f"the C++ kernels are not usable: {error}"
    return ""


def build(sources: Sequence[Path] | None = None, name: str = "kernels") -> Path:
    """The shared library of the kernels, or of other ``sources`` that include their headers, for this compiler and this
    processor, compiled if the cache lacks it.

    Raises:
        NativeError: there is no compiler, it failed or did not end, or there is no folder to keep the kernels in.
    """
    compiler = _compiler()
    until = time.monotonic() + SECONDS * (10 if _sanitized() else 1)
    version = _run([compiler, "--version"], until).stdout
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    # Compilers shorten vectors where long ones once slowed the clock; without OpenMP there is one thread.
    attempts = [
        [*FLAGS, *(SANITIZERS if _sanitized() else ()), native, *wide, *threads]
        for wide in (["-mprefer-vector-width=512"], [])
        for threads in (["-fopenmp"], [])
    ]
    folder = Path(__file__).parent
    key = hashlib.sha256("\0".join([compiler, version, _processor(), str(attempts)]).encode())
    sources = [folder / source for source in SOURCES] if sources is None else sources
    for source in sorted({*sources, *folder.glob("*.[ch]*")}):
        key.update(source.read_bytes())
    reasons: list[str] = []
    for cache_folder in _cache_folders():
        target = cache_folder / f"{name}-{key.hexdigest()[:20]}.so"
        try:
            cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            reason = _open_to_others(cache_folder) or _open_to_others(target)
            if not reason and not _is_whole(target):
                with tempfile.TemporaryDirectory(dir=cache_folder) as scratch:
                    made = Path(scratch) / target.name
                    _compile(compiler, attempts, sources, made, until)
                    _seal(made)
                    os.replace(made, target)  # whole or not at all, also when several processes compile at once
        except OSError as error:
            reason = f"{cache_folder} cannot be used: {error.strerror}"
        if not reason:
            if reasons:
                getLogger("recbole_holo").warning(
                    "the C++ kernels are kept in %s: %s", cache_folder, "; ".join(reasons)
                )
            return target
        reasons.append(reason)
    raise NativeError(f"there is no folder to keep them in: {'; '.join(reasons)}")


def _open_to_others(path: Path) -> str:
    """Why what lies at ``path`` may have been put there by somebody else; empty if only the user and root could."""
    if not os.path.lexists(path):
        return ""
    link, target = path.lstat(), path.stat()  # of a symbolic link both count
    if {link.st_uid, target.st_uid} - {0, os.geteuid()}:
        return f"{path} belongs to another user"
    if target.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path} (chmod go-w)"
    return ""


def _seal(path: Path) -> None:
    """Appends the checksum of a file to it; what loads a library reads over what follows its last section."""
    path.chmod(0o700)
    with path.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)


def _is_whole(path: Path) -> bool:
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NativeError(f"no C++ compiler found ({', '.join(COMPILERS)}, or the one named by CXX)")


def _sanitized() -> bool:
    return os.environ.get("RECBOLE_HOLO_SANITIZE", "") not in ("", "0")


def _compile(compiler: str, attempts: list[list[str]], sources: Sequence[Path], target: Path, until: float) -> None:
    failure = ""
    for flags in attempts:
        command = [compiler, *flags, f"-I{Path(__file__).parent}", *map(str, sources), "-o", str(target)]
        done = _run(command, until)
        if done.returncode == 0:
            return
        failure = done.stderr.strip()[-400:]
    raise NativeError(f"{compiler} failed: {failure}")


def _run(command: list[str], until: float) -> subprocess.CompletedProcess[str]:
    """Runs a compiler to its end, or ends it and what it started at the time ``until``."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=max(until - time.monotonic(), 0))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise NativeError(f"{command[0]} had not ended when its time was up") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _processor() -> str:
    """What ``native`` means to the compiler: a cache may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    kinds = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return platform.machine() + platform.processor() + "".join(kinds[:2])


def _cache_folders() -> list[Path]:
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base or os.path.expanduser("~/.cache"))
    return [home / "recbole_holo", Path(tempfile.gettempdir()) / f"recbole_holo-{os.geteuid()}"]


# ------------------------------------------------------------------ what the callers of the kernels share
def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The memory of a contiguous float32 tensor; 0 for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def structure(name: str, numbers: str, pointers: str = "", floats: str = "") -> type[ctypes.Structure]:
    """A C struct of 64-bit integers, then floats, then pointers."""
    kinds = ((numbers, ctypes.c_int64), (floats, ctypes.c_float), (pointers, ctypes.c_void_p))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def lanes() -> int:
    """Channels that a kernel handles at once: widths must be multiples of it."""
    return int(library().lanes())


def half_products() -> str:
    """What multiplies in bfloat16 here, for those products that do under autocast; empty if nothing does."""
    return ("", "avx512 bf16", "amx bf16")[library().half_products()]


def stretches(length: int) -> int:
    """States that a forward pass over ``length`` steps keeps for the backward pass."""
    return -(-length // int(library().stretch()))


def segments(length: int) -> int:
    """Parts of a sequence of ``length`` steps between which Mamba-2's kernels keep states."""
    return -(-length // int(library().ssd_segment()))


def whole(size: int, unit: int) -> int:
    """``size``, rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


def whole_states(order: int) -> int:
    """``order``, rounded up to what the kernels take."""
    return whole(order, int(library().states_together()))


def pack(states: Tensor) -> Tensor:
    """``[..., D, N]`` → ``[..., D / lanes, N, lanes]``, contiguous."""
    return states.unflatten(-2, (-1, lanes())).transpose(-1, -2).contiguous()


def unpack(states: Tensor) -> Tensor:
    """``[..., D / lanes, N, lanes]`` → ``[..., D, N]``."""
    return states.transpose(-1, -2).flatten(-3, -2)


def split(sums: Tensor, shapes: list[tuple[int, ...]]) -> Iterator[Tensor]:
    """Sums of threads ``[threads, n]`` → their totals in the given shapes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = total(sums).split(sizes)
    return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def total(sums: Tensor) -> Tensor:
    """``sums [threads, ...]`` → ``[...]``, to the bit ``sums.sum(0)``, but of two in one parallel region."""
    return sums[0] + sums[1] if len(sums) == 2 else sums.sum(0)


def evenly_spaced(x: Tensor) -> Tensor:
    """``x [batch, L, D]`` itself if its rows follow at one distance, as in a slice of the last axis; else a copy."""
    in_place = x.stride(2) == 1 and x.stride(1) >= x.shape[2] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if in_place else x.contiguous()
