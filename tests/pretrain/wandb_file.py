"""Reads wandb's offline files, for which wandb has no reader in Python any more: `run_and_rows`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record, RunRecord

BLOCK = 2**15
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _records(path: Path) -> Iterator[Record]:
    """A log as LevelDB has it (https://github.com/google/leveldb/blob/main/doc/log_format.md), after seven bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if kind not in (FULL, FIRST, MIDDLE, LAST) or at + 7 + length > len(data):
            return  # the process was killed as it wrote
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def run_and_rows(directory: Path) -> tuple[RunRecord, list[dict]]:
    """What the one offline file of a run directory says of the run, and the rows of its history."""
    (path,) = (directory / "wandb").glob("offline-run-*/*.wandb")
    found = list(_records(path))
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    return next(record.run for record in found if record.WhichOneof("record_type") == "run"), rows
