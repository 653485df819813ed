"""KuaiRand: what users of a short-video app were shown, and clicked (Gao et al., CIKM 2022, arXiv 2208.08696).

Versions: ``27k`` (27,285 users, all they were shown in a month), ``1k`` (1,000 of these users) and ``pure`` (all
users, only the 7,583 videos that were also shown at random). Each has standard logs, of what the app recommended, and a
log of videos that were put in at random; a user's history is both. Times are milliseconds, written as seconds.

RecMamba (arXiv 2403.16371) is evaluated on ``27k``. The script that its authors published reads one of the four
standard logs and keeps what was not clicked too, because it asks whether the text ``"0"`` is empty; here ``is_click``
is a number.
"""

from __future__ import annotations

import os
from pathlib import Path

from recbole_holo.data.prepare import tables
from recbole_holo.data.prepare.conversion import ALL_KINDS, Published, Source
from recbole_holo.data.prepare.lines import Log
from recbole_holo.data.prepare.tables import Column, Table
from recbole_holo.errors import ConfigError, DataError, nearest

STANDARD, RANDOM = "standard", "random"
LOGS = (ALL_KINDS, STANDARD, RANDOM)
KEEP = {"clicked": "is_click", "long_view": "long_view", "all": None}

_PERIODS = ("4_08_to_4_21", "4_22_to_5_08")
_LOGS = {
    "27k": {
        STANDARD: [f"log_standard_{period}_27k_part{part}.csv" for period in _PERIODS for part in (1, 2)],
        RANDOM: ["log_random_4_22_to_5_08_27k.csv"],
    },
    **{
        version: {
            STANDARD: [f"log_standard_{period}_{version}.csv" for period in _PERIODS],
            RANDOM: [f"log_random_4_22_to_5_08_{version}.csv"],
        }
        for version in ("1k", "pure")
    },
}
VERSIONS = tuple(_LOGS)
_TITLES = {"27k": "KuaiRand-27K", "1k": "KuaiRand-1K", "pure": "KuaiRand-Pure"}

# The table of the data set's own description. Its 32,038,725 videos of 27K are those of all logs together (the standard
# logs lack 32 of the videos shown at random), its 4,369,953 of 1K and 7,551 of Pure those of the standard logs. Its
# 27,285 users of Pure are not those of the standard logs.
_PUBLISHED = {
    "27k": {
        STANDARD: Published(users=(27_285,), events=(322_278_385,)),
        RANDOM: Published(users=(27_285,), items=(7_583,), events=(1_186_059,)),
        ALL_KINDS: Published(items=(32_038_725,)),
    },
    "1k": {
        STANDARD: Published(users=(1_000,), items=(4_369_953,), events=(11_713_045,)),
        RANDOM: Published(users=(1_000,), items=(7_388,), events=(43_028,)),
    },
    "pure": {
        STANDARD: Published(items=(7_551,), events=(1_436_609,)),
        RANDOM: Published(users=(27_285,), items=(7_583,), events=(1_186_059,)),
    },
}

_VIDEO_COLUMNS = (
    Column("author_id", "author_id:token", tables.number_token),
    Column("video_type", "video_type:token", tables.token("UNKNOWN")),
    Column("upload_dt", "upload_dt:token", tables.token()),
    Column("upload_type", "upload_type:token", tables.token("UNKNOWN")),
    Column("video_duration", "video_duration:float", tables.number(least=0, per=1000)),  # seconds
    Column("server_width", "server_width:float", tables.number(least=1)),
    Column("server_height", "server_height:float", tables.number(least=1)),
    Column("music_id", "music_id:token", tables.number_token),
    Column("music_type", "music_type:token", tables.number_token),
    Column("tag", "tag:token_seq", tables.token_list(",")),
)
_USER_COLUMNS = (
    Column("user_active_degree", "user_active_degree:token", tables.token("UNKNOWN")),
    *(Column(name, f"{name}:token", tables.number_token) for name in ("is_lowactive_period", "is_live_streamer")),
    Column("is_video_author", "is_video_author:token", tables.number_token),
    *(
        Column(name, f"{name}:float", tables.number(least=0))
        for name in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
    ),
    *(Column(f"onehot_feat{i}", f"onehot_feat{i}:token", tables.number_token) for i in range(18)),
)


def source(
    raw_dir: str | os.PathLike[str], version: str | None = None, logs: str = ALL_KINDS, keep: str = "clicked"
) -> Source:
    """KuaiRand as its archive unpacks.

    Args:
        raw_dir: the unpacked folder, or the folder ``data`` inside it.
        version: ``27k``, ``1k`` or ``pure``; None = the one that is there.
        logs: ``standard``, ``random`` or ``all``.
        keep: ``clicked`` (``is_click``: in the single-column layout, played for 7 seconds or to the end), ``long_view``
            (18 seconds or to the end) or ``all`` that was shown.

    Raises:
        ConfigError: an unknown version, kind of log or kind of event.
        DataError: no or several versions in ``raw_dir``, or one that lacks a log.
    """
    for field, value, allowed in (("logs", logs, LOGS), ("keep", keep, KEEP), ("version", version or "1k", VERSIONS)):
        if value not in allowed:
            raise ConfigError(field, value, nearest(value, allowed))
    kinds = (STANDARD, RANDOM) if logs == ALL_KINDS else (logs,)
    folder, version = _find(Path(raw_dir), version, kinds)
    published = _PUBLISHED[version]
    return Source(
        title=_TITLES[version],
        name=f"kuairand-{version}",
        logs=[Log(folder / name, kind, ",") for kind in kinds for name in _LOGS[version][kind]],
        user="user_id",
        item="video_id",
        time="time_ms",
        kept_by=KEEP[keep],
        ticks_per_second=1000,
        unit="second",
        ticks_per_unit=1000,
        published={
            kind: published[kind] for kind in (*kinds, *([logs] if logs == ALL_KINDS else [])) if kind in published
        },
        users=Table(folder / f"user_features_{version}.csv", ",", "user_id", _USER_COLUMNS),
        items=Table(folder / f"video_features_basic_{version}.csv", ",", "video_id", _VIDEO_COLUMNS),
    )


def _find(raw: Path, version: str | None, kinds: tuple[str, ...]) -> tuple[Path, str]:
    """The folder of the logs, and their version."""
    versions = [version] if version else VERSIONS
    found = [
        (folder, v)
        for folder in (raw, raw / "data")
        for v in versions
        if any((folder / name).is_file() for kind in kinds for name in _LOGS[v][kind])
    ]
    wanted = f"KuaiRand-{version or '27K'} (Gao et al., CIKM 2022; its project page has the archives)"
    if not found:
        names = [name for kind in kinds for name in _LOGS[version or "27k"][kind]]
        raise DataError(f"{raw}: no logs of {wanted} here or in data/ inside it; expected {', '.join(names)}.")
    if len(found) > 1:
        there = ", ".join(f"{v} in {folder}" for folder, v in found)
        raise DataError(
            f"{raw}: several versions of KuaiRand ({there}); name one with version, or give its own folder."
        )
    folder, version = found[0]
    absent = [name for kind in kinds for name in _LOGS[version][kind] if not (folder / name).is_file()]
    if absent:
        raise DataError(
            f"{folder} lacks {', '.join(absent)}: they are in the archive of {_TITLES[version]} (Gao et al., CIKM "
            "2022); unpack all of it, or choose other logs."
        )
    return folder, version
