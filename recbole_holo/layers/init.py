r"""How the parameters of a Mamba block start.

The bias of the step size decides how long a fresh block remembers: with ``softplus(bias) = Δ`` the state of order n
decays by ``exp(-n Δ)`` a step. mamba-ssm draws Δ log-uniformly from [0.001, 0.1], so memories span ten to a thousand
steps. Recommenders that copied SASRec's ``self.apply(self._init_weights)`` overwrite that bias with zero, which makes Δ
0.693 in every channel: a memory of a step or two. Their published numbers carry it, so it can be chosen here:

========== ============================================================================================================
official   as mamba-ssm: Δ log-uniform in [dt_min, dt_max], ``dt_proj.weight`` U(±dt_rank^-½), A = -1..-N (Mamba-2:
           uniform in ``A_init_range``), D = 1, all other weights as PyTorch draws them.
linear     official, but ``dt_proj`` starts as any ``nn.Linear``: weight and bias U(±dt_rank^-½), so Δ is around 0.7.
           What the authors of HoloMambaRec run. Mamba-2 has no ``dt_proj``: its ``dt_bias`` starts at zero.
recbole    what ``self.apply(self._init_weights)`` leaves: every Linear weight N(0, 0.02²), every Linear bias zero
           (``dt_proj.bias`` included: Δ = 0.693); convolution, A and D stay official. What Mamba4Rec and SIGMA
           published. The ``dt_bias`` of Mamba-2 belongs to no Linear and stays official.
xavier     ``xavier_normal_`` on every parameter of two or more dimensions (``A_log`` of Mamba-1 included); those of one
           dimension stay official.
========== ============================================================================================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recbole_holo.errors import ConfigError, nearest

SSM_INITS = ("official", "linear", "recbole", "xavier")


@torch.no_grad()
def initialise_ssm(
    module: nn.Module, how: str, dt_min: float = 0.001, dt_max: float = 0.1, dt_init_floor: float = 1e-4
) -> None:
    """Starts a :class:`~recbole_holo.layers.mamba.Mamba` or :class:`~recbole_holo.layers.mamba2.Mamba2` block.

    Called by the constructors, on freshly built modules: what ``how`` leaves alone keeps the values that PyTorch drew.
    Also marks what no optimiser should decay, ``A_log``, ``D`` and ``dt_bias``, by ``_no_weight_decay = True``.

    Args:
        module: the block.
        how: one of :data:`SSM_INITS`, described at the top of this module.
        dt_min, dt_max: range of the official step sizes.
        dt_init_floor: no official step size starts below.

    Raises:
        ConfigError: ``how`` is not one of :data:`SSM_INITS`.
    """
    if how not in SSM_INITS:
        raise ConfigError("ssm_init", how, nearest(how, SSM_INITS))
    dt_proj = getattr(module, "dt_proj", None)
    step_bias: Tensor = module.dt_bias if dt_proj is None else dt_proj.bias  # type: ignore[assignment]
    if how != "linear":
        if dt_proj is not None:
            nn.init.uniform_(dt_proj.weight, -(dt_proj.in_features**-0.5), dt_proj.in_features**-0.5)
        step_bias.copy_(_log_uniform_steps(step_bias, dt_min, dt_max, dt_init_floor))
    elif dt_proj is None:
        step_bias.zero_()
    if how == "recbole":
        for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                linear.bias.zero_()
    elif how == "xavier":
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                nn.init.xavier_normal_(parameter)
    mark_no_weight_decay(module)


def mark_no_weight_decay(module: nn.Module) -> None:
    """Marks ``A_log``, ``D`` and ``dt_bias`` of a block, as mamba-ssm does."""
    for name in ("A_log", "D", "dt_bias"):
        if hasattr(module, name):
            getattr(module, name)._no_weight_decay = True


def _log_uniform_steps(like: Tensor, smallest: float, largest: float, floor: float) -> Tensor:
    """Inverse softplus of step sizes drawn log-uniformly from ``[smallest, largest]``."""
    step = torch.exp(torch.rand_like(like) * (math.log(largest) - math.log(smallest)) + math.log(smallest))
    step = step.clamp(min=floor)
    return step + torch.log(-torch.expm1(-step))
