"""What the time between events adds to the items of a history."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.ops.circular_convolution import bind

FORMS = ("add", "role")


class EventTime(nn.Module):
    r"""A vector for each bucket of the time since the event before, added to the item's (ours).

    ========  =======================  ================================================
    ``add``   e + t_bucket             a bucket has a vector of its own
    ``role``  e + β (r ⊛ t_bucket)     bound with a role, as an attribute of the event
    ========  =======================  ================================================

    β and the role r are learned. Buckets are those of :class:`~recbole_holo.data.event_time.GapBuckets`. With ``kind``
    ``request`` the time until the next event is read likewise, with vectors, a role and a weight of its own: what a
    position has seen is then not all that it knows, it also knows when the next event comes.

    At the start vectors are drawn at the scale of the items, roles from N(0, 1), and β is a half, as where attributes
    are bound with roles (:class:`~recbole_holo.layers.holographic.AttributeBinding`).

    Args:
        d_model: width d.
        buckets: their number n.
        std: of the vectors at the start.
        kind: ``gap`` or ``request``.
        form: ``add`` or ``role``.
    """

    def __init__(self, d_model: int, buckets: int, std: float, kind: str = "gap", form: str = "add") -> None:
        super().__init__()
        self.kind, self.form = kind, form
        self.buckets, times = buckets, 2 if kind == "request" else 1
        self.vectors = nn.Parameter(torch.empty(times * buckets, d_model).normal_(std=std))
        if form == "role":
            self.roles = nn.Parameter(torch.randn(times, d_model))
            self.beta = nn.Parameter(torch.full((times,), 0.5))

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.form}, buckets={self.buckets}"

    @property
    def numbers(self) -> int:
        """How many different :meth:`forward` takes."""
        return self.buckets ** (2 if self.kind == "request" else 1)

    def table(self) -> Tensor:
        """What each number adds: ``[n, d]``, or ``[n², d]`` where number b + n·a is bucket b before and a after."""
        terms = self.vectors.unflatten(0, (-1, self.buckets))
        if self.form == "role":
            terms = self.beta[:, None, None] * bind(self.roles.unsqueeze(1), terms, "ortho")
        return terms[0] if len(terms) == 1 else (terms[1].unsqueeze(1) + terms[0]).flatten(0, 1)

    def forward(self, gaps: Tensor) -> Tensor:
        """Numbers ``[...]`` of :meth:`~recbole_holo.data.event_time.GapBuckets.numbers` → ``[..., d]``."""
        return F.embedding(gaps, self.table())
