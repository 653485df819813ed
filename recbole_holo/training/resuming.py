"""What becomes of each setting when a run goes on from a checkpoint that was made with another value of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from recbole_holo.bridge.checkpoint import plain
from recbole_holo.errors import ConfigError

Effect = Literal["obeyed", "best anew", "refused"]


@dataclass(frozen=True)
class Rule:
    """Settings that are treated alike, and why."""

    effect: Effect
    why: str
    words: str  # the settings, separated by white space

    @property
    def keys(self) -> list[str]:
        return self.words.split()


RULES = (
    Rule(
        "obeyed",
        "the steps to come are taken with it; moments and step counts of the optimizer stay",
        """learning_rate weight_decay adam_betas lr_scheduler warmup_ratio lr_final_ratio clip_grad_norm enable_amp
        enable_scaler train_batch_size train_batch_tokens train_steps_at_once shuffle shuffle_ties pad_to""",
    ),
    Rule(
        "obeyed",
        "`epochs` is the number of all epochs; a schedule goes over all of them, so the rate may jump, with a warning",
        "epochs eval_step stopping_step",
    ),
    Rule(
        "obeyed",
        "the average goes on with it, begins with it, or ends",
        "ema_decay",
    ),
    Rule(
        "obeyed",
        "targets, and what they are compared with in the loss, from the next epoch on",
        """train_on train_windows window_stride train_neg_sample_args loss_type seen_items num_negatives
        negative_distribution popularity_exponent logq_correction gbce_t bundle_schedule reg_weight require_pow""",
    ),
    Rule(
        "obeyed",
        "dropout of the steps to come",
        """dropout_prob hidden_dropout_prob attn_dropout_prob layer_dropout_prob""",
    ),
    Rule(
        "obeyed",
        "where and how it runs, what it prints and keeps; the checkpoint stays the file that was resumed",
        """gpu_id use_gpu worker state encoding reproducibility data_path checkpoint_dir show_progress save_dataset
        dataset_save_path save_dataloaders dataloaders_save_path log_wandb wandb_project backend cuda_graphs
        eval_batch_size eval_max_elements loss_decimal_place trust_checkpoint field_separator seq_separator""",
    ),
    Rule(
        "best anew",
        "the score of the best epoch so far is another's: of the saved results, or evaluated again before training",
        """valid_metric valid_metric_bigger metrics topk eval_args.mode repeatable exclude_last metric_decimal_place
        MAX_ITEM_LIST_LENGTH bundle_inference""",
    ),
    Rule(
        "refused",
        "it decides which events are targets of training, and which of validation and test: what was trained on would "
        "be tested on",
        """dataset eval_args.split eval_args.order eval_args.group_by ties time_precision rm_dup_inter val_interval
        filter_inter_by_user_or_item user_inter_num_interval item_inter_num_interval keep_unseen_items
        benchmark_filename USER_ID_FIELD ITEM_ID_FIELD TIME_FIELD threshold LABEL_FIELD entity_kg_num_interval
        relation_kg_num_interval""",
    ),
    Rule(
        "refused",
        "a run goes on from the random states of its checkpoint, and splits, ties and candidates are drawn by it",
        "seed",
    ),
    Rule(
        "refused",
        "the optimizer's state is another's",
        "learner sparse_embedding",
    ),
    Rule(
        "refused",
        "it decides what the model reads",
        """load_col unload_col unused_col additional_feat_suffix numerical_features seq_len RATING_FIELD NEG_PREFIX
        ITEM_LIST_LENGTH_FIELD LIST_SUFFIX POSITION_FIELD HEAD_ENTITY_ID_FIELD TAIL_ENTITY_ID_FIELD RELATION_ID_FIELD
        ENTITY_ID_FIELD kg_reverse_r alias_of_user_id alias_of_item_id alias_of_entity_id alias_of_relation_id
        preload_weight normalize_field normalize_all discretization transform item_attributes attribute_buckets
        attribute_shuffle attribute_values attribute_floats event_time event_time_form event_time_buckets""",
    ),
    Rule(
        "refused",
        "it is part of the model, or what its weights started from",
        """model hidden_size binding binding_algebra binding_scale binding_alpha bind_output cold_items attribute_range
        attribute_size bundle_size bundle_recent ssm_init similarity temperature learn_temperature item_bias""",
    ),
)
BY_KEY = {key: rule for rule in RULES for key in rule.keys}
OTHERS = Rule("refused", "all other settings of a model: they are part of it", "")
EVAL_ARGS: dict[str, Any] = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"}


def rule_of(key: str) -> Rule:
    """What becomes of a setting; ``eval_args`` counts by its parts, ``eval_args.split``."""
    return BY_KEY.get(key, OTHERS)


def parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with ``eval_args`` taken apart."""
    found = {key: plain(value) for key, value in given.items() if key != "eval_args"}
    eval_args = given.get("eval_args")
    if isinstance(eval_args, Mapping):
        found |= {f"eval_args.{key}": plain(value) for key, value in {**EVAL_ARGS, **eval_args}.items()}
        mode = found["eval_args.mode"]
        if isinstance(mode, dict):  # as RecBole completes it
            first = mode.get("valid", mode.get("test", "full"))
            mode = {"valid": mode.get("valid", first), "test": mode.get("test", first)}
        else:
            mode = {"valid": mode, "test": mode}
        found["eval_args.mode"] = mode
    return found


def check(saved: Mapping[str, Any], given: Mapping[str, Any], known: frozenset[str] | set[str], path: str) -> None:
    """That a run with the settings ``given`` may go on from a checkpoint.

    Args:
        saved: what the checkpoint says of its configuration: model, dataset, given.
        known: keys that mean something for the model.

    Raises:
        ConfigError: a setting that differs and cannot be obeyed; it is named, with both values, the others after it.
    """
    for key in ("model", "dataset"):
        if saved[key] != given[key]:
            raise ConfigError("resume", path, f"it is a checkpoint of {key} {saved[key]!r}, not {given[key]!r}")
    then, now = parts(saved.get("given", {})), parts(given)
    differing = [
        key
        for key in now
        if key in then and key.split(".")[0] in known and rule_of(key).effect == "refused" and then[key] != now[key]
    ]
    if not differing:
        return
    first, *others = sorted(differing, key=lambda key: key == "load_col")  # which follows from others
    also = "".join(f"; likewise {key}: {then[key]!r}, now {now[key]!r}" for key in others)
    raise ConfigError(
        first,
        now[first],
        f"the run in {path!r} has {then[first]!r}: {rule_of(first).why}. Resume with that, or start a new run{also}",
    )


def selection(config: Any, valid_data: Any) -> dict[str, Any]:
    """All that the score of an epoch depends on, but for the metric's name."""
    now = parts(config.final_config_dict)
    keys = [key for rule in RULES if rule.effect == "best anew" for key in rule.keys]
    by_name = ("valid_metric", "valid_metric_bigger", "metrics", "topk")  # a saved result may have the other, too
    found = {key: now.get(key) for key in keys if key not in by_name}
    return found | {"data": None if valid_data is None else fingerprint(valid_data._dataset)}


def fingerprint(dataset: Any) -> str:
    """Of the users, items and targets of a split, in the numbers they have."""
    digest = blake2b(digest_size=16)
    events, rows = getattr(dataset, "_events", None), dataset.inter_feat
    fields = (dataset.uid_field, dataset.iid_field)
    columns = [] if events is None else [events[field] for field in fields]
    columns += [rows[field] for field in sorted(rows.interaction) if not rows[field].is_floating_point()]
    if getattr(dataset, "following", None) is not None:  # windows are a setting
        columns = [*columns[:2], dataset.following]
    for column in columns:
        digest.update(column.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def table() -> str:
    """The rules as a table for people."""
    lines = ["| settings | another value | why |", "|---|---|---|"]
    for rule in (*RULES, OTHERS):
        keys = ", ".join(f"`{key}`" for key in rule.keys) or "those of `properties/model/<Model>.yaml`"
        lines.append(f"| {keys} | {rule.effect} | {rule.why} |")
    return "\n".join(lines)
