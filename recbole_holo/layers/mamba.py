"""The Mamba-1 block, with the parameters of ``mamba_ssm.Mamba``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.layers.carried import Recurrent, StateShapes
from recbole_holo.layers.init import initialise_ssm
from recbole_holo.ops.mamba_block import MambaState, MambaWeights, mamba_block, mamba_block_with_state
from recbole_holo.ops.step import Stepper, mamba_stepper


class Mamba(Recurrent):
    r"""A selective state space model between a gate and two projections (Gu and Dao, arXiv 2312.00752).

    ``x, z = in_proj(h)``; ``x = SiLU(conv1d(x))``; ``dt, B, C = x_proj(x)``; ``Δ = softplus(dt_proj(dt))``;
    ``s_t = exp(Δ_t A) s_{t-1} + Δ_t B_t x_t``, ``y_t = C_t·s_t + D x_t`` with ``A = -exp(A_log)``;
    ``out_proj(y · SiLU(z))``.

    Names, shapes and types of the parameters are those of ``mamba_ssm.Mamba``, so state dicts can be exchanged. Causal:
    the output at a position depends on no later one, so pads on the right need no mask.

    Args:
        d_model: width of input and output.
        d_state: N, states a channel; at most 256.
        d_conv: width of the convolution, 2 to 4.
        expand: inner width as a multiple of ``d_model``.
        dt_rank: rank of the projection to the step size; ``auto`` is ``ceil(d_model / 16)``.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes.
        conv_bias: bias of the convolution.
        bias: biases of the input and output projections.
        ssm_init: see :mod:`recbole_holo.layers.init`.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        ssm_init: str = "official",
    ) -> None:
        super().__init__()
        if dt_rank == "auto":
            dt_rank = math.ceil(d_model / 16)
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank)
        assert isinstance(dt_rank, int)
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, expand, dt_rank
        self.d_inner = d_inner = expand * d_model

        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        initialise_ssm(self, ssm_init, dt_min, dt_max, dt_init_floor)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, L, d_model]`` → ``[B, L, d_model]``."""
        return mamba_block(hidden, self._weights())

    def state_shapes(self) -> StateShapes:
        return StateShapes((self.d_conv - 1, self.d_inner), (self.d_inner, self.d_state))

    def forward_from(
        self, hidden: Tensor, state: MambaState | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        return mamba_block_with_state(hidden, self._weights(), state, lengths)

    def make_stepper(self) -> Stepper:
        return mamba_stepper(self._weights())

    def _weights(self) -> MambaWeights:
        return MambaWeights(
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            -torch.exp(self.A_log.float()),
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
        )


def check_sizes(**sizes: int | str) -> None:
    """Refuses sizes of a block that cannot be built, or that the CUDA kernels cannot run later.

    Raises:
        ConfigError: naming the size, its value and what is possible.
    """
    for field, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(field, value, "use an integer above 0")
    # A model trained on a CPU must load on CUDA, so what the kernels cannot do is refused everywhere.
    if sizes["d_conv"] not in (2, 3, 4):
        raise ConfigError("d_conv", sizes["d_conv"], "the convolution kernels are 2, 3 or 4 wide")
    if int(sizes["d_state"]) > 256:
        raise ConfigError("d_state", sizes["d_state"], "the kernels take at most 256")
