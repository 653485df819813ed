"""LinRec: SASRec's block with L2-normalised linear attention (Liu et al., SIGIR 2023, arXiv 2411.01537)."""

from __future__ import annotations

from torch import Tensor

from recbole_holo.errors import ConfigError
from recbole_holo.model.sequence_sasrec import SequenceSASRec
from recbole_holo.model.settings import one_of
from recbole_holo.ops.linear_attention import KEY_NORMS, linear_attention


class LinRec(SequenceSASRec):
    r""":class:`SequenceSASRec` with ``ρ₁(ELU(Q)) (ρ₂(ELU(K))ᵀ V) / √d_head`` for its attention, linear in the length.

    The paper replaces the attention of a Transformer and nothing else; its code does so inside RecBole's SASRec.

    **Causality.** The paper's attention has no mask: every position sees the whole window. With a loss at every
    position a model would be shown its targets, so ``causal: False``, the paper's form, trains on prefixes only, with
    the loss after the last item, and whole sequences are refused. ``causal: True`` is ours: a position sees the
    positions up to itself, with the same attention (see :func:`~recbole_holo.ops.linear_attention.linear_attention`).
    With one layer the two give the same hidden state after the last item of a history; in a stack, the lower layers'
    states of earlier items differ, as they saw later items in one form and not in the other.

    **Norm of the keys.** The paper's equation normalises the columns of K, over positions; its code normalises each
    key. Both are here (``key_norm``).

    **Pads.** The authors' code lets pads take part in ``KᵀV``; here they are left out.

    There is no matrix of attention weights, so ``attn_dropout_prob`` is not a setting of this model, as it is without
    effect in the authors' code. The other keys are those of :class:`SequenceSASRec`.

    Config keys: also ``causal`` (bool), ``key_norm`` (column | position).
    """

    def _set_attention(self, config) -> None:
        self.causal = bool(config["causal"])
        self.key_norm = one_of("key_norm", config["key_norm"], KEY_NORMS)
        if not self.causal and config["train_on"] != "prefixes":
            remedy = (
                "without a mask every position sees its own target in whole-sequence training: "
                "set train_on: prefixes, or causal: True"
            )
            raise ConfigError("causal", self.causal, remedy)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        """Linear attention: ``[B, L, heads, width]`` each, ``valid [B, L]`` (False = pad) → like ``q``."""
        return linear_attention(q, k, v, None if self.causal else valid, self.causal, self.key_norm)
