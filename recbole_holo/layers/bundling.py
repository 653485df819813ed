"""Temporal bundling: the older part of a history as superpositions of k events each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recbole_holo.ops.circular_convolution import unitary


class Layout(NamedTuple):
    """Where the positions of a batch of histories are among its tokens."""

    token_of: Tensor  # [B, L]: the token whose state is a position's; -1 = none yet

    def spread(self, hidden: Tensor) -> Tensor:
        """States of the tokens ``[B, T, d]`` → of the positions ``[B, L, d]``; zero where there is none yet."""
        index = self.token_of.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index).masked_fill(self.token_of.unsqueeze(-1) < 0, 0.0)


class TemporalBundling(nn.Module):
    r"""``s_w = (1/√k) Σ_{j<k} x_{wk+k-1-j} ⊛ r_j`` for the older windows of k events, the latest events as they are.

    Of a history of n events the first ``⌊(n - recent)/k⌋`` windows of k become one token each, the ``recent`` to
    ``recent + k - 1`` events after them stay tokens of their own. Roles r are learned, projected to magnitude 1 in
    every frequency, so that a bound event is as long as the event, and the sum of k independent ones divided by √k as
    long as each. Role j belongs to the j-th latest event of a window, whatever k is: one set of roles serves every k
    up to ``largest`` (ours; HoloMambaRec's authors allocate roles and do not train them, and count from the start).

    **What a position sees.** A recent event's state is its own token's. A bundled event's is that of the last window
    that was complete by then, its own if it is the window's last: no state holds an event that comes later.

    Args:
        d_model: width d.
        largest: largest k, and the number of roles.
        recent: latest events that are never bundled, at least 1.

    Attributes:
        size: k outside training, 1 to ``largest``; 1 bundles nothing.
        training_size: k in training.
    """

    def __init__(self, d_model: int, largest: int, recent: int) -> None:
        super().__init__()
        self.recent = recent
        self.size = self.training_size = largest
        self.roles = nn.Parameter(torch.randn(largest, d_model))

    def extra_repr(self) -> str:
        return f"size={self.size}, recent={self.recent}"

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Layout | None]:
        """Histories ``[B, L, d]`` of ``lengths [B]``, pads on the right → tokens ``[B, T, d]``, T ≤ L, and where the
        positions are among them (None: where they were)."""
        size = self.training_size if self.training else self.size
        length = x.shape[1]
        windows = max(length - self.recent, 0) // size
        if size == 1 or windows == 0:
            return x, None
        bundled = (lengths - self.recent).clamp(min=0).div(size, rounding_mode="floor").unsqueeze(-1)  # [B, 1] windows
        position = torch.arange(length, device=x.device)
        recent_token = position - bundled * (size - 1)
        past_token = (position + 1).div(size, rounding_mode="floor") - 1
        # Of L events no history has more tokens than those whose last window just lacks an event.
        token = torch.arange(min(windows + self.recent + size - 1, length), device=x.device)
        token_of = torch.where(position >= bundled * size, recent_token, past_token).clamp(max=len(token) - 1)  # [B, L]

        source = torch.where(token < bundled, token, windows + token + bundled * (size - 1))  # [B, T]
        source = source.clamp(max=windows + length - 1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat([self.bundles(x, size, windows), x], 1).gather(1, source), Layout(token_of)

    def bundles(self, x: Tensor, size: int, windows: int) -> Tensor:
        """The first windows of k events: ``[B, L, d]`` → ``[B, windows, d]``.

        A bound role is a circulant matrix, so a window is one product with k of them: faster than transforms at the
        widths of recommenders.
        """
        d = x.shape[-1]
        step = torch.arange(d, device=x.device)
        roles = unitary(self.roles[:size]).flip(0)  # in the order of the events
        circulants = roles[:, (step - step.unsqueeze(-1)) % d]  # [k, d, d]: x @ circulant = x ⊛ role
        return x[:, : windows * size].unflatten(1, (windows, size)).flatten(-2) @ (circulants.flatten(0, 1) / size**0.5)
