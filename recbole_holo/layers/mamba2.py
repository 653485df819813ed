"""Mamba-2 blocks: one, with the parameters of ``mamba_ssm.Mamba2``, and many narrow ones side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.layers.carried import Recurrent, StateShapes
from recbole_holo.layers.init import initialise_ssm, mark_no_weight_decay
from recbole_holo.layers.mamba import check_sizes
from recbole_holo.ops.mamba2_block import Mamba2Sizes, Mamba2Weights, mamba2_block, mamba2_block_with_state
from recbole_holo.ops.mamba_block import MambaState
from recbole_holo.ops.step import Stepper, mamba2_stepper

_NORM_EPS = 1e-5


class Mamba2(Recurrent):
    r"""A state space model with one decay a head, between a gate and two projections (Dao and Gu, arXiv 2405.21060).

    ``z, x, B, C, dt = in_proj(h)``; ``x, B, C = SiLU(conv1d(x, B, C))``; ``Δ = softplus(dt + dt_bias)``;
    ``S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t B_tᵀ``, ``y_t = S_t C_t + D x_t`` in each head, ``A = -exp(A_log)``;
    ``out_proj(RMSNorm(y · SiLU(z)))``.

    Names, shapes and types of the parameters are those of ``mamba_ssm.Mamba2``, so state dicts can be exchanged.
    Causal: the output at a position depends on no later one, so pads on the right need no mask.

    Args:
        d_model: width of input and output.
        d_state: N, the states of a channel.
        d_conv: width of the convolution, 2 to 4.
        expand: inner width as a multiple of ``d_model``.
        headdim: channels of a head; must divide the inner width. None: the largest divisor of the inner width up
            to 64. The CUDA kernels work on powers of two from 16 on; other widths are padded.
        ngroups: groups of heads that share B and C; must divide the number of heads.
        A_init_range: the decay rates start uniformly in this range.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes.
        conv_bias: bias of the convolution.
        bias: biases of the input and output projections.
        chunk_size: steps multiplied out at once; changes speed and rounding only.
        ssm_init: see :mod:`recbole_holo.layers.init`.

    Raises:
        ConfigError: a size is out of range or does not divide another.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        chunk_size: int = 64,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        ssm_init: str = "official",
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        self.d_inner = d_inner = expand * d_model
        if headdim is None:
            headdim = next(width for width in range(min(64, d_inner), 0, -1) if d_inner % width == 0)
        check_sizes(d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups, chunk_size=chunk_size)
        if d_inner % headdim:
            remedy = f"it must divide the inner width expand·d_model = {d_inner}: change it or d_model"
            raise ConfigError("headdim", headdim, remedy)
        self.nheads = nheads = d_inner // headdim
        if nheads % ngroups:
            raise ConfigError("ngroups", ngroups, f"it must divide the number of heads, {nheads}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ConfigError("A_init_range", A_init_range, "use two numbers above 0 in ascending order")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.headdim, self.ngroups, self.chunk_size = headdim, ngroups, chunk_size

        channels = d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, d_inner + channels + nheads, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(nheads))
        self.A_log = nn.Parameter(torch.empty(nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(nheads))
        self.norm = nn.RMSNorm(d_inner, eps=_NORM_EPS)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        initialise_ssm(self, ssm_init, dt_min, dt_max, dt_init_floor)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, L, d_model]`` → ``[B, L, d_model]``."""
        return mamba2_block(hidden.unsqueeze(2), *_stacked(self)).squeeze(2)

    def state_shapes(self) -> StateShapes:
        """``conv [d_conv - 1, channels of x, B, C]`` and ``ssm [nheads, headdim, d_state]``."""
        channels = self.d_inner + 2 * self.ngroups * self.d_state
        return StateShapes((self.d_conv - 1, channels), (self.nheads, self.headdim, self.d_state))

    def forward_from(
        self, hidden: Tensor, state: MambaState | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        before = None if state is None else MambaState(state.conv.unsqueeze(1), state.ssm.unsqueeze(1))
        out, after = mamba2_block_with_state(hidden.unsqueeze(2), *_stacked(self), before, lengths)
        return out.squeeze(2), MambaState(after.conv.squeeze(1), after.ssm.squeeze(1))

    def make_stepper(self) -> Stepper:
        step = mamba2_stepper(*_stacked(self))

        def one_block(hidden: Tensor, state: MambaState) -> Tensor:
            return step(hidden.unsqueeze(1), MambaState(state.conv.unsqueeze(1), state.ssm.unsqueeze(1))).squeeze(1)

        return one_block


class _Stack(nn.Module):
    """The weight, and the bias if there is one, of equal submodules, stacked on a new first axis."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        for name, first in modules[0].named_parameters():
            stacked = torch.stack([getattr(module, name).detach() for module in modules])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=first.requires_grad))


class LatentMamba2(Recurrent):
    r"""v independent Mamba-2 blocks of width d_c, computed together (the latent heads of Hydra, arXiv 2504.07398).

    The parameters are those of :class:`Mamba2`, without projection biases, stacked on a first axis of length v. The v
    blocks run as one Mamba-2 with v times the heads and groups: the channels of all blocks are laid out kind by kind
    (z of every block, then x, B, C, dt), and every block keeps its own B and C, because they are shared within a group
    only, and its own norm, because that is taken group by group.

    Args:
        n_heads: v.
        d_head: d_c, width of a block's input and output.
        others: as for :class:`Mamba2`, for every block.

    Raises:
        ConfigError: a size is out of range or does not divide another.
    """

    dt_bias: nn.Parameter  # [v, nheads], as the two below
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        n_heads: int,
        d_head: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        chunk_size: int = 64,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        ssm_init: str = "official",
    ) -> None:
        super().__init__()
        check_sizes(d_state=d_state, d_conv=d_conv, n_heads=n_heads, d_head=d_head)
        self._sizes = {
            "d_model": d_head,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "headdim": headdim,
            "ngroups": ngroups,
            "chunk_size": chunk_size,
            "conv_bias": conv_bias,
        }
        start = {"A_init_range": A_init_range, "dt_min": dt_min, "dt_max": dt_max, "dt_init_floor": dt_init_floor}
        blocks = [Mamba2(**self._sizes, **start, ssm_init=ssm_init) for _ in range(n_heads)]  # type: ignore[arg-type]
        first = blocks[0]
        self.n_heads, self.d_head = n_heads, d_head
        self.d_inner, self.d_state, self.headdim = first.d_inner, first.d_state, first.headdim
        self.nheads, self.ngroups, self.chunk_size = first.nheads, first.ngroups, first.chunk_size

        self.in_proj = _Stack([block.in_proj for block in blocks])  # weight [v, d_in_proj, d_c]
        self.conv1d = _Stack([block.conv1d for block in blocks])  # weight [v, channels, 1, d_conv], bias [v, channels]
        for name in ("dt_bias", "A_log", "D"):
            self.register_parameter(name, nn.Parameter(torch.stack([getattr(b, name).detach() for b in blocks])))
        self.norm = _Stack([block.norm for block in blocks])  # weight [v, d_inner]
        self.out_proj = _Stack([block.out_proj for block in blocks])  # weight [v, d_c, d_inner]
        mark_no_weight_decay(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, L, v, d_c]`` → ``[B, L, v, d_c]``."""
        return mamba2_block(hidden, *_stacked(self))

    def state_shapes(self) -> StateShapes:
        """``conv [v, d_conv - 1, channels of x, B, C]`` and ``ssm [v, nheads, headdim, d_state]``."""
        v, channels, _, width = self.conv1d.weight.shape
        return StateShapes((v, width - 1, channels), (v, self.nheads, self.headdim, self.d_state))

    def forward_from(
        self, hidden: Tensor, state: MambaState | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        return mamba2_block_with_state(hidden, *_stacked(self), state, lengths)

    def make_stepper(self) -> Stepper:
        return mamba2_stepper(*_stacked(self))

    @torch.no_grad()
    def head(self, i: int) -> Mamba2:
        """The i-th block as a :class:`Mamba2` of its own, with copied weights."""
        block = Mamba2(**self._sizes)  # type: ignore[arg-type]
        block.load_state_dict({name: parameter[i] for name, parameter in self.state_dict().items()})
        return block.to(self.D.device)


def _stacked(block: Mamba2 | LatentMamba2) -> tuple[Mamba2Weights, Mamba2Sizes]:
    """The parameters of a block, with a first axis of 1 for a single one."""
    parameters = Mamba2Weights(
        block.in_proj.weight,
        block.in_proj.bias,
        block.conv1d.weight.squeeze(-2),
        block.conv1d.bias,
        block.dt_bias,
        -torch.exp(block.A_log.float()),
        block.D,
        block.norm.weight,
        block.out_proj.weight,
        block.out_proj.bias,
    )
    if isinstance(block, Mamba2):
        parameters = Mamba2Weights(*(t if t is None else t.unsqueeze(0) for t in parameters))  # type: ignore[arg-type]
    return parameters, Mamba2Sizes(block.headdim, block.ngroups, block.d_state, _NORM_EPS, block.chunk_size)
