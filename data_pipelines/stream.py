"""Packed text that is read, tokenised and packed while a run trains on it.

Suffixes: B rows, N tokens of a row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.cache import cache_directory, write_whole
from data_pipelines.config import DataConfig, DataError
from data_pipelines.encoding import Encoder
from data_pipelines.lanes import PackedRow, Source, State, Stream
from data_pipelines.manifest import manifest
from data_pipelines.rows import PackedText, packed_rows
from data_pipelines.sources import COUNTS
from data_pipelines.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_VERSION = 1  # bump it when the same sources would give other rows
# Keys of `data` that leave the rows as they are. What a source refers to is known by what its shards contain.
_FREE = {"reference", "config", "split", "revision", "stream", "patience", "mixture", "weight"}
_SOURCE_KEYS = {"text_field", "filter", "epochs", "max_tokens"}
# What a lane counts of a source.
READ = ("tokens", "bytes", *COUNTS)


class StreamText(PackedText):
    """Rows of a stream, which has no random access: `lanes.Stream` says what row follows which.

    Attributes beside PackedText's:
        contents: JSON-able, what the shards of each source contain, and the commit of a hub dataset.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        rows_per_step: int,
        contents: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
    ):
        """contents: those that a run began with; it keeps the commits. Raises DataError."""
        pinned = {name: known.get("revision") for name, known in (contents or {}).items()}
        self.length, self.seed, self.config = config.length, seed, config
        self.tokens_per_epoch = math.inf
        sources = tuple(
            Source(name, number, source, manifest(source, config, pinned.get(name), cache_dir))
            for number, (name, source) in enumerate(config.sources.items())
        )
        self.lanes = Stream(config, sources, Encoder(config, tokenizer), seed, rows_per_step)
        self.contents: dict[str, dict[str, Any]] = {
            source.name: {"shards": "".join(source.manifest.digests), "revision": source.manifest.revision}
            for source in sources
        }
        self.counts = sum((source.manifest.counts for source in sources), Counter(dict.fromkeys(COUNTS, 0)))
        self._cache = cache_directory(cache_dir)
        scheduled = any(isinstance(source.weight, list) for source in config.sources.values())
        what = [_VERSION, self._text_fingerprint, config.length, config.lanes, config.packing, seed]
        what += [[source.weight for source in config.sources.values()], rows_per_step if scheduled else None]
        self.fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @cached_property
    def _text_fingerprint(self) -> str:
        """Of the documents, whatever their order."""
        config = self.config
        settings = config.model_dump(mode="json", exclude=_FREE | {"length", "lanes", "packing"})
        of = [
            [s.manifest.fingerprint, s.config.model_dump(mode="json", exclude=_FREE, include=_SOURCE_KEYS)]
            for s in self.lanes.sources
        ]
        return hashlib.sha256(json.dumps([of, settings, self.lanes.encoder.settings]).encode()).hexdigest()

    def changed(self, contents: Mapping[str, Any]) -> str | None:
        """What differs from the contents that a run began with, in words; None if nothing does."""
        if list(contents) != list(self.contents):
            return f"its sources are {', '.join(self.contents)}, not {', '.join(contents)}"
        for source in self.lanes.sources:
            now, before = (c[source.name]["shards"] for c in (self.contents, contents))
            if len(now) != len(before):
                return f"{source.config.reference} has {len(now) // 12} shards, not {len(before) // 12}"
            for n, shard in enumerate(source.manifest.shards):
                if now[12 * n : 12 * n + 12] != before[12 * n : 12 * n + 12]:
                    return f"{shard.name} has changed"
        return None

    def about(self) -> str:
        shards = sum(len(source.manifest.shards) for source in self.lanes.sources)
        return f"a stream of {shards:,} shards in {self.config.lanes} lanes"

    # Training rows

    def beginning(self, first: int) -> dict[int, State]:
        """States of lanes that go on with row `first` as if there had been nothing before."""
        L = self.config.lanes
        return {lane: {"rows": (first - lane + L - 1) // L} for lane in range(L)}

    def stream(
        self, first: int, stride: int, states: Mapping[int, State], stop: int | None = None
    ) -> Iterator[tuple[int, int, PackedRow]]:
        """(number, lane, row) of every `stride`-th row from `first` on. states: of lanes, behind the last row before
        `first` that each gave."""
        L = self.config.lanes
        lanes: dict[int, Iterator[PackedRow]] = {}
        for number in itertools.count(first, stride) if stop is None else range(first, stop, stride):
            index, lane = divmod(number, L)
            if lane not in lanes:
                state = states.get(lane)
                lanes[lane] = self.lanes.lane(lane, state)
                # Without a state, or with an older one, what was read before is read again.
                for _ in range(index - (state["rows"] if state else 0)):
                    next(lanes[lane])
            row = next(lanes[lane])
            assert row.state["rows"] == index + 1, "a lane is ahead of its rows"
            yield number, lane, row

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        """Reads from the beginning of the stream."""
        return self.packed([(number, row) for number, _, row in self.stream(first, 1, {}, first + count)])

    def packed(self, rows: list[tuple[int, PackedRow]]) -> dict[str, Tensor]:
        """Numbered rows as PackedText gives them."""
        found = packed_rows(0, [row.documents for _, row in rows], self.length)
        found["sample_id_B"] = torch.tensor([number for number, _ in rows])
        return found

    # Held-out rows

    def held_out_rows(self, limit: int) -> dict[str, Tensor]:
        return packed_rows(0, _rows(self._held_out(limit), self.length, limit), self.length)

    def held_out_documents(self, limit: int) -> Tensor:
        numbers = [np.full(len(ids), number) for number, ids in enumerate(self._held_out(limit))]
        rows = [[np.concatenate(row)] for row in _rows(numbers, self.length, limit)]
        packed = packed_rows(0, rows, self.length)
        return torch.where(packed["document_BN"] < 0, -1, packed["tokens_BN"])

    def _held_out(self, limit: int) -> list[np.ndarray]:
        """Token ids of held-out documents for about `limit` rows, of each source by its weight; found once, and cached.
        Documents of equal text are one."""
        if not limit or not self.config.held_out:
            return []
        what = [_VERSION, self._text_fingerprint, self.length, limit, [s.config.weight for s in self.lanes.sources]]
        path = self._cache / "held-out" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.npz"
        if not path.exists():
            self._find_held_out(path, limit)
        with np.load(path, allow_pickle=False) as kept:
            tokens, offsets = kept["tokens"], kept["offsets"]
        return [tokens[a:b] for a, b in itertools.pairwise(offsets)]

    def _find_held_out(self, path: Path, limit: int) -> None:
        weights = [_mean_weight(source) for source in self.lanes.sources]
        documents: list[tuple[float, int, np.ndarray]] = []
        for source, weight in zip(self.lanes.sources, weights, strict=True):
            wanted = math.ceil(limit * self.length * weight / (sum(weights) or 1))
            found, seen = 0, set()
            log.info("looking for %d tokens of held-out text in %s", wanted, source.config.reference)
            for ids in self.lanes.held_out_documents(source) if wanted else ():
                if (same := ids.tobytes()) not in seen:
                    seen.add(same)
                    documents.append((found / wanted, source.number, ids))
                    found += len(ids)
                if found >= wanted:
                    break
            if wanted and not found:
                raise DataError(
                    f"no document of {source.config.reference!r} is held out by data.held_out {self.config.held_out}; "
                    "raise it, give more text, or set it to 0 for no evaluation"
                )

        # Sources in turn, so that the last row is cut off all of them.
        mixed = [ids for *_, ids in sorted(documents, key=lambda document: document[:2])]
        tokens, offsets = np.concatenate([np.zeros(0, "<u4"), *mixed]), np.cumsum([0, *map(len, mixed)])
        write_whole(path, lambda file: np.savez(file, tokens=tokens, offsets=offsets))


def _mean_weight(source: Source) -> float:
    weight = source.config.weight
    return sum(w for _, w in weight) / len(weight) if isinstance(weight, list) else float(weight)


def _rows(documents: list[np.ndarray], length: int, limit: int) -> list[list[np.ndarray]]:
    """Documents end to end, cut wherever a row ends; at most `limit` rows."""
    rows: list[list[np.ndarray]] = []
    room = 0
    for ids in documents:
        while len(ids):
            if not room:
                if len(rows) == limit:
                    return rows
                rows.append([])
                room = length
            rows[-1].append(ids[:room])
            ids, room = ids[room:], room - min(room, len(ids))
    return rows
