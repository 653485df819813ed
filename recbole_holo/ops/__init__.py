"""Operations on tensors: no RecBole, no modules.

Each has a plain reference, a fast CPU form and the fused CUDA kernel behind one name;
:mod:`recbole_holo.ops.backend` chooses.
"""

from recbole_holo.ops.causal_conv1d import causal_conv1d
from recbole_holo.ops.circular_convolution import bind, circular_convolution, circular_correlation, unbind, unitary
from recbole_holo.ops.cleanup import cleanup
from recbole_holo.ops.cross_entropy import cross_entropy
from recbole_holo.ops.feed_forward import FeedForwardWeights, feed_forward
from recbole_holo.ops.losses import bce, bpr, info_nce, sample_negatives
from recbole_holo.ops.mamba2_block import (
    Mamba2Sizes,
    Mamba2Weights,
    gated_rms_norm,
    mamba2_block,
    mamba2_block_with_state,
    mamba2_inner,
    mamba2_inner_with_state,
)
from recbole_holo.ops.mamba_block import MambaState, MambaWeights, mamba_block, mamba_block_with_state
from recbole_holo.ops.selective_scan import selective_scan, selective_scan_with_state
from recbole_holo.ops.state_space_dual import state_space_dual, state_space_dual_with_state
from recbole_holo.ops.superposition import superposition, superposition_of_rows

__all__ = [
    "FeedForwardWeights",
    "Mamba2Sizes",
    "Mamba2Weights",
    "MambaState",
    "MambaWeights",
    "bce",
    "bind",
    "bpr",
    "causal_conv1d",
    "circular_convolution",
    "circular_correlation",
    "cleanup",
    "cross_entropy",
    "feed_forward",
    "gated_rms_norm",
    "info_nce",
    "mamba2_block",
    "mamba2_block_with_state",
    "mamba2_inner",
    "mamba2_inner_with_state",
    "mamba_block",
    "mamba_block_with_state",
    "sample_negatives",
    "selective_scan",
    "selective_scan_with_state",
    "state_space_dual",
    "state_space_dual_with_state",
    "superposition",
    "superposition_of_rows",
    "unbind",
    "unitary",
]
