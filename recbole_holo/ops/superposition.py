"""Sums of bound pairs: what a window of events is as one vector."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import backend, native

FEW = 2048  # events up to which products with circulant matrices are faster


def superposition(x: Tensor, roles: Tensor) -> Tensor:
    """``s = Σ_j x_j ⊛ role_j``: the vectors of a window, each bound with the role of its place, summed.

    A bound role is a circulant matrix, so a window is one product with k of them: faster than transforms at the widths
    of recommenders.

    Args:
        x: ``[..., k, d]``.
        roles: ``[k, d]``.

    Returns:
        ``[..., d]``.

    >>> superposition(torch.eye(3)[:2], torch.eye(3)[:2])
    tensor([1., 0., 1.])
    """
    step = torch.arange(roles.shape[1], device=roles.device)
    circulants = roles[:, (step - step.unsqueeze(-1)) % len(step)]  # [k, d, d]: x @ circulant = x ⊛ role
    return x.flatten(-2) @ circulants.flatten(0, 1)


def superposes_rows(events: Tensor, roles: Tensor) -> bool:
    """Whether :func:`superposition_of_rows` has a kernel for these, and is faster."""
    return roles.dtype == torch.float32 and events.numel() > FEW and backend.runs_native(roles)


def superposition_of_rows(table: Tensor, events: Tensor, roles: Tensor) -> Tensor:
    """:func:`superposition` of ``table[events]``, in the frequencies, where binding is elementwise; on a CPU only.

    The table is transformed once, however often its rows occur, the C++ kernel sums windows, and only sums are
    transformed back: d² multiplications a row and a window instead of an event, and no vectors of events are held.

    Args:
        table: ``[n, d]``.
        events: ``[..., k]`` int64, rows of ``table``.
        roles: ``[k, d]``.

    Returns:
        ``[..., d]``, float32.

    Raises:
        IndexError: an event is no row of ``table``.
    """
    if events.numel() and not 0 <= int(events.min()) <= int(events.max()) < len(table):
        raise IndexError(f"events {int(events.min())} to {int(events.max())} of a table of {len(table)} rows")
    with backend.without_autocast(table):
        basis = _basis(table.shape[1], native.lanes())
        coefficients = _coefficients(roles.float(), basis.shape[1] // 2)
        return SuperpositionOfSpectra.apply(table.float() @ basis, events, coefficients) @ basis.T


@cache
def _basis(d: int, lanes: int) -> Tensor:
    """Cosines and sines as orthonormal columns ``[d, 2·half]``: x @ basis is the spectrum that the kernel takes.

    Half the width is that of the frequencies, rounded up to whole vectors: columns beyond are zero. The imaginary part
    of frequency 0, which is zero, has the place of the sign's frequency, which an even d has.
    """
    half = native.whole((d + 1) // 2, lanes)
    angle = 2 * math.pi / d * torch.outer(torch.arange(d), torch.arange((d + 1) // 2)).double()
    real, imaginary = torch.cos(angle), -torch.sin(angle)
    if d % 2 == 0:
        imaginary[:, 0] = 1 - 2.0 * (torch.arange(d) % 2)
    parts = [F.pad(part * (2 / d) ** 0.5, (0, half - part.shape[1])) for part in (real, imaginary)]
    basis = torch.cat(parts, 1)
    basis[:, [0, half]] /= 2**0.5  # what is real is not there twice
    return basis.float()


def _coefficients(roles: Tensor, half: int) -> Tensor:
    """``[k, d]`` → ``[k, 3, half]``: what the kernel multiplies spectra with, from the roles' own."""
    d = roles.shape[1]
    spectrum = torch.fft.rfft(roles)
    real, imaginary = spectrum.real[:, : (d + 1) // 2], spectrum.imag[:, : (d + 1) // 2]
    sign = spectrum.real[:, d // 2 :] if d % 2 == 0 else torch.zeros_like(real[:, :1])
    rows = [real, imaginary, torch.cat([sign, real[:, 1:]], 1)]
    return torch.stack([F.pad(row, (0, half - row.shape[1])) for row in rows], 1)


Sizes = native.structure("Sizes", "windows size half", "events spectra roles")


class SuperpositionOfSpectra(torch.autograd.Function):
    """The kernel: ``spectra [n, 2·half]``, ``events [..., k]``, ``roles [k, 3, half]`` → ``[..., 2·half]``."""

    @staticmethod
    def forward(ctx: Any, spectra: Tensor, events: Tensor, roles: Tensor) -> Tensor:
        spectra, events, roles = spectra.contiguous(), events.contiguous(), roles.contiguous()
        ctx.save_for_backward(spectra, events, roles)
        out = spectra.new_empty(*events.shape[:-1], spectra.shape[1])
        native.library().superposition(*_arguments(spectra, events, roles), native.pointer(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
        spectra, events, roles = ctx.saved_tensors
        gout, gspectra = gout.contiguous(), torch.zeros_like(spectra)
        sums = roles.new_zeros(torch.get_num_threads(), *roles.shape)
        native.library().superposition_backward(
            *_arguments(spectra, events, roles), *map(native.pointer, (gout, gspectra, sums))
        )
        return gspectra, None, sums.sum(0)


def _arguments(spectra: Tensor, events: Tensor, roles: Tensor) -> tuple[Any, int]:
    size, _, half = roles.shape
    sizes = Sizes(events.numel() // size, size, half, *map(native.pointer, (events, spectra, roles)))
    return ctypes.byref(sizes), torch.get_num_threads()
