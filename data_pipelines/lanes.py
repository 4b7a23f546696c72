"""Lanes: independent readers of a stream, whose number is a fact of the recipe.

    blocks      of a source, cut into stripes where they are fewer than the lanes, and dealt to the lanes by the seed
      ↓
    order       in which a lane reads its pieces, drawn anew for every epoch
      ↓
    windows     of about a thousand rows of a piece, shuffled; unusable, filtered and held-out ones are counted
      ↓
    mixture     the next document is of the source that is furthest behind its share of the lane's tokens
      ↓
    packing     documents into rows of N tokens

Global row g is row g div L of lane g mod L, and nothing that a lane does depends on another one, on ranks or workers. A
lane's state is JSON-able, says where it stands behind a row, and is all it takes to go on from there.

Suffixes: N tokens of a row.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import lab
from data_pipelines.config import DataConfig, DataError, SourceConfig
from data_pipelines.encoding import Encoder, text_hash
from data_pipelines.manifest import Manifest
from data_pipelines.readers import Reading, read
from data_pipelines.shards import Block, Place, Row

WINDOW_ROWS, WINDOW_BYTES = 1024, 2**24
ENCODED_AT_ONCE = 2**17  # characters; with fewer, the tokenizer is left and entered so often that it is slower
POOL_ROWS = 64  # rows that best-fit packing fills at a time
State = dict[str, Any]


class Piece(NamedTuple):
    """A block, or a stripe of one, of the shard of this number."""

    shard: int
    block: Block


@dataclass(frozen=True)
class Source:
    """A source with what its lanes have to know of it. number: its place in the mixture."""

    name: str
    number: int
    config: SourceConfig
    manifest: Manifest

    def weight(self, step: float) -> float:
        """Its weight at a step: linear between those of a schedule, constant before the first and behind the last."""
        weight = self.config.weight
        if isinstance(weight, float | int):
            return float(weight)
        return float(np.interp(step, [at for at, _ in weight], [value for _, value in weight]))

    def rows(self, piece: Piece, place: Place, reading: Reading) -> Iterator[tuple[Row, Place]]:
        """Rows of a piece from a place on, each with the place behind it. Raises DataError."""
        if self.config.is_lab:
            config = lab.LabConfig.parse(self.config.reference)
            first = place.rows + (piece.block.stripe - place.rows) % piece.block.stripes
            for index in itertools.count(first, piece.block.stripes):
                text = lab.document(config, 0, index)
                yield Row(f"document {index} of the lab", text, size=len(text)), Place(index + 1, index + 1)
        yield from read(self.manifest.shards[piece.shard], piece.block, reading, place)


class Cursor(NamedTuple):
    """Where a lane is in a source, before a document: `taken` rows into the shuffled window that begins at `place` of
    piece `piece` of the epoch's order. credit: tokens that it is behind its share. counts: tokens, bytes and
    `sources.COUNTS` of what it has read."""

    epoch: int
    piece: int
    place: Place
    taken: int
    credit: float
    counts: Mapping[str, int]

    @property
    def tokens(self) -> int:
        return self.counts.get("tokens", 0)

    @classmethod
    def of(cls, state: Sequence[Any]) -> Cursor:
        """From what JSON makes of one."""
        epoch, piece, place, *others = state
        return cls(epoch, piece, Place(*place), *others)


class Document(NamedTuple):
    """ids: uint32, empty behind the last document. before: the lane's cursors before it, one for each source."""

    ids: np.ndarray
    before: tuple[Cursor, ...]


class PackedRow(NamedTuple):
    """documents: the token ids of each document or fragment. state: of the lane behind the row."""

    documents: list[np.ndarray]
    state: State


@dataclass(frozen=True)
class Stream:
    """What all lanes of a stream have in common."""

    config: DataConfig
    sources: tuple[Source, ...]
    encoder: Encoder
    seed: int
    rows_per_step: int
    reads_held_out: bool = False  # instead of all others

    def lane(self, number: int, state: State | None = None) -> Iterator[PackedRow]:
        """A lane's rows from its beginning or from a state on, the last padded. Raises DataError, also at its end."""
        packing = {"concatenate": _Lane.concatenated, "best_fit": _Lane.best_fit}[self.config.packing]
        return packing(_Lane(self, number), state or {})

    def reads(self, hash: int) -> bool:
        """Whether the text of this hash is read, in whatever source it stands."""
        return (hash < self.config.held_out * 2**64) == self.reads_held_out

    def held_out_documents(self, source: Source) -> Iterator[np.ndarray]:
        """Token ids of the held-out documents of a source, in an order that is the same for every seed."""
        config = source.config.model_copy(update={"epochs": 1, "max_tokens": None})
        alone = self.config.model_copy(update={"lanes": 1})
        of = replace(self, config=alone, sources=(replace(source, config=config),), seed=0, reads_held_out=True)
        yield from _Lane(of, 0).documents()

    def pieces(self, source: Source, lane: int) -> list[Piece]:
        """A lane's share of a source. Raises DataError where it is empty."""
        lanes, blocks = self.config.lanes, source.manifest.blocks
        if not blocks:
            raise DataError(f"{source.config.reference!r} has no readable blocks; choose other data")
        stripes = -(-lanes // len(blocks))
        dealt = _permutation(len(blocks) * stripes, self.seed, source.number)[lane::lanes]
        pairs = ((*blocks[n // stripes], n % stripes) for n in dealt.tolist())
        return [Piece(shard, replace(block, stripe=stripe, stripes=stripes)) for shard, block, stripe in pairs]


def _permutation(n: int, *key: int) -> np.ndarray:
    """Of 0 … n − 1, drawn by the key: at most four numbers."""
    words = [(k ^ k >> 32) & 0xFFFFFFFF for k in key] + [0] * (4 - len(key))
    generator = np.random.Philox(key=np.array([words[0] << 32 | words[1], words[2] << 32 | words[3]], np.uint64))
    # Raw words: unlike Generator.permutation, they are the same in every numpy version.
    return np.argsort(generator.random_raw(n), kind="stable")


class _Lane:
    def __init__(self, stream: Stream, number: int):
        self.stream, self.number = stream, number
        self.length = stream.config.length
        self.pieces = [stream.pieces(source, number) for source in stream.sources]
        self.filters = [find_filter(source.config.filter) for source in stream.sources]
        self.readings = [
            Reading(
                text_field=source.config.text_field,
                fields=source.config.filter is not None,
                skip_broken=stream.config.skip_broken,
                max_document_bytes=stream.config.max_document_bytes,
                patience=stream.config.patience,
            )
            for source in stream.sources
        ]

    def documents(self) -> Iterator[np.ndarray]:
        """All of the first source, unpacked."""
        yield from (ids for ids, _ in self._source(0, self._cursors({})[0]))

    # Packing

    def concatenated(self, state: State) -> Iterator[PackedRow]:
        """Documents end to end, cut wherever a row ends."""
        rows, offset = state.get("rows", 0), state.get("offset", 0)
        chosen_at = state.get("chosen_at", 0)  # the row in which the document that is read begins

        def step() -> float:
            nonlocal chosen_at
            chosen_at = chosen_at if offset else rows
            return self._step(chosen_at)

        row: list[np.ndarray] = []
        wanted = self.length
        for document in self._documents(self._cursors(state), step):
            ids = document.ids
            while len(ids) - offset >= wanted:
                row.append(ids[offset : offset + wanted])
                offset += wanted
                rows += 1
                at = {"rows": rows, "offset": offset, "chosen_at": chosen_at}
                yield PackedRow(row, at | {"sources": list(document.before)})
                row, wanted = [], self.length
            if len(ids) > offset:
                row.append(ids[offset:])
                wanted -= len(ids) - offset
            offset = 0
            if not len(ids):
                if row:
                    yield PackedRow(row, {"rows": rows + 1, "sources": list(document.before)})
                raise self._end()

    def best_fit(self, state: State) -> Iterator[PackedRow]:
        """Documents whole, but for those longer than a row: each of a pool goes, longest first, where it leaves the
        least room (best-fit decreasing, as in Ding et al., 2404.10830); what is left of the rows is padding."""
        rows, done = state.get("rows", 0), state.get("offset", 0)
        cursors = self._cursors(state)
        while True:
            pool, after = self._pool(cursors, rows - done)
            if not pool:
                raise self._end()
            packed = _best_fit(pool, self.length)
            for number in range(done, len(packed)):
                rows += 1
                last = number + 1 == len(packed)
                sources, offset = (after, 0) if last else (cursors, number + 1)
                yield PackedRow(packed[number], {"rows": rows, "offset": offset, "sources": list(sources)})
            cursors, done = after, 0

    def _pool(self, cursors: tuple[Cursor, ...], rows: int) -> tuple[list[np.ndarray], tuple[Cursor, ...]]:
        """Documents for about POOL_ROWS rows, cut to the length of a row, and the cursors behind them."""
        pool: list[np.ndarray] = []
        tokens = 0
        for document in self._documents(cursors, lambda: self._step(rows)):
            if tokens >= POOL_ROWS * self.length or not len(document.ids):
                return pool, document.before
            tokens += len(document.ids)
            pool += [document.ids[at : at + self.length] for at in range(0, len(document.ids), self.length)]
        raise AssertionError("the last document is empty")

    def _step(self, rows: int) -> float:
        """The step of the lane's row."""
        return (rows * self.stream.config.lanes + self.number) // self.stream.rows_per_step

    # Mixture

    def _cursors(self, state: State) -> tuple[Cursor, ...]:
        if "sources" in state:
            return tuple(Cursor.of(cursor) for cursor in state["sources"])
        # Lanes begin at different places of the mixture's rhythm.
        words = np.random.Philox(key=np.array([self.stream.seed, self.number], np.uint64)).random_raw(self._n).tolist()
        return tuple(Cursor(0, 0, Place(0, 0), 0, -1000.0 * word / 2**64, {}) for word in words)

    @property
    def _n(self) -> int:
        return len(self.stream.sources)

    def _documents(self, cursors: tuple[Cursor, ...], step: Callable[[], float]) -> Iterator[Document]:
        """Endless, or with an empty one behind the last."""
        readers = [self._source(s, cursor) for s, cursor in enumerate(cursors)]
        ended: set[int] = set()
        while len(ended) < self._n:
            now = step()
            weights = [0.0 if s in ended else source.weight(now) for s, source in enumerate(self.stream.sources)]
            total = sum(weights)
            if total == 0:
                raise DataError(f"no source that has text left has a weight above 0 at step {now:.0f}; give it one")
            s = max((s for s in range(self._n) if weights[s] > 0), key=lambda s: cursors[s].credit)
            found = next(readers[s], None)
            if found is None:
                ended.add(s)
                continue
            ids, after = found
            yield Document(ids, cursors)
            shares = [weight / total * len(ids) for weight in weights]
            shares[s] -= len(ids)
            after = after._replace(credit=cursors[s].credit)
            moved = [after if i == s else cursor for i, cursor in enumerate(cursors)]
            cursors = tuple(c._replace(credit=c.credit + d) if d else c for c, d in zip(moved, shares, strict=True))
        yield Document(np.zeros(0, "<u4"), cursors)

    def _end(self) -> DataError:
        return DataError(
            f"the data ends: lane {self.number} has read all that data.epochs and data.max_tokens allow; raise them, "
            "or lower steps"
        )

    # A source

    def _source(self, s: int, cursor: Cursor) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Token ids of the documents from the cursor on, each with the cursor behind it; the credit is not kept up."""
        source, pieces = self.stream.sources[s], self.pieces[s]
        limit = source.config.max_tokens and -(-source.config.max_tokens // self.stream.config.lanes)
        epoch = cursor.epoch
        # Tokens before the epoch; an epoch without any would never end. One that was begun before had some.
        began = cursor.tokens if (cursor.piece, cursor.place, cursor.taken) == (0, Place(0, 0), 0) else -1
        while source.config.epochs is None or epoch < source.config.epochs:
            order = _permutation(len(pieces), self.stream.seed, source.number + 1, self.number + 1, epoch + 1)
            cursor = cursor._replace(epoch=epoch)
            while cursor.piece < len(pieces):
                for ids, behind in self._piece(s, pieces[order[cursor.piece]], cursor):
                    cursor = behind
                    if limit is not None and cursor.tokens > limit:
                        return
                    if ids is not None:
                        yield ids, cursor
                cursor = cursor._replace(piece=cursor.piece + 1, place=Place(0, 0), taken=0)
            if cursor.tokens == began and source.config.epochs is None:
                found = ", ".join(f"{count} {name}" for name, count in cursor.counts.items() if count) or "nothing"
                raise DataError(
                    f"{source.config.reference!r} has no documents for lane {self.number} of "
                    f"{self.stream.config.lanes} ({found}); give more text, or lower data.lanes"
                )
            epoch, began = epoch + 1, cursor.tokens
            cursor = cursor._replace(piece=0)

    def _piece(self, s: int, piece: Piece, cursor: Cursor) -> Iterator[tuple[np.ndarray | None, Cursor]]:
        source, stream = self.stream.sources[s], self.stream
        for window, after in self._windows(s, piece, cursor.place):
            # A place's number within the epoch; collisions would do no harm.
            place = (cursor.epoch * 1_000_003 + cursor.piece) * 1_000_003 + cursor.place.rows
            order = _permutation(len(window), stream.seed, source.number + 1, self.number + 1, ~place)
            seen: set[int] = set()
            taken = cursor.taken
            rows = [self._usable(s, row, seen) for row in window]
            rows = [rows[n] for n in order[taken:].tolist()]
            encoded = stream.encoder.documents((row.text for row in rows if row.text is not None), ENCODED_AT_ONCE)
            for row in rows:
                ids = next(encoded) if row.text is not None else None
                read = [(note, 1) for note in row.notes]
                if ids is not None:
                    assert row.text is not None
                    read += [("documents", 1), ("tokens", len(ids)), ("bytes", row.size)]
                    read.append(("enormous", stream.encoder.is_enormous(row.text)))
                    read.append(("control_text", stream.encoder.tokenizer.has_control_text(row.text)))
                elif row.text is not None:  # the normaliser removed everything
                    read.append(("empty", 1))
                counts = dict(cursor.counts)
                for name, count in read:
                    counts[name] = counts.get(name, 0) + count
                taken += 1
                here, at = (cursor.place, taken) if taken < len(window) else (after, 0)
                cursor = Cursor(cursor.epoch, cursor.piece, here, at, cursor.credit, counts)
                yield ids, cursor

    def _windows(self, s: int, piece: Piece, place: Place) -> Iterator[tuple[list[Row], Place]]:
        """The piece's rows from `place` on, WINDOW_ROWS or a little more than WINDOW_BYTES at a time, and the place
        behind each window. None is empty."""
        window, size = [], 0
        for row, after in self.stream.sources[s].rows(piece, place, self.readings[s]):
            window.append(row)
            size += row.size
            if len(window) == WINDOW_ROWS or size > WINDOW_BYTES:
                yield window, after
                window, size = [], 0
        if window:
            yield window, after

    def _usable(self, s: int, row: Row, seen: set[int]) -> Row:
        """The row as the source's filter leaves it, without text if it is held out or was `seen` in its window."""
        config = self.stream.config
        if row.text is not None and (keep := self.filters[s]) is not None:
            verdict = keep(row.text, row.fields)
            if not isinstance(verdict, bool | str):
                path = self.stream.sources[s].config.filter
                raise DataError(f"data.filter {path} returned {verdict!r}; return true, false or text")
            if not verdict:
                return row._replace(text=None, notes=(*row.notes, "filtered"))
            if isinstance(verdict, str):
                row = row._replace(text=verdict, size=len(verdict.encode()))
        if row.text is None or not (config.held_out or config.drop_duplicates):
            return row
        hash = text_hash(row.text)
        if not self.stream.reads(hash):
            return row._replace(text=None, notes=(*row.notes, "held_out"))
        if config.drop_duplicates and hash in seen:
            return row._replace(text=None, notes=(*row.notes, "duplicate"))
        seen.add(hash)
        return row


def find_filter(path: str | None) -> Callable[[str, Mapping[str, Any]], bool | str] | None:
    """The function at `package.module:function`. Raises DataError."""
    if path is None:
        return None
    module, colon, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise DataError(f"data.filter {path} cannot be imported ({error}); write package.module:function") from None
    if not callable(function):
        raise DataError(f"data.filter {path} is no function; write package.module:function")
    return function


def _best_fit(pool: Sequence[np.ndarray], length: int) -> list[list[np.ndarray]]:
    """Rows of at most `length` tokens."""
    rows: list[list[np.ndarray]] = []
    open_rows: list[tuple[int, int]] = []  # (room, number) of each row, sorted
    for document in sorted(pool, key=len, reverse=True):  # stable: equal lengths in the order of the pool
        at = bisect.bisect_left(open_rows, (len(document), -1))
        room, number = open_rows.pop(at) if at < len(open_rows) else (length, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(document)
        bisect.insort(open_rows, (room - len(document), number))
    return rows
