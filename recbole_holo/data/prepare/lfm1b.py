"""LFM-1b: what users of Last.fm listened to (Schedl, ICMR 2016).

``LFM-1b_LEs.txt`` has a listening event a line: user, artist, album, track, time in seconds. RecMamba (arXiv
2403.16371) is evaluated on tracks, albums and artists. Times are written as minutes, of which ten years have 5 million.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from recbole_holo.data.prepare import tables
from recbole_holo.data.prepare.conversion import ALL_KINDS, Published, Source
from recbole_holo.data.prepare.lines import Log
from recbole_holo.data.prepare.tables import Column, Table
from recbole_holo.errors import ConfigError, DataError, nearest

EVENTS = "LFM-1b_LEs.txt"
EVENT_COLUMNS = ("user_id", "artist_id", "album_id", "track_id", "timestamp")

_NAME = Column("name", "name:token_seq", tables.words)
_ARTIST = Column("artist_id", "artist_id:token", tables.number_token)
_SECONDS_A_DAY = 86_400
_USER_COLUMNS = (
    Column("country", "country:token", tables.lower_case_token),
    Column("age", "age:float", tables.number(least=1)),
    Column("gender", "gender:token", tables.token("n")),
    Column("playcount", "playcount:float", tables.number(least=0)),
    Column("registered_unixtime", "registered_day:float", tables.number(least=1, per=_SECONDS_A_DAY)),
)


@dataclass(frozen=True)
class _Item:
    name: str  # of the data set
    file: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    published: tuple[int, ...]


# How many there are: in the tables (Schedl 2016) or in the events (RecBole's list of data sets; RecMamba, Table 1).
ITEMS = {
    "track": _Item(
        "lfm-1b", "LFM-1b_tracks.txt", ("track_id", "name", "artist_id"), (_NAME, _ARTIST), (32_291_134, 31_634_450)
    ),
    "album": _Item(
        "lfm-1b-album",
        "LFM-1b_albums.txt",
        ("album_id", "name", "artist_id"),
        (_NAME, _ARTIST),
        (15_791_883, 15_641_432),
    ),
    "artist": _Item("lfm-1b-artist", "LFM-1b_artists.txt", ("artist_id", "name"), (_NAME,), (3_190_371, 3_123_496)),
}


def source(raw_dir: str | os.PathLike[str], item: str = "track") -> Source:
    """LFM-1b as its archive unpacks.

    Args:
        raw_dir: the unpacked folder.
        item: ``track``, ``album`` or ``artist``.

    Raises:
        ConfigError: an unknown item.
        DataError: the listening events are not there.
    """
    if item not in ITEMS:
        raise ConfigError("item", item, nearest(item, ITEMS))
    folder, chosen = Path(raw_dir), ITEMS[item]
    events = folder / EVENTS
    if not events.is_file():
        raise DataError(f"{events} is not there. It is in the archive of LFM-1b (Schedl, ICMR 2016); unpack all of it.")
    return Source(
        title="LFM-1b",
        name=chosen.name,
        logs=[Log(events, ALL_KINDS, "\t", EVENT_COLUMNS)],
        user="user_id",
        item=f"{item}_id",
        time="timestamp",
        kept_by=None,
        ticks_per_second=1,
        unit="minute",
        ticks_per_unit=60,
        published={ALL_KINDS: Published(users=(120_322,), items=chosen.published, events=(1_088_161_692,))},
        users=Table(folder / "LFM-1b_users.txt", "\t", "user_id", _USER_COLUMNS, quoted=False),
        items=Table(folder / chosen.file, "\t", f"{item}_id", chosen.columns, chosen.names, quoted=False),
    )
