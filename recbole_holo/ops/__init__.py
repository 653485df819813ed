"""Operations on tensors: no RecBole, no modules.

Each has a plain reference, a fast CPU form and the fused CUDA kernel behind one name;
:mod:`recbole_holo.ops.backend` chooses.
"""

from recbole_holo.ops.causal_conv1d import causal_conv1d
from recbole_holo.ops.circular_convolution import bind, circular_convolution, circular_correlation, unbind, unitary
from recbole_holo.ops.losses import bce, bpr, cross_entropy, info_nce, sample_negatives
from recbole_holo.ops.mamba_block import (
    MambaState,
    MambaWeights,
    gated_rms_norm,
    mamba2_inner,
    mamba_block,
    mamba_block_with_state,
)
from recbole_holo.ops.selective_scan import selective_scan, selective_scan_with_state
from recbole_holo.ops.state_space_dual import state_space_dual

__all__ = [
    "MambaState",
    "MambaWeights",
    "bce",
    "bind",
    "bpr",
    "causal_conv1d",
    "circular_convolution",
    "circular_correlation",
    "cross_entropy",
    "gated_rms_norm",
    "info_nce",
    "mamba2_inner",
    "mamba_block",
    "mamba_block_with_state",
    "sample_negatives",
    "selective_scan",
    "selective_scan_with_state",
    "state_space_dual",
    "unbind",
    "unitary",
]
