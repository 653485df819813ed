"""Every key of every yaml: what it may be is declared once; anything else is one line that names it."""

from __future__ import annotations

import math
import os
import random
import re
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_holo.bridge import registry, resources, settings
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.data.order import TIES, TIME_PRECISIONS
from recbole_holo.errors import ConfigError, DataError, NonFiniteLoss
from recbole_holo.layers import attributes, event_time, holographic, init
from recbole_holo.losses import negatives
from recbole_holo.model import base, items, recmamba, sequence_sasrec, state_space
from recbole_holo.ops.circular_convolution import SCALES
from recbole_holo.ops.linear_attention import KEY_NORMS
from recbole_holo.quick_start import prepare
from recbole_holo.training import schedule

EVERY = {**settings.SETTINGS, **settings.MODEL_SETTINGS}
BAD: list[Any] = [
    "wrong",
    "",
    "a\0b",
    -1,
    0,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    10**30,
    1e300,
    None,
    True,
    [],
    [1],
    ["a", 2],
]
BAD += [[math.nan], {}, {"a": 1}, {1: 2}, {"a": [1]}, [[]], b"x", "x" * 5000, ("a",), 1j]


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> ConfigError | DataError | NonFiniteLoss | None:
    """What a call is refused with, in one line; None where it is not."""
    try:
        call(*args, **kwargs)
    except (ConfigError, DataError, NonFiniteLoss) as error:
        return error
    return None


TRIED = int(os.environ.get("FUZZ_CASES", "60"))


def yamls() -> dict[str, dict[str, Any]]:
    """Settings of every yaml file, this package's and RecBole's common ones."""
    ours = [resources.properties("overall.yaml"), *resources.presets().values()]
    ours += sorted(resources.folder("dataset_configs").glob("*.yaml"))
    theirs = [Path(str(files("recbole") / "properties" / name)) for name in ("overall.yaml", "dataset/sample.yaml")]
    loader = Config("RecMamba", "ml-100k").yaml_loader
    return {str(path): yaml.load(path.read_text("utf-8"), Loader=loader) for path in [*ours, *theirs]}


def test_every_key_of_every_yaml_is_declared_and_its_value_allowed() -> None:
    for path, own in yamls().items():
        assert own.keys() <= EVERY.keys(), path
        settings.check(own, {}, ours=True, sequential=False)
    for path in resources.folder("properties").glob("search/*.yaml"):
        for name, options in yaml.safe_load(path.read_text())["choice"].items():
            for option in options:
                EVERY[name].check(name, option)


@pytest.mark.parametrize("field", sorted(EVERY))
def test_any_value_is_allowed_or_refused_in_one_line(field: str) -> None:
    """Wrong types, negative numbers, nan, lists and huge values ended in tracebacks out of RecBole, torch and pandas,
    or were taken: nan was no number below any limit, and False for rm_dup_inter dropped every item met twice."""
    found = [refusal(settings.check, {field: value}, {}, ours=True, sequential=False) for value in BAD]
    refused = [error for error in found if error is not None]
    assert len(refused) >= 10
    for error in refused:
        assert isinstance(error, ConfigError)
        assert field in error.field
        assert error.remedy
        assert "\n" not in str(error)
        assert len(str(error)) < 600


def test_values_that_are_allowed_work(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """What passes the declaration builds a data set, loaders, a model and its trainer, or one line says why not.

    All of them: ``FUZZ_CASES=100000``.
    """
    base_settings = {**tiny, "item_attributes": ["genre"], "load_col": None}
    cases = []
    for field, setting in EVERY.items():
        if setting.part == "run" or field in ("dataset", "data_path", "wandb_project"):
            continue
        names = [name for name in setting.names if name not in ("user_defined",)]
        cases += [(field, value) for value in [*BAD, *names, False, 1, 2, 3, 1e-30, "[5,inf)"] if setting.fits(value)]
    random.Random(0).shuffle(cases)
    for field, value in cases[:TRIED]:
        for model in ("HoloMambaRec", "SequenceSASRec") if len(cases) < TRIED else ("HoloMambaRec",):
            error = refusal(ran, model, cyclic_dataset, {**base_settings, field: value}, len(cases) < TRIED)
            assert error is None or "\n" not in str(error), (model, field, value)


def ran(model: str, name: str, given: dict[str, Any], trains: bool) -> None:
    try:
        trainer, train, valid, _ = prepare(Config(model, name, config_dict=given))
        if trains:
            trainer.fit(train, valid, saved=False, show_progress=False, verbose=False)
    except (ConfigError, DataError, NonFiniteLoss):
        raise
    except Exception as error:
        raise AssertionError(f"{model}, {given}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rm_dup_inter": False}, "rm_dup_inter: False cannot be used: .*first, last, or ~ for keeping all"),
        ({"dropout_prob": math.nan}, "dropout_prob: nan .*a number from 0 up to, not including, 1"),
        ({"learning_rate": math.inf}, "learning_rate: inf .*a number above 0"),
        ({"learner": "adm"}, "learner: 'adm'.*did you mean adam"),
        (
            {"user_inter_num_interval": "[5,inf"},
            r"user_inter_num_interval: '\[5,inf'.*an interval, such as '\[5,inf\)'",
        ),
        ({"user_inter_num_interval": 5}, "user_inter_num_interval: 5"),
        ({"eval_args": {"split": {"RS": [0.8, 0.2]}}}, "eval_args: split: .*give RS the parts"),
        ({"eval_args": {"split": {"LO": "valid_and_test"}}}, "eval_args"),
        ({"eval_args": {"splt": {"LS": "valid_and_test"}}}, "eval_args"),
        ({"eval_args": {"split": {"LS": "valid_and_test"}, "order": "RO"}}, "eval_args: order: .RO.*use TO"),
        ({"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni"}}, "eval_args.*uni100"),
        ({"metrics": ["NDCG", "AUC"]}, "metrics: .*use one kind"),
        ({"metrics": ["AUC"], "valid_metric": "AUC"}, "metrics: .*mode: labeled"),
        ({"repeatable": False}, "repeatable: False.*use True"),
        ({"TIME_FIELD": None}, "TIME_FIELD: None.*a column"),
        (
            {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
            "train_neg_sample_args.*draws no neg",
        ),
        ({"benchmark_filename": ["train", "test"]}, r"benchmark_filename: .*\[train, valid, test\]"),
        ({"state": 5}, "state: 5"),
        ({"data_path": 7}, "data_path: 7"),
        ({"topk": [10, 2.5]}, r"topk: \[10, 2.5\]"),
        ({"item_attributes": "genre"}, "item_attributes: 'genre'.*a list"),
        ({"clip_grad_norm": {"max": 5}}, "clip_grad_norm: .*max_norm: 5.0"),
        ({"hidden_size": "[64]" * 100}, r"hidden_size: .{0,140}…"),
    ],
)
def test_the_line_says_what_to_use(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config("SASRec" if "train_neg_sample_args" in given else "RecMamba", "ml-100k", config_dict=given)


def test_recboles_models_keys_are_of_their_defaults_kind() -> None:
    for given in ({"n_layers": "two"}, {"hidden_act": 3}, {"attn_dropout_prob": [0.1]}, {"hidden_size": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(given))):
            Config("SASRec", "ml-100k", config_dict=given)
    assert Config("SASRec", "ml-100k", config_dict={"hidden_act": "swish", "n_layers": 3})["n_layers"] == 3
    for model in (*registry.MODELS, *sorted(registry.recbole_models())[::4]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = refusal(Config, model, "ml-100k")
        assert error is None or re.search("is not installed|use TO", str(error)), model


def test_declared_names_are_those_that_the_code_knows() -> None:
    known = {
        "ties": TIES,
        "time_precision": TIME_PRECISIONS,
        "similarity": base.SIMILARITIES,
        "seen_items": base.SEEN_ITEMS,
        "cold_items": items.COLD_ITEMS,
        "negative_distribution": negatives.DISTRIBUTIONS,
        "binding": holographic.FORMS,
        "binding_algebra": holographic.ALGEBRAS,
        "attribute_floats": holographic.FLOATS,
        "binding_scale": SCALES,
        "attribute_values": attributes.ATTRIBUTE_VALUES,
        "event_time_form": event_time.FORMS,
        "bundle_schedule": state_space.SCHEDULES,
        "ssm_init": init.SSM_INITS,
        "lr_scheduler": schedule.KINDS,
        "key_norm": KEY_NORMS,
        "position_embedding": recmamba.POSITIONS,
        "embedding_init": recmamba.EMBEDDING_INITS,
        "norm": recmamba.NORMS,
        "hidden_act": (*sequence_sasrec.ACTIVATIONS, "swiglu"),
    }
    for field, names in known.items():
        assert set(EVERY[field].names) == set(names), field


def test_the_documentation_has_the_declaration() -> None:
    page = resources.PACKAGE.parent / "docs" / "allowed-values.md"
    assert settings.table() in page.read_text("utf-8"), "python -m recbole_holo.bridge.settings"


# ---------------------------------------------------------------------- yaml files
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"epochs: 3\nepochs: 4\n", "'epochs' is there twice"),
        (b"5: 3\n", "5 is no name of a setting"),
        (b"# caf\xe9\nepochs: 3\n", r"byte 0xe9 in line 1 is no UTF-8"),
        (b"epochs: 3\0\n", "not well-formed yaml"),
        (b"seed: 2020-99-99\n", "not well-formed yaml"),
        (b"epochs: " + b"[" * 5000, "not well-formed yaml"),
        (b"a: &a [*a]\n? [1]\n: 2\n", "not well-formed yaml"),
        (b"epochs: !!python/object/apply:os.system [ls]\n", "not well-formed yaml"),
        (b"\tepochs: 3\n", "not well-formed yaml"),
        (b"seed: 2020-01-01\n", "seed: datetime.date.*whole number"),
        (b"epochs: 1:30\nepochs_: 1\n", None),
        (b"\xef\xbb\xbfepochs: 3\r\nseed: 5\r\n", None),
    ],
)
def test_yaml_files_that_cannot_be_read_are_one_line(text: bytes, message: str | None, tmp_path: Path) -> None:
    """A key that is there twice took its last value silently; bytes and dates ended in tracebacks."""
    path = tmp_path / "own.yaml"
    path.write_bytes(text)
    if message is None:
        assert Config("RecMamba", "ml-100k", [path])["epochs"] in (3, 90)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        Config("RecMamba", "ml-100k", [path])
    assert "\n" not in str(caught.value)


def test_random_yaml_is_read_or_one_line(tmp_path: Path, cyclic_dataset: str) -> None:
    path, texts = tmp_path / "own.yaml", [Path(name).read_bytes() for name in yamls()]
    for seed in range(TRIED):
        draw = random.Random(seed)
        raw = draw.choice(texts)
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.randrange(len(raw) + 1)
            piece = draw.choice(
                [b":", b"\t", b"[", b"{", b"'", b'"', b"\0", b"\xe9", b"&", b"*", b"!!", b"- ", b"\n", b"%", b"~"]
            )
            raw = draw.choice(
                [raw[:at] + piece + raw[at:], raw[:at], raw[:at] + raw[at + 1 :], raw[:at] + piece + raw[at + 1 :]]
            )
        path.write_bytes(raw)
        error = refusal(built, cyclic_dataset, path)
        assert error is None or "\n" not in str(error), seed


def built(name: str, path: Path) -> None:
    top = {"state": "ERROR", "topk": [2], "valid_metric": "NDCG@2", "metrics": ["NDCG"]}
    try:
        config = Config("HoloMambaRec", name, [path], top)
        data_preparation(config, create_dataset(config))
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {path.read_bytes()!r}") from error
