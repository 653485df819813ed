"""The configuration: RecBole's keys, files and precedence, for all models, with errors before work starts."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from recbole.config import Config as RecBoleConfig
from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType, ModelType

from recbole_holo.bridge import registry, resources, settings
from recbole_holo.bridge.metric_names import UNSEEN, kept_name, two_columns, valid_metric
from recbole_holo.data import atomic_files, splits
from recbole_holo.errors import ConfigError, DataError, nearest, nearest_names

if TYPE_CHECKING:
    from recbole_holo.data.numbering import Numbering

_logger = getLogger("recbole_holo")

# How this run is spread over processes; says nothing about the experiment.
LAUNCH_KEYS = ("local_rank", "world_size", "nproc", "offset", "ip", "port", "config_files", "resume")

# Names of a time column, in small letters and without what separates words.
TIME_NAMES = frozenset(
    {"time", "ts", "date", "datetime", "unixtime", "eventtime", "ratingtime", "reviewtime", "clicktime", "createdat"}
)

# Keys that RecBole or this package reads although no yaml file gives them a default.
EXTRA_KEYS = frozenset(
    {
        "loss_type",
        "model",
        "dataset",
        "config_files",
        "config_file_list",
        "data_path",
        "encoding",
        "reg_weight",
        "tail_ratio",
        "embedding_size",
        "benchmark_filename",
        "discretization",
        "alias_of_user_id",
        "alias_of_item_id",
        "kge_interval",
        "save_step",
        "pretrain_epochs",
        "train_rec_step",
        "train_kg_step",
        "warm_up_step",
        "lgb_params",
        "xgb_params",
        "seq_len",
        "nproc",
        "world_size",
        "ip",
        "port",
        "group_offset",
        "offset",
        "local_rank",
        "wandb_project",
        "search_space",
        "search_algo",
        "max_evals",
    }
)


class Config(RecBoleConfig):
    """RecBole's ``Config`` for this package's models and RecBole's.

    Precedence, lowest first: RecBole's defaults, ``properties/overall.yaml``, ``properties/model/<Model>.yaml``,
    ``dataset_configs/<dataset>.yaml``, the user's config files in their order, ``config_dict``, the command line.

    Unlike RecBole's: the command line is read only when it is passed (``argv``); values are parsed as literals, never
    evaluated as code; a config file may be a preset's name (``HoloMambaRec_paper``); unknown keys get a warning.

    Args:
        model: name or class of a model; None = from the other sources.
        dataset: name of a data set; None likewise.
        config_file_list: yaml files or preset names, the last one wins.
        config_dict: settings that win over files.
        argv: command line words ``--key=value`` that win over everything; others are ignored with a warning.
        foreign_argv: the command line is another program's: words that are no setting are its own affair.
        complete: ``config_dict`` is the whole configuration, as a checkpoint holds it: no yaml file is read.

    Raises:
        ConfigError: unknown model, file, backend or metric, malformed yaml, top-k out of range.
    """

    numbering: Numbering | None = None  # of the checkpoint that the data set is read for

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: Sequence[str | os.PathLike[str]] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        argv: Sequence[str] = (),
        foreign_argv: bool = False,
        complete: bool = False,
    ) -> None:
        self._argv = list(argv)
        self._foreign_argv = foreign_argv
        self._complete = complete
        super().__init__(model, dataset, [str(f) for f in config_file_list or []], dict(config_dict or {}))
        self._check_values()
        if not complete:
            self._warn_of_unknown_keys()

    # ------------------------------------------------------------------ sources
    def _load_config_files(self, file_list: Iterable[str] | None) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for name in file_list or ():
            read.update(self._read_yaml(resolve_config_file(name)))
        return read

    def _load_cmd_line(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for word in self._argv:
            key, equals, value = word.removeprefix("--").partition("=")
            if not (word.startswith("--") and equals and key):
                if self._foreign_argv:
                    continue
                _logger.warning(f"command line: {word!r} is ignored; settings are written --key=value")
                continue
            if key in given and given[key] != value:
                raise ConfigError(key, value, f"the command line also says {given[key]!r}; give one value")
            given[key] = value
        return self._convert_config_dict(given)

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Strings that are Python literals or yaml booleans become values. RecBole calls ``eval`` here."""
        if self._complete:  # they are values
            return dict(config_dict)
        return {key: literal(value) if isinstance(value, str) else value for key, value in config_dict.items()}

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, type, str]:
        model = model or self.external_config_dict.get("model")
        dataset = dataset or self.external_config_dict.get("dataset")
        if model is None:
            raise ConfigError("model", None, "name one: --model=HoloMambaRec")
        if dataset is None:
            raise ConfigError("dataset", None, "name one: --dataset=ml-100k")
        settings.SETTINGS["dataset"].check("dataset", dataset)
        if isinstance(model, str):
            return model, registry.get_model_class(model), dataset
        if not isinstance(model, type):
            raise ConfigError("model", model, "use a model's name, such as HoloMambaRec")
        return model.__name__, model, dataset

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        if self._complete:
            self.internal_config_dict = {"MODEL_TYPE": model_class.type}
            return
        super()._load_internal_config_dict(model, model_class, dataset)
        self.internal_config_dict.update(self._read_yaml(resources.properties("overall.yaml")))
        for path in (registry.properties_file(model), resources.dataset_config(dataset)):
            if path.is_file():
                self.internal_config_dict.update(self._read_yaml(path))
        if self._foreign_argv:
            ours = {**self.file_config_dict, **self.variable_config_dict}
            for key in set(self.cmd_config_dict) - set(ours) - self.known_keys():
                del self.external_config_dict[key]

    def _read_yaml(self, path: Path) -> dict[str, Any]:
        try:
            read = yaml.load(
                path.read_text(encoding="utf-8"), Loader=type("_Loader", (_OneValueAKey, self.yaml_loader), {})
            )
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            remedy = f"byte 0x{error.object[error.start]:02x} in line {line} is no UTF-8; convert it"
            raise ConfigError("config file", str(path), remedy) from error
        except OSError as error:
            raise ConfigError("config file", str(path), f"it cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
            reason = " ".join(str(error).split())
            raise ConfigError("config file", str(path), f"it is not well-formed yaml: {reason}") from error
        if read is None:
            return {}
        if not isinstance(read, dict):
            raise ConfigError("config file", str(path), "it must hold `key: value` lines")
        return read

    # ------------------------------------------------------------------ the final settings
    def _get_final_config_dict(self) -> dict[str, Any]:
        final = super()._get_final_config_dict()
        sequential = self.internal_config_dict["MODEL_TYPE"] == ModelType.SEQUENTIAL
        settings.check(
            {**final, "dataset": self.dataset},
            self.internal_config_dict,
            ours=registry.is_the_packages(self.model),
            sequential=sequential,
        )
        final["encoding"] = atomic_files.text_encoding(final.get("encoding"))
        if sequential and final.get("loss_type") == "CE" and "train_neg_sample_args" not in self.external_config_dict:
            final["train_neg_sample_args"] = None  # RecBole's default stands in the way of its own CE models
        final["eval_args"] = splits.with_order(final.get("eval_args"), sequential)
        self._add_attribute_columns(final)
        if sequential and "load_col" not in self.external_config_dict and not final.get("benchmark_filename"):
            self._add_time_column(final)
        # What rebuilds this configuration wherever it is loaded, whatever the yaml files say by then.
        self.given = {key: value for key, value in final.items() if key not in ("MODEL_TYPE", *LAUNCH_KEYS)}
        return final

    def _add_attribute_columns(self, final: dict[str, Any]) -> None:
        names, columns = final.get("item_attributes"), final.get("load_col")
        reads = getattr(self.model_class, "uses_attributes", False)
        if not reads and not (getattr(self.model_class, "binds_attributes", False) and final.get("binding")):
            final["item_attributes"] = []
        elif names and isinstance(columns, dict) and columns.get("item") != "*":
            wanted = [final.get("ITEM_ID_FIELD"), *(columns.get("item") or []), *names]
            final["load_col"] = {**columns, "item": list(dict.fromkeys(wanted))}

    def _add_time_column(self, final: dict[str, Any]) -> None:
        """Completes a ``load_col`` that nobody gave: RecBole's own ends at user and item, and sequences need times."""
        listed = (final.get("load_col") or {}).get("inter", "*")
        if listed == "*" or final["TIME_FIELD"] in listed:
            return
        user, item = final["USER_ID_FIELD"], final["ITEM_ID_FIELD"]
        file = Path(final["data_path"], self.dataset, f"{self.dataset}.inter")
        if file.is_file():  # else it is downloaded first, and RecBole's downloads have the usual names
            columns = list(atomic_files.read_header(file, atomic_files.Form.of(final)))
            for field, what in (("USER_ID_FIELD", "users"), ("ITEM_ID_FIELD", "items")):
                if final[field] not in columns:
                    raise DataError(
                        f"{field}: {file} has no column {final[field]!r}; its columns are {', '.join(columns)}. Name "
                        f"that of the {what}: {field}: <column>."
                    )
            final["TIME_FIELD"] = self._time_column(final["TIME_FIELD"], columns, file)
        others = [column for column in listed if column not in ("user_id", "item_id")]
        final["load_col"] = {**final["load_col"], "inter": [user, item, *others, final["TIME_FIELD"]]}

    def _time_column(self, wanted: str, columns: list[str], file: Path) -> str:
        if wanted in columns:
            return wanted
        like_it = [name for name in columns if _looks_like_a_time(name)]
        if "TIME_FIELD" in self.external_config_dict or len(like_it) != 1:
            several = f"several that look like a time ({', '.join(like_it)})" if like_it else "none that looks like one"
            raise DataError(
                f"TIME_FIELD: {file} has no column {wanted!r}, and {several}; its columns are {', '.join(columns)}. "
                "Name that of the times, TIME_FIELD: <column>, and, where more than users, items and times are to be "
                "read, all that are, load_col: {inter: [...]}."
            )
        _logger.warning(f"TIME_FIELD: {file} has no column {wanted!r}; {like_it[0]!r} is read as the time")
        return like_it[0]

    def _init_device(self) -> None:
        """As RecBole's, with gloo where there are no GPUs; the visible devices stay as the user set them."""
        final = self.final_config_dict
        gpu_id = final["gpu_id"]
        final["gpu_id"] = ",".join(map(str, gpu_id)) if isinstance(gpu_id, (tuple, list)) else str(gpu_id)
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", final["gpu_id"])
        cuda = torch.cuda.is_available() and final["use_gpu"] and final["gpu_id"] != ""
        final["device"] = torch.device("cuda" if cuda else "cpu")
        final["single_spec"] = "local_rank" not in final
        if final["single_spec"]:
            final["local_rank"] = 0
            return
        if cuda:
            if torch.cuda.device_count() < final["nproc"]:
                raise ConfigError("nproc", final["nproc"], f"{torch.cuda.device_count()} GPU(s) are visible (gpu_id)")
            final["device"] = torch.device("cuda", final["local_rank"])
            torch.cuda.set_device(final["local_rank"])
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend="nccl" if cuda else "gloo",
                rank=final["local_rank"] + final["offset"],
                world_size=final["world_size"],
                init_method=f"tcp://{final['ip']}:{final['port']}" if "ip" in final else "env://",  # torchrun's
                device_id=final["device"] if cuda else None,  # else nccl guesses it from the rank, at the first message
            )
        if final["local_rank"] != 0:
            final.update(state="error", show_progress=False, verbose=False)

    # ------------------------------------------------------------------ checks
    def _set_default_parameters(self) -> None:
        final = self.final_config_dict
        metrics = [final["metrics"]] if isinstance(final["metrics"], str) else final["metrics"]
        for metric in metrics:
            if metric.lower() not in metric_types:
                raise ConfigError("metrics", metric, nearest(metric, metric_types))
        topk = [final["topk"]] if isinstance(final["topk"], int) else final["topk"]
        final["valid_metric"] = chosen_by = valid_metric(final["valid_metric"], metrics, topk)
        if self.ranks_general and two_columns(metrics):
            final["valid_metric"] = kept_name(chosen_by) + UNSEEN  # RecBole's own choice for these models
        self._check_what_recbole_refuses(final, metrics)
        super()._set_default_parameters()
        if "MODEL_INPUT_TYPE" not in final:
            raise ConfigError("loss_type", final["loss_type"], f"{self.model} knows CE and BPR")

    def _check_what_recbole_refuses(self, final: Mapping[str, Any], metrics: Sequence[str]) -> None:
        kinds = {metric_types[metric.lower()] for metric in metrics}
        if len(kinds) > 1:
            remedy = "metrics of rankings and of single scores cannot be measured together: use one kind"
            raise ConfigError("metrics", metrics, remedy)
        mode = final["eval_args"].get("mode", "full")
        if kinds == {EvaluatorType.VALUE} and "full" in (mode.values() if isinstance(mode, dict) else [mode]):
            raise ConfigError("metrics", metrics, "they are of single scores: use eval_args mode: labeled or uni100")
        sequential = not self.ranks_general
        if sequential and not final.get("repeatable"):
            raise ConfigError("repeatable", final.get("repeatable"), "models of sequences evaluate repeats: use True")
        negatives = final.get("train_neg_sample_args")
        by_loss = sequential and not hasattr(self.model_class, "input_type")
        if by_loss and final.get("loss_type") == "CE" and negatives is not None:
            remedy = "loss_type: CE is over all items and draws no negatives: use ~"
            raise ConfigError("train_neg_sample_args", negatives, remedy)

    @property
    def ranks_general(self) -> bool:
        """Whether the model is none of sequences: RecBole ranks for it what a user has not seen."""
        return self.internal_config_dict["MODEL_TYPE"] != ModelType.SEQUENTIAL

    def _check_values(self) -> None:
        final = self.final_config_dict
        if final.get("backend") == "cuda" and final["device"].type != "cuda":
            raise ConfigError("backend", "cuda", "no GPU can be used (use_gpu, gpu_id, python -m recbole_holo.doctor)")
        splits.check(final, sequential=not self.ranks_general)
        self._drop_what_has_no_effect(final)
        self._check_shuffle_ties(final)
        self._drop_what_only_ours_read(final)
        last = final.get("exclude_last")
        if last is not None and self.ranks_general:
            remedy = f"{final['model']} knows no order of events, and all that users have seen is left out: use ~"
            raise ConfigError("exclude_last", last, remedy)

    def _check_shuffle_ties(self, final: Mapping[str, Any]) -> None:
        if not final.get("shuffle_ties", False):
            return
        if not registry.is_ours(self.model) or final["train_on"] != "sequences":
            remedy = "it is for whole sequences: use a model of this package with train_on: sequences, or False"
            raise ConfigError("shuffle_ties", True, remedy)
        if final.get("benchmark_filename"):
            raise ConfigError("shuffle_ties", True, "the rows of benchmark_filename are in no order of time: use False")

    def _drop_what_has_no_effect(self, final: dict[str, Any]) -> None:
        """What a split passes over must not stand in the report, and nobody should believe in it."""
        why, fields = splits.without_effect(final)
        if fields:
            said = ", ".join(f"{field}: {final[field]}" for field in fields)
            _logger.warning(f"{said}: without effect and dropped, since {why}")
        for field in fields:
            final[field] = splits.UNSPLIT_ONLY[field][0]

    def _drop_what_only_ours_read(self, final: dict[str, Any]) -> None:
        """RecBole's models train as RecBole does: what they would pass over must not stand in their report."""
        if registry.is_ours(self.model):
            return
        for field, plain in (("seen_items", "kept"), ("event_time", None)):
            if final.get(field, plain) not in (plain, None):
                _logger.warning(f"{field}: {self.model} is RecBole's and does not read it; {final[field]!r} is dropped")
                final[field] = plain

    def known_keys(self) -> set[str]:
        """All keys that mean something for this model and data set."""
        listed = {key for keys in self.parameters.values() for key in keys}
        return listed | set(self.internal_config_dict) | EXTRA_KEYS

    def _warn_of_unknown_keys(self) -> None:
        known = self.known_keys()
        for key in self.external_config_dict:
            if key not in known:
                close = nearest_names(key, known, limit=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                _logger.warning(f"config: unknown key {key!r} = {self.external_config_dict[key]!r}{hint}")


class _OneValueAKey:
    """A yaml loader for settings: keys are names, each there once; yaml itself would take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        again = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if again is not None:
            problem = f"{again!r} is there twice; keep one"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        unnamed = next((key for key in found if not isinstance(key, str)), None)
        if unnamed is not None:
            problem = f"{unnamed!r} is no name of a setting"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return found


@contextmanager
def overridden(config: RecBoleConfig, **settings: Any) -> Iterator[RecBoleConfig]:
    """``config`` with other ``settings`` inside the block. Not a copy: RecBole's transforms leave keys in it."""
    final = config.final_config_dict
    before = {key: final[key] for key in settings}
    final.update(settings)
    try:
        yield config
    finally:
        final.update(before)


def resolve_config_file(name: str | os.PathLike[str]) -> Path:
    """A config file by its path, or one of this package's presets by its name.

    Raises:
        ConfigError: neither exists; the nearest presets are offered.
    """
    path, presets = Path(name), resources.presets()
    if path.is_file():
        return path
    if str(name) in presets:
        return presets[str(name)]
    raise ConfigError("config_files", str(name), f"no such file or preset; {nearest(path.stem, presets)}")


def _looks_like_a_time(column: str) -> bool:
    name = re.sub(r"[\W_]", "", column).lower()
    return name in TIME_NAMES or name.endswith("timestamp")


def literal(text: str) -> Any:
    """The value that a Python literal or a yaml boolean says; other text is itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None if text in ("~", "null") else text
