"""Names to classes: models, data sets and trainers, this package's first, then RecBole's."""

from __future__ import annotations

import importlib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_holo.bridge import resources
from recbole_holo.bridge.errors import ConfigError, nearest

if TYPE_CHECKING:
    from recbole.trainer import Trainer

MODELS = {
    "HoloMambaRec": "recbole_holo.model.holomambarec",
    "Hydra": "recbole_holo.model.hydra",
    "RecMamba": "recbole_holo.model.recmamba",
    "Mamba4Rec": "recbole_holo.model.mamba4rec",
}
# Models of RecBole that read the padded histories of all rows from the data set, besides their batches.
READS_PADDED_LISTS = frozenset({"FEARec"})
PROPERTIES: dict[str, Path] = {}  # of models registered from outside; the package's own are found by name
RECBOLE_FAMILIES = (
    "general_recommender",
    "context_aware_recommender",
    "sequential_recommender",
    "knowledge_aware_recommender",
    "exlib_recommender",
)


def is_ours(model: str) -> bool:
    """Whether ``model`` is a model of this package, rather than RecBole's."""
    return model in MODELS


def register_model(name: str, module: str, properties: str | Path | None = None) -> None:
    """Adds a model.

    Args:
        name: of its class, a subclass of ``SequenceRecommender``.
        module: dotted path of the module that holds the class.
        properties: yaml file with the defaults of its settings.
    """
    MODELS[name] = module
    if properties is not None:
        PROPERTIES[name] = Path(properties)


def properties_file(name: str) -> Path:
    """The yaml file with a model's defaults; it may not exist."""
    return PROPERTIES.get(name, resources.properties("model", f"{name}.yaml"))


@cache
def recbole_models() -> dict[str, str]:
    """RecBole's models: class name → dotted path of its module, found without importing any of them."""
    found = {}
    for family in RECBOLE_FAMILIES:
        spec = find_spec(f"recbole.model.{family}")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in Path(folder).glob("*.py"):
                for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
                    if name.lower() == file.stem:
                        found[name] = f"recbole.model.{family}.{file.stem}"
    return found


def get_model_class(name: str) -> Any:
    """The class of a model by its name.

    Raises:
        ConfigError: no such model (the nearest names are offered), or one whose own dependency is not installed.
    """
    path = MODELS.get(name) or recbole_models().get(name)
    if path is None:
        raise ConfigError("model", name, nearest(name, [*MODELS, *recbole_models()]))
    try:
        return getattr(importlib.import_module(path), name)
    except ModuleNotFoundError as error:
        raise ConfigError("model", name, f"it needs the package {error.name!r}, which is not installed") from error


def get_dataset_class(config) -> type:
    """The data set class of a configuration's model.

    This package's models read whole sequences; RecBole's sequential models get RecBole's rows, gathered lazily; models
    with a data set class of their own keep it, with the repairs of ``data.repairs`` mixed in.
    """
    import recbole.data.dataset as recbole_datasets
    from recbole.utils import ModelType

    from recbole_holo.data.repairs import RepairedDataset
    from recbole_holo.data.sequences import PrefixDataset, SequenceDataset

    if is_ours(config["model"]):
        return SequenceDataset
    base = getattr(recbole_datasets, f"{config['model']}Dataset", None)
    if base is None:
        if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and config["model"] not in READS_PADDED_LISTS:
            return PrefixDataset
        family = {
            ModelType.KNOWLEDGE: recbole_datasets.KnowledgeBasedDataset,
            ModelType.SEQUENTIAL: recbole_datasets.SequentialDataset,
        }
        base = family.get(config["MODEL_TYPE"], recbole_datasets.Dataset)
    return type(base.__name__, (RepairedDataset, base), {"__module__": __name__})


def get_trainer_class(config) -> type[Trainer]:
    """The trainer of a configuration's model: RecBole's, with safe checkpoints and exact resuming mixed in."""
    from recbole.trainer import Trainer
    from recbole.utils import get_trainer

    from recbole_holo.training.trainer import HoloTrainer, SafeCheckpoints

    base = Trainer if is_ours(config["model"]) else get_trainer(config["MODEL_TYPE"], config["model"])
    if base is Trainer:
        return HoloTrainer
    return type(base.__name__, (SafeCheckpoints, base), {"__module__": __name__})
