"""What every setting may be: one declaration, by which configurations are checked before work starts.

``python -m recbole_holo.bridge.settings`` prints it as the table of docs/allowed-values.md. What depends on several
settings at once, on the model or on the data is checked where it is used.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recbole_holo.data.order import TIES, TIME_PRECISIONS
from recbole_holo.errors import ConfigError, nearest
from recbole_holo.ops.backend import BACKENDS

MANY = 2**31 - 1  # what counts and sizes of batches may be: they meet 32-bit numbers in libraries
WIDE = 2**16  # what widths may be
LONG = 2**20  # what lengths of histories may be
SEED = 2**32 - 3  # numpy's largest seed, with room for the phases'


@dataclass(frozen=True)
class Setting:
    """What a setting may be.

    Args:
        words: after "use": a whole number of at least 1.
        fits: whether a value is that.
        names: of which it must be one, where only names are allowed, so that an error can offer the nearest.
        part: what follows from it. ``data``: the events, splits and attributes; ``loading``: the batches made of them;
            ``model``; ``training``; ``run``: nothing of these, only where and how the program runs.
    """

    words: str
    fits: Callable[[Any], bool]
    names: tuple[str, ...] = ()
    part: str = "data"

    def check(self, field: str, value: Any) -> None:
        """
        Raises:
            ConfigError: another value.
        """
        if not self.fits(value):
            offer = nearest(value, self.names) if self.names else f"use {self.words}"
            none = f", or {self.words.split(', or ')[-1]}" if self.names and ", or ~" in self.words else ""
            raise ConfigError(field, _short(value), offer + none)


def _short(value: Any, most: int = 80) -> Any:
    """A value as an error shows it."""
    text = repr(value)
    return value if len(text) <= most else f"{text[:most]}…"


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of values


def whole(least: int = 1, most: int = MANY) -> Setting:
    """A whole number; True and 2.0 are none."""
    limits = f"of at least {least}" if most in (MANY, LONG, WIDE, SEED) else f"from {least} to {most}"
    above = "" if most in (MANY, SEED) or "from" in limits else f", {most} at most"
    return Setting(f"a whole number {limits}{above}", lambda value: type(value) is int and least <= value <= most)


def number(least: float = -math.inf, most: float = math.inf, *, above: bool = False, below: bool = False) -> Setting:
    """A finite number from ``least`` to ``most``, themselves only without ``above`` and ``below``."""

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        inside = (least < value if above else least <= value) and (value < most if below else value <= most)
        return inside and -1e38 < value < 1e38  # of float32

    if most < math.inf:
        low = f"above {least:g} up to" if above else f"from {least:g} up to"
        return Setting(f"a number {low}{', not including,' if below else ''} {most:g}", fits)
    low = "" if least == -math.inf else f" above {least:g}" if above else f" of at least {least:g}"
    return Setting(f"a number{low}", fits)


def choice(*names: str, any_case: bool = False) -> Setting:
    """One of ``names``."""

    def fits(value: Any) -> bool:
        return isinstance(value, str) and (value.lower() if any_case else value) in names

    return Setting(" | ".join(names), fits, names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


FLAG = Setting("True or False", lambda value: isinstance(value, bool))
NAME = Setting("a name", _is_text)
PATH = Setting("a path", lambda value: _is_text(os.fspath(value) if isinstance(value, os.PathLike) else value))
ANY = Setting("anything", lambda value: True)


def or_none(setting: Setting, meaning: str = "") -> Setting:
    """``setting``, or None, written ~."""
    words = f"{setting.words}, or ~{f' for {meaning}' if meaning else ''}"
    return replace(setting, words=words, fits=lambda value: value is None or setting.fits(value))


def either(*settings: Setting) -> Setting:
    """What one of several allows."""
    words = ", or ".join(setting.words for setting in settings)
    return Setting(words, lambda value: any(setting.fits(value) for setting in settings))


def a_list(of: Setting, such_as: str, least: int = 0, most: int = MANY) -> Setting:
    """A list of values that ``of`` allows."""
    length = f" of {least}" if least == most else " of at least one" if least == 1 else ""
    return Setting(
        f"a list{length}, such as {such_as}",
        lambda value: isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(of.fits, value)),
    )


def a_map(keys: Setting, values: Setting, such_as: str, most: int = MANY) -> Setting:
    """``key: value`` pairs, at least one."""
    return Setting(
        f"a map, such as {such_as}",
        lambda value: (
            isinstance(value, Mapping)
            and 1 <= len(value) <= most
            and all(keys.fits(key) and values.fits(own) for key, own in value.items())
        ),
    )


def fields(such_as: str, required: Iterable[str] = (), **settings: Setting) -> Setting:
    """A map of these names only, with ``required`` among them."""
    return Setting(
        f"a map, such as {such_as}",
        lambda value: (
            isinstance(value, Mapping)
            and set(required) <= set(value)
            and all(key in settings and settings[key].fits(own) for key, own in value.items())
        ),
    )


def _is_interval(text: Any) -> bool:
    """``[5,inf)``, several with ``;`` between."""
    if not isinstance(text, str):
        return False
    for one in text.split(";"):
        found = re.fullmatch(r"\s*[\[(]([^,]+),([^,]+)[\])]\s*", one)
        try:
            if not found or not float(found[1]) <= float(found[2]):
                return False
        except ValueError:
            return False
    return True


def _is_separator(value: Any) -> bool:
    # RecBole's pandas takes several characters for a regular expression, RecBole's header does not.
    text = isinstance(value, str) and value != "" and value != ":" and not re.search(r'["\n\r\0]', value)
    return text and (len(value) == 1 or re.escape(value) == value)


INTERVAL = Setting("an interval, such as '[5,inf)'", _is_interval)
NAMES = a_list(NAME, "[genre, tag]")
COLUMNS = a_map(NAME, either(a_list(NAME, "[user_id]"), choice("*")), "{inter: [user_id, item_id, timestamp]}")
SEVERAL_COLUMNS = a_map(NAME, a_list(NAME, "[age]"), "{user: [age]}")
MODE = Setting(
    "full | labeled | uni100 | pop100",
    lambda value: isinstance(value, str) and re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d{0,6}", value) is not None,
)
MODES = either(MODE, fields("{valid: uni100, test: full}", valid=MODE, test=MODE))
EVAL_ARGS = Setting(  # the rest of it is checked where it is used, recbole_holo/data/splits.py
    "a map, such as {split: {LS: valid_and_test}, order: TO, group_by: user, mode: full} (mode also labeled | uni100 | "
    "pop100)",
    lambda value: isinstance(value, Mapping) and MODES.fits(value.get("mode", "full")),
)
NEGATIVES = fields(
    "{distribution: uniform, sample_num: 1}",
    distribution=or_none(choice("uniform", "popularity", "none", "None")),
    sample_num=either(whole(1, 10_000), choice("none")),
    alpha=either(number(0, 100), choice("none")),
    dynamic=FLAG,
    candidate_num=whole(0, 10_000),
)
LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")
STATES = ("debug", "info", "warning", "error", "critical")
# RecBole's transforms of batches, and the setting that each needs besides.
TRANSFORMS = {
    "mask_itemseq": "mask_ratio",
    "inverse_itemseq": None,
    "crop_itemseq": "eta",
    "reorder_itemseq": "beta",
    "user_defined": None,
}


# ---------------------------------------------------------------------------------------------------------------------
# The settings


def _of(part: str, **settings: Setting) -> dict[str, Setting]:
    return {field: replace(setting, part=part) for field, setting in settings.items()}


# Keys that all models have: RecBole's and those of properties/overall.yaml.
SETTINGS: dict[str, Setting] = {
    **_of(
        "run",
        gpu_id=either(
            Setting("a string such as '0,1'", lambda v: isinstance(v, str)),
            whole(0, 1023),
            a_list(whole(0, 1023), "[0, 1]"),
        ),
        use_gpu=FLAG,
        worker=whole(0, 1024),
        state=or_none(choice(*STATES, any_case=True), "info"),
        checkpoint_dir=PATH,
        show_progress=FLAG,
        save_dataset=FLAG,
        dataset_save_path=or_none(PATH),
        save_dataloaders=FLAG,
        dataloaders_save_path=or_none(PATH),
        log_wandb=FLAG,
        wandb_project=or_none(NAME),
        loss_decimal_place=whole(0, 100),
        metric_decimal_place=whole(0, 100),
        backend=choice(*BACKENDS),
        cuda_graphs=either(FLAG, choice("auto")),
        trust_checkpoint=FLAG,
        resume=or_none(PATH, "a new run"),
        local_rank=whole(0),
        world_size=whole(-1),
        nproc=whole(1),
        offset=whole(0),
        ip=NAME,
        port=either(whole(1, 65535), Setting("digits", lambda v: isinstance(v, str) and v.isdecimal())),
    ),
    **_of(
        "training",
        reproducibility=FLAG,
        epochs=whole(0),
        learner=choice(*LEARNERS, any_case=True),
        learning_rate=number(0, above=True),
        eval_step=whole(0),
        stopping_step=whole(0),
        clip_grad_norm=or_none(
            fields(
                "{max_norm: 5.0}",
                ["max_norm"],
                max_norm=number(0, above=True),
                norm_type=number(0, above=True),
                error_if_nonfinite=FLAG,
                foreach=or_none(FLAG),
            ),
            "gradients as they are",
        ),
        weight_decay=number(0),
        require_pow=FLAG,
        enable_amp=FLAG,
        enable_scaler=FLAG,
        adam_betas=or_none(a_list(number(0, 1, below=True), "[0.9, 0.999]", least=2, most=2), "PyTorch's"),
        lr_scheduler=or_none(choice("linear", "cosine", "onecycle"), "a constant rate"),
        warmup_ratio=number(0, 1, below=True),
        lr_final_ratio=number(0, 1),
        ema_decay=or_none(number(0, 1, below=True), "no average"),
        train_steps_at_once=or_none(whole(1), "whole histories"),
        bundle_schedule=choice("constant", "grow", "mixed"),
    ),
    **_of(
        "loading",
        shuffle=FLAG,
        train_batch_size=whole(1),
        eval_batch_size=whole(1),
        train_batch_tokens=or_none(whole(1), "train_batch_size windows"),
        eval_max_elements=or_none(whole(1, 2**62), "no limit"),
        train_neg_sample_args=or_none(either(NEGATIVES, choice("None")), "none"),
        transform=or_none(choice(*TRANSFORMS)),
        metrics=either(NAME, a_list(NAME, "[Hit, NDCG]", least=1)),
        topk=either(whole(1), a_list(whole(1), "[10, 20]", least=1)),
        valid_metric=NAME,
        valid_metric_bigger=FLAG,
        exclude_last=or_none(whole(1), "the whole history"),
        pad_to=choice("batch", "max"),
    ),
    **_of(
        "data",
        dataset=NAME,
        data_path=PATH,
        encoding=or_none(NAME, "UTF-8"),
        seed=whole(0, SEED),
        eval_args=EVAL_ARGS,
        repeatable=FLAG,
        field_separator=Setting(
            "the character between columns itself, or several that are no regular expression, such as ::", _is_separator
        ),
        seq_separator=Setting("the characters between values", lambda v: isinstance(v, str) and v != ""),
        USER_ID_FIELD=or_none(NAME),
        ITEM_ID_FIELD=or_none(NAME),
        RATING_FIELD=or_none(NAME),
        TIME_FIELD=or_none(NAME),
        LABEL_FIELD=or_none(NAME),
        seq_len=or_none(a_map(NAME, whole(1, LONG), "{title: 10}"), "no limit"),
        threshold=or_none(a_map(NAME, number(), "{rating: 3}", most=1)),
        NEG_PREFIX=NAME,
        numerical_features=NAMES,
        load_col=or_none(COLUMNS, "all columns"),
        unload_col=or_none(SEVERAL_COLUMNS),
        unused_col=or_none(SEVERAL_COLUMNS),
        additional_feat_suffix=or_none(either(NAME, NAMES)),
        rm_dup_inter=or_none(choice("first", "last"), "keeping all"),
        val_interval=or_none(a_map(NAME, either(INTERVAL, a_list(ANY, "[1]", least=1)), "{rating: '[3,inf)'}")),
        filter_inter_by_user_or_item=FLAG,
        user_inter_num_interval=or_none(INTERVAL),
        item_inter_num_interval=or_none(INTERVAL),
        alias_of_user_id=or_none(NAMES),
        alias_of_item_id=or_none(NAMES),
        alias_of_entity_id=or_none(NAMES),
        alias_of_relation_id=or_none(NAMES),
        preload_weight=or_none(a_map(NAME, NAME, "{ent_id: ent_emb}")),
        normalize_field=or_none(NAMES),
        normalize_all=or_none(FLAG),
        discretization=or_none(
            a_map(
                NAME,
                fields("{method: ED, bucket: 8}", ["method"], method=choice("ED", "LD"), bucket=whole(1, 1_000_000)),
                "{price: {method: ED, bucket: 8}}",
            )
        ),
        ITEM_LIST_LENGTH_FIELD=NAME,
        LIST_SUFFIX=NAME,
        MAX_ITEM_LIST_LENGTH=whole(1, LONG),
        POSITION_FIELD=NAME,
        HEAD_ENTITY_ID_FIELD=or_none(NAME),
        TAIL_ENTITY_ID_FIELD=or_none(NAME),
        RELATION_ID_FIELD=or_none(NAME),
        ENTITY_ID_FIELD=or_none(NAME),
        kg_reverse_r=FLAG,
        entity_kg_num_interval=or_none(INTERVAL),
        relation_kg_num_interval=or_none(INTERVAL),
        benchmark_filename=or_none(a_list(NAME, "[train, valid, test]", least=3, most=3)),
        ties=choice(*TIES),
        time_precision=choice(*TIME_PRECISIONS),
        shuffle_ties=FLAG,
        train_on=choice("sequences", "prefixes"),
        train_windows=choice("all", "last"),
        window_stride=or_none(whole(1), "half of MAX_ITEM_LIST_LENGTH"),
        item_attributes=or_none(NAMES, "none"),
        keep_unseen_items=FLAG,
        attribute_buckets=whole(1, 1_000_000),
        attribute_shuffle=FLAG,
        event_time=or_none(choice("gap", "request")),
        event_time_buckets=whole(3, 1_000_000),
        bundle_size=or_none(whole(1, LONG), "1"),
        bundle_recent=or_none(whole(1), "a quarter of MAX_ITEM_LIST_LENGTH"),
    ),
    **_of(
        "model",
        binding=or_none(choice("item", "role", "both", "triple", "add", "concat"), "no attributes"),
        binding_algebra=choice("none", "unitary"),
        binding_scale=or_none(choice("none", "ortho")),
        binding_alpha=number(),
        bind_output=either(FLAG, choice("added")),
        cold_items=choice("train", "attributes"),
        attribute_values=choice("mean", "first"),
        attribute_floats=choice("quantile", "learned"),
        attribute_range=or_none(number(0, above=True)),
        attribute_size=or_none(whole(1, WIDE), "hidden_size"),
        event_time_form=choice("add", "role"),
        bundle_inference=or_none(whole(1, LONG), "bundle_size"),
        ssm_init=choice("official", "linear", "recbole", "xavier"),
        seen_items=choice("kept", "excluded"),
        similarity=choice("dot", "cosine"),
        temperature=number(0, above=True),
        learn_temperature=FLAG,
        item_bias=FLAG,
        num_negatives=whole(1, 2**24),
        gbce_t=number(0, 1),
        negative_distribution=choice("uniform", "popularity", "in_batch", "mixed"),
        popularity_exponent=number(0, 1),
        logq_correction=or_none(FLAG, "what the loss needs"),
        sparse_embedding=FLAG,
    ),
}

# Keys of this package's models, properties/model. RecBole's models have some of these names with another meaning.
MODEL_SETTINGS: dict[str, Setting] = _of(
    "model",
    hidden_size=whole(1, WIDE),
    num_layers=whole(1, 1024),
    n_layers=whole(1, 1024),
    n_heads=whole(1, WIDE),
    inner_size=or_none(whole(1, WIDE), "the model's own"),
    d_state=whole(1, 256),
    d_conv=whole(2, 4),
    expand=whole(1, 256),
    latent_heads=whole(1, WIDE),
    head_dim=or_none(whole(1, WIDE), "hidden_size / 4"),
    headdim=or_none(whole(1, WIDE), "up to 64"),
    chunk_size=whole(1, LONG),
    rope_base=number(0, above=True),
    dropout_prob=number(0, 1, below=True),
    hidden_dropout_prob=number(0, 1, below=True),
    attn_dropout_prob=number(0, 1, below=True),
    layer_dropout_prob=number(0, 1, below=True),
    layer_norm_eps=number(0, above=True),
    initializer_range=or_none(number(0, above=True), "embedding_init: xavier"),
    hidden_act=or_none(choice("gelu", "relu", "swish", "tanh", "sigmoid", "swiglu"), "gelu"),
    norm=choice("none", "pre", "post"),
    causal=FLAG,
    key_norm=choice("column", "position"),
    residual=FLAG,
    ffn=FLAG,
    position_embedding=choice("none", "learned"),
    scale_embedding=FLAG,
    embedding_init=choice("normal", "xavier"),
    final_norm=FLAG,
    tie_weights=FLAG,
    bundle_roles=whole(0, WIDE),
    loss_type=NAME,  # losses are registered: the model knows which there are
)
NEEDED_OF_SEQUENCES = ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")


def check(settings: Mapping[str, Any], defaults: Mapping[str, Any], ours: bool, sequential: bool) -> None:
    """Refuses a value that no use of its setting could read.

    Args:
        settings: what is to be checked; keys that are declared nowhere are let through.
        defaults: of the yaml files; keys of RecBole's models are of the same kind as theirs.
        ours: whether the model is one of this package.
        sequential: whether it is one of sequences.

    Raises:
        ConfigError: the first such value.
    """
    for field, value in settings.items():
        declared = SETTINGS.get(field) or (MODEL_SETTINGS.get(field) if ours else like(defaults.get(field)))
        if declared is not None:
            declared.check(field, value)
    for field in NEEDED_OF_SEQUENCES if sequential else ():
        if field in settings and settings[field] is None:
            raise ConfigError(field, None, "models of sequences need it: use the name of a column")
    if (settings.get("USER_ID_FIELD") is None) != (settings.get("ITEM_ID_FIELD") is None):
        raise ConfigError("USER_ID_FIELD, ITEM_ID_FIELD", None, "name both columns, or neither")
    if settings.get("normalize_field") and settings.get("normalize_all"):
        raise ConfigError("normalize_all", True, "normalize_field names some already: use one of the two")
    for name, how in (settings.get("discretization") or {}).items():
        if name not in settings.get("numerical_features", [name]):
            raise ConfigError("discretization", settings["discretization"], f"list {name!r} in numerical_features, too")
        if how["method"] == "ED" and "bucket" not in how:
            raise ConfigError("discretization", settings["discretization"], f"{name}: ED needs a number: bucket: 8")
    needed = TRANSFORMS.get(settings.get("transform"))
    if needed is not None and not number(0, 1, above=True).fits(settings.get(needed)):
        remedy = f"transform: {settings['transform']} needs a number above 0 up to 1"
        raise ConfigError(needed, settings.get(needed), remedy)
    both = set(settings.get("load_col") or ()) & set(settings.get("unload_col") or ())
    for suffix in sorted(both):
        if settings["load_col"][suffix] not in ("*", []):
            raise ConfigError("unload_col", settings["unload_col"], f"load_col names columns of {suffix}, too: use one")


def like(default: Any) -> Setting:
    """What a key of a RecBole model may be: of its default's kind, which is all that is known of it."""
    if isinstance(default, bool):
        return or_none(FLAG)
    if isinstance(default, (int, float)):
        return or_none(number())
    if isinstance(default, str):
        return or_none(Setting("text", lambda value: isinstance(value, str)))
    if isinstance(default, (list, tuple)):
        return or_none(Setting("a list", lambda value: isinstance(value, (list, tuple))))
    if isinstance(default, Mapping):
        return or_none(Setting("a map", lambda value: isinstance(value, Mapping)))
    return ANY


def table() -> str:
    """The declaration as a table of Markdown, in the order of names."""
    rows = [
        f"| `{field}` | {setting.words.replace('|', chr(92) + '|')} | {setting.part} |"
        for field, setting in sorted({**SETTINGS, **MODEL_SETTINGS}.items(), key=lambda pair: pair[0].lower())
    ]
    return "\n".join(["| setting | what it may be | part |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
