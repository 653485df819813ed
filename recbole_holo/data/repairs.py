"""RecBole's data pipeline without its silent faults, for every model that is run through this package."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import recbole.data.dataset
import torch
import yaml
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from recbole.utils.enum_type import FeatureSource, FeatureType
from recbole.utils.url import decide_download, download_url, extract_zip, rename_atomic_files

from recbole_holo.data import atomic_files, splits
from recbole_holo.data.order import OrderOfTime, are_numbers, id_ranks, tied_with_the_one_before, time_order
from recbole_holo.errors import ConfigError, DataError, nearest_names

REPAIRED = "_repaired"  # after the names of the classes of RecBole's that repaired() makes


class RepairedDataset(Dataset):
    """Mixed in before one of RecBole's data set classes. What it mends, and what happens without it:

    * **Time order.** RecBole turns timestamps into float32 before sorting; Unix seconds of today then have a grid of
      128 s, so that events less than two minutes apart keep the order of the file: histories are shuffled and the
      "last" item is not the last. Here rows are sorted first, by float64 time (``time_precision: float32`` rounds as
      RecBole does) and in ties as ``ties`` says; RecBole's later sorts are stable and change nothing. Sequences that
      are split in the order of time across users are in exact order across users, too, and splits at moments of time
      (:mod:`recbole_holo.data.splits`) are at exact ones.
    * **Repeated pairs.** With ``rm_dup_inter`` RecBole sorts by an unstable method before all else, so that ties are in
      no order at all; here all that is kept stays in the order of the file.
    * **Rows without an id.** Where some lack the user and some the item, RecBole drops other rows than these.
    * **Lists of benchmark files.** Their items are numbered as the item field's, likewise the lists of any other token
      field, without an alias; they are cut to the latest MAX_ITEM_LIST_LENGTH; the item field may have any name.
    * **Pad row.** The pad item (and user) gets the column mean as its float attributes; here it gets zero.
    * **Dropped interactions.** Loading a ``.item`` or ``.user`` file silently drops interactions whose item or user it
      lacks; here the number is reported.
    * **Missing values** of float attributes become the mean and look like data; here ``missing_values`` remembers them.
    * **Errors** for absent files, columns and empty results say which, and what to do. A download that fails leaves
      nothing behind, and a single process can finish one (RecBole waits for a process group that does not exist).

    Attributes:
        order_of_time: of the events, once it is built; None where they are in no order of time.
        tied: of sequences, which events have the time of the event before ``[n_events]``, bool.
    """

    inter_feat: Any
    _rest_fields: np.ndarray
    missing_values: dict[str, np.ndarray]
    order_of_time: OrderOfTime | None = None
    tied: torch.Tensor | None = None
    _times: np.ndarray  # of the rows, in the file's unit, float64
    _times_as_read: np.ndarray  # the same as RecBole would read them: normalized where that is asked for
    _row_times: np.ndarray  # of the rows that are split, in the precision that counts

    # ------------------------------------------------------------------ loading
    def _load_data(self, token: str, dataset_path: str) -> None:
        suffixes = [f".{name}" for name in self.config["benchmark_filename"] or []] or [""]
        for suffix in suffixes if os.path.isdir(dataset_path) else []:
            inter = os.path.join(dataset_path, f"{token}{suffix}.inter")
            if not os.path.isfile(inter):
                there = ", ".join(sorted(os.listdir(dataset_path))) or "nothing"
                raise DataError(f"dataset: {token!r} needs the file {inter}, which is not there (found: {there}).")
        self._file_of_column: dict[str, str] = {}
        super()._load_data(token, dataset_path)
        atomic_files.check_column_settings(self.config, self.field2type)
        for suffix, columns in (self.config["unused_col"] or {}).items():
            if getattr(self, f"{suffix}_feat", None) is None:
                raise ConfigError("unused_col", self.config["unused_col"], f"no file {token}.{suffix} was loaded")
            for field in (self.uid_field, self.iid_field, self.time_field):
                if field in columns:
                    raise ConfigError("unused_col", self.config["unused_col"], f"{field!r} is used: leave it out")
        if self.config["benchmark_filename"] is not None:
            self._check_rows_of_files()
            if self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
                self._cut_histories()

    def _check_rows_of_files(self) -> None:
        """RecBole filters no rows of benchmark files: one without an id would be one of the pad."""
        for field in filter(None, (self.uid_field, self.iid_field)):
            if field not in self.inter_feat:
                raise DataError(f"load_col: the benchmark files were loaded without the column {field!r}: list it.")
            self._refuse_rows(self.inter_feat[field].isna().to_numpy(), f"have no {field}")

    def _cut_histories(self) -> None:
        """Keeps the latest MAX_ITEM_LIST_LENGTH of the lists that benchmark files give."""
        lists, most = self._list_columns(), self.config["MAX_ITEM_LIST_LENGTH"]
        if self.iid_field not in lists:
            wanted = f"{self.iid_field}{self.config['LIST_SUFFIX']}"
            raise DataError(
                f"benchmark_filename: the files were loaded without a column {wanted!r}, the history of each row; add "
                f"it as {wanted}:token_seq, and to load_col."
            )
        for column in set(lists.values()) & set(self.config["seq_len"] or {}):
            remedy = f"it keeps the oldest events of {column}; leave it out, and say MAX_ITEM_LIST_LENGTH"
            raise ConfigError("seq_len", self.config["seq_len"], remedy)
        lengths = self.inter_feat[lists[self.iid_field]].map(len).to_numpy()
        self._refuse_rows(lengths == 0, f"have an empty {lists[self.iid_field]}")
        for column in lists.values():
            unequal = self.inter_feat[column].map(len).to_numpy() != lengths
            self._refuse_rows(unequal, f"have a {column} that is not as long as {lists[self.iid_field]}")
            self.inter_feat[column] = [values[-most:] for values in self.inter_feat[column]]
            self.field2seqlen[column] = min(self.field2seqlen[column], most)

    def _refuse_rows(self, refused: np.ndarray, what: str) -> None:
        if not refused.any():
            return
        ends = np.cumsum(self.file_size_list)
        row = int(refused.argmax())
        file = int(np.searchsorted(ends, row, side="right"))
        line = row - int(np.r_[0, ends][file]) + 2
        raise DataError(
            f"benchmark_filename: {refused.sum():,} rows {what}, the first in line {line} of "
            f"{self.dataset_name}.{self.config['benchmark_filename'][file]}.inter; take them out of the files."
        )

    def _list_columns(self) -> dict[str, str]:
        """The columns that were loaded with a list of their earlier values beside them, and that list's name."""
        lists = {field: f"{field}{self.config['LIST_SUFFIX']}" for field in self.inter_feat}
        sequences = (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ)
        return {field: column for field, column in lists.items() if self.field2type.get(column) in sequences}

    def _benchmark_presets(self) -> None:
        """RecBole's, whatever the item field's name."""
        lists = self._list_columns()
        for field, column in lists.items():
            setattr(self, f"{field}_list_field", column)
        length = self.config["ITEM_LIST_LENGTH_FIELD"]
        self.set_field_property(length, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.inter_feat[length] = self.inter_feat[lists[self.iid_field]].map(len)

    def _init_alias(self) -> None:
        """As RecBole's; a token column and the list of its earlier values are numbered alike."""
        super()._init_alias()
        for field, column in self._list_columns().items():
            if field in self._rest_fields and column in self._rest_fields:
                self.alias[field] = np.array([field, column])
                self._rest_fields = self._rest_fields[~np.isin(self._rest_fields, self.alias[field])]

    def _set_alias(self, alias_name: str, default_value: list[str | None]) -> None:
        lists = self._list_columns()
        others = [lists[field] for field in default_value if field in lists]
        super()._set_alias(alias_name, [*default_value, *others])

    def _download(self) -> None:
        if self.config["local_rank"] == 0:
            self._download_files()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()

    def _download_files(self) -> None:
        name, target = self.dataset_name, os.path.abspath(self.dataset_path)
        where = f"put {name}.inter (and, for attributes, {name}.item) into {target}/"
        url = self._get_download_url("url", allow_none=True)
        if url is None:
            known = yaml.safe_load(files("recbole").joinpath("properties/dataset/url.yaml").read_text("utf-8"))
            close = nearest_names(name, [*known, "ml-100k"])
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise DataError(f"dataset: {name!r} is not on disk, and RecBole knows no download of it; {hint}{where}")

        os.makedirs(os.path.dirname(target), exist_ok=True)
        half_done = tempfile.mkdtemp(prefix=f".{name}-", dir=os.path.dirname(target))
        try:
            if not decide_download(url):
                raise DataError(f"dataset: the download of {name!r} was declined; {where}")
            archive = download_url(url, half_done)
            extract_zip(archive, half_done)
            os.unlink(archive)
            rename_atomic_files(half_done, os.path.splitext(os.path.basename(archive))[0], name)
            os.rename(half_done, target)
        except OSError as error:  # URLError among them
            raise DataError(f"dataset: {name!r} could not be downloaded ({error}); {where}") from error
        finally:
            shutil.rmtree(half_done, ignore_errors=True)

    def _checked_header(self, filepath: str, source: FeatureSource | str) -> list[str]:
        """The columns of a file that was looked through before RecBole reads it; none of one that is not read."""
        wanted, unwanted = self._get_load_and_unload_col(source)
        form = atomic_files.Form.of(self.config)
        header = {} if wanted == set() else atomic_files.read_header(filepath, form)
        loaded = [name for name in header if (wanted is None or name in wanted) and name not in (unwanted or ())]
        if source is FeatureSource.INTERACTION:
            for field, what in ((self.uid_field, "USER_ID_FIELD"), (self.iid_field, "ITEM_ID_FIELD")):
                if field is not None and field not in loaded:
                    raise DataError(
                        f"{what}: {filepath} was loaded without a column {field!r} (loaded: "
                        f"{', '.join(loaded) or 'nothing'}); name the column, and list it in load_col."
                    )
        if not header:
            return []
        ids = {name for name in (self.uid_field, self.iid_field) if name in loaded}
        atomic_files.check_file(filepath, form, set(header) - set(loaded), ids, self.time_field or "")
        own = self._id_of(source)
        if own is not None and loaded and own not in loaded:
            raise DataError(f"load_col: {filepath} is of no use without its column of ids, {own!r}: load it, too")
        if source in (FeatureSource.INTERACTION, FeatureSource.USER, FeatureSource.ITEM):
            suffix = filepath.rpartition(".")[2]
            for name in set(loaded) - {own}:
                other = self._file_of_column.setdefault(name, suffix)
                if other != suffix:
                    raise DataError(
                        f"{filepath}: its column {name!r} is also one of {self.dataset_name}.{other}, and one would be "
                        "read in the place of the other; rename it, or leave one out with unload_col"
                    )
        return list(header)

    def _id_of(self, source: FeatureSource | str) -> str | None:
        """The column of ids of a file that describes users or items."""
        return {FeatureSource.USER: self.uid_field, FeatureSource.ITEM: self.iid_field}.get(source)

    def _load_feat(self, filepath: str, source: FeatureSource | str) -> pd.DataFrame | None:
        header = self._checked_header(filepath, source)
        feat = super()._load_feat(filepath, source)
        own = self._id_of(source)
        if feat is not None and own is not None and (again := feat[own].duplicated()).any():
            self.logger.warning(
                f"{os.path.basename(filepath)}: {again.sum():,} of {len(feat):,} lines are of a {own} that has one "
                f"before (e.g. {feat[own][again].iloc[0]!r}); the first counts."
            )
        wanted, _ = self._get_load_and_unload_col(source)
        if feat is None or wanted is None:
            return feat
        needed = {self.uid_field, self.iid_field, self.time_field, *(self.config["item_attributes"] or [])}
        for column in sorted(wanted - set(feat.columns)):
            close = nearest_names(column, header)
            message = (
                f"load_col: {os.path.basename(filepath)} has no column {column!r}; "
                + (f"did you mean {' or '.join(close)}? " if close else "")
                + f"its columns are {', '.join(header)}."
            )
            if column in needed:
                raise DataError(message)
            self.logger.warning(message)
        return feat

    # ------------------------------------------------------------------ filtering
    def _filter_nan_user_or_item(self) -> None:
        tables = ((self.user_feat, self.uid_field, "user"), (self.item_feat, self.iid_field, "item"))
        of_events = ((self.inter_feat, field, "inter") for field in (self.uid_field, self.iid_field))
        for feat, field, suffix in (*tables, *of_events):
            missing = [] if feat is None or field is None else feat.index[feat[field].isna()]
            if len(missing):
                self.logger.warning(
                    f"{len(missing):,} rows of {self.dataset_name}.{suffix} are dropped because they have no {field} "
                    f"(the first in line {missing[0] + 2})."
                )
                feat.drop(missing, inplace=True)

    def _filter_inter_by_user_or_item(self) -> None:
        if self.config["filter_inter_by_user_or_item"] is True:
            for feat, field, suffix in (
                (self.item_feat, self.iid_field, "item"),
                (self.user_feat, self.uid_field, "user"),
            ):
                if feat is None:
                    continue
                unlisted = self.inter_feat.loc[~self.inter_feat[field].isin(feat[field]), field]
                if len(unlisted):
                    self.logger.warning(
                        f"{len(unlisted):,} of {len(self.inter_feat):,} interactions are dropped because "
                        f"{self.dataset_name}.{suffix} lacks {unlisted.nunique():,} of their {field}s (e.g. "
                        f"{unlisted.iloc[0]!r}). Set filter_inter_by_user_or_item: False to keep them."
                    )
        super()._filter_inter_by_user_or_item()

    def _remove_duplication(self) -> None:
        keep = self.config["rm_dup_inter"]
        if keep is None or self.time_field not in self.inter_feat:
            super()._remove_duplication()
            return
        in_order = self.inter_feat.sort_values(self.time_field, kind="stable")  # RecBole's is unstable
        self.inter_feat = in_order.drop_duplicates([self.uid_field, self.iid_field], keep=keep).sort_index()

    def _reset_index(self) -> None:
        if self.inter_feat.empty:
            filters = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter")
            used = ", ".join(f"{key}: {self.config[key]}" for key in filters if self.config[key])
            raise DataError(
                f"dataset: no interaction of {self.dataset_name!r} is left after filtering "
                f"({used or 'no filter set'}); widen the intervals."
            )
        super()._reset_index()

    # ------------------------------------------------------------------ values
    def _fill_nan(self) -> None:
        feats = [feat for feat in (self.item_feat, self.user_feat) if feat is not None]
        self.missing_values = {
            field: feat[field].isna().to_numpy()
            for feat in feats
            for field in feat
            if self.field2type[field] is FeatureType.FLOAT
        }
        super()._fill_nan()

    def _normalize(self) -> None:
        if self.time_field in self.inter_feat:
            self._times = self.inter_feat[self.time_field].to_numpy()
        super()._normalize()

    def _discretization(self) -> None:
        if self.time_field in self.inter_feat:  # before numerical_features make pairs of them
            self._times_as_read = self.inter_feat[self.time_field].to_numpy()
        super()._discretization()

    def _change_feat_format(self) -> None:
        in_order = self.config["eval_args"]["order"] == "TO" and self.config["benchmark_filename"] is None
        at_once = None if not in_order else self._put_in_order()
        super()._change_feat_format()
        if at_once is not None:
            self.inter_feat = self.inter_feat[at_once]
        for feat in (self.item_feat, self.user_feat):
            for values in feat.interaction.values() if isinstance(feat, Interaction) else ():
                values[0] = 0

    def _put_in_order(self) -> np.ndarray | None:
        """Sorts the rows.

        Returns:
            For sequences that are split across users, the order of the rows that RecBole makes of them (one for every
            event but a user's first): that of time across users. Else None.
        """
        if self.time_field not in self.inter_feat:
            raise DataError(
                f"TIME_FIELD: {self.dataset_name}.inter was loaded without a column {self.time_field!r}; name the "
                f"time column (loaded: {', '.join(self.inter_feat)}) and list it in load_col."
            )
        if self.field2type[self.time_field] is not FeatureType.FLOAT:
            raise DataError(
                f"TIME_FIELD: the column {self.time_field!r} of {self.dataset_name}.inter is of type "
                f"{self.field2type[self.time_field].value}, which has no order; make it {self.time_field}:float."
            )
        # An older checkpoint's configuration has neither setting.
        ties, precision = self.config["ties"] or "file", self.config["time_precision"] or "float64"
        users = self.inter_feat[self.uid_field].to_numpy()
        times = self._times if precision == "float64" else self._times_as_read.astype(precision)
        sequential = self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        tie_break, order_of_ties = self._tie_break(ties)
        order = time_order(times, tie_break, users if sequential else None)
        self.inter_feat = self.inter_feat.iloc[order].reset_index(drop=True)
        self._times, self._row_times = self._times[order], times[order]

        by_user = order if sequential else order[np.argsort(users[order], kind="stable")]
        users, times = users[by_user], times[by_user]
        tied, is_first = tied_with_the_one_before(users, times), np.r_[True, users[1:] != users[:-1]]
        n_users, ending = int(is_first.sum()), int(tied[np.r_[is_first[1:], True]].sum())
        self.order_of_time = OrderOfTime(ties, precision, int(tied.sum()), ending)
        self.logger.info(
            f"order of time: {tied.sum():,} of {len(tied):,} events have the time of their user's event before, and "
            f"{ending:,} of {n_users:,} users end in such a tie. Ties are in {order_of_ties} "
            f"(ties: {ties}), times in {precision} (time_precision)."
        )
        if not sequential:
            return None
        if is_first.all():
            raise DataError(
                f"dataset: every user of {self.dataset_name!r} has a single event, so there is nothing to predict; "
                "check USER_ID_FIELD and the filters."
            )
        self.tied = torch.from_numpy(tied)
        if not splits.is_at_once(self.config):
            return None
        at_once = np.argsort(times[~is_first], kind="stable")
        self._row_times = times[~is_first][at_once]
        return at_once

    # ------------------------------------------------------------------ splitting
    def build(self) -> list[Any]:
        """As RecBole's; splits at moments of time are at exact ones, with any RecBole."""
        if self.config["benchmark_filename"] is not None:
            return super().build()
        kind, value = splits.of(self.config)
        if kind not in ("TS", *splits.MOMENTS):
            return super().build()
        self._change_feat_format()
        if kind == "TS":
            users = self.inter_feat[self.uid_field].numpy()
            parts = splits.by_recboles_moment(self._row_times, self._grouped_index(users), value)
        else:
            moments = splits.at_moments(kind, value, self._times)
            parts = splits.by_moments(self._row_times, moments)
            self.logger.info(
                f"split: validation begins at {moments[0]:.15g} and test at {moments[1]:.15g}; "
                f"{len(parts[0]):,}, {len(parts[1]):,} and {len(parts[2]):,} targets."
            )
        self._drop_unused_col()
        return [self.copy(self.inter_feat[part]) for part in parts]

    def _tie_break(self, ties: str) -> tuple[np.ndarray | None, str]:
        """What orders the rows of equal times ``[n]``, None for the order they have; and the order in words."""
        if ties == "random":
            draws = np.random.default_rng(self.config["seed"]).random(len(self.inter_feat))
            return draws, "an order drawn by the seed"
        if ties == "item":
            ids = self.field2id_token[self.iid_field][1:].tolist()
            order = f"the order of item ids as {'numbers' if are_numbers(ids) else 'strings'}"
            return id_ranks(ids)[self.inter_feat[self.iid_field].to_numpy() - 1], order
        return None, "the file's order"


@cache
def repaired(base: type) -> type:
    """One of RecBole's data set classes with its faults mended: a class of that name, which can be pickled."""
    names = {"__module__": __name__, "__qualname__": base.__name__ + REPAIRED}
    return type(base.__name__, (RepairedDataset, base), names)


def __getattr__(name: str) -> type:
    """The class of :func:`repaired` that a pickle names."""
    base = getattr(recbole.data.dataset, name.removesuffix(REPAIRED), None) if name.endswith(REPAIRED) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return repaired(base)
