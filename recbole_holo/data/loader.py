"""From a configuration to data sets and loaders, for this package's models and RecBole's alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import recbole.data.dataset
import torch
from recbole.data.dataloader import (
    AbstractDataLoader,
    FullSortEvalDataLoader,
    KnowledgeBasedDataLoader,
    NegSampleEvalDataLoader,
    TrainDataLoader,
)
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset
from recbole.data.transform import construct_transform
from recbole.data.utils import create_samplers, get_dataloader
from recbole.sampler import KGSampler
from recbole.utils import ModelType

from recbole_holo.bridge import registry
from recbole_holo.bridge.compat import recboles_refusals
from recbole_holo.bridge.config import overridden
from recbole_holo.bridge.metric_names import two_columns
from recbole_holo.data import kept
from recbole_holo.data.batches import CandidateEvalLoader, SequenceEvalLoader, SequenceTrainLoader
from recbole_holo.data.repairs import repaired
from recbole_holo.data.seen import repeats_of
from recbole_holo.data.sequences import PrefixDataset, SequenceDataset
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.training import distributed
from recbole_holo.training.distributed import ShardedTrainDataLoader

PHASES = ("train", "valid", "test")
# Models of RecBole that read the padded histories of all rows from the data set, besides their batches.
READS_PADDED_LISTS = frozenset({"FEARec"})


def get_dataset_class(config) -> type:
    """The data set class of a configuration's model.

    This package's models read whole sequences; RecBole's sequential models get RecBole's rows, gathered lazily; models
    with a data set class of their own keep it, with the repairs of :class:`RepairedDataset` mixed in.
    """
    model, family = config["model"], config["MODEL_TYPE"]
    if registry.is_ours(model):
        return SequenceDataset
    base = getattr(recbole.data.dataset, f"{model}Dataset", None)
    if base is None and family == ModelType.SEQUENTIAL and model not in READS_PADDED_LISTS:
        return PrefixDataset
    if base is None:
        families = {ModelType.KNOWLEDGE: KnowledgeBasedDataset, ModelType.SEQUENTIAL: SequentialDataset}
        base = families.get(family, Dataset)
    return repaired(base)


def create_dataset(config) -> Any:
    """The filtered, remapped data set of ``config``, of the class that its model needs.

    ``dataset_save_path`` names a data set saved before with ``save_dataset`` (a pickle: load only your own), used when
    it was made with the same settings from the same files (:mod:`recbole_holo.data.kept`).
    """
    dataset_class = get_dataset_class(config)
    if not (config["dataset_save_path"] or config["save_dataset"]):
        with recboles_refusals(f"dataset {config['dataset']!r}"):
            return dataset_class(config)
    made_from = kept.Fingerprint.of(config, dataset_class.__name__, kept.NOT_DATA_SET)
    if config["dataset_save_path"]:
        dataset = kept.read(config["dataset_save_path"], made_from, "dataset_save_path")
        if dataset is not None:
            dataset.config = config  # what is done with it from here on is as the settings say now
            return dataset
    with recboles_refusals(f"dataset {config['dataset']!r}"):
        dataset = dataset_class(config)
    if config["save_dataset"]:
        name = f"{config['dataset']}-{dataset_class.__name__}.pth"
        if not made_from.sources:  # they were downloaded
            made_from = kept.Fingerprint.of(config, dataset_class.__name__, kept.NOT_DATA_SET)
        kept.write(os.path.join(config["checkpoint_dir"], name), made_from, dataset)
    return dataset


def data_preparation(config, dataset) -> tuple[AbstractDataLoader, AbstractDataLoader, AbstractDataLoader]:
    """Splits ``dataset`` by ``eval_args`` and returns the training, validation and test loaders.

    As RecBole's function of that name, with four differences: this package's models get batches of nearly one length,
    gathered on the device (:mod:`recbole_holo.data.batches`); in uniN/popN modes their loaders hold each history once;
    evaluation batches are cut so that rows × items stays below ``eval_max_elements``; and a split without rows is
    ``None`` for validation (RecBole's trainer then skips it), an error for training and test.
    """
    made_from = None
    path = os.path.join(config["checkpoint_dir"], f"{config['dataset']}-for-{config['model']}-dataloader.pth")
    # RecBole would also unpickle a file of the right name that merely lies in checkpoint_dir.
    if config["dataloaders_save_path"] or config["save_dataloaders"]:
        made_from = kept.Fingerprint.of(config, f"the loaders of {config['model']}", kept.NOT_DATA)
        saved = kept.read(config["dataloaders_save_path"] or path, made_from, "dataloaders_save_path")
        if saved is not None:
            dataset._change_feat_format()
            return _as_now(config, *saved)

    with recboles_refusals(f"dataset {config['dataset']!r}"):
        splits = dict(zip(PHASES, dataset.build(), strict=True))
    for phase in ("train", "test"):
        if len(splits[phase]) == 0:
            raise DataError(
                f"eval_args: the split {config['eval_args']['split']} leaves no {phase} interaction in "
                f"{dataset.dataset_name!r} ({len(dataset):,} in all); histories are too short or the ratios too small."
            )
    n_items = dataset.item_num - 1
    for k in config["topk"]:
        if k > n_items:
            raise ConfigError("topk", k, f"{dataset.dataset_name!r} has {n_items:,} items after filtering; use fewer")
    samplers = dict(zip(splits, create_samplers(config, dataset, list(splits.values())), strict=True))
    triples = []
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        negatives = config["train_neg_sample_args"]
        triples.append(KGSampler(dataset, negatives["distribution"], negatives["alpha"]))
    loaders: list[Any] = []
    for phase, split in splits.items():
        loader_class = get_dataloader(config, phase)
        if phase == "train":
            if isinstance(split, SequenceDataset) and split.following is not None:
                loader_class = SequenceTrainLoader
            elif not config["single_spec"]:
                if loader_class is not TrainDataLoader:
                    raise ConfigError("nproc", config["nproc"], f"{config['model']} loads by user; use one process")
                loader_class = ShardedTrainDataLoader
            with overridden(config, single_spec=True):  # RecBole's own sharding pads, so it is not used
                loaders.append(loader_class(config, split, samplers[phase], *triples, shuffle=config["shuffle"]))
        else:
            loaders.append(_eval_loader(config, loader_class, split, samplers[phase]) if len(split) else None)
    _count_repeats(config, loaders, splits)
    if config["save_dataloaders"] and made_from is not None:
        with _without_generators(loaders) as states:
            kept.write(path, made_from, (loaders, states))
    train, valid, test = loaders
    return train, valid, test


def _that_draw(loaders: Sequence[Any]) -> Iterator[AbstractDataLoader]:
    """The loaders with a generator of their own; that of a model of knowledge is two of them."""
    for loader in loaders:
        if isinstance(loader, KnowledgeBasedDataLoader):
            yield from (loader.general_dataloader, loader.kg_dataloader)
        elif loader is not None:
            yield loader


@contextmanager
def _without_generators(loaders: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """``loaders`` without what cannot be pickled, inside the block; gives their generators' states."""
    present = list(_that_draw(loaders))
    generators = [loader.generator for loader in present]
    for loader in present:
        loader.generator = loader.sampler.generator = None
    try:
        yield [generator.get_state() for generator in generators]
    finally:
        for loader, generator in zip(present, generators, strict=True):
            loader.generator = loader.sampler.generator = generator


def _as_now(config, loaders: Sequence[Any], states: Sequence[torch.Tensor]) -> tuple[Any, Any, Any]:
    """Loaders that were kept, under the configuration of now."""
    for loader, state in zip(_that_draw(loaders), states, strict=True):
        loader.generator = loader.sampler.generator = torch.Generator()
        loader.generator.set_state(state)
        loader.config = loader._dataset.config = config
        loader.transform = construct_transform(config)  # leaves names of its own in the configuration
    train, valid, test = loaders
    return train, valid, test


def _count_repeats(config, loaders: Sequence[Any], splits: Mapping[str, Any]) -> None:
    """Leaves with the validation and test loaders how many of their targets were seen before, where there are rankings
    that it concerns."""
    if not two_columns(config["metrics"]):
        return
    found = repeats_of(splits)
    for phase, loader in zip(PHASES, loaders, strict=True):
        if phase in found:
            loader.repeats = {phase: found[phase]}


def _eval_loader(config, loader_class: type, split, sampler) -> AbstractDataLoader:
    if loader_class is NegSampleEvalDataLoader and registry.is_ours(config["model"]):
        loader_class = CandidateEvalLoader
    if loader_class is FullSortEvalDataLoader and isinstance(split, SequenceDataset) and split.is_augmented:
        loader_class = SequenceEvalLoader
    full_ranking = issubclass(loader_class, FullSortEvalDataLoader)
    rows_are_independent = full_ranking and config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    settings: dict[str, Any] = {"single_spec": True}
    if rows_are_independent and config["eval_max_elements"]:
        # RecBole scores eval_batch_size sequences against all items at once, whatever the catalogue.
        settings["eval_batch_size"] = min(
            config["eval_batch_size"], max(config["eval_max_elements"] // split.item_num, 1)
        )
    sharded = rows_are_independent and len(split) >= distributed.world()[1] > 1
    with overridden(config, **settings):
        loader = loader_class(config, distributed.shard(split) if sharded else split, sampler)
    loader.is_sharded = sharded
    return loader
