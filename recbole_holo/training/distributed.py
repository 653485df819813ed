"""Several processes that compute what one would: sharded batches, averaged gradients, gathered rows.

Every function does nothing in a single process.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_holo.training.sparse import average_gradient

SHARD_ROWS = "_shard_rows"  # rows of this process's share of a batch that count; see ShardedTrainDataLoader
T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def barrier() -> None:
    if world()[1] > 1:
        torch.distributed.barrier()


def broadcast(value: T) -> T:
    """``value`` of the first process."""
    if world()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def broadcast_parameters(model: nn.Module) -> None:
    """Every process starts from the first one's parameters and buffers."""
    if world()[1] > 1:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def average_gradients(model: nn.Module) -> None:
    """The mean over processes of every gradient: of the dense ones in one flat message, of each sparse one by rows."""
    size = world()[1]
    if size == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    sparse = [p for p in trained if p.grad is not None and p.grad.is_sparse]
    for parameter in sparse:
        parameter.grad = average_gradient(cast(Tensor, parameter.grad))
    by_rows = {id(p) for p in sparse}
    dense = [p for p in trained if id(p) not in by_rows]
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in dense])
    torch.distributed.all_reduce(flat)
    flat /= size
    for parameter, part in zip(dense, flat.split([p.numel() for p in dense]), strict=True):
        parameter.grad = part.view_as(parameter)


def loss_weight(interaction: Interaction) -> float | Tensor | None:
    """What a batch's mean loss must be multiplied by, for the mean over processes to be the mean over its targets.

    None: by nothing. Batches of whole sequences are also weighted among themselves, by their loader.
    """
    planned = getattr(interaction, "loss_weight", None)
    if planned is not None:
        return planned
    size = world()[1]
    if size == 1:
        return None
    own = interaction[SHARD_ROWS][0].float()
    everyone = own.clone()
    torch.distributed.all_reduce(everyone)
    return own * size / everyone.clamp(min=1)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, on the host: ``[n, ...]`` of each → ``[sum of n, ...]``."""
    parts: list[Any] = [None] * world()[1]
    torch.distributed.all_gather_object(parts, rows)
    return torch.cat(parts)


def shard(split: Any) -> Any:
    """This process's rows of a validation or test split."""
    rank, size = world()
    return split.copy(split.inter_feat[slice(rank, None, size)])


class ShardedTrainDataLoader(TrainDataLoader):
    """The batches of a single process, of which each process takes every ``world_size``-th row."""

    def collate_fn(self, index: Any) -> Interaction:
        rank, size = world()
        share = list(index)[rank::size]
        batch = super().collate_fn(share or list(index)[:1])  # a short last batch: a stand-in row that does not count
        batch.update(Interaction({SHARD_ROWS: torch.full((len(batch),), len(share))}))
        return batch
