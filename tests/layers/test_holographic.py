"""Items bound with any number of attributes: each form against its formula, term by term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.layers.attributes import LearnedBuckets
from recbole_holo.layers.holographic import ALGEBRAS, FORMS, AttributeBinding
from recbole_holo.ops.circular_convolution import circular_convolution, unbind, unitary

D, N_ITEMS = 12, 9
ITEMS = torch.tensor([[1, 2, 8], [0, 3, 4]])


def attributes() -> list[ItemAttribute]:
    genre = torch.tensor([0, 1, 2, 0, 3, 1, 2, 3, 1])
    tags = torch.tensor([[0, 0], [1, 2], [3, 0], [2, 1], [0, 0], [4, 1], [4, 0], [3, 2], [1, 4]])
    price = torch.tensor([0, 1, 1, 2, 0, 2, 3, 3, 3])
    position = torch.tensor([-1.0, 0.0, 0.1, 0.4, -1.0, 0.5, 0.7, 0.9, 1.0])
    return [
        ItemAttribute("genre", genre, 4, ["[PAD]", "a", "b", "c"]),
        ItemAttribute("tags", tags, 5, ["[PAD]", "p", "q", "r", "s"]),
        ItemAttribute("price", price, 4, ["[PAD]", "low", "middle", "high"], position),
    ]


def make(form: str, algebra: str = "none", **settings) -> AttributeBinding:
    torch.manual_seed(0)
    binding = AttributeBinding(attributes(), D, 0.5, form, algebra, **settings)
    with torch.no_grad():
        for name in ("alpha", "beta"):
            if hasattr(binding, name):
                getattr(binding, name).copy_(torch.tensor([0.3, -0.7, 1.1]) * (2 if name == "beta" else 1))
    return binding.double()


def value(binding: AttributeBinding, m: int, item: int) -> Tensor:
    """The vector of attribute m of an item: the mean of its values'; zero without one."""
    ids = torch.atleast_1d(attributes()[m].index[item])
    ids = ids[ids > 0]
    table = binding.attributes[m].embedding.weight
    rows = [unitary(table[i], "ortho") if binding.algebra == "unitary" else table[i] for i in ids]
    return torch.stack(rows).mean(0) if rows else torch.zeros(D, dtype=torch.double)


def expected(binding: AttributeBinding, e: Tensor, item: int) -> Tensor:
    def conv(a: Tensor, b: Tensor) -> Tensor:
        return circular_convolution(a, b, "ortho")

    if binding.form == "concat":
        return binding.mix(torch.cat([e, *(value(binding, m, item) for m in range(3))]))
    x = e.clone()
    for m in range(3):
        a, alpha = value(binding, m, item), binding.alpha[m]
        role = binding.roles[m] if hasattr(binding, "roles") else e
        role = unitary(role, "ortho") if binding.algebra == "unitary" else role
        if binding.form in ("item", "both"):
            x = x + alpha * conv(e, a)
        if binding.form in ("role", "both"):
            x = x + (binding.beta[m] if binding.form == "both" else alpha) * conv(role, a)
        if binding.form == "triple":
            x = x + alpha * conv(conv(e, role), a)
        if binding.form == "add":
            x = x + alpha * a
    return x


CASES = [(form, algebra) for form in FORMS for algebra in ALGEBRAS if (form, algebra) != ("concat", "unitary")]


@pytest.mark.parametrize(("form", "algebra"), CASES)
def test_every_form_is_its_formula(form, algebra):
    binding = make(form, algebra)
    e = torch.randn(*ITEMS.shape, D, dtype=torch.double)
    x = binding(e, ITEMS)
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        at = tuple(at)
        torch.testing.assert_close(x[at], expected(binding, e[at], int(ITEMS[at])), rtol=1e-9, atol=1e-9)
    if form != "concat":
        assert torch.equal(x[1, 0], e[1, 0])  # the pad has no attributes


@pytest.mark.parametrize("form", FORMS)
def test_the_transforms_do_not_grow_with_the_attributes(form, monkeypatch):
    calls = []
    real = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, **given: calls.append(x.shape) or real(x, **given))
    items = torch.randint(1, N_ITEMS, (50, 7))
    make(form)(torch.randn(50, 7, D, dtype=torch.double), items)
    assert sum(shape[:2] == (50, 7) for shape in calls) == (2 if form in ("item", "both", "triple") else 0)


@pytest.mark.parametrize(("form", "algebra"), CASES)
def test_gradients(form, algebra):
    binding, items = make(form, algebra), torch.tensor([[1, 2, 8], [5, 6, 7]])
    e = torch.randn(2, 3, D, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e, *_: binding(e, items), (e, *binding.parameters()), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_term_is_as_long_as_alpha_says(form):
    """At the start, at the scale of the items, whatever the algebra."""
    torch.manual_seed(1)
    many = [ItemAttribute("one", torch.arange(2000) % 50, 50, [str(i) for i in range(50)])]
    items, e = torch.arange(1, 2000), 0.02 * torch.randn(1999, 64)
    for algebra in [algebra for one, algebra in CASES if one == form]:
        share = AttributeBinding(many, 64, 0.02, form, algebra, alpha=0.5).report(e, items)["one"]["share"]
        whole = 2**0.5 * 0.5 if form == "both" else 0.5
        if form == "concat" or (form == "add" and algebra == "none") or (form == "role" and algebra == "none"):
            assert 0.2 < share < 0.8
        else:
            assert abs(share - whole) < 0.15


def test_the_report_names_attributes_weights_and_shares():
    binding, e = make("both"), torch.randn(N_ITEMS - 1, D, dtype=torch.double)
    report = binding.report(e, torch.arange(1, N_ITEMS))
    assert list(report) == ["genre", "tags", "price"]
    assert report["tags"]["alpha"] == pytest.approx(-0.7)
    assert report["tags"]["beta"] == pytest.approx(-1.4)
    with torch.no_grad():
        whole = binding(e, torch.arange(1, N_ITEMS)) - e
        binding.alpha[1:], binding.beta[1:] = 0, 0
        alone = binding(e, torch.arange(1, N_ITEMS)) - e
    assert report["genre"]["share"] == pytest.approx((alone.square().mean() / e.square().mean()).sqrt().item())
    assert not torch.allclose(alone, whole)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "concat"])
def test_unbinding_with_the_key_finds_the_value(form):
    """The only attribute of an item, bound by unitary vectors, is the nearest of all after unbinding."""
    torch.manual_seed(0)
    one = [ItemAttribute("one", torch.arange(40), 40, [str(i) for i in range(40)])]
    binding = AttributeBinding(one, 256, 1.0, form, "unitary", alpha=1.0)
    items, e = torch.arange(1, 40), unitary(torch.randn(39, 256), "ortho")
    x = binding(e, items)
    found = unbind(x, binding.keys(e)[:, 0], "ortho")
    nearest = (found @ binding.roles_and_values()[1][0].T).argmax(-1)
    assert (nearest == items).float().mean() > 0.95


def test_learned_buckets_are_between_their_neighbours_and_follow_the_gradient():
    torch.manual_seed(0)
    price = attributes()[2]
    buckets = LearnedBuckets(price, D)
    vectors = buckets(torch.arange(N_ITEMS))
    assert not vectors[[0, 4]].any()  # the pad, and an item without a price
    share = torch.linalg.lstsq(buckets.embedding.weight[1:].T, vectors.T).solution.T
    known = price.position >= 0
    torch.testing.assert_close(share[known].sum(-1), torch.ones(7))
    assert share[1].argmax() == 0
    assert share[8].argmax() == 2
    assert (share[known] > 0).all()
    vectors.square().sum().backward()
    assert buckets.centres.grad.abs().min() > 0
    assert buckets.log_width.grad.abs() > 0
    made = AttributeBinding(attributes(), D, 1.0, "role", floats="learned")
    assert [type(vectors) is LearnedBuckets for vectors in made.attributes] == [False, False, True]


@pytest.mark.parametrize("form", ["item", "role", "both", "triple", "add"])
def test_gradients_of_unitary_weights_do_not_depend_on_the_length_of_parameters(form):
    found = []
    for scale in (1e-4, 1.0, 1e4):
        binding = make(form, "unitary")
        with torch.no_grad():
            for vectors in binding.attributes:
                vectors.embedding.weight.mul_(scale)
            if hasattr(binding, "roles"):
                binding.roles.mul_(scale)
        torch.manual_seed(3)
        binding(torch.randn(2, 3, D, dtype=torch.double), ITEMS).square().sum().backward()
        found.append(binding.alpha.grad)
        assert all(p.grad.isfinite().all() for p in binding.parameters())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[2], found[1], rtol=1e-6, atol=1e-9)
