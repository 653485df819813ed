"""The state space of Mamba-2 in its dual, matrix-product form (Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.errors import ConfigError
from recbole_holo.ops import backend


class DualArguments(NamedTuple):
    """What :func:`state_space_dual` is given, on its way to one of the forms."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    chunk_size: int = 64,
) -> Tensor:
    r"""The selective scan with one decay a head, so that it can be written in matrix products.

    ``Δ_t = softplus(dt_t + dt_bias)``, ``h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ``, ``y_t = h_t C_t + D x_t`` for each
    of H heads of width P, with h_{-1} = 0. The H/G heads of a group share B and C. Causal.

    Args:
        x: ``[batch, L, H, P]``.
        dt: ``[batch, L, H]``.
        A: ``[H]``, negative.
        B, C: ``[batch, L, G, N]``, G a divisor of H.
        D: ``[H]``, the skip; left out if None.
        dt_bias: ``[H]``; left out if None.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        chunk_size: steps multiplied out at once; changes speed and rounding only. 64 suits lengths up to 256.

    Returns:
        ``[batch, L, H, P]`` in the type of ``x``. Computed in float32 (float64 inputs: float64).

    Raises:
        ConfigError: the groups do not divide the heads.
    """
    _check_groups(x, B)
    given = DualArguments(x, dt, A, B, C, D, dt_bias, dt_softplus)
    implementation = backend.choose("state_space_dual", x)
    if implementation == "mamba-ssm":
        return _cuda(given, chunk_size)
    if implementation == "native":
        return _native(given, None, False)[0]
    if implementation == "torch":
        return _products(given, chunk_size, None, False)[0]
    return _reference(given, None)[0]


def state_space_dual_with_state(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`state_space_dual` from a state h_{-1} to the state h_{L-1}; gradients pass through both.

    Args:
        initial_state: ``[batch, H, P, N]``; zeros if None.

    Returns:
        ``[batch, L, H, P]`` in the type of ``x``, and ``[batch, H, P, N]`` in float32 (float64 inputs: float64).
    """
    _check_groups(x, B)
    given = DualArguments(x, dt, A, B, C, D, dt_bias, dt_softplus)
    implementation = backend.choose("state_space_dual", x)
    if implementation == "mamba-ssm":
        initial = None if initial_state is None else initial_state.float()
        y, last = _cuda(given, chunk_size, initial_states=initial, return_final_states=True)
        return y, last.float()
    if implementation == "native":
        return _native(given, initial_state, True)
    if implementation == "torch":
        return _products(given, chunk_size, initial_state, True)
    return _reference(given, initial_state)


def state_space_dual_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """:func:`state_space_dual` step by step, by plain operations, for any device and floating type."""
    return _reference(DualArguments(x, dt, A, B, C, D, dt_bias, dt_softplus), None)[0]


def _reference(given: DualArguments, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype, heads = given.x.dtype, given.x.shape[2]
    with backend.without_autocast(given.x):
        x, A, B, C = (backend.working(t) for t in (given.x, given.A, given.B, given.C))
        dt = _step_sizes(given)
        B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))  # [batch, L, H, N]
        start = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
        h, outputs = start if initial_state is None else initial_state.to(x.dtype), []
        # unbind, not indexing: the gradient of x[:, t] is a zero tensor as large as x for every t, quadratic in L.
        steps = (t.unbind(1) for t in (torch.exp(dt * A), dt.unsqueeze(-1) * x, B, C))
        for decay, x_t, b_t, c_t in zip(*steps, strict=True):
            h = decay[..., None, None] * h + x_t.unsqueeze(-1) * b_t.unsqueeze(-2)  # [batch, H, P, N]
            outputs.append(torch.matmul(h, c_t.unsqueeze(-1)).squeeze(-1))
        return _add_skip(torch.stack(outputs, 1), x, given.D).to(dtype), h


def _native(given: DualArguments, initial_state: Tensor | None, wants_state: bool) -> tuple[Tensor, Tensor]:
    from recbole_holo.ops._state_space_dual_native import state_space_dual_native  # compiles, so only when it is needed

    y, last = state_space_dual_native(given, initial_state, wants_state)
    return y.to(given.x.dtype), last


def _products(
    given: DualArguments, chunk_size: int, initial_state: Tensor | None, wants_state: bool
) -> tuple[Tensor, Tensor]:
    """Chunks of equal length: inside one, a masked product like attention; between them, their last states.

    Every group becomes a batch entry of its own, so B and C are never repeated over heads and the states of all heads
    of a group come from one matrix product. The last state is empty unless ``wants_state``.
    """
    batch, length, heads, width = given.x.shape
    groups, order = given.B.shape[2:]
    shared = heads // groups
    with backend.without_autocast(given.x):
        x, A, B, C = (backend.working(t) for t in (given.x, given.A, given.B, given.C))
        dt = _step_sizes(given)
        chunks = -(-length // chunk_size)
        size = -(-length // chunks)  # even chunks: 65 steps are 33 + 32, not 64 + 1 and 63 of padding
        pad = chunks * size - length

        def chunked(t: Tensor, *rest: int) -> Tensor:
            """``[batch, L, G, ...]`` → ``[batch * G, chunks, size, ...]``, zeros at the end."""
            t = t.reshape(batch, length, groups, -1).transpose(1, 2).reshape(batch * groups, length, -1)
            return F.pad(t, (0, 0, 0, pad)).view(batch * groups, chunks, size, *rest)

        inputs = chunked(x * dt.unsqueeze(-1), shared, width)
        exponents = chunked(dt * A, shared)
        b, c = chunked(B, order), chunked(C, order)

        total = exponents.cumsum(2)  # [bg, c, q, h]
        within = _Decay.apply(exponents.transpose(2, 3))  # [bg, c, h, q, q]
        weights = within * (c @ b.transpose(-1, -2)).unsqueeze(2)
        y = torch.matmul(weights, inputs.transpose(2, 3)).transpose(2, 3)  # [bg, c, q, h, p]
        # States between chunks are [bg, n, h, p].
        state = x.new_zeros(()) if initial_state is None else initial_state.to(x.dtype).unflatten(1, (groups, shared))
        if initial_state is not None:
            state = state.flatten(0, 1).permute(0, 3, 1, 2)
        first, last = int(initial_state is None), chunks if wants_state else chunks - 1
        states = []
        if last > 0:
            to_end = torch.exp(total[:, :last, -1:] - total[:, :last]).unsqueeze(-1)
            added = b[:, :last].transpose(-1, -2) @ (inputs[:, :last] * to_end).flatten(3)  # [bg, c, n, h·p]
            added = added.view(*added.shape[:3], shared, width)
            across = torch.exp(total[:, :, -1])[:, :, None, :, None]
            for i in range(last):
                states.append(state)
                state = torch.addcmul(added[:, i], across[:, i], state)
        states = [*states, state][first:chunks]
        if states:
            carried = (c[:, first:] @ torch.stack(states, 1).flatten(3)).view_as(inputs[:, first:])
            y = torch.cat([y[:, :first], y[:, first:] + carried * torch.exp(total[:, first:]).unsqueeze(-1)], 1)
        y = y.reshape(batch, groups, chunks * size, shared, width)[:, :, :length].transpose(1, 2)
        y = _add_skip(y.reshape(batch, length, heads, width), x, given.D).to(given.x.dtype)
        if wants_state:
            state = state.permute(0, 2, 3, 1).reshape(batch, heads, width, order)
        return y, state


class _Decay(torch.autograd.Function):
    r"""``exponents [..., Q]`` (≤ 0) → ``[..., Q, Q]`` with ``exp(Σ_{j<k≤i} exponents_k)`` at (i, j), j ≤ i; else 0.

    The sums are differences of one running sum. That is taken in float64: after one large step it is large, and in
    float32 the small decays behind it would drown in its rounding.
    """

    @staticmethod
    def forward(ctx: Any, exponents: Tensor) -> Tensor:
        total = exponents.double().cumsum(-1)
        size = exponents.shape[-1]
        decay = exponents.new_empty(*exponents.shape, size)
        torch.sub(total.unsqueeze(-1), total.unsqueeze(-2), out=decay)
        above = torch.full((size, size), -torch.inf, dtype=decay.dtype, device=decay.device).triu_(1)
        decay.add_(above).exp_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (decay,) = ctx.saved_tensors
        gradient = gradient * decay
        # exponent k is in the sum at (i, j) for j < k <= i: whatever reaches row k or later, less what starts there
        total = gradient.sum(-1, dtype=torch.float64) - gradient.sum(-2, dtype=torch.float64)
        return total.flip(-1).cumsum(-1).flip(-1).to(gradient.dtype)


def _cuda(given: DualArguments, chunk_size: int, **states: Any) -> Any:
    given = given._replace(
        x=backend.adjacent(given.x),
        A=given.A.float(),
        B=backend.adjacent(given.B.to(given.x.dtype)),
        C=backend.adjacent(given.C.to(given.x.dtype)),
        D=None if given.D is None else backend.adjacent(given.D),
    )
    return backend.kernel("state_space_dual")(**given._asdict(), chunk_size=chunk_size, **states)


def _check_groups(x: Tensor, B: Tensor) -> None:
    heads, groups = x.shape[2], B.shape[2]
    if heads % groups:
        raise ConfigError("ngroups", groups, f"it must divide the number of heads, {heads}")


def _step_sizes(given: DualArguments) -> Tensor:
    dt = backend.working(given.dt)
    if given.dt_bias is not None:
        dt = dt + given.dt_bias
    return F.softplus(dt) if given.dt_softplus else dt


def _add_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else y + D.unsqueeze(-1) * x
