"""The rows of a shard, block by block and from any place on.

    remote      bytes, from wherever they are
      ↓
    _Unpacked   what .gz and .zst contain, up to the first damage
      ↓
    _jsonl, _parquet, _text, _tar
      ↓
    Row         a text that can be used, or why there is none

Reading a block again gives the same rows, at the same places, from whatever place it begins. Nothing that is read is
ever unpickled, executed or written to disk, and only row groups of parquet files are in memory whole where they are
larger than `max_document_bytes`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from typing import Any, BinaryIO, cast

from data_pipelines import remote
from data_pipelines.config import DataError
from data_pipelines.remote import open_shard
from data_pipelines.shards import Block, Place, Row, Shard

log = logging.getLogger(__name__)
END = 2**63 - 1  # of a block: that of its shard; of a place: nothing is left to read
START = Place(0, 0)
BLOCK_BYTES = 2**23  # of jsonl
_BATCH_ROWS = 256  # of parquet in memory
_FEED = 2**16  # compressed bytes at a time
_PIECE = 2**20  # bytes at a time of what is unpacked or skipped
_SILENT_BYTES, _SILENT_SECONDS = 2**26, 10.0  # that are skipped without a word
_TEXTS = {"txt": "", "txt.gz": "gz", "txt.zst": "zst"}  # members of a tar, and how they are compressed
_OBJECTS = {"json": "", "json.gz": "gz", "json.zst": "zst"}
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset leaves out
_BOM = b"\xef\xbb\xbf"
_NOTHING: Mapping[str, Any] = {}
_OTHER = Row("", None)  # of another stripe, whose text nobody wants


@dataclass(frozen=True)
class Reading:
    """How rows are read. text_field to max_document_bytes: as in DataConfig. fields: whether `Row.fields` are wanted.
    patience: seconds without a byte from a server."""

    text_field: str = "text"
    fields: bool = False
    skip_broken: bool = False
    max_document_bytes: int = 2**26
    patience: float = 600.0


def blocks(shard: Shard, patience: float, skip: Callable[[DataError], None]) -> list[Block]:
    """The blocks of a shard, found without reading its rows.

    skip: is called with the error of a shard whose blocks cannot be found; unless it raises that, the shard has none.
    Raises DataError for what its server refuses.
    """
    try:
        if shard.format == "parquet":
            footer = _footer(shard, patience, _stamp(shard))
            rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            return [Block(group, group + 1, count) for group, count in enumerate(rows)]
        size = remote.size(shard, patience)
    except _damage(shard) as error:
        if isinstance(error, DataError):
            raise
        skip(_error(shard.name, f"cannot be read ({error})"))
        return []
    if size is not None and shard.format == "jsonl" and not shard.compression and not _may_be_array(shard):
        return [Block(start, min(start + BLOCK_BYTES, size)) for start in range(0, size, BLOCK_BYTES)]
    return [Block(0, END if size is None else size)]


def read(shard: Shard, block: Block, reading: Reading, place: Place = START) -> Iterator[tuple[Row, Place]]:
    """The rows of a block from a place on, each with the place behind it.

    What is broken is a row without text if `skip_broken`. Raises DataError if not, and for what a server refuses.
    """
    if place.at == END:
        return
    rows = {"jsonl": _jsonl, "parquet": _parquet, "text": _text, "tar": _tar}[shard.format]
    number = place.rows
    try:
        with open_shard(shard, reading.patience) as stored:
            file = _unpacked(stored, shard.compression) if shard.compression else stored
            for row, after in rows(shard, block, reading, place, cast(BufferedReader, file)):
                number = after.rows
                if block.has(number - 1):
                    yield row, after
    except (OSError, EOFError) as error:
        if block.has(number):
            yield _broken(reading, shard.name, f"cannot be read ({error})"), Place(number + 1, END)


# Formats: each yields as `read` does, rows of other stripes too, and may raise OSError and EOFError


def _jsonl(
    shard: Shard, block: Block, reading: Reading, place: Place, file: BufferedReader
) -> Iterator[tuple[Row, Place]]:
    if _may_be_array(shard) and file.peek().removeprefix(_BOM).lstrip().startswith(b"["):
        yield from _array(shard, reading, place, file)
        return
    limit = reading.max_document_bytes
    seeks = not shard.compression
    stop = block.stop if seeks else END
    at = number = 0
    if seeks and place.rows:
        number, at = place
        file.seek(at)
    elif block.start:  # a line belongs to the block that it begins in
        file.seek(block.start - 1)
        at = block.start - 1 + _skip_line(file, stop - block.start + 1)
    skipping = _Skipping(shard)
    while at < stop:
        line = file.readline(limit + 2)
        if not line:
            return
        begin, at, number = at, at + len(line), number + 1
        oversized = len(line) > limit + 1
        if oversized and not line.endswith(b"\n"):
            at += _skip_line(file, END)
        if number <= place.rows:
            skipping.add(len(line))
            continue
        name = f"{shard.name}, byte {begin}" if block.start else f"{shard.name}, line {number}"
        if not block.has(number - 1):
            row = _OTHER
        elif oversized:
            row = Row(name, None, ("oversized",))
        else:
            row = _of_json(name, line, reading)
        yield row, Place(number, at if seeks else number)


def _skip_line(file: BinaryIO, most: int) -> int:
    """Reads to the end of a line, or at least to `most` bytes; returns how many."""
    count = 0
    while count < most:
        piece = file.readline(_PIECE)
        count += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return count


def _may_be_array(shard: Shard) -> bool:
    return shard.name.removesuffix(f".{shard.compression}").endswith(".json")


def _array(shard: Shard, reading: Reading, place: Place, file: BinaryIO) -> Iterator[tuple[Row, Place]]:
    """Of a file that is one JSON array."""
    data = file.read(reading.max_document_bytes + 1)
    if len(data) > reading.max_document_bytes:
        what = f"is one array of more than {reading.max_document_bytes} bytes"
        yield _broken(reading, shard.name, what, "write it as jsonl, or raise data.max_document_bytes"), Place(1, END)
        return
    try:
        # What is not UTF-8 becomes half surrogate pairs, which are mended and counted text by text.
        rows = json.loads(data.removeprefix(_BOM).decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        yield _broken(reading, shard.name, f"is not valid JSON ({error})"), Place(1, END)
        return
    for number in range(place.rows, len(rows)):
        yield _of_object(f"{shard.name}, row {number + 1}", rows[number], reading), Place(number + 1, number + 1)


def _text(
    shard: Shard, block: Block, reading: Reading, place: Place, file: BufferedReader
) -> Iterator[tuple[Row, Place]]:
    if not place.rows:
        yield _of_bytes(shard.name, file.read(reading.max_document_bytes + 1), reading), Place(1, END)


def _parquet(
    shard: Shard, block: Block, reading: Reading, place: Place, file: BufferedReader
) -> Iterator[tuple[Row, Place]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    field, damage = reading.text_field, _damage(shard)
    unreadable = None
    try:
        footer = _footer(shard, reading.patience, _stamp(shard))
        table = pq.ParquetFile(file, metadata=footer)
        columns = table.schema_arrow.names
        if field not in columns:
            unreadable = f"has no column {field!r}, only {columns}", "set data.text_field"
        else:
            pa.array([], table.schema_arrow.field(field).type).cast(pa.large_binary())
    except damage as error:
        if isinstance(error, DataError):
            raise
        unreadable = f"cannot be read ({error})", "repair it"
    if unreadable is not None:
        yield _broken(reading, shard.name, *unreadable), Place(1, END)
        return
    number, skipping = 0, _Skipping(shard)
    first = sum(footer.row_group(group).num_rows for group in range(block.start)) + 1
    for group in range(block.start, min(block.stop, footer.num_row_groups)):
        in_file = first
        first += footer.row_group(group).num_rows
        try:
            for batch in table.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=None if reading.fields else [field], use_threads=False
            ):
                if number + len(batch) <= place.rows:
                    skipping.add(batch.nbytes)
                    number, in_file = number + len(batch), in_file + len(batch)
                    continue
                # As bytes: pyarrow assumes that string columns are UTF-8 but does not check.
                texts = batch.column(field).cast(pa.large_binary()).to_pylist()
                fields = batch.drop_columns([field]).to_pylist() if reading.fields else [{}] * len(texts)
                for raw, others in zip(texts, fields, strict=True):
                    number, in_file = number + 1, in_file + 1
                    if number <= place.rows:
                        continue
                    name = f"{shard.name}, row {in_file - 1}"
                    if not block.has(number - 1):
                        row = _OTHER
                    elif raw is None:
                        row = _broken(reading, name, f"has no string in column {field!r}")
                    else:
                        row = _of_bytes(name, raw, reading, others)
                    yield row, Place(number, number)
        except damage as error:
            if isinstance(error, DataError):
                raise
            number += 1
            if number > place.rows:
                where = f"{shard.name}, row group {group}"
                yield _broken(reading, where, f"cannot be read ({error})"), Place(number, number)


def _stamp(shard: Shard) -> object:
    """Changes when a local file does; `remote` sees by itself when another one does."""
    if shard.is_remote:
        return None
    stat = os.stat(shard.place)
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=64)
def _footer(shard: Shard, patience: float, stamp: object) -> Any:
    """Of a parquet file: pyarrow.parquet.FileMetaData. It may take megabytes, and every block wants it."""
    import pyarrow.parquet as pq

    with open_shard(shard, patience) as file:
        return pq.read_metadata(file)


def _damage(shard: Shard) -> tuple[type[Exception], ...]:
    """What reading a damaged file may raise."""
    if shard.format != "parquet":
        return (OSError,)
    import pyarrow as pa

    return OSError, ValueError, OverflowError, pa.ArrowException


def _tar(
    shard: Shard, block: Block, reading: Reading, place: Place, file: BufferedReader
) -> Iterator[tuple[Row, Place]]:
    from webdataset.tariterators import base_plus_ext  # takes two seconds, if torch is not imported yet

    seeks = not shard.compression
    number = place.rows if seeks else 0
    sample: _Sample | None = None
    skipping = _Skipping(shard)

    def done(found: _Sample | None, at: int, where: str = "") -> Iterator[tuple[Row, Place]]:
        nonlocal number
        number += 1
        if number > place.rows:
            if not block.has(number - 1):
                row = _OTHER
            elif found is None:
                row = _broken(reading, where, "is no header of a tar")
            else:
                row = found.row(reading)
            yield row, Place(number, at if seeks else number)

    try:
        if seeks:
            file.seek(place.at)
        tar = _Tar(fileobj=file)
        for begin, info in tar.found(place.at if seeks else 0, block.stop if seeks else END):
            if number < place.rows:
                skipping.reach(begin)
            if info is None:
                if sample is not None:
                    yield from done(sample, begin)
                sample = None
                yield from done(None, tar.behind, f"{shard.name}, byte {begin}")
                continue
            key, suffix = base_plus_ext(_printable(info.name))
            if not info.isreg() or key is None or _META.match(info.name):
                continue
            suffix = suffix.lower()
            if sample is not None and (key != sample.key or suffix in sample.suffixes):
                yield from done(sample, begin)
                sample = None
            if sample is None:
                sample = _Sample(f"{shard.name}, sample {key}", key)
            sample.suffixes.add(suffix)
            if suffix in _TEXTS or suffix in _OBJECTS:
                read, sample = sample, None  # lost if the file ends inside it
                read.add(suffix, tar.content(info, reading.max_document_bytes), reading)
                sample = read
        if sample is not None:
            yield from done(sample, END)
    except (OSError, EOFError):
        if sample is not None:
            yield from done(sample, END)
        raise


class _Sample:
    """Consecutive members of a tar with one key. suffixes: of all members. parts: what the text and the JSON member
    contain, or the row that says why that cannot be read."""

    def __init__(self, name: str, key: str):
        self.name, self.key = name, key
        self.suffixes: set[str] = set()
        self.parts: dict[str, bytes | Row] = {}

    def add(self, suffix: str, content: bytes | str | None, reading: Reading) -> None:
        """content: as `_Tar.content` returns it."""
        kind = "txt" if suffix in _TEXTS else "json"
        compression = (_TEXTS | _OBJECTS)[suffix]
        part: bytes | Row | None = None
        if isinstance(content, bytes) and compression:
            try:
                content = _unpacked(io.BytesIO(content), compression).read(reading.max_document_bytes + 1)
            except (OSError, EOFError) as error:
                content = str(error)
        if content is None or (isinstance(content, bytes) and len(content) > reading.max_document_bytes):
            part = Row(self.name, None, ("oversized",))
        elif isinstance(content, str):
            part = _broken(reading, f"{self.name}, {suffix}", f"cannot be read ({content})")
        self.parts.setdefault(kind, content if part is None else part)  # type: ignore[arg-type]

    def row(self, reading: Reading) -> Row:
        text, other = self.parts.get("txt"), self.parts.get("json")
        if isinstance(text, Row):
            return text
        fields = _NOTHING
        if reading.fields or text is None:
            if isinstance(other, Row):
                return other
            if other is not None:
                return _of_json(self.name, other, reading, {"__key__": self.key}, text)
            fields = {"__key__": self.key}
        return Row(self.name, None, ("empty",)) if text is None else _of_bytes(self.name, text, reading, fields)


class _Header(tarfile.TarInfo):
    """Notes damage, and refuses what would make tarfile go backwards or take all memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        extended = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        long = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if info.size < 0 or ((extended or long) and info.size > _PIECE):
            raise tarfile.InvalidHeaderError("impossible size")  # type: ignore[attr-defined]
        return info

    @classmethod
    def fromtarfile(cls, tar):
        try:
            info = super().fromtarfile(tar)
            if info.size < 0:  # by an extended header
                raise tarfile.InvalidHeaderError("impossible size")  # type: ignore[attr-defined]
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError:
            tar.damaged = True
            raise
        return info


class _Tar(tarfile.TarFile):
    """A tar that is read forwards, and on from the next valid header where one is damaged.

    behind: where in the file that begins which `found` yields next."""

    tarinfo = _Header
    ignore_zeros = True  # between headers, as anything else that is none
    fileobj: BufferedReader
    damaged = False
    behind = 0

    def found(self, start: int, end: int) -> Iterator[tuple[int, tarfile.TarInfo | None]]:
        """Yields where each member begins with what is known of it, or None where there is damage instead."""
        while True:
            info = self.next()
            self.members.clear()  # type: ignore[attr-defined]
            if info is not None and self.offset - tarfile.BLOCKSIZE >= end:  # cut off, or its size is wrong
                self.damaged, self.offset = True, info.offset_data
                continue
            self.behind = END if info is None else info.offset
            if self.damaged:
                self.damaged = False
                yield start, None
            if info is None:
                return
            yield info.offset, info
            start = self.offset

    def next(self) -> tarfile.TarInfo | None:
        while True:
            try:
                return super().next()
            except DataError:
                raise
            except (tarfile.TarError, ValueError, OverflowError, IndexError):
                self.damaged = True
                if not self.fileobj.tell():
                    return None  # it is empty
                self.offset = self.fileobj.tell()

    def content(self, info: tarfile.TarInfo, limit: int) -> bytes | str | None:
        """What the member contains that was found last; why that cannot be read; or None if it is more than `limit`."""
        if info.size > limit:
            return None
        if info.issparse():
            try:
                file = self.extractfile(info)
                assert file is not None
                return file.read()
            except tarfile.ReadError as error:
                return str(error)
        data = self.fileobj.read(info.size)
        if len(data) == info.size:
            return data
        self.offset = self.fileobj.tell()  # there is nothing more to be missed
        return "unexpected end of data"


# Texts


def _of_bytes(name: str, raw: bytes, reading: Reading, fields: Mapping[str, Any] = _NOTHING) -> Row:
    if len(raw) > reading.max_document_bytes:
        return Row(name, None, ("oversized",))
    text, notes = _decoded(raw)
    return of_text(name, text, reading, notes, fields)


def _of_json(
    name: str, raw: bytes, reading: Reading, more: Mapping[str, Any] = _NOTHING, text: bytes | None = None
) -> Row:
    """Of a line or file of JSON. more: further fields. text: is read instead of the text field."""
    line, notes = _decoded(raw)
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        if b"\0" in raw:
            return Row(name, None, ("binary",))
        if not line.strip():
            return Row(name, None, (*notes, "empty"))
        return _broken(reading, name, f"is not valid JSON ({error})", notes=notes)
    return _of_object(name, found, reading, notes, more, text)


def _of_object(
    name: str,
    found: Any,
    reading: Reading,
    notes: tuple[str, ...] = (),
    more: Mapping[str, Any] = _NOTHING,
    text: bytes | None = None,
) -> Row:
    field = reading.text_field
    if not isinstance(found, dict):
        return _broken(reading, name, "is not a JSON object", notes=notes)
    if text is not None:
        return _of_bytes(name, text, reading, {**found, **more})
    if field not in found:
        return _broken(reading, name, f"has no field {field!r}, only {sorted(found)}", "set data.text_field", notes)
    value = found[field]
    if not isinstance(value, str):
        return _broken(reading, name, f"has no string in field {field!r}", notes=notes)
    if not reading.fields:
        return of_text(name, value, reading, notes)
    del found[field]
    return of_text(name, value, reading, notes, {**found, **more})


def of_text(
    name: str, text: str, reading: Reading, notes: tuple[str, ...] = (), fields: Mapping[str, Any] = _NOTHING
) -> Row:
    """A row of a text as it was found, if that can be used."""
    if "\0" in text:
        return Row(name, None, ("binary",))
    if text.isascii():
        size = len(text)
    else:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            # A JSON string can escape half of a surrogate pair, which is not a character.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            size, notes = len(text.encode()), ("not_utf8",)
    if not text or text.isspace():
        return Row(name, None, (*notes, "empty"))
    if size > reading.max_document_bytes:
        return Row(name, None, ("oversized",))
    return Row(name, text, notes, size, fields)


def _decoded(raw: bytes) -> tuple[str, tuple[str, ...]]:
    raw = raw.removeprefix(_BOM)
    try:
        return raw.decode(), ()
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), ("not_utf8",)


def _printable(name: str) -> str:
    """Without what cannot be encoded."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


# Damage


def _broken(reading: Reading, where: str, what: str, way_out: str = "repair it", notes: tuple[str, ...] = ()) -> Row:
    if not reading.skip_broken:
        raise _error(where, what, way_out)
    return Row(where, None, (*notes, "broken"))


def _error(where: str, what: str, way_out: str = "repair it") -> DataError:
    what = " ".join(what.split())  # libraries' messages may span lines
    return DataError(f"{where} {what}; {way_out}, or set data.skip_broken to skip what is broken")


class _Skipping:
    """Says in the log how far reading has come that cannot begin in the middle of a file."""

    def __init__(self, shard: Shard):
        self.name, self.bytes, self.said = shard.name, 0, -_SILENT_SECONDS

    def add(self, count: int) -> None:
        self.reach(self.bytes + count)

    def reach(self, position: int) -> None:
        """position: in bytes that were read again."""
        self.bytes = position
        if position > _SILENT_BYTES and time.monotonic() - self.said >= _SILENT_SECONDS:
            self.said = time.monotonic()
            log.warning("%s is read again to where it was left: %d MiB so far", self.name, position >> 20)


# Compression


def _unpacked(file: BinaryIO, compression: str) -> BufferedReader:
    return BufferedReader(_Unpacked(file, compression), remote.BUFFER)


class _Unpacked(remote.Positioned):
    """What a compressed file contains, forwards. Raises OSError and EOFError, but first gives all that precedes the
    damage."""

    def __init__(self, file: BinaryIO, compression: str):
        self._chunks = _chunks(file, compression)
        self._left = memoryview(b"")

    def readinto(self, buffer) -> int:
        if not self._left:
            self._left = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at}[whence]
        if target < self._at:
            raise io.UnsupportedOperation("seeking backwards in a compressed file")
        piece = bytearray(_PIECE)
        while self._at < target and self.readinto(memoryview(piece)[: target - self._at]):
            pass
        return self._at


def _chunks(file: BinaryIO, compression: str) -> Iterator[bytes]:
    new, errors, magic = _codec(compression)
    given, careful = 0, END
    while True:
        file.seek(0)
        codec, begun, skip = None, False, given
        try:
            while True:
                at = file.tell()
                data = file.read(_FEED if at < careful else 1)
                if not data:
                    if codec is not None:
                        raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                    return
                while data or not getattr(codec, "needs_input", True):
                    if codec is None:
                        if begun and compression == "gz":
                            data = data.lstrip(b"\0")  # padding
                        if not data:
                            break
                        if not magic.startswith(data[: len(magic)]):
                            raise OSError(f"Not a {'gzipped' if compression == 'gz' else 'zstd'} file ({data[:4]!r})")
                        codec, begun = new(), True
                    out = codec.decompress(data, _PIECE)
                    data = codec.unused_data if codec.eof else getattr(codec, "unconsumed_tail", b"")
                    if codec.eof:
                        codec = None
                    skipped = min(skip, len(out))
                    skip -= skipped
                    if len(out) > skipped:
                        given += len(out) - skipped
                        yield out[skipped:]
        except errors as error:
            if careful < END:
                raise OSError(str(error)) from None
            careful = at  # once more, and byte by byte through what was lost with the error


def _codec(compression: str) -> tuple[Callable[[], Any], type[Exception], bytes]:
    """What makes decompressors, the errors that they raise, and how their data begins."""
    if compression == "gz":
        return lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), zlib.error, b"\x1f\x8b"
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdDecompressor, zstd.ZstdError, b""
