"""What a source consists of: shards, blocks that can be read on their own, and digests of what the shards contain."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from data_pipelines import lab
from data_pipelines.cache import cache_directory, write_whole
from data_pipelines.config import DataConfig, DataError, DataUnreachable, SourceConfig
from data_pipelines.finding import find
from data_pipelines.lab import LabConfig
from data_pipelines.readers import blocks
from data_pipelines.remote import open_shard
from data_pipelines.shards import Block, Shard
from data_pipelines.sources import PYTHON_DOCS, Documents

_FORMAT = 1  # bump it when the same shards would give other blocks, so that no old cache is used
_EDGE = 4096  # bytes at the beginning and end of a shard that its digest covers
_AT_ONCE = 16  # shards that are looked at concurrently


@dataclass(frozen=True)
class Manifest:
    """shards: in the order of the reference. blocks: (number of a shard, part of it), shard by shard. digests: of each
    shard's size and edges, 12 hex digits. counts: what was skipped in finding blocks. revision: of a hub dataset."""

    shards: tuple[Shard, ...]
    blocks: tuple[tuple[int, Block], ...]
    digests: tuple[str, ...]
    counts: Counter[str]
    revision: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of the shards' order and contents, wherever they lie and whatever they are called."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    @property
    def rows(self) -> int | None:
        """Rows of all blocks, where the files say so."""
        rows = [block.rows for _, block in self.blocks]
        return None if None in rows else sum(rows)  # type: ignore[arg-type]


def manifest(
    source: SourceConfig, config: DataConfig, revision: str | None = None, cache_dir: Path | None = None
) -> Manifest:
    """The manifest of a source; that of local files and pinned hub datasets is kept in the cache.

    revision: a hub dataset's commit, if it was pinned before. Raises DataError.
    """
    if source.is_lab:
        # Endless: every lane generates every L-th document.
        what = json.dumps([lab.VERSION, asdict(LabConfig.parse(source.reference))])
        shard = Shard(source.reference, source.reference, "text")
        digest = hashlib.sha256(what.encode()).hexdigest()[:12]
        return Manifest((shard,), ((0, Block(0, 0)),), (digest,), Counter())
    if source.reference == PYTHON_DOCS:
        source = source.model_copy(update={"reference": str(_python_docs(cache_directory(cache_dir)))})
    found = find(source, revision, config.patience)
    shards = tuple(found.shards)
    known = [_known(shard, found.revision) for shard in shards]
    settings = (source.text_field, source.filter is not None, config.skip_broken)
    what = json.dumps([_FORMAT, [astuple(s) for s in shards], known, settings])
    path = cache_directory(cache_dir) / "manifests" / f"{hashlib.sha256(what.encode()).hexdigest()}.json"
    keep = all(k is not None for k in known)
    if keep and path.exists():
        kept = json.loads(path.read_bytes())
        parts = [(number, Block(*block)) for number, *block in kept["blocks"]]
        return Manifest(shards, tuple(parts), tuple(kept["digests"]), Counter(kept["counts"]), found.revision)

    def look(shard: Shard) -> tuple[list[Block], str, int]:
        broken = 0

        def skip(error: DataError) -> None:
            nonlocal broken
            if not config.skip_broken:
                raise error
            broken += 1

        return blocks(shard, config.patience, skip), _digest(shard, config.patience, skip), broken

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looks = list(pool.map(look, shards))
    parts = [(number, block) for number, (found_blocks, _, _) in enumerate(looks) for block in found_blocks]
    counts = Counter(broken=sum(broken for _, _, broken in looks))
    made = Manifest(shards, tuple(parts), tuple(digest for _, digest, _ in looks), counts, found.revision)
    if keep:
        rows = [(number, block.start, block.stop, block.rows) for number, block in made.blocks]
        kept = json.dumps({"blocks": rows, "digests": made.digests, "counts": counts}).encode()
        write_whole(path, lambda file: file.write(kept))
    return made


def _known(shard: Shard, revision: str | None) -> object:
    """What changes when a shard does, without opening it; None where nothing tells."""
    if shard.is_remote:
        return revision
    try:
        stat = os.stat(shard.place)
    except OSError as error:
        raise DataError(f"{shard.name} cannot be read ({error.strerror}); restore it") from None
    return stat.st_size, stat.st_mtime_ns


def _digest(shard: Shard, patience: float, skip: Callable[[DataError], None]) -> str:
    try:
        with open_shard(shard, patience) as file:
            first = file.read(_EDGE)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _EDGE, 0))
            last = file.read(_EDGE)
    except DataUnreachable:
        raise  # never skipped: the data would depend on the network
    except DataError as error:
        skip(error)
        return "0" * 12
    except OSError as error:
        skip(DataError(f"{shard.name} cannot be read ({error}); restore it, or set data.skip_broken to skip it"))
        return "0" * 12
    return hashlib.sha256(b"%d" % size + first + last).hexdigest()[:12]


def _python_docs(cache: Path) -> Path:
    """Python's documentation as a jsonl file in the cache."""
    documents = Documents(DataConfig(reference=PYTHON_DOCS))
    files = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in documents.files]
    path = cache / "python-docs" / f"{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        lines = [json.dumps({"text": text}).encode() + b"\n" for _, text in documents]
        write_whole(path, lambda file: file.writelines(lines))
    return path
