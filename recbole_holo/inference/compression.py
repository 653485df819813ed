"""A trained model made small for serving: its tables, its weights, its states."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.inference.tables import BITS, CompressedTable
from recbole_holo.layers import Mamba
from recbole_holo.layers.holographic import AttributeBinding
from recbole_holo.ops.causal_conv1d import causal_conv1d
from recbole_holo.ops.quantization import Quantized, dequantize, quantize

CRITERIA = ("hankel", "energy")


@dataclass(frozen=True)
class Compression:
    """What a model is compressed to.

    Args:
        table_bits: of a number of the item tables, 4 to 8, 16 or 32.
        weight_bits: of a number of all matrices of the encoder; vectors (norms, biases, D) are kept in 16 at least.
        rank: of the item tables; None = full.
        states: of each channel of the Mamba-1 blocks, by ``criterion``; None = all. See :func:`truncate_states`.
        fold: attributes into the table that the encoder reads. Where the model binds its input otherwise than its
            output, that is a second table beside the one that is scored against; False binds an item with its
            attributes when it is read, which takes longer and half the bytes.
    """

    table_bits: int = 8
    weight_bits: int = 8
    rank: int | None = None
    states: int | None = None
    criterion: str = "energy"
    fold: bool = True

    def __post_init__(self) -> None:
        for field in ("table_bits", "weight_bits"):
            if getattr(self, field) not in BITS:
                raise ConfigError(field, getattr(self, field), f"use {', '.join(map(str, BITS))}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError("rank", self.rank, "use an integer above 0, or None")


class ServedItems(nn.Module):
    """The tables of a compressed model: what the encoder reads, and what hidden states are scored against.

    They are one where the model's are one. Attributes are folded in or kept with the table: a served model needs no
    ``.item`` file.
    """

    def __init__(self, model: Any, wanted: Compression) -> None:
        super().__init__()

        def compressed(table: Tensor) -> CompressedTable:
            return CompressedTable(table, wanted.table_bits, wanted.rank)

        self.read: nn.Module
        scored = model.item_vectors()
        bound = model.head is None and model.binding is not None and not model.scored_products
        if bound and not wanted.fold:
            table = compressed(scored)
            self.read = BoundWhenRead(table, model.binding, model.bind_output)
        else:
            every = torch.arange(model.n_items, device=model.item_embedding.weight.device)
            self.read = table = compressed(model.embed_items(every))
        same = model.head is None and (not bound or not wanted.fold) and not model.cosine
        self.scored = table if same else compressed(F.normalize(scored, dim=-1) if model.cosine else scored)


class BoundWhenRead(nn.Module):
    """Rows of a compressed table, bound with their items' attributes.

    ``with_roles``: the table has the terms with roles already, and lacks the products with the item.
    """

    def __init__(self, table: CompressedTable, binding: AttributeBinding, with_roles: bool = False) -> None:
        super().__init__()
        self.table, self.binding, self.with_roles = table, binding, with_roles
        attributes: Any = binding.attributes
        for vectors in attributes:
            vectors.index = vectors.index.to(torch.uint8 if len(vectors.labels) <= 256 else torch.int32)

    def forward(self, items: Tensor) -> Tensor:
        """``[...]`` → ``[..., d]``."""
        vectors = self.table(items)
        if self.with_roles:
            vectors = vectors - self.binding(torch.zeros_like(vectors), items, products=False)
        return self.binding(vectors, items)


@torch.no_grad()
def compress(model: Any, wanted: Compression, histories: Tensor | None = None, gaps: Tensor | None = None) -> Any:
    """A copy of a trained model of this package that scores as it does from fewer bytes, and cannot be trained.

    The tables stay compressed in memory; the encoder's weights, which are few, are floats again when they are used, of
    the values that their bits leave.

    Args:
        histories: ``[B, L]``, pads on the right; what states are judged by, needed for ``wanted.states``.
        gaps: ``[B, L]``, what a model with ``event_time`` reads of their times, a batch's ``gap_list``.

    Raises:
        ConfigError: states of a model without Mamba-1 blocks, without histories, or without the times that it reads.
    """
    model = copy.deepcopy(model).eval()
    served = ServedItems(model, wanted)
    if wanted.states is not None:
        if histories is None:
            raise ConfigError("states", wanted.states, "histories say which to keep: pass some")
        truncate_states(model, histories, wanted.states, wanted.criterion, gaps)
    model.unfold()
    model.item_embedding = nn.Embedding(1, 1)  # nothing reads it any more
    model.binding = model.head = None
    model.served, model.compression = served, wanted
    for parameter in model.parameters():
        parameter.copy_(_read(_stored(parameter, wanted.weight_bits), wanted.weight_bits, parameter))
        parameter.requires_grad_(False)
    return model


def restored(model: Any, wanted: Compression, saved: dict[str, Any]) -> Any:
    """The compressed model, from a new one of its class and settings and what :func:`stored` gave."""
    one = torch.ones(1, 1, dtype=torch.long)
    small = compress(model.cpu(), wanted, one, one)  # of states only the number counts
    like = small.state_dict()
    values = {n: _read(value, wanted.weight_bits, like[n]) for n, value in saved.items()}
    small.load_state_dict(values)
    return small


def stored(model: nn.Module) -> dict[str, Any]:
    """A compressed model's state dict in its bits: a matrix of integers as its ``codes`` and ``scales``."""
    wanted: Compression = model.compression  # type: ignore[assignment]
    weights = {name for name, _ in model.named_parameters()} - {"item_embedding.weight"}
    return {
        name: _stored(value, wanted.weight_bits) if name in weights else value
        for name, value in model.state_dict().items()
    }


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's tables and weights as stored: of a compressed one in its bits, else in their types."""
    if getattr(model, "compression", None) is None:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    parts = [value for name, value in stored(model).items() if name != "item_embedding.weight"]
    tensors = [t for part in parts for t in (part.values() if isinstance(part, dict) else [part])]
    tensors += [of for m in model.modules() if isinstance(m, BoundWhenRead) for of in m.binding.buffers()]  # the items
    once = {t.data_ptr(): t for t in tensors}  # the table that is read may be the one that is scored against
    return sum(t.numel() * t.element_size() for t in once.values())


def _stored(parameter: Tensor, bits: int) -> Any:
    """A weight in its bits; what is not worth a scale a row in 16 at least."""
    if bits < 16 and parameter.dim() > 1 and parameter[0].numel() >= 16:
        codes, scales, _, _ = quantize(parameter.flatten(1), bits)
        return {"codes": codes, "scales": scales}
    return parameter.detach() if bits == 32 else parameter.detach().bfloat16()


def _read(value: Any, bits: int, like: Tensor) -> Tensor:
    """The inverse of :func:`_stored`, in the shape and type of ``like``."""
    if not isinstance(value, dict):
        return value.to(like.dtype)
    return dequantize(Quantized(value["codes"], value["scales"], bits, like[0].numel())).view_as(like)


# ---------------------------------------------------------------------- states
@torch.no_grad()
def truncate_states(
    model: Any, histories: Tensor, keep: int, criterion: str = "energy", gaps: Tensor | None = None
) -> None:
    """Leaves each Mamba-1 block of ``model`` the ``keep`` of its N states that matter most, in place.

    State n of all channels of a block goes or stays: B and C are shared by the channels. ``energy`` is the mean square
    of what a state adds to the block's outputs, ``E[(C_n h_n)²]``, over ``histories``. ``hankel`` is the singular value
    of a state's own Hankel operator, had the block its mean step size, ``|B_n||C_n| Δ / (1 - exp(2ΔA_n))``, with root
    mean squares of B and C over ``histories``: the states are decoupled, so balancing them is no more than ranking.

    Args:
        histories: ``[B, L]``, pads on the right.
        keep: at least 1.
        gaps: ``[B, L]``, what a model with ``event_time`` reads of the histories' times, a batch's ``gap_list``.

    Raises:
        ConfigError: no Mamba-1 block, more states to keep than there are, or no times of a model that reads them.
    """
    blocks = [module for module in model.modules() if isinstance(module, Mamba)]
    if not blocks:
        raise ConfigError("states", keep, f"{type(model).__name__} has no Mamba-1 block, whose states are many")
    if criterion not in CRITERIA:
        raise ConfigError("criterion", criterion, f"use {' or '.join(CRITERIA)}")
    if not 1 <= keep <= min(block.d_state for block in blocks):
        raise ConfigError("states", keep, f"use 1 to {min(block.d_state for block in blocks)}")
    if model.event_time is not None and (gaps is None or gaps.shape != histories.shape):
        shape = None if gaps is None else tuple(gaps.shape)
        raise ConfigError("gaps", shape, "the model reads times: pass the histories' gap_list, of their shape")
    seen: dict[Mamba, Tensor] = {}
    hooks = [b.register_forward_hook(lambda b, given, _: seen.__setitem__(b, given[0])) for b in blocks]
    _, layout = model.token_states(histories, **({} if model.event_time is None else {"gaps": gaps}))
    for hook in hooks:
        hook.remove()
    lengths = (histories > 0).sum(1)
    if layout is not None:  # bundles of events
        lengths = layout.token_of.masked_fill(histories == 0, -1).amax(1) + 1
    for block in blocks:
        valid = torch.arange(seen[block].shape[1], device=lengths.device) < lengths.unsqueeze(-1)
        worth = state_worth(block, seen[block], valid, criterion)
        _keep_states(block, worth.topk(keep).indices.sort().values)


def state_worth(block: Mamba, hidden: Tensor, valid: Tensor, criterion: str) -> Tensor:
    """Of each state of a block that reads ``hidden [B, L, d]``, where ``valid [B, L]``: ``[N]``."""
    w = block._weights()
    x = F.linear(hidden, w.in_proj_weight, w.in_proj_bias).chunk(2, -1)[0]
    x = causal_conv1d(x.contiguous(), w.conv1d_weight, w.conv1d_bias, "silu")  # [B, L, D]
    dt, B, C = F.linear(x, w.x_proj_weight).split([block.dt_rank, block.d_state, block.d_state], -1)
    step = F.softplus(F.linear(dt, w.dt_proj_weight) + w.dt_proj_bias)  # [B, L, D]
    if criterion == "hankel":
        rate = step[valid].mean(0).unsqueeze(-1) * w.A  # [D, N]
        size = B[valid].square().mean(0).sqrt() * C[valid].square().mean(0).sqrt()
        gain = step[valid].mean(0).unsqueeze(-1) * x[valid].square().mean(0).sqrt().unsqueeze(-1)
        return (size * gain / -torch.expm1(2 * rate)).square().sum(0).sqrt()
    state, worth = x.new_zeros(len(x), x.shape[2], block.d_state), x.new_zeros(block.d_state)
    for t in range(x.shape[1]):
        now = step[:, t].unsqueeze(-1)  # [B, D, 1]
        state = torch.exp(now * w.A) * state + now * x[:, t].unsqueeze(-1) * B[:, t].unsqueeze(1)
        added = (state * C[:, t].unsqueeze(1)).square().sum(1)  # [B, N]
        worth += added[valid[:, t]].sum(0)
    return worth


def _keep_states(block: Mamba, kept: Tensor) -> None:
    rank, order = block.dt_rank, block.d_state
    rows = torch.cat([torch.arange(rank, device=kept.device), rank + kept, rank + order + kept])
    block.x_proj.weight = nn.Parameter(block.x_proj.weight[rows].clone())
    block.x_proj.out_features = len(rows)
    block.A_log = nn.Parameter(block.A_log[:, kept].clone())
    block.d_state = len(kept)
