"""Temporal bundling: bundles by their formula, layouts by hand, and no event in a state that comes before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.layers.bundling import TemporalBundling, distinct
from recbole_holo.ops import backend
from recbole_holo.ops.circular_convolution import circular_convolution, unitary

D = 6


def make(largest: int = 3, recent: int = 4) -> TemporalBundling:
    torch.manual_seed(0)
    return TemporalBundling(D, largest, recent).double().eval()


def numbered(x: Tensor, lengths: Tensor):
    """Every event an item of its own: ids, lengths, and what makes vectors of ids."""
    items = torch.arange(1, x.shape[0] * x.shape[1] + 1).view(x.shape[:2])
    table = F.pad(x.flatten(0, 1), (0, 0, 1, 0))
    items = items * (torch.arange(x.shape[1]) < lengths.unsqueeze(1))
    return items, lengths, lambda ids: table[ids]


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
    tokens, layout = bundling(*numbered(x, lengths))
    for row, n in enumerate(lengths.tolist()):
        expected, token_of = by_hand(bundling, x[row], n)
        assert len(expected) <= tokens.shape[1]
        torch.testing.assert_close(tokens[row, : len(expected)], torch.stack(expected))
        if layout is not None:
            assert layout.token_of[row, :n].tolist() == token_of
            state = torch.arange(1.0, tokens.shape[1] + 1, dtype=torch.double)[None, :, None].expand(len(x), -1, D)
            wanted = [token + 1 for token in token_of]
            assert layout.spread(state)[row, :n, 0].tolist() == wanted
            assert layout.select(state, row * 17 + torch.arange(n))[:, 0].tolist() == wanted
    assert (layout is None) == (size == 1 or recent >= 17)


@pytest.mark.parametrize(("length", "size", "tokens"), [(2000, 4, 541), (2000, 8, 301), (200, 4, 91)])
def test_an_encoder_reads_nearly_a_kth(length, size, tokens):
    bundling = TemporalBundling(D, size, 50).eval()
    given = numbered(torch.randn(1, length, D), torch.tensor([length]))
    assert bundling(*given)[0].shape[1] in range(tokens - size, tokens)


def test_a_bundle_is_as_long_as_an_event():
    bundling = TemporalBundling(64, 8, 1)
    events = torch.randn(4000, 64)
    bundles = bundling.bundles(torch.arange(4000).view(50, 10, 8), lambda ids: events[ids])
    assert bundles.shape == (50, 10, 64)
    assert bundles.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)


def test_bundled_events_can_be_told_apart():
    """Unbound with the role of its place, a bundle is nearest to the event that was there."""
    torch.manual_seed(0)
    bundling, events = TemporalBundling(512, 4, 1), torch.randn(40, 512)
    (bundle,) = bundling.bundles(torch.arange(8, 12).unsqueeze(0), lambda ids: events[ids])
    for place, role in enumerate(unitary(bundling.roles)):
        found = torch.fft.irfft(torch.fft.rfft(bundle) * torch.fft.rfft(role).conj())
        assert (events @ found).argmax() == 11 - place


def test_gradients_are_right_and_stable_however_large_the_roles():
    bundling = make(largest=2, recent=2).train()
    x, lengths = torch.randn(2, 7, D, dtype=torch.double, requires_grad=True), torch.tensor([7, 5])
    assert torch.autograd.gradcheck(lambda x, _: bundling(*numbered(x, lengths))[0], (x, bundling.roles))
    sizes = []
    for scale in (1e-3, 1.0, 1e3):
        roles = bundling.roles.detach() * scale
        bundling.roles.data = roles
        bundling.zero_grad()
        tokens = bundling(*numbered(x.detach(), lengths))[0]
        (tokens * torch.linspace(-1, 1, D)).sum().backward()
        assert bundling.roles.grad.isfinite().all()
        sizes.append((bundling.roles.grad.norm() * scale).item())  # a direction's gradient, whatever the length
        bundling.roles.data = roles / scale
    assert sizes == pytest.approx([sizes[1]] * 3, rel=1e-6)


def test_parts_change_nothing_and_nothing_is_kept_of_them(monkeypatch):
    from recbole_holo.layers import bundling as module

    bundling, table = make(largest=3, recent=1).train(), torch.randn(500, D, dtype=torch.double, requires_grad=True)
    items = torch.randint(500, (4, 40, 3))
    results, kept = [], []
    for events in (10_000, 30):
        monkeypatch.setattr(module, "_EVENTS", events)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            made = bundling.bundles(items, lambda ids: table[ids])
        assert max(kept) <= max(D * D * 3, items.numel())  # ids and roles, no vectors of events
        results.append((made, *torch.autograd.grad(made.square().sum(), (table, bundling.roles))))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("largest_id", [400, 10**6])
def test_the_kernel_bundles_as_the_products_do(largest_id):
    """Values, gradients of roles and of the items that occur, and nothing kept but ids; for catalogues of any size."""
    torch.manual_seed(0)
    bundling, lengths = TemporalBundling(24, 4, 10).train(), torch.tensor([900, 1, 350, 899, 12, 14])
    ids = torch.randint(1, largest_id, (300,))[torch.randint(300, (6, 900))] * (torch.arange(900) < lengths[:, None])
    table = torch.randn(300, 24, requires_grad=True)
    seen = []

    def embed(items: Tensor) -> Tensor:
        seen.append(items.numel())
        return table[items % 300] * (items > 0).unsqueeze(-1)

    def run() -> list[Tensor]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            made = bundling.bundles(ids.unflatten(1, (225, 4)), embed)
        tokens, layout = bundling(ids, lengths, embed)
        states = layout.spread(tokens) * (ids > 0).unsqueeze(-1)
        return [made, states, *torch.autograd.grad((states * weights).sum(), (table, bundling.roles))]

    kept: list[int] = []
    weights = torch.randn(6, 900, 24)
    found = run()
    assert max(seen) <= 6 * 13 + 301  # vectors of the items that occur, not of the events
    assert max(kept, default=0) <= 24 * 4
    with backend.excluding("native"):
        for got, wanted in zip(found, run(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("largest", [3, 60, 10**9])
def test_distinct_ids_and_their_places(largest):
    items = torch.randint(0, largest + 1, (4, 5, 3))
    ids, place = distinct(items)
    assert ids.tolist() == sorted(set(items.flatten().tolist()))
    assert torch.equal(ids[place], items)
