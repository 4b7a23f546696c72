"""Every format and compression, read from any place, damaged anywhere, and far too large."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import tarfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines import DataConfig, DataError, Documents, readers
from data_pipelines.readers import END, Reading, blocks, read
from data_pipelines.shards import Block, Place, Row, Shard
from tests.data_pipelines.servers import serving

try:
    from compression import zstd
except ImportError:
    from backports import zstd

COMPRESSIONS = {"": bytes, "gz": gzip.compress, "zst": zstd.compress}
ROWS = [{"text": f"document {n} " + "grün " * (n % 40), "n": n} for n in range(200)]
TEXTS = [str(row["text"]) for row in ROWS]
SKIP = Reading(skip_broken=True)


def raises(error: DataError) -> None:
    raise error


def jsonl(rows=ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0).encode() + b"\n" for row in rows)


def parquet(rows=ROWS, group: int = 30, **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out, row_group_size=group, **options)
    return out.getvalue()


def tar(members, format: int = tarfile.PAX_FORMAT) -> bytes:
    """members: TarInfo or name, and content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as file:
        for info, content in members:
            info = info if isinstance(info, tarfile.TarInfo) else tarfile.TarInfo(info)
            info.size = info.size or len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def samples(rows=ROWS):
    """Each with an image, the number as JSON and, compressed or not, the text."""
    for row in rows:
        n, text = int(row["n"]), str(row["text"]).encode()
        suffix = ["txt", "txt.gz", "TXT.zst"][n % 3]
        yield f"part/{n:04d}.jpg", b"\xff" * (37 * n)
        yield f"part/{n:04d}.json", json.dumps({"text": "a caption", "n": n}).encode()
        yield f"part/{n:04d}.{suffix}", COMPRESSIONS[suffix[4:]](text)


CONTENT = {
    "jsonl": jsonl(),
    "json": json.dumps(ROWS).encode(),
    "lines.json": jsonl(),
    "parquet": parquet(),
    "tar": tar(samples()),
}
FORMATS = {"jsonl": "jsonl", "json": "jsonl", "lines.json": "jsonl", "parquet": "parquet", "tar": "tar", "txt": "text"}
KINDS = [(name, compression) for name in CONTENT for compression in COMPRESSIONS if (name, compression) != ("parquet",)]
KINDS = [kind for kind in KINDS if kind[0] != "parquet" or not kind[1]]


def shard(place: Path | str, name: str, compression: str = "") -> Shard:
    suffix = f".{compression}" if compression else ""
    return Shard(f"x.{name}{suffix}", str(place), FORMATS[name], compression)  # type: ignore[arg-type]


def rows_of(shard: Shard, reading: Reading = Reading(), expect=raises) -> list[Row]:  # noqa: B008
    return [row for block in blocks(shard, reading.patience, expect) for row, _ in read(shard, block, reading)]


def texts_of(shard: Shard, reading: Reading = SKIP) -> list[str]:
    return [row.text for row in rows_of(shard, reading) if row.text is not None]


def counts(rows: list[Row]) -> dict[str, int]:
    notes = [note for row in rows for note in row.notes]
    return {note: notes.count(note) for note in sorted(set(notes))}


@pytest.mark.parametrize(("name", "compression"), KINDS)
@pytest.mark.parametrize("over_http", [False, True], ids=["local", "http"])
def test_the_same_rows_from_every_place(tmp_path, monkeypatch, name, compression, over_http):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 5000)
    data = COMPRESSIONS[compression](CONTENT[name])
    (tmp_path / "x").write_bytes(data)
    with serving({"x": data}) as server:
        where = shard(server.url("x") if over_http else tmp_path / "x", name, compression)
        for reading in (Reading(), Reading(fields=True)):
            found = []
            for block in blocks(where, 5, raises):
                whole = list(read(where, block, reading))
                assert block.rows in (None, len(whole))
                assert [after.rows for _, after in whole] == list(range(1, len(whole) + 1))
                for n in range(0, len(whole), 20 if over_http or name == "tar" else 1):
                    assert list(read(where, block, reading, whole[n][1])) == whole[n + 1 :]
                found += [row for row, _ in whole]
            assert [row.text for row in found] == TEXTS
            assert [row.size for row in found] == [len(text.encode()) for text in TEXTS]
            assert [row.fields.get("n") for row in found] == (
                [row["n"] for row in ROWS] if reading.fields else [None] * 200
            )
            assert len({row.name for row in found}) == 200
            assert not any(row.notes for row in found)


@pytest.mark.parametrize(("name", "compression"), KINDS)
def test_each_row_is_of_one_stripe(tmp_path, name, compression):
    """Broken ones too, and from the place behind any other; rows of other stripes are not parsed."""
    damaged = bytearray(CONTENT[name])
    for at in range(3000, len(damaged) - 3000, 9000):
        damaged[at : at + 600] = b"#" * 600
    (tmp_path / "x").write_bytes(COMPRESSIONS[compression](bytes(damaged)))
    where = shard(tmp_path / "x", name, compression)
    for block in blocks(where, 5, lambda error: None):
        whole = list(read(where, block, SKIP))
        stripes = [replace(block, stripe=stripe, stripes=3) for stripe in range(3)]
        parts = [list(read(where, stripe, SKIP)) for stripe in stripes]
        assert [part for n in range(len(whole)) for part in parts[n % 3][n // 3 : n // 3 + 1]] == whole
        for stripe, part in zip(stripes, parts, strict=True):
            for n in range(0, len(part), 10):
                assert list(read(where, stripe, SKIP, part[n][1])) == part[n + 1 :]


def test_parquet_and_jsonl_have_many_blocks_found_without_reading_rows(tmp_path):
    (tmp_path / "x.parquet").write_bytes(CONTENT["parquet"])
    sizes = [30] * 6 + [20]
    assert blocks(shard(tmp_path / "x.parquet", "parquet"), 1, raises) == [
        Block(n, n + 1, size) for n, size in enumerate(sizes)
    ]
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.truncate(20 * 2**20)  # nothing but NULs: it is not read
    found = blocks(shard(tmp_path / "x.jsonl", "jsonl"), 1, raises)
    assert found == [Block(0, 2**23), Block(2**23, 2**24), Block(2**24, 20 * 2**20)]


def test_tars_and_jsonl_seek_over_http():
    """Reading from the middle does not fetch what precedes it."""
    for name, place in (("jsonl", Place(5, 400_000)), ("tar", Place(5, 512 * 800))):
        data = CONTENT[name] + bytes(1_000_000)
        with serving({"x": data}) as server:
            where = shard(server.url("x"), name)
            next(read(where, Block(0, len(data)), SKIP, place))
            assert [asked[1] for asked in server.asked if asked[1] != "bytes=0-0"] == [f"bytes={place.at}-"]


def test_a_server_that_goes_away_is_no_damage(tmp_path):
    """Skipping what is broken must not make data depend on the network."""
    for name in ("jsonl", "parquet", "tar", "json"):
        with serving({"x": CONTENT[name]}) as server:
            where = shard(server.url("x"), name)
            (block, *_) = blocks(where, 5, raises)
            server.always = 503
            with pytest.raises(DataError, match=r"has sent nothing for .* s \(503"):
                list(read(where, block, replace(SKIP, patience=0.1)))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_of_jsonl_have_every_line_once(tmp_path, monkeypatch, data):
    size = data.draw(st.integers(1, 40))
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    # Lengths that put line ends on, before and behind the borders.
    lines = data.draw(st.lists(st.integers(0, 2 * size), max_size=12))
    content = b"\n".join(b'{"text":"%d %s"}' % (n, b"x" * length) for n, length in enumerate(lines))
    (tmp_path / "x.jsonl").write_bytes(content + data.draw(st.sampled_from([b"", b"\n"] if lines else [b""])))
    found = texts_of(shard(tmp_path / "x.jsonl", "jsonl"), Reading())
    assert found == [f"{n} {'x' * length}" for n, length in enumerate(lines)]


# Damage


def write(tmp_path: Path, name: str, compression: str, data: bytes) -> Shard:
    (tmp_path / "x").write_bytes(data)
    return shard(tmp_path / "x", name, compression)


def lost(where: Shard, reading: Reading = SKIP) -> set[int]:
    """Numbers of the documents that are not read as they were."""
    rows = rows_of(where, reading, expect=lambda error: None)
    assert not [row for row in rows if row.text is None and not row.notes]
    with contextlib.suppress(DataError):
        strict = rows_of(where, Reading())
        # With nothing broken there is no error either.
        assert [row.text for row in strict] == [row.text for row in rows]
    return {n for n, text in enumerate(TEXTS) if text not in {row.text for row in rows}}


damages = st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=64), st.booleans())
property_test = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damage(data: bytes, where: float, by: bytes, cut: bool, end: int | None = None) -> tuple[bytes, int, int]:
    """Bytes overwritten, or all cut off behind; with the first and the last byte that differ."""
    start = int(where * (len(data) if end is None else end))
    if cut:
        return data[:start], start, len(data)
    stop = min(start + len(by), len(data))
    return data[:start] + by[: stop - start] + data[stop:], start, stop


@given(damages)
@property_test
def test_damaged_jsonl_loses_the_damaged_lines(tmp_path, how):
    data, start, stop = damage(CONTENT["jsonl"], *how)
    ends = [n for n, byte in enumerate(CONTENT["jsonl"]) if byte == 10]
    touched = {n for n, (a, b) in enumerate(zip([-1, *ends], ends, strict=False)) if start <= b and stop > a}
    assert lost(write(tmp_path, "jsonl", "", data)) <= touched


def spans_of_samples(data: bytes) -> list[tuple[int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        members = file.getmembers()
    starts = [member.offset for member in members[::3]]
    return list(zip(starts, [*starts[1:], len(data)], strict=True))


@given(damages)
@property_test
def test_a_damaged_tar_loses_the_damaged_samples(tmp_path, how):
    data, start, stop = damage(CONTENT["tar"], *how)
    touched = {n for n, (a, b) in enumerate(spans_of_samples(CONTENT["tar"])) if start < b and stop > a}
    assert lost(write(tmp_path, "tar", "", data)) <= touched


@given(damages)
@property_test
def test_damaged_parquet_loses_the_damaged_row_groups(tmp_path, how):
    content = CONTENT["parquet"]
    footer = pq.ParquetFile(io.BytesIO(content)).metadata
    starts = [footer.row_group(n).column(0).dictionary_page_offset for n in range(footer.num_row_groups)]
    where, by, _ = how
    data, start, stop = damage(content, where, by, False, end=len(content) - footer.serialized_size - 8 - len(by))
    bounds = list(zip(starts, [*starts[1:], len(content)], strict=True))
    touched = {
        n for group, (a, b) in enumerate(bounds) if start < b and stop > a for n in range(30 * group, 30 * group + 30)
    }
    assert lost(write(tmp_path, "parquet", "", data)) <= touched


@given(damages)
@property_test
def test_damaged_anywhere_parquet_is_an_error_or_is_read(tmp_path, how):
    data, _, _ = damage(CONTENT["parquet"], *how)
    lost(write(tmp_path, "parquet", "", data))


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("name", ["jsonl", "tar", "json"])
@given(damages)
@property_test
def test_damaged_compression_loses_nothing_before_the_damage(tmp_path, name, compression, how):
    content = CONTENT[name]
    packed = COMPRESSIONS[compression](content)
    data, start, _ = damage(packed, *how)
    before = readable(packed[:start], compression)
    gone = lost(write(tmp_path, name, compression, data))
    if name == "jsonl":
        whole = content[:before].count(b"\n")
    else:
        whole = sum(b <= before for _, b in spans_of_samples(content)) if name == "tar" else 0
    assert not {n for n in gone if n < whole}


def readable(packed: bytes, compression: str) -> int:
    """How many bytes a decompressor gives for the beginning of a file."""
    codec = zstd.ZstdDecompressor() if compression == "zst" else readers._codec("gz")[0]()
    return len(codec.decompress(packed)) if packed else 0


def test_members_of_tars_that_are_not_read(tmp_path, caplog):
    link, pickle = tarfile.TarInfo("b.txt"), b"cos\nsystem\n(S'touch /tmp/owned'\ntR."
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("c.txt")
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.txt"
    members = [
        ("/etc/a.txt", b"absolute"),
        ("../../b.txt", b"outside"),
        (link, b""),
        (hard, b""),
        ("d.pyd", pickle),
        ("e.pkl", pickle),
        ("e.txt", b"beside a pickle"),
        ("__meta__/f.txt", b"about the tar"),
        (".hidden", b"no key"),
        ("g.json", b'{"body": "from its field", "id": 3}'),
        ("h\xff\ud83d\n.txt".encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"), b"named oddly"),
        ("i.txt", b"first"),
        ("i.txt", b"second of the same name"),
        ("j.txt", b"nul \0"),
        ("k.txt", b"caf\xe9"),
    ]
    where = write(tmp_path, "tar", "", tar(members))
    rows = rows_of(where, Reading(text_field="body", fields=True))
    assert [(row.name.removeprefix("x.tar, sample "), row.text, row.notes) for row in rows if row.name.isascii()][
        :4
    ] == [
        ("/etc/a", "absolute", ()),
        ("../../b", "outside", ()),
        ("d", None, ("empty",)),
        ("e", "beside a pickle", ()),
    ]
    assert [row.text for row in rows][4:] == [
        "from its field",
        "named oddly",
        "first",
        "second of the same name",
        None,
        "caf\ufffd",
    ]
    assert rows[4].fields == {"__key__": "g", "id": 3}
    assert counts(rows) == {"binary": 1, "empty": 1, "not_utf8": 1}
    for row in rows:
        row.name.encode()


BROKEN_SAMPLES = {
    "json": ([("a.json", b"{")], r"x.tar, sample a is not valid JSON"),
    "field": ([("a.json", b'{"id": 1}')], r"x.tar, sample a has no field 'text', only \['id'\]; set data.text_field"),
    "gz": (
        [("a.txt.gz", gzip.compress(b"x" * 99)[:-9])],
        r"x.tar, sample a, txt.gz cannot be read \(Compressed file end",
    ),
    "zst": ([("a.txt.zst", b"no zstd")], r"x.tar, sample a, txt.zst cannot be read \("),
}


@pytest.mark.parametrize(("members", "message"), BROKEN_SAMPLES.values(), ids=BROKEN_SAMPLES)
def test_broken_samples(tmp_path, members, message):
    where = write(tmp_path, "tar", "", tar([*members, ("b.txt", b"after")]))
    with pytest.raises(DataError, match=rf"^{message}[^\n]*, or set data.skip_broken[^\n]*$"):
        rows_of(where)
    rows = rows_of(where, SKIP)
    assert ([row.text for row in rows], counts(rows)) == ([None, "after"], {"broken": 1})


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("damaged", ["header", "cut", "size"])
def test_a_damaged_header_or_a_cut_is_one_broken_row(tmp_path, damaged, compression):
    data = bytearray(CONTENT["tar"])
    begin, _ = spans_of_samples(CONTENT["tar"])[100]
    with tarfile.open(fileobj=io.BytesIO(CONTENT["tar"])) as file:
        member = file.getmembers()[302]
    texts = TEXTS[:100] + TEXTS[101:]
    if damaged == "header":
        data[begin + 20 : begin + 30] = b"0123456789"
        texts = TEXTS  # it is the image's
    elif damaged == "cut":
        data = data[: member.offset_data + 9]
        texts = TEXTS[:100]
    else:
        member.size = 10**9
        header = member.tobuf(tarfile.USTAR_FORMAT)
        data[member.offset : member.offset + 512] = header
        if compression:
            texts = TEXTS[:100]  # where it ends is not known
    where = write(tmp_path, "tar", compression, COMPRESSIONS[compression](bytes(data)))
    with pytest.raises(DataError, match=r"^x.tar[^\n]*; repair it, or set data.skip_broken"):
        rows_of(where)
    rows = rows_of(where, SKIP)
    assert [row.text for row in rows if row.text not in (None, "a caption")] == texts
    assert counts(rows).get("broken", counts(rows).get("oversized")) == 1


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("jsonl", b"", {}),
        ("json", b"", {}),
        ("json", b"[]", {}),
        ("json", b'[{"text": "x"}, 3, {"text": null}]', {"broken": 2}),
        ("json", b'[{"text": "x"}', {"broken": 1}),
        ("json", b'[{"text": "caf\xe9"}, {"text": "x"}]', {"not_utf8": 1}),
        ("tar", b"", {"broken": 1}),
        ("tar", b"not a tar", {"broken": 1}),
        ("tar", bytes(10240), {}),
        ("txt", b"", {"empty": 1}),
    ],
)
def test_empty_and_odd_files(tmp_path, name, data, expected):
    where = write(tmp_path, name, "", data)
    assert counts(rows_of(where, SKIP)) == expected
    if "broken" in expected:
        with pytest.raises(DataError, match=r"^x\."):
            rows_of(where)


@pytest.mark.parametrize(
    ("name", "content", "compression"),
    [("x.tgz", "tar", "gz"), ("x.tar.zst", "tar", "zst"), ("x.jsonl.zst", "jsonl", "zst"), ("x.json", "json", "")],
)
def test_random_access_reads_them_too(tmp_path, name, content, compression):
    (tmp_path / name).write_bytes(COMPRESSIONS[compression](CONTENT[content]))
    assert [text for _, text in Documents(DataConfig(reference=str(tmp_path / name)))] == TEXTS


def test_concatenated_archives_and_frames(tmp_path):
    two = [tar(samples(ROWS[:70])), tar(samples(ROWS[70:]))]
    assert texts_of(write(tmp_path, "tar", "", b"".join(two)), Reading()) == TEXTS
    for compression in ("gz", "zst"):
        for parts in (two, [CONTENT["tar"][:5000], CONTENT["tar"][5000:]]):
            data = b"".join(COMPRESSIONS[compression](part) for part in parts)
            assert texts_of(write(tmp_path, "tar", compression, data), Reading()) == TEXTS
    padded = gzip.compress(CONTENT["jsonl"]) + bytes(1000)
    assert texts_of(write(tmp_path, "jsonl", "gz", padded), Reading()) == TEXTS


def test_a_missing_file_and_an_unreadable_footer_are_counted_or_named(tmp_path):
    errors: list[DataError] = []
    assert blocks(write(tmp_path, "parquet", "", b"PAR1 and no more"), 1, errors.append) == []
    assert blocks(shard(tmp_path / "none", "jsonl"), 1, errors.append) == []
    assert [str(error).partition(" cannot be read")[0] for error in errors] == ["x.parquet", "x.jsonl"]
    with pytest.raises(DataError, match=r"^x.jsonl cannot be read \(.*No such file"):
        list(read(shard(tmp_path / "none", "jsonl"), Block(0, END), Reading()))


# Size


LIMIT = 2**20


def oversized(name: str, compression: str) -> bytes:
    big = 50 * 2**20
    if name == "tar":
        return tar(
            [("a.txt", b"before"), ("b.txt", b" " * big), ("c.txt.gz", gzip.compress(bytes(big))), ("d.txt", b"x")]
        )
    if name == "txt":
        return b"x" * big
    return b'{"text": "before"}\n{"text": "%s"}\n{"text": "x"}' % (b"y" * big)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["jsonl", "tar", "txt"])
def test_what_is_too_large_is_never_in_memory(tmp_path, name, compression):
    where = write(tmp_path, name, compression, COMPRESSIONS[compression](oversized(name, compression)))
    tracemalloc.start()
    rows = rows_of(where, Reading(max_document_bytes=LIMIT))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * LIMIT
    assert counts(rows) == {"oversized": 2 if name == "tar" else 1}
    assert [row.text for row in rows if row.text] == ([] if name == "txt" else ["before", "x"])


def test_lines_of_50_mb_are_read_below_the_cap(tmp_path):
    rows = rows_of(write(tmp_path, "jsonl", "", oversized("jsonl", "")))
    assert [row.size for row in rows] == [6, 50 * 2**20, 1]


def test_a_sparse_member_of_5_gb_takes_no_time(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        for name, size in (("a.txt", 1), ("b.txt", 5 * 2**30), ("c.jpg", 5 * 2**30), ("d.txt", 1)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(b"x" if size == 1 else b"")
            file.truncate(file.tell() + (511 if size == 1 else size))
            file.seek(0, 2)
    start = time.monotonic()
    rows = rows_of(shard(tmp_path / "x", "tar"))
    assert time.monotonic() - start < 1
    assert [row.text for row in rows] == ["x", None, None, "x"]
    assert counts(rows) == {"oversized": 1, "empty": 1}


def test_a_header_cannot_take_all_memory_or_turn_back(tmp_path):
    for size in (2**40, -512):
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE if size > 0 else tarfile.REGTYPE, size
        data = info.tobuf(tarfile.GNU_FORMAT) + tar([("a.txt", b"after")])
        rows = rows_of(write(tmp_path, "tar", "", data), SKIP)
        assert [row.text for row in rows] == [None, "after"]
    info = tarfile.TarInfo("b.txt")
    info.pax_headers = {"size": "-2048"}
    rows = rows_of(write(tmp_path, "tar", "", tar([(info, b"negative"), ("a.txt", b"after")])), SKIP)
    assert rows[-1].text == "after"


def test_reading_again_to_a_distant_place_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    line = json.dumps({"text": "x" * 2**20}).encode() + b"\n"
    where = write(tmp_path, "jsonl", "gz", gzip.compress(line * 70, 1))
    ((row, after),) = read(where, Block(0, END), Reading(), Place(69, 69))
    assert (row.name, after) == ("x.jsonl.gz, line 70", Place(70, 70))
    assert caplog.messages == ["x.jsonl.gz is read again to where it was left: 64 MiB so far"]
