"""Temporal bundling: the older part of a history as superpositions of k events each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recbole_holo.ops.circular_convolution import unitary
from recbole_holo.ops.superposition import superposes_rows, superposition, superposition_of_rows

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
        # The latest events of a history follow its bundles; behind its end a token may hold anything.
        latest = torch.arange(self.recent + size - 1, device=items.device)
        bundles = self.bundles(items[:, : windows * size].unflatten(1, (windows, size)), embed)
        tokens = F.pad(bundles, (0, 0, 0, len(latest)))
        recent = embed(items.gather(1, (bundled * size + latest).clamp(max=length - 1)))
        place = torch.arange(len(items), device=items.device).unsqueeze(-1) * tokens.shape[1] + bundled + latest
        tokens.flatten(0, 1).index_copy_(0, place.flatten(), recent.flatten(0, 1).to(tokens.dtype))
        token_of = torch.where(position >= bundled * size, recent_token, past_token)
        return tokens, Layout(token_of.clamp(max=tokens.shape[1] - 1))  # [B, L]

    def bundles(self, items: Tensor, embed: Embed) -> Tensor:
        """Windows of k events ``[..., k]`` → their superpositions ``[..., d]``.

        No more is kept of a bundled history than of one that is k times as short: a kernel reads vectors from a table
        of the items that occur; without it the events' vectors are made a part at a time, and again for the gradient.
        """
        size = items.shape[-1]
        roles = unitary(self.roles[:size]).flip(0) / size**0.5  # in the order of the events
        if superposes_rows(items, roles):
            ids, events = distinct(items)
            return _again(lambda roles: superposition_of_rows(embed(ids), events, roles), roles)
        parts = items.flatten(0, -2).split(max(_EVENTS // size, 1))
        made = [_again(partial(_superposed, embed, part), roles) for part in parts]
        return torch.cat(made).unflatten(0, items.shape[:-1])


def _superposed(embed: Embed, part: Tensor, roles: Tensor) -> Tensor:
    return superposition(embed(part), roles)


def _again(make: Callable[[Tensor], Tensor], roles: Tensor) -> Tensor:
    """``make(roles)``, of which nothing is kept: it is called again for the gradient."""
    if not torch.is_grad_enabled():
        return make(roles)
    return checkpoint(make, roles, use_reentrant=False, preserve_rng_state=False)


def distinct(items: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ``[...]`` → those that occur ``[n]``, ascending, and for each its place among them ``[...]``."""
    largest = int(items.max())
    if largest > items.numel():
        return torch.unique(items, return_inverse=True)
    occurs = torch.zeros(largest + 1, dtype=torch.long).index_fill_(0, items.flatten(), 1)  # five times as fast
    return occurs.nonzero().flatten(), (occurs.cumsum(0) - 1)[items]
