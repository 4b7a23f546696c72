"""All documents of a reference as one flat array of token ids, built once and cached on disk.

Suffixes: D documents, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.config import DataConfig, DataError
from data_pipelines.sources import Documents
from data_pipelines.tokenizer import Tokenizer

_FORMAT = 1  # bump it when the same sources would give different tokens, so that no old cache is used
_BATCH_CHARACTERS = 1 << 20
Part = tuple[str, int, int]  # of a text, from start to stop


class Corpus:
    """Token ids of documents, memory-mapped.

    Attributes:
        tokens_T: uint32 ids, the documents end to end; document d is `tokens_T[offsets[d] : offsets[d + 1]]`.
        offsets: int64, D + 1.
        hash_D: uint64, of each document's text; equal texts have equal hashes.
        counts: how many documents were of each kind in `sources.COUNTS`.
        fingerprint: hex digest of the arrays above; the same corpus has the same one on every machine.
    """

    def __init__(self, directory: Path):
        """Opens what `tokenised` wrote. Raises DataError if it is incomplete."""
        self.directory = directory
        try:
            self.tokens_T = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
            self.offsets = np.load(directory / "offsets.npy", allow_pickle=False)
            self.hash_D = np.load(directory / "hashes.npy", allow_pickle=False)
            about = json.loads((directory / "about.json").read_bytes())
            self.counts: Counter[str] = Counter(about["counts"])
            self.fingerprint: str = about["fingerprint"]
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise DataError(f"the token cache {directory} is damaged ({error}); delete it") from error

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path]]:
        return Corpus, (self.directory,)  # a pickled memory map would copy its data to every worker


def tokenised(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path | None = None) -> Corpus:
    """The corpus of a reference, from the cache or newly built.

    A document is [bos, if the tokenizer adds it] + its tokens + [the end-of-document token]. The cache is
    in `cache_dir`, else `$FORETHOUGHT_CACHE`, else `~/.cache/forethought`; it is rebuilt when a file's
    name, size or modification time changes. Raises DataError for broken or empty sources, an unknown
    end-of-document token, or a cache that cannot be written.
    """
    end_id = end_of_document(config, tokenizer)
    documents = Documents(config)
    root = cache_dir or Path(os.environ.get("FORETHOUGHT_CACHE") or "~/.cache/forethought").expanduser()
    files = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in documents.files]
    reading = (config.reference, config.text_field, config.skip_broken, config.max_document_characters)
    encoding = (tokenizer.fingerprint, tokenizer.control_ids, tokenizer.add_bos, tokenizer.bos_id, end_id)
    key = hashlib.sha256(json.dumps([_FORMAT, files, reading, encoding]).encode()).hexdigest()
    directory = root / "corpora" / key
    if not directory.exists():
        _make(directory, documents, tokenizer, end_id)
    return Corpus(directory)


def end_of_document(config: DataConfig, tokenizer: Tokenizer) -> int:
    """The id of the token that ends every document. Raises DataError if the tokenizer lacks it."""
    token = config.end_of_document
    end_id = tokenizer.eos_id if token is None else tokenizer.token_id(token)
    if end_id is None:
        lacks = "has no eos token" if token is None else f"has no token {token!r}"
        raise DataError(f"the tokenizer {lacks}; set data.end_of_document to a token in its vocabulary")
    return end_id


def _make(directory: Path, documents: Documents, tokenizer: Tokenizer, end_id: int) -> None:
    """Writes a corpus under a temporary name, then renames it, so that no directory is ever incomplete."""
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, documents, tokenizer, end_id)
        temporary.rename(directory)
    except OSError as error:
        if not directory.exists():  # else another process finished first, with the same result
            raise DataError(
                f"the token cache {directory.parent} cannot be written ({error}); free up space, or set "
                "FORETHOUGHT_CACHE to another directory"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(directory: Path, documents: Documents, tokenizer: Tokenizer, end_id: int) -> None:
    counts = documents.counts
    before = np.array([tokenizer.bos_id] if tokenizer.add_bos else [], "<u4")
    after = np.array([end_id], "<u4")
    digest = hashlib.sha256()
    offsets, hashes = [0], []
    with (directory / "tokens.npy").open("wb") as file:
        _header(file, 0)
        for text, ids in _encoded(documents, tokenizer):
            if not len(ids):  # the normaliser removed everything
                counts["empty"] += 1
                continue
            data = np.concatenate([before, ids, after]).tobytes()
            file.write(data)
            digest.update(data)
            offsets.append(offsets[-1] + len(data) // 4)
            hashes.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
            counts["documents"] += 1
            counts["control_text"] += tokenizer.has_control_text(text)
        file.seek(0)
        _header(file, offsets[-1])
    if not counts["documents"]:
        found = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing"
        raise DataError(f"{documents.config.reference!r} has no usable documents ({found}); choose other data")
    for name, array in (("offsets", np.array(offsets, "<i8")), ("hashes", np.array(hashes, "<u8"))):
        np.save(directory / f"{name}.npy", array, allow_pickle=False)
        digest.update(array.tobytes())
    about = {"fingerprint": digest.hexdigest(), "reference": documents.config.reference, "counts": counts}
    (directory / "about.json").write_text(json.dumps(about, indent=2))


def _header(file: BinaryIO, length: int) -> None:
    """Writes a `.npy` header for uint32s; numpy pads it, so its size does not depend on the length."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<u4", "fortran_order": False, "shape": (length,)})


def _encoded(documents: Documents, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each text with its token ids, uint32, encoding many parts at a time to use the tokenizer's threads.

    The tokenizer takes some hundred bytes for a token, so that a long text must not be encoded in one go.
    """
    done: list[np.ndarray] = []
    for batch in _batches(_parts(documents)):
        encoded = tokenizer.encode([text[start:stop] for text, start, stop in batch])
        for (text, _, stop), ids in zip(batch, encoded, strict=True):
            done.append(np.array(ids, dtype="<u4"))
            if stop == len(text):
                documents.counts["enormous"] += len(done) > 1
                yield text, np.concatenate(done)
                done = []


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    characters = 0
    for text, start, stop in parts:
        if batch and characters + stop - start > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append((text, start, stop))
        characters += stop - start
    if batch:
        yield batch


def _parts(documents: Documents) -> Iterator[Part]:
    """Cuts texts into parts of at most `max_document_characters`, before whitespace where possible."""
    limit = documents.config.max_document_characters
    for _, text in documents:
        start = 0
        while len(text) - start > limit:
            cut = max(text.rfind(space, start + 1, start + limit + 1) for space in " \n\t")
            stop = cut if cut > start else start + limit
            yield text, start, stop
            start = stop
        yield text, start, len(text)
