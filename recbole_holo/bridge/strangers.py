"""What a checkpoint may have done that nobody vouches for: models that run nothing, and paths that stay inside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recbole_holo.bridge import registry
from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.bridge.config import LAUNCH_KEYS, literal
from recbole_holo.errors import ConfigError

# RecBole's models whose construction was read (1.2.0 and 1.2.1) and neither evaluates, imports nor loads anything that
# a setting names. Those that are in no list here, such as a later RecBole's, are refused as unknown.
_PLAIN = """
    ADMMSLIM AFM AsymKNN AutoInt BERT4Rec BPR CDAE CFKG CKE CORE Caser DCN DCNV2 DGCF DIEN DIN DMF DSSM DeepFM DiffRec
    EASE ENMF EulerNet FDSA FEARec FFM FISM FM FNN FOSSIL FPMC FiGNN FwFM GCMC GCSAN GRU4Rec GRU4RecCPR GRU4RecF
    GRU4RecKG HGN HRM ItemKNN KGAT KGCN KGIN KGNNLS KSR KTUP LINE LR LightGCN LightSANs MCCLK MKR MacridVAE MultiDAE
    MultiVAE NARM NCEPLRec NCL NFM NGCF NNCF NPE NextItNet PNN Pop Random RecVAE RepeatNet RippleNet SASRec SASRecCPR
    SASRecF SGL SHAN SINE SLIMElastic SRGNN STAMP SimpleX SpectralCF TransRec WideDeep xDeepFM
"""
PLAIN_MODELS = frozenset(_PLAIN.split())


@dataclass(frozen=True)
class Refusal:
    """Why a model is not built for a stranger, and the setting with which it may be, if there is one."""

    why: str
    setting: str | None = None
    harmless: Any = None


REFUSED = {
    "KD_DAGFM": Refusal("it evaluates its setting teacher as Python, and unpickles the file warm_up"),
    "ConvNCF": Refusal("it unpickles the file pre_model_path", "train_method", "no_pretrain"),
    "LDiffRec": Refusal("it unpickles the file item_emb.npy of the data set", "n_cate", 1),
    "LightGBM": Refusal("its checkpoint names a file that LightGBM's own reader opens"),
    "NAIS": Refusal("it unpickles the file pretrain_path", "pretrain_path", None),
    "NeuMF": Refusal("it unpickles the files mf_pretrain_path and mlp_pretrain_path", "use_pretrain", False),
    "RaCT": Refusal("it unpickles the file pre_model_path", "train_stage", "actor_pretrain"),
    "S3Rec": Refusal("it unpickles the file pre_model_path", "train_stage", "pretrain"),
    "XGBoost": Refusal("its checkpoint names a file that XGBoost's own reader opens"),
}

# Settings that a checkpoint does not choose, trusted or not: how a run is spread, what is unpickled or sent elsewhere.
NOT_ITS_OWN: dict[str, Any] = {
    "dataset_save_path": None,
    "dataloaders_save_path": None,
    "save_dataset": False,
    "save_dataloaders": False,
    "log_wandb": False,
}


def settings_of(
    saved: Mapping[str, Any], path: str | os.PathLike[str], said: Mapping[str, Any], trusted: bool
) -> dict[str, Any]:
    """The settings of a checkpoint of plain values that a model is built and data are read with.

    Args:
        saved: what the checkpoint says of its configuration.
        path: of the checkpoint.
        said: settings that the user gives, which win.
        trusted: ``trust_checkpoint``.

    Raises:
        CheckpointError: there is no configuration in it, or a model that can run or unpickle what a setting says.
        ConfigError: it names files outside of the working directory, which nobody else has named.
    """
    name = os.fspath(path)
    model, given = saved.get("model"), saved.get("given")
    if not (isinstance(model, str) and isinstance(saved.get("dataset"), str) and isinstance(given, dict)):
        raise CheckpointError(f"checkpoint: {name!r} does not say its model, data set and settings")
    folder = os.path.dirname(os.path.abspath(path))
    said = {key: literal(value) if isinstance(value, str) else value for key, value in said.items()}
    settings = {**given, **NOT_ITS_OWN, "checkpoint_dir": folder, **said}
    for key in LAUNCH_KEYS:
        settings.pop(key, None)
    if not trusted:
        _check_model(model, settings, name)
        _check_paths(saved["dataset"], settings, said)
    return settings


def _check_model(model: str, settings: Mapping[str, Any], name: str) -> None:
    if registry.is_ours(model) or model in PLAIN_MODELS:
        return
    refusal = REFUSED.get(model) or Refusal("nobody has read what it does with its settings")
    if refusal.setting is not None and _same(settings.get(refusal.setting), refusal.harmless):
        return
    setting = "" if refusal.setting is None else f" with {refusal.setting}: {settings.get(refusal.setting)!r}"
    raise CheckpointError(
        f"checkpoint: {name!r} is of the model {model}{setting}, which is not built for a file that nobody vouches "
        f"for: {refusal.why}. If you know where it comes from, pass trust_checkpoint=True."
    )


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def _check_paths(dataset: str, settings: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Data sets are read from folders inside the working directory, or from where the user says."""
    names = {"dataset": [said.get("dataset", dataset)]}
    for key in ("benchmark_filename", "additional_feat_suffix"):
        listed = settings.get(key) or []
        names[key] = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    for key, values in names.items():
        for value in values:
            if key not in said and (not isinstance(value, str) or value in ("", ".", "..") or set(value) & {"/", "\0"}):
                raise ConfigError(key, value, "a checkpoint may name data sets, not paths: trust_checkpoint=True")
    folder = settings.get("data_path", "dataset/")
    if "data_path" in said or dataset == "ml-100k":  # the one that RecBole brings
        return
    here = os.getcwd()
    if not isinstance(folder, str) or os.path.commonpath([here, os.path.abspath(folder)]) != here:
        remedy = (
            "the checkpoint names it, and it lies outside of the working directory: if your data are there, pass "
            f"data_path={folder!r}"
        )
        raise ConfigError("data_path", folder, remedy)
