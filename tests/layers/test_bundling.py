"""Temporal bundling: bundles by their formula, layouts by hand, and no event in a state that comes before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recbole_holo.layers.bundling import TemporalBundling
from recbole_holo.ops.circular_convolution import circular_convolution, unitary

D = 6


def make(largest: int = 3, recent: int = 4) -> TemporalBundling:
    torch.manual_seed(0)
    return TemporalBundling(D, largest, recent).double().eval()


def by_hand(bundling: TemporalBundling, x: Tensor, n: int) -> tuple[list[Tensor], list[int]]:
    """Tokens of one history, and for each of its positions the token whose state it has."""
    k, roles = bundling.size, unitary(bundling.roles)
    windows = max(n - bundling.recent, 0) // k if k > 1 else 0
    tokens, token_of = [], []
    for w in range(windows):
        terms = [circular_convolution(x[w * k + k - 1 - j], roles[j]) for j in range(k)]
        tokens.append(torch.stack(terms).sum(0) / k**0.5)
        token_of += [w - 1] * (k - 1) + [w]
    for t in range(windows * k, n):
        token_of.append(len(tokens))
        tokens.append(x[t])
    return tokens, token_of


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("recent", [1, 4, 20])
def test_tokens_and_layout_are_those_made_by_hand(size, recent):
    bundling, lengths = make(recent=recent), torch.tensor([17, 1, 4, 5, 7, 16, 9])
    bundling.size = size
    x = torch.randn(len(lengths), 17, D, dtype=torch.double)
    tokens, layout = bundling(x, lengths)
    for row, n in enumerate(lengths.tolist()):
        expected, token_of = by_hand(bundling, x[row], n)
        assert len(expected) <= tokens.shape[1]
        torch.testing.assert_close(tokens[row, : len(expected)], torch.stack(expected))
        if layout is not None:
            assert layout.token_of[row, :n].tolist() == token_of
            state = torch.arange(1.0, tokens.shape[1] + 1, dtype=torch.double)[None, :, None].expand(len(x), -1, D)
            assert layout.spread(state)[row, :n, 0].tolist() == [token + 1 for token in token_of]
    assert (layout is None) == (size == 1 or recent >= 17)


@pytest.mark.parametrize(("length", "size", "tokens"), [(2000, 4, 541), (2000, 8, 301), (200, 4, 91)])
def test_an_encoder_reads_nearly_a_kth(length, size, tokens):
    bundling = TemporalBundling(D, size, 50).eval()
    assert bundling(torch.randn(1, length, D), torch.tensor([length]))[0].shape[1] in range(tokens - size, tokens)


def test_a_bundle_is_as_long_as_an_event():
    bundling = TemporalBundling(64, 8, 1)
    bundles = bundling.bundles(torch.randn(50, 80, 64), 8, 10)
    assert bundles.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)


def test_bundled_events_can_be_told_apart():
    """Unbound with the role of its place, a bundle is nearest to the event that was there."""
    torch.manual_seed(0)
    bundling, events = TemporalBundling(512, 4, 1), torch.randn(40, 512)
    (bundle,) = bundling.bundles(events[None, 8:12], 4, 1)[0]
    for place, role in enumerate(unitary(bundling.roles)):
        found = torch.fft.irfft(torch.fft.rfft(bundle) * torch.fft.rfft(role).conj())
        assert (events @ found).argmax() == 11 - place


def test_gradients_are_right_and_stable_however_large_the_roles():
    bundling = make(largest=2, recent=2).train()
    x, lengths = torch.randn(2, 7, D, dtype=torch.double, requires_grad=True), torch.tensor([7, 5])
    assert torch.autograd.gradcheck(lambda x, _: bundling(x, lengths)[0], (x, bundling.roles))
    sizes = []
    for scale in (1e-3, 1.0, 1e3):
        roles = bundling.roles.detach() * scale
        bundling.roles.data = roles
        bundling.zero_grad()
        tokens = bundling(x.detach(), lengths)[0]
        (tokens * torch.linspace(-1, 1, D)).sum().backward()
        assert bundling.roles.grad.isfinite().all()
        sizes.append((bundling.roles.grad.norm() * scale).item())  # a direction's gradient, whatever the length
        bundling.roles.data = roles / scale
    assert sizes == pytest.approx([sizes[1]] * 3, rel=1e-6)
