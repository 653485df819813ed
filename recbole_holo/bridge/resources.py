"""Where the package's own yaml files are, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """The folder ``properties`` or ``dataset_configs``: inside the installed package, or beside it in a checkout."""
    inside, beside = PACKAGE / name, PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def properties(*parts: str) -> Path:
    """A file under ``properties/``: ``properties("model", "Hydra.yaml")``."""
    return folder("properties").joinpath(*parts)


def dataset_config(dataset: str) -> Path:
    """The file of a data set's settings; it may not exist."""
    return folder("dataset_configs") / f"{dataset}.yaml"


def presets() -> dict[str, Path]:
    """Settings that can be named instead of a file: all of ``properties/model`` (``HoloMambaRec_paper``), and the other
    protocols of a data set (``kuairand-27k_uni1000``)."""
    protocols = folder("dataset_configs").glob("*_*.yaml")
    return {path.stem: path for path in (*sorted(properties("model").glob("*.yaml")), *sorted(protocols))}
