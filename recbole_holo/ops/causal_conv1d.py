"""The short causal depthwise convolution in front of a selective scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.errors import ConfigError
from recbole_holo.ops import backend


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    r"""``y_t = activation(bias + Σ_k weight_k x_{t-W+1+k})`` channel by channel, with zeros before the sequence.

    Args:
        x: ``[batch, L, D]``; L may be shorter than the convolution.
        weight: ``[D, W]``.
        bias: ``[D]``; left out if None.
        activation: None or ``silu``.

    Returns:
        ``[batch, L, D]`` in the type of ``x``.
    """
    if activation not in (None, "silu"):
        raise ConfigError("activation", activation, "use None or silu")
    implementation = backend.choose("causal_conv1d", x)
    if implementation == "causal-conv1d":
        return _causal_conv1d_cuda(x, weight, bias, activation)
    if implementation == "native":
        return _causal_conv1d_native(x, weight, bias, activation)
    if implementation == "torch":
        return _causal_conv1d_shifted(x, weight, bias, activation)
    return causal_conv1d_reference(x, weight, bias, activation)


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """:func:`causal_conv1d` by the convolution of PyTorch, for any device and floating type."""
    dtype, (channels, width) = x.dtype, weight.shape
    with backend.without_autocast(x):
        x, weight, bias = _common_type(x, weight, bias)
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        y = F.conv1d(padded, weight.unsqueeze(1), bias, groups=channels).transpose(1, 2)
        return _activate(y, activation).to(dtype)


def _causal_conv1d_native(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    from recbole_holo.ops._causal_conv1d_native import causal_conv1d_native  # compiles, so only when it is needed

    return causal_conv1d_native(x, weight, bias, activation == "silu").to(x.dtype)


def _causal_conv1d_shifted(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """W multiply-adds of shifted views: on a CPU faster than the convolution, which wants channels before time."""
    dtype, length, width = x.dtype, x.shape[1], weight.shape[1]
    x, weight, bias = _common_type(x, weight, bias)
    padded = F.pad(x, (0, 0, width - 1, 0))
    taps = weight.unbind(1)
    y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
    for k, tap in enumerate(taps[:-1]):
        y = torch.addcmul(y, padded[:, k : k + length], tap)
    return _activate(y, activation).to(dtype)


def _causal_conv1d_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The kernel takes ``[batch, D, L]``."""
    bias = None if bias is None else backend.dense(bias)
    y = backend.kernel("causal_conv1d")(x=_readable(x.transpose(1, 2)), weight=weight, bias=bias, activation=activation)
    return backend.with_gradient(y, _readable).transpose(1, 2)


def _readable(x: Tensor) -> Tensor:
    """``x [batch, D, L]`` itself if the kernel can read it channels-last, 8 channels at a time, else with time last."""
    channels, length = x.shape[1:]
    apart = all(step % 8 == 0 for step in (channels, x.stride(0), x.stride(2))) and x.stride(2) >= channels
    in_place = length > 1 and x.stride(1) == 1 and apart and x.data_ptr() % 16 == 0
    return x if in_place else backend.dense(x)


def _common_type(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    x = backend.working(x)
    return x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y
