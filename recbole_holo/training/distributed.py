"""Several processes that compute what one would: sharded batches, averaged gradients, gathered rows.

Every function does nothing in a single process.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator.collector import Collector, DataStruct
from torch import Tensor, nn

from recbole_holo.data import TARGETS_SUFFIX

SHARD_ROWS = "_shard_rows"  # rows of this process's share of a batch that count; see ShardedTrainDataLoader
ROW_TABLES = ("rec.topk", "rec.items", "rec.meanrank", "rec.score", "data.label")
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
    """The mean over processes of every gradient, in one flat message."""
    size = world()[1]
    if size == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= size
    parts = flat.split([gradient.numel() for gradient in gradients])
    for parameter, part in zip((p for p in model.parameters() if p.requires_grad), parts, strict=True):
        parameter.grad = part.view_as(parameter)


def loss_weight(interaction: Interaction) -> float | Tensor:
    """What this process's mean loss must be multiplied by, for the mean over processes to be the mean over targets."""
    size = world()[1]
    if size == 1:
        return 1.0
    targets = [key for key in interaction.columns if key.endswith(TARGETS_SUFFIX)]
    own = (interaction[targets[0]] > 0).sum() if targets else interaction[SHARD_ROWS][0]
    own = own.float()
    everyone = own.clone()
    torch.distributed.all_reduce(everyone)
    return own * size / everyone.clamp(min=1)


class GatheringCollector(Collector):
    """RecBole's collector; after a sharded evaluation it holds the rows of all processes, for its evaluator."""

    sharded = False

    def get_data_struct(self) -> DataStruct:
        struct = super().get_data_struct()
        for name in ROW_TABLES if self.sharded else ():
            if name in struct:
                rows: list[Any] = [None] * world()[1]
                torch.distributed.all_gather_object(rows, struct[name])
                struct[name] = torch.cat(rows)
        return struct


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
        for key in batch.columns:
            if key.endswith(TARGETS_SUFFIX) and not share:
                batch[key] = torch.zeros_like(batch[key])
        return batch
