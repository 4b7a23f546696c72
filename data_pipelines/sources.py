"""Documents of a data reference, one at a time, always in the same order.

Whatever a document contains is handled and counted. What cannot be read as documents at all (invalid JSON, a
truncated file, a missing column) is a broken row or file: an error that names it or, with `skip_broken`,
skipped and counted. Nothing that is read is ever unpickled or executed.
"""

from __future__ import annotations

import ast
import gzip
import json
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from data_pipelines.config import DataConfig, DataError
from data_pipelines.finding import PYTHON_DOCS, find

# Folders inside the standard library's that are not part of it, or only test it.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

COUNTS = (
    "documents",  # contain text, whatever else is counted about them
    "empty",  # skipped: no text, or only whitespace
    "binary",  # skipped: contains NUL
    "not_utf8",  # read with U+FFFD in place of invalid bytes
    "enormous",  # longer than max_document_characters: tokenised in pieces
    "control_text",  # contains control tokens as text: read as ordinary text
    "broken",  # rows and files skipped because they cannot be read
)


class Documents:
    """The documents of a reference as `(name, text)`. Iterate once: `counts` is filled along the way.

    Attributes:
        files: the files to read, in order.
        counts: how many documents were of each kind in COUNTS.

    Raises DataError for a reference with nothing to read and, while iterating, for anything broken.
    """

    def __init__(self, config: DataConfig):
        self.config = config
        self.files = _python_docs_files() if config.reference == PYTHON_DOCS else _find(config)
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        if self.config.reference == PYTHON_DOCS:
            for name, docs in _python_docs(self.files):
                if text := self._text(docs):
                    yield name, text
            return
        for file in self.files:
            kind = Path(file.name.removesuffix(".gz")).suffix
            read = {".jsonl": self._jsonl, ".parquet": self._parquet}.get(kind, self._plain)
            try:
                yield from read(file)
            except (OSError, EOFError, zlib.error) as error:
                self._broken(str(file), f"cannot be read ({error})")

    def _plain(self, file: Path) -> Iterator[tuple[str, str]]:
        with _open(file) as stream:
            text = self._text(stream.read())
        if text:
            yield str(file), text

    def _jsonl(self, file: Path) -> Iterator[tuple[str, str]]:
        field = self.config.text_field
        with _open(file) as stream:
            for number, raw in enumerate(stream, start=1):
                name = f"{file}, line {number}"
                line = self._text(raw)
                if line is None:
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    self._broken(name, f"is not valid JSON ({error})")
                    continue
                if not isinstance(row, dict):
                    self._broken(name, "is not a JSON object")
                elif field not in row:
                    self._broken(name, f"has no field {field!r}, only {sorted(row)}", "set data.text_field")
                elif not isinstance(row[field], str):
                    self._broken(name, f"has no string in field {field!r}")
                elif text := self._text(row[field]):
                    yield name, text

    def _parquet(self, file: Path) -> Iterator[tuple[str, str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        field = self.config.text_field
        number = 0
        try:
            table = pq.ParquetFile(file)
            columns = table.schema_arrow.names
            if field not in columns:
                self._broken(str(file), f"has no column {field!r}, only {columns}", "set data.text_field")
                return
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                # As bytes: pyarrow assumes that string columns are UTF-8 but does not check.
                for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
                    number += 1
                    if raw is None:
                        self._broken(f"{file}, row {number}", f"has no string in column {field!r}")
                    elif text := self._text(raw):
                        yield f"{file}, row {number}", text
        except pa.ArrowException as error:
            self._broken(str(file), f"cannot be read ({error})")

    def _text(self, raw: bytes | str) -> str | None:
        """The text if it is a usable document or line, else None; counts what is wrong with it."""
        if (b"\0" if isinstance(raw, bytes) else "\0") in raw:  # type: ignore[operator]
            self.counts["binary"] += 1
            return None
        try:
            # A JSON string can escape half of a surrogate pair, which is not a character.
            text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw.encode().decode()
        except UnicodeError:
            self.counts["not_utf8"] += 1
            if isinstance(raw, str):
                text = raw.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            else:
                text = raw.decode("utf-8-sig", "replace")
        if not text.strip():
            self.counts["empty"] += 1
            return None
        return text

    def _broken(self, where: str, what: str, way_out: str = "repair it") -> None:
        if not self.config.skip_broken:
            what = " ".join(what.split())  # libraries' messages may span lines
            raise DataError(f"{where} {what}; {way_out}, or set data.skip_broken to skip what is broken")
        self.counts["broken"] += 1


def _open(file: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def _find(config: DataConfig) -> list[Path]:
    shards = find(config, patience=config.patience).shards
    for shard in shards:
        if (
            shard.is_remote
            or shard.format == "tar"
            or shard.compression == "zst"
            or ".json" in Path(shard.name).suffixes
        ):
            raise DataError(f"{shard.name} can only be streamed; set data.stream to true")
    return [Path(shard.place) for shard in shards]


def _python_docs_files() -> list[Path]:
    root = _standard_library()
    return sorted(file for file in root.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(root).parts))


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _python_docs(files: list[Path]) -> Iterator[tuple[str, str]]:
    """The language reference by topic, then the docstrings of the standard library's source, by module."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in others' strings
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):  # a template, not a module of this Python
                continue
        parts = file.relative_to(_standard_library()).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = "\n\n".join(f"{name}\n{docstring}" for name, docstring in _docstrings(tree, module))
        if text:
            yield module, text


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of a module, class or function and everything in it, in order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif not isinstance(child, ast.expr):
            yield from _docstrings(child, name)
