"""Cross-entropy over all items, estimated from a sample of them."""

from __future__ import annotations

from recbole_holo.losses.info_nce import InfoNCE


class SampledCE(InfoNCE):
    """:class:`InfoNCE` with the log-q correction on."""

    corrects = True
