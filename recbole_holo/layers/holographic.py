"""Holographic reduced representations as layers: what an item's attributes add to its vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.layers.attributes import AttributeVectors, LearnedBuckets
from recbole_holo.ops.circular_convolution import bind, unitary

FORMS = ("item", "role", "both", "triple", "add", "concat")
ALGEBRAS = ("none", "unitary")
FLOATS = ("quantile", "learned")
WITHOUT_ITEM = ("role", "both", "add", "concat")  # forms that say something of an item without a vector of its own


class AttributeBinding(nn.Module):
    r"""The item's vector e and its M attributes' vectors a_m as one vector of the same width.

    ==========  ========================================  ==========================================================
    ``item``    e + Σ_m α_m (e ⊛ a_m)                      HoloMambaRec, eq. 1, for any number of attributes
    ``role``    e + Σ_m α_m (r_m ⊛ a_m)                    role-filler pairs (Plate 1995), the same for every item
    ``both``    e + Σ_m α_m (e ⊛ a_m) + β_m (r_m ⊛ a_m)    the two together
    ``triple``  e + Σ_m α_m (e ⊛ r_m ⊛ a_m)                item, role and filler in one product
    ``add``     e + Σ_m α_m a_m                            no binding, for comparison
    ``concat``  W [e; a_1; …; a_M]                         no binding, for comparison; W starts with e alone
    ==========  ========================================  ==========================================================

    α, β and the roles r are learned, one of each an attribute. ``item`` and ``triple`` say nothing of an item whose own
    vector is zero; in the other forms such a cold item is what its attributes say. Products with the item on the input
    alone help with anybody's attributes, role-fillers on both sides by what attributes say, and ``both`` with products
    on the input alone most (ours; results/metadata-industrial-scientific.md).

    **Algebra.** With ``unitary`` the roles and the attributes' vectors have magnitude 1 in every frequency, whatever
    their parameters are (Ganesan et al. 2021): binding then keeps lengths and unbinding is exact. An item's vector
    stays as it is.

    **One transform, whatever M.** Binding is linear, so attributes are weighted, bound with their roles and summed
    value by value, before an item's are looked up; the item is bound once, with their sum. Forward and backward of
    12,800 items with three attributes take 14.1 ms on two cores, 30.0 bound one by one (d 64, ``python -m
    benchmarks.operators --only attributes``); tables kept as spectra, which spare one of three transforms and look up
    more numbers, take 13.4: level, so parameters are vectors.

    **Scale at the start** (ours). Vectors that multiply the item (``item``, ``both``, ``triple``) are drawn from
    N(0, 1), as by the authors, so that a bound term is as long as α says; vectors that are added to it (``role``,
    ``add``, ``concat``) at the scale of the items, and so are all of them where lengths are fixed by the algebra: Adam
    moves every coordinate by its learning rate, so the scale says how fast directions turn.

    Args:
        attributes: in the order of roles and weights; at least one.
        d_model: width d of items.
        item_std: standard deviation of items' vectors at the start.
        alpha: weight of a term at the start, as a part of the item's length.
        scale: ``ortho`` scales all three transforms orthonormally, i.e. (1/√d)·convolution, as the authors' code does;
            ``none`` is the formula as printed, whose bound term is √d longer.
        values: several values of an item: ``mean`` or ``first``.
        floats: numbers in ``quantile`` buckets or in ``learned`` ones.
        std: of the attributes' vectors at the start; None = as above.
        width: of the attributes' vectors in ``concat``; None = d.
    """

    def __init__(
        self,
        attributes: Sequence[ItemAttribute],
        d_model: int,
        item_std: float,
        form: str = "item",
        algebra: str = "none",
        scale: str = "ortho",
        alpha: float = 0.5,
        values: str = "mean",
        floats: str = "quantile",
        std: float | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.form, self.algebra, self.scale = form, algebra, scale
        count, fixed_length = len(attributes), algebra == "unitary"
        if std is None:
            std = item_std if fixed_length or form in ("role", "add", "concat") else 1.0

        def vectors(attribute: ItemAttribute) -> AttributeVectors:
            kind = LearnedBuckets if floats == "learned" and attribute.position is not None else AttributeVectors
            return kind(attribute, width or d_model if form == "concat" else d_model, values, std)

        self.attributes = nn.ModuleList(vectors(attribute) for attribute in attributes)
        if form != "concat":
            added = alpha * item_std if fixed_length or form == "both" else alpha  # of terms without e
            self.alpha = nn.Parameter(torch.full((count,), float(added if form in ("role", "add") else alpha)))
        if form in ("role", "both", "triple"):
            self.roles = nn.Parameter(torch.randn(count, d_model))
        if form == "both":
            self.beta = nn.Parameter(torch.full((count,), float(added)))
        if form == "concat":
            self.mix = nn.Linear(d_model + sum(a.embedding.embedding_dim for a in self._vectors()), d_model, bias=False)
            with torch.no_grad():
                self.mix.weight[:, :d_model] = torch.eye(d_model)

    def extra_repr(self) -> str:
        return f"{self.form}, algebra={self.algebra}, scale={self.scale}"

    @property
    def names(self) -> list[str]:
        """Of the attributes, in their order."""
        return [vectors.name for vectors in self._vectors()]

    def forward(self, item: Tensor, items: Tensor, products: bool = True) -> Tensor:
        """``item [..., d]``, the vectors of ``items [...]`` → ``[..., d]``; without ``products``, the terms that e is a
        factor of are left out."""
        if self.form == "concat":
            return self.mix(torch.cat([item, *(vectors(items) for vectors in self._vectors())], -1))
        times, plus = self._terms()
        if not (times and products):
            return item + self._sum(plus, items) if plus else item
        if not plus:
            return item + bind(item, self._sum(times, items), self.scale)
        # One look-up: an item's values are the same in both terms.
        together = [torch.cat(tables, 1) for tables in zip(times, plus, strict=True)]
        factor, added = self._sum(together, items).chunk(2, -1)
        return item + bind(item, factor, self.scale) + added

    # ------------------------------------------------------------------ reading it back
    def roles_and_values(self) -> tuple[Tensor | None, list[Tensor]]:
        """Roles ``[M, d]`` and vectors of the values of each attribute ``[n_values, d]``, as they are bound."""
        roles = self._projected(self.roles) if hasattr(self, "roles") else None
        return roles, [self._values(vectors) for vectors in self._vectors()]

    def keys(self, item: Tensor) -> Tensor:
        """What the attributes of an item are bound with in its vector: ``[..., d]`` → ``[..., M, d]``.

        ``unbind(forward(item, …), key)`` is the attribute's vector and noise. In ``add`` it is not bound at all: the
        key is the impulse, which leaves what it is bound with as it is.
        """
        own = item.unsqueeze(-2).expand(*item.shape[:-1], len(self.attributes), item.shape[-1])
        roles, _ = self.roles_and_values()
        if self.form == "item":
            return own
        if self.form == "role" and roles is not None:
            return roles.expand_as(own)
        if self.form == "both" and roles is not None:
            return self.alpha.unsqueeze(-1) * own + self.beta.unsqueeze(-1) * roles
        if self.form == "triple" and roles is not None:
            return bind(own, roles, self.scale)
        impulse = torch.zeros_like(own)
        impulse[..., 0] = item.shape[-1] ** 0.5 if self.scale == "ortho" else 1.0
        return impulse

    @torch.no_grad()
    def report(self, item: Tensor, items: Tensor) -> dict[str, dict[str, float]]:
        """Of each attribute its weights, and its ``share``: the length of its term over that of the item's vector.

        Both lengths are root mean squares over ``items [n]``, whose vectors are ``item [n, d]``.
        """
        weights = {name: getattr(self, name) for name in ("alpha", "beta") if hasattr(self, name)}
        found = {name: {key: w[m].item() for key, w in weights.items()} for m, name in enumerate(self.names)}
        for m, vectors in enumerate(self._vectors()):
            if self.form == "concat":
                before = item.shape[-1] + sum(a.embedding.embedding_dim for a in list(self._vectors())[:m])
                term = vectors(items) @ self.mix.weight[:, before : before + vectors.embedding.embedding_dim].T
            else:
                times, plus = (terms[m : m + 1] for terms in self._terms())
                term = sum((vectors(items, table) for table in plus), torch.zeros_like(item))
                for table in times:
                    term = term + bind(item, vectors(items, table), self.scale)
            found[vectors.name]["share"] = (term.square().mean() / item.square().mean()).sqrt().item()
        return found

    # ------------------------------------------------------------------ terms
    def _vectors(self) -> Sequence[AttributeVectors]:
        return self.attributes  # type: ignore[return-value]

    def _terms(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weighted tables ``[n_values, d]``, one an attribute: what multiplies the item, and what is added to it."""
        roles, values = self.roles_and_values()
        alpha = self.alpha.unbind()
        plain = [w * a for w, a in zip(alpha, values, strict=True)]
        if roles is None:
            return (plain, []) if self.form == "item" else ([], plain)
        paired = [bind(role, a, self.scale) for role, a in zip(roles, values, strict=True)]
        if self.form == "both":
            return plain, [w * p for w, p in zip(self.beta.unbind(), paired, strict=True)]
        weighted = [w * p for w, p in zip(alpha, paired, strict=True)]
        return (weighted, []) if self.form == "triple" else ([], weighted)

    def _sum(self, tables: list[Tensor], items: Tensor) -> Tensor:
        terms = [vectors(items, table) for vectors, table in zip(self._vectors(), tables, strict=True)]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def _projected(self, x: Tensor) -> Tensor:
        return unitary(x, self.scale) if self.algebra == "unitary" else x

    def _values(self, vectors: AttributeVectors) -> Tensor:
        """``[n_values, d]``; the row of no value stays zero, which has no phases to keep."""
        table = vectors.embedding.weight
        if self.algebra == "none":
            return table
        return torch.cat([torch.zeros_like(table[:1]), self._projected(table[1:])])
