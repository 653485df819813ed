"""Temporal bundling: the older part of a history as superpositions of k events each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recbole_holo.ops.circular_convolution import unitary

Embed = Callable[[Tensor], Tensor]
_EVENTS = 2**13  # whose vectors exist at a time


class Layout(NamedTuple):
    """Where the positions of a batch of histories are among its tokens."""

    token_of: Tensor  # [B, L]: the token whose state is a position's; -1 = none yet

    def select(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """States of positions ``[M]`` of the flattened batch, 0 to B·L - 1: ``[B, T, d]`` → ``[M, d]``.

        Zero where there is none yet: any other would hold later events.
        """
        token = self.token_of.flatten()[positions]
        row = positions.div(self.token_of.shape[1], rounding_mode="floor")
        states = hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + token.clamp(min=0))
        return states * (token >= 0).unsqueeze(-1)

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

    def forward(self, items: Tensor, lengths: Tensor, embed: Embed) -> tuple[Tensor, Layout | None]:
        """Histories ``items [B, L]`` of ``lengths [B]``, pads on the right → tokens ``[B, T, d]``, T ≤ L, and where the
        positions are among them (None: where they were). ``embed`` makes vectors ``[..., d]`` of ids ``[...]``."""
        size = self.training_size if self.training else self.size
        length = items.shape[1]
        windows = max(length - self.recent, 0) // size
        if size == 1 or windows == 0:
            return embed(items), None
        bundled = (lengths - self.recent).clamp(min=0).div(size, rounding_mode="floor").unsqueeze(-1)  # [B, 1] windows
        position = torch.arange(length, device=items.device)
        recent_token = position - bundled * (size - 1)
        past_token = (position + 1).div(size, rounding_mode="floor") - 1
        # Of L events no history has more tokens than those whose last window just lacks an event.
        token = torch.arange(min(windows + self.recent + size - 1, length), device=items.device)
        token_of = torch.where(position >= bundled * size, recent_token, past_token).clamp(max=len(token) - 1)  # [B, L]

        is_bundle = token < bundled  # [B, T]
        recent = items.gather(1, (token + bundled * (size - 1)).clamp(max=length - 1)).masked_fill(is_bundle, 0)
        bundles = self.bundles(items[:, : windows * size].unflatten(1, (windows, size)), embed)
        bundles = F.pad(bundles, (0, 0, 0, len(token) - windows))
        return torch.where(is_bundle.unsqueeze(-1), bundles, embed(recent)), Layout(token_of)

    def bundles(self, items: Tensor, embed: Embed) -> Tensor:
        """Windows of k events ``[..., k]`` → their superpositions ``[..., d]``.

        A bound role is a circulant matrix, so a window is one product with k of them: faster than transforms at the
        widths of recommenders. The events' vectors are made a part at a time, and made again for the gradient: of a
        bundled history no more is kept than of one that is k times as short.
        """
        d, size = self.roles.shape[1], items.shape[-1]
        step = torch.arange(d, device=items.device)
        roles = unitary(self.roles[:size]).flip(0)  # in the order of the events
        circulants = roles[:, (step - step.unsqueeze(-1)) % d]  # [k, d, d]: x @ circulant = x ⊛ role
        matrix = circulants.flatten(0, 1) / size**0.5

        def superposed(part: Tensor, matrix: Tensor) -> Tensor:
            return embed(part).flatten(-2) @ matrix

        parts = items.flatten(0, -2).split(max(_EVENTS // size, 1))
        if torch.is_grad_enabled():
            made = [
                checkpoint(superposed, part, matrix, use_reentrant=False, preserve_rng_state=False) for part in parts
            ]
        else:
            made = [superposed(part, matrix) for part in parts]
        return torch.cat(made).unflatten(0, items.shape[:-1])
