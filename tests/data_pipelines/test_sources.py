import gzip
import json
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import DataConfig, DataError
from data_pipelines.sources import COUNTS, Documents


def read(reference, **settings) -> tuple[list[str], dict[str, int]]:
    """The texts of a reference, and those counts that are not 0."""
    documents = Documents(DataConfig(reference=str(reference), **settings))
    texts = [text for _, text in documents]
    assert set(documents.counts) == set(COUNTS)
    return texts, {name: count for name, count in documents.counts.items() if count}


def jsonl(*rows: object) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def test_kinds_of_files_and_their_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": "four"})))
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "one", "id": 1}, {"text": "two"}))
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# three\r\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("fünf".encode()))
    (tmp_path / "d.png").write_bytes(b"not text")
    pq.write_table(pa.table({"n": [1, 2], "text": ["six", "seven"]}), tmp_path / "e.parquet")
    every = ["one", "two", "# three\r\n", "four", "fünf", "six", "seven"]
    assert read(tmp_path) == (every, {})
    assert read(tmp_path / "**" / "*") == (every, {})
    assert read(tmp_path / "*.jsonl") == (every[:2], {})
    assert read(tmp_path / "c.txt.gz") == (["fünf"], {})
    names = [name for name, _ in Documents(DataConfig(reference=str(tmp_path / "a.jsonl")))]
    assert names == [f"{tmp_path}/a.jsonl, line 1", f"{tmp_path}/a.jsonl, line 2"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x", "ÿ"], pa.large_string()),
        pa.array(["x", "ÿ"]).dictionary_encode(),
        pa.array(["x", "ÿ"], pa.binary()),
    ],
    ids=["large_string", "dictionary", "binary"],
)
def test_parquet_column_types(tmp_path, column):
    pq.write_table(pa.table({"body": column}), tmp_path / "x.parquet")
    assert read(tmp_path, text_field="body") == (["x", "ÿ"], {})


def test_bad_text_is_counted_and_never_fatal(tmp_path):
    rows = [
        {"text": "good"},
        {"text": ""},
        {"text": " \n\t"},
        b"\n",
        {"text": "nul \0 byte"},
        b'{"text": "raw nul \0"}\n',
        b'{"text": "latin \xe9"}\n',
        {"text": "half a pair \ud83d and a whole \ud83d\ude00"},
    ]
    (tmp_path / "x.jsonl").write_bytes(jsonl(*rows))
    assert read(tmp_path) == (
        ["good", "latin \ufffd", "half a pair \ufffd and a whole \U0001f600"],
        {"empty": 3, "binary": 2, "not_utf8": 2},
    )


@pytest.mark.parametrize(
    ("content", "texts", "counts"),
    [
        (b"caf\xe9", ["caf\ufffd"], {"not_utf8": 1}),
        ("UTF-16 is binary".encode("utf-16"), [], {"binary": 1}),
        (b"\n\n", [], {"empty": 1}),
        (b"", [], {"empty": 1}),
    ],
)
def test_bad_text_files(tmp_path, content, texts, counts):
    (tmp_path / "x.txt").write_bytes(content)
    assert read(tmp_path) == (texts, counts)


def test_parquet_strings_that_are_not_utf8(tmp_path):
    column = pa.array([b"caf\xe9", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert read(tmp_path) == (["caf\ufffd", "fine"], {"not_utf8": 1})


TRUNCATED = gzip.compress(jsonl(*({"text": f"row {n} {n**50}"} for n in range(2000))))[:-4000]
BROKEN_ROWS = {
    "no field": (
        {"body": "x", "id": 1},
        r"x.jsonl, line 2 has no field 'text', only \['body', 'id'\]; set data.text_field",
    ),
    "number": ({"text": 1}, r"x.jsonl, line 2 has no string in field 'text'; repair it"),
    "null": ({"text": None}, r"x.jsonl, line 2 has no string"),
    "list": (["text"], r"x.jsonl, line 2 is not a JSON object"),
    "invalid": (b'{"text": "x"\n', r"x.jsonl, line 2 is not valid JSON \(Expecting"),
    "nested": (
        b'{"text": ' + b"[" * 100_000 + b"\n",
        r"x.jsonl, line 2 is not valid JSON \(maximum recursion",
    ),
}


@pytest.mark.parametrize(("row", "message"), BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_broken_row(tmp_path, row, message):
    (tmp_path / "x.jsonl").write_bytes(jsonl({"text": "before"}, row, {"text": "after"}))
    with pytest.raises(DataError, match=rf"{message}[^\n]*, or set data.skip_broken[^\n]*$"):
        read(tmp_path)
    assert read(tmp_path, skip_broken=True) == (["before", "after"], {"broken": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl.gz", TRUNCATED, r"x.jsonl.gz cannot be read \(Compressed file ended"),
        ("x.txt.gz", TRUNCATED, r"x.txt.gz cannot be read \(Compressed file ended"),
        ("x.txt.gz", b"not gzip", r"x.txt.gz cannot be read \(Not a gzipped file"),
        ("x.txt.gz", TRUNCATED[:50] + b"\0\xff" * 50, r"x.txt.gz cannot be read \(Error"),
        ("x.parquet", b"PAR1 is how it begins", r"x.parquet cannot be read \(Parquet magic"),
        ("x.parquet", b"", r"x.parquet cannot be read \(Parquet file size is 0"),
    ],
)
def test_broken_file(tmp_path, name, content, message):
    (tmp_path / "z.txt").write_text("another file")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{message}[^\n]*; repair it, or set data.skip_broken[^\n]*$"):
        read(tmp_path)
    texts, counts = read(tmp_path, skip_broken=True)
    assert texts[-1] == "another file"
    assert counts == {"broken": 1}


def test_rows_before_a_truncation_are_kept(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(TRUNCATED)
    texts, _ = read(tmp_path, skip_broken=True)
    assert len(texts) > 100
    assert texts == [f"row {n} {n**50}" for n in range(len(texts))]


@pytest.mark.parametrize(
    ("table", "message", "kept"),
    [
        ({"body": ["x"]}, r"x.parquet has no column 'text', only \['body'\]; set data.text_field", []),
        ({"text": [1, 2]}, r"x.parquet cannot be read \(Unsupported cast", []),
        ({"text": ["x", None, "y"]}, r"x.parquet, row 2 has no string in column 'text'", ["x", "y"]),
    ],
)
def test_broken_parquet(tmp_path, table, message, kept):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    assert read(tmp_path, skip_broken=True) == (kept, {"broken": 1})


@pytest.mark.parametrize("reference", ["python-dogs", "absent/*.jsonl"])
def test_unknown_reference_says_what_is_accepted(reference):
    with pytest.raises(DataError, match=r"neither a known name nor an existing path; accepted: python-docs, .*\.jsonl"):
        read(reference)


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "b.TXT", "c.json", "d.csv", ".hidden.txt", ".git/e.md", ".git/config"):
        (tmp_path / name).write_text("words")
    for _ in range(2):
        assert read(tmp_path) == (["words"], {})
    (message,) = caplog.messages
    assert message.startswith(f"not read: {tmp_path}/b.TXT, {tmp_path}/c.json, {tmp_path}/d.csv; only .txt .md")


def test_folder_without_readable_files(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    for reference in (tmp_path, tmp_path / "x.csv"):
        with pytest.raises(DataError, match=r"matches no file of a supported type; accepted: .*\.parquet"):
            read(reference)


def test_python_docs_come_from_source_text_alone(monkeypatch, tmp_path):
    """Side effects of a module would show if it were imported."""
    (tmp_path / "package").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text('"""Tests are no documentation."""')
    (tmp_path / "template.py").write_text("this is not Python")
    (tmp_path / "undocumented.py").write_text("x = 1")
    (tmp_path / "package" / "__init__.py").write_text(
        '"""Of the package \\d."""\nraise SystemExit\nclass A:\n    """Of A."""\n    if True:\n'
        '        async def f(self):\n            """Of f.\n\n            More.\n            """\n'
    )
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = Documents(DataConfig(reference="python-docs"))
    package = "package\nOf the package \\d.\n\npackage.A\nOf A.\n\npackage.A.f\nOf f.\n\nMore."
    assert list(documents) == [*sorted(topics.items()), ("package", package)]
    assert [file.name for file in documents.files] == ["__init__.py", "template.py", "undocumented.py"]
