"""Names to models: this package's first, then RecBole's."""

from __future__ import annotations

import importlib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recbole_holo.bridge import resources
from recbole_holo.errors import ConfigError, nearest

MODELS = {
    "HoloMambaRec": "recbole_holo.model.holomambarec",
    "Hydra": "recbole_holo.model.hydra",
    "RecMamba": "recbole_holo.model.recmamba",
    "Mamba4Rec": "recbole_holo.model.mamba4rec",
    "LinRec": "recbole_holo.model.linrec",
    "SequenceSASRec": "recbole_holo.model.sequence_sasrec",
}
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


def is_the_packages(model: str) -> bool:
    """Whether it is one that this package brings itself, rather than one registered from outside."""
    return MODELS.get(model, "").startswith("recbole_holo.model.")


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
