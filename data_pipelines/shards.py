"""Files of a dataset, wherever they lie, and the parts of them that can be read on their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Format = Literal["text", "jsonl", "parquet", "tar"]


@dataclass(frozen=True)
class Shard:
    """One file.

    name: as messages call it. place: a local path or an http(s) URL. compression: of the whole file.
    on_hub: whether the place wants the user's login at the hub.
    """

    name: str
    place: str
    format: Format
    compression: Literal["", "gz", "zst"] = ""
    on_hub: bool = False

    @property
    def is_remote(self) -> bool:
        return self.place.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Block:
    """A part of a shard that can be read without the rest: row groups `start` to `stop` of a parquet file, the lines
    that begin in bytes `start` to `stop` of an uncompressed jsonl file, and else all of the file; of its rows, every
    `stripes`-th from row `stripe` on.

    rows: how many it has in all stripes, where the file says so without being read.
    """

    start: int
    stop: int
    rows: int | None = None
    stripe: int = 0
    stripes: int = 1

    def has(self, row: int) -> bool:
        """Whether a row, counted from 0 in all stripes, is of this one."""
        return row % self.stripes == self.stripe


class Place(NamedTuple):
    """Where in a block reading can go on: behind `rows` of its rows. at: the byte in the file where the format can
    seek (tar and jsonl, uncompressed), else equal to `rows`. Rows of other stripes count."""

    rows: int
    at: int


class Row(NamedTuple):
    """A row, line, member or file.

    name: as messages call it. text: None if it has none that can be used. notes: names in `sources.COUNTS`, why there
    is no text or what was done to it. size: bytes of the text as UTF-8. fields: whatever else is stored with it.
    """

    name: str
    text: str | None
    notes: tuple[str, ...] = ()
    size: int = 0
    fields: Mapping[str, Any] = {}
