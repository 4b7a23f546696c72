"""Documents of a data reference, one at a time, always in the same order.

Whatever a document contains is handled and counted. What cannot be read as documents at all (invalid JSON, a
truncated file, a missing column) is a broken row or file: an error that names it or, with `skip_broken`,
skipped and counted. Nothing that is read is ever unpickled or executed.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipelines.config import DataConfig, DataError
from data_pipelines.finding import PYTHON_DOCS, find
from data_pipelines.readers import END, Reading, of_text, read
from data_pipelines.shards import Block, Row, Shard

# Folders inside the standard library's that are not part of it, or only test it.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

COUNTS = (
    "documents",  # contain text, whatever else is counted about them
    "empty",  # skipped: no text, or only whitespace
    "binary",  # skipped: contains NUL
    "not_utf8",  # read with U+FFFD in place of invalid bytes
    "enormous",  # longer than max_document_characters: tokenised in pieces
    "control_text",  # contains control tokens as text: read as ordinary text
    "oversized",  # skipped: larger than max_document_bytes
    "filtered",  # dropped by a source's filter
    "duplicate",  # dropped: its window of a stream had the same text before
    "held_out",  # of a stream: kept for evaluation
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
        self.shards = [] if config.reference == PYTHON_DOCS else _find(config)
        self.files = [Path(shard.place) for shard in self.shards] or _python_docs_files()
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for row in self._rows():
            self.counts.update(row.notes)
            if row.text is not None:
                yield row.name, row.text

    def _rows(self) -> Iterator[Row]:
        reading = Reading(
            text_field=self.config.text_field,
            skip_broken=self.config.skip_broken,
            max_document_bytes=self.config.max_document_bytes,
        )
        if self.config.reference == PYTHON_DOCS:
            for name, docs in _python_docs(self.files):
                yield of_text(name, docs, reading)
        for shard in self.shards:
            for row, _ in read(shard, Block(0, END), reading):
                yield row


def _find(config: DataConfig) -> list[Shard]:
    shards = find(config, patience=config.patience).shards
    for shard in shards:
        if shard.is_remote:
            raise DataError(f"{shard.name} can only be streamed; set data.stream to true")
    return [replace(shard, name=shard.place) for shard in shards]


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
