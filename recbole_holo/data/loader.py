"""From a configuration to data sets and loaders, for this package's models and RecBole's alike."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import recbole.data.dataset
from recbole.data.dataloader import (
    AbstractDataLoader,
    FullSortEvalDataLoader,
    NegSampleEvalDataLoader,
    TrainDataLoader,
)
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset
from recbole.data.utils import create_samplers, get_dataloader, load_split_dataloaders, save_split_dataloaders
from recbole.data.utils import data_preparation as recbole_data_preparation
from recbole.utils import ModelType
from recbole.utils.argument_list import dataset_arguments

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import overridden
from recbole_holo.bridge.metric_names import two_columns
from recbole_holo.data.batches import CandidateEvalLoader, SequenceEvalLoader, SequenceTrainLoader
from recbole_holo.data.event_time import SETTINGS as EVENT_TIME_SETTINGS
from recbole_holo.data.order import SETTINGS as ORDER_SETTINGS
from recbole_holo.data.repairs import RepairedDataset
from recbole_holo.data.seen import repeats_of
from recbole_holo.data.sequences import PrefixDataset, SequenceDataset
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.training import distributed
from recbole_holo.training.distributed import ShardedTrainDataLoader

# Of saved data, besides those that RecBole compares.
DATA_SETTINGS = (*ORDER_SETTINGS, *EVENT_TIME_SETTINGS)
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
    return type(base.__name__, (RepairedDataset, base), {"__module__": __name__})


def create_dataset(config) -> Any:
    """The filtered, remapped data set of ``config``, of the class that its model needs.

    ``dataset_save_path`` names a data set saved before with ``save_dataset`` (a pickle: load only your own), used when
    it was made with the same settings.
    """
    dataset_class = get_dataset_class(config)
    saved = None if numbered(config) else config["dataset_save_path"]
    if saved and os.path.exists(saved):
        with open(saved, "rb") as file:
            dataset = pickle.load(file)
        if all(
            config[key] == dataset.config[key] for key in [*dataset_arguments, *DATA_SETTINGS, "seed", "repeatable"]
        ):
            return dataset
    dataset = dataset_class(config)
    if config["save_dataset"] and not numbered(config):
        dataset.save()
    return dataset


def numbered(config) -> bool:
    """Whether data are read in a checkpoint's numbers: what is kept of data has those of its files."""
    return getattr(config, "numbering", None) is not None


def data_preparation(config, dataset) -> tuple[AbstractDataLoader, AbstractDataLoader, AbstractDataLoader]:
    """Splits ``dataset`` by ``eval_args`` and returns the training, validation and test loaders.

    As RecBole's function of that name, with four differences: this package's models get batches of nearly one length,
    gathered on the device (:mod:`recbole_holo.data.batches`); in uniN/popN modes their loaders hold each history once;
    evaluation batches are cut so that rows × items stays below ``eval_max_elements``; and a split without rows is
    ``None`` for validation (RecBole's trainer then skips it), an error for training and test.
    """
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        prepared = recbole_data_preparation(config, dataset)
        _count_repeats(prepared, {phase: loader._dataset for phase, loader in zip(PHASES, prepared, strict=True)})
        return prepared
    # RecBole would also unpickle a file of the right name that merely lies in checkpoint_dir.
    wanted = not numbered(config) and (config["dataloaders_save_path"] or config["save_dataloaders"])
    saved = load_split_dataloaders(config) if wanted else None
    if saved is not None and all(config[key] == saved[0]._dataset.config[key] for key in DATA_SETTINGS):
        dataset._change_feat_format()
        return saved

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
                loaders.append(loader_class(config, split, samplers[phase], shuffle=config["shuffle"]))
        else:
            loaders.append(_eval_loader(config, loader_class, split, samplers[phase]) if len(split) else None)
    _count_repeats(loaders, splits)
    if config["save_dataloaders"] and not numbered(config) and None not in loaders:
        generators = [loader.generator for loader in loaders]
        save_split_dataloaders(config, dataloaders=loaders)
        for loader, generator in zip(loaders, generators, strict=True):  # saving takes them away
            loader.generator = loader.sampler.generator = generator
    train, valid, test = loaders
    return train, valid, test


def _count_repeats(loaders: Sequence[Any], splits: Mapping[str, Any]) -> None:
    """Leaves with the validation and test loaders how many of their targets were seen before, where there are rankings
    that it concerns."""
    if not two_columns(splits["train"].config["metrics"]):  # loaders of knowledge graphs have no configuration
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
