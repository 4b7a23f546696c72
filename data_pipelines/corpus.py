"""All documents of a reference as one flat array of token ids, built once and cached on disk.

Suffixes: D documents, T tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.cache import cache_directory
from data_pipelines.config import DataConfig, DataError
from data_pipelines.encoding import Encoder, text_hash
from data_pipelines.sources import Documents
from data_pipelines.tokenizer import Tokenizer

_FORMAT = 1  # bump it when the same sources would give different tokens, so that no old cache is used
_BATCH_CHARACTERS = 1 << 20


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
            self.encoding: list | None = about.get("encoding")  # corpora of older versions do not say
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
    encoder = Encoder(config, tokenizer)
    documents = Documents(config)
    files = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in documents.files]
    reading = (config.reference, config.text_field, config.skip_broken, config.max_document_bytes)
    key = hashlib.sha256(json.dumps([_FORMAT, files, reading, encoder.settings]).encode()).hexdigest()
    directory = cache_directory(cache_dir) / "corpora" / key
    if not directory.exists():
        _make(directory, documents, encoder)
    return Corpus(directory)


def write_corpus(config: DataConfig, tokenizer: Tokenizer, directory: Path) -> Corpus:
    """Writes the corpus of a reference to a new directory, which is a reference of its own. Raises DataError."""
    if directory.exists():
        raise DataError(f"{directory} exists; name a new directory for the tokenised copy")
    _make(directory, Documents(config), Encoder(config, tokenizer))
    return Corpus(directory)


def is_corpus(reference: str) -> bool:
    """Whether the reference is a directory that `write_corpus` wrote."""
    return (Path(reference).expanduser() / "about.json").exists() and (Path(reference) / "tokens.npy").exists()


def open_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """What `write_corpus` wrote. Raises DataError if that was for another tokenizer or end of documents."""
    directory = Path(config.reference).expanduser()
    corpus, encoder = Corpus(directory), Encoder(config, tokenizer)
    if corpus.encoding != json.loads(json.dumps(encoder.settings)):
        raise DataError(
            f"{directory} was tokenised by another tokenizer or with another end of documents; write it again with "
            "forethought data RECIPE --tokenize"
        )
    return corpus


def _make(directory: Path, documents: Documents, encoder: Encoder) -> None:
    """Writes a corpus under a temporary name, then renames it, so that no directory is ever incomplete."""
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, documents, encoder)
        temporary.rename(directory)
    except OSError as error:
        if not directory.exists():  # else another process finished first, with the same result
            raise DataError(
                f"the token cache {directory.parent} cannot be written ({error}); free up space, or set "
                "FORETHOUGHT_CACHE to another directory"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(directory: Path, documents: Documents, encoder: Encoder) -> None:
    counts = documents.counts
    digest = hashlib.sha256()
    offsets, hashes = [0], []
    with (directory / "tokens.npy").open("wb") as file:
        _header(file, 0)
        texts, encoded = itertools.tee(text for _, text in documents)
        for text, ids in zip(texts, encoder.documents(encoded, _BATCH_CHARACTERS), strict=True):
            counts["enormous"] += encoder.is_enormous(text)
            if ids is None:  # the normaliser removed everything
                counts["empty"] += 1
                continue
            data = ids.tobytes()
            file.write(data)
            digest.update(data)
            offsets.append(offsets[-1] + len(ids))
            hashes.append(text_hash(text))
            counts["documents"] += 1
            counts["control_text"] += encoder.tokenizer.has_control_text(text)
        file.seek(0)
        _header(file, offsets[-1])
    if not counts["documents"]:
        found = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing"
        raise DataError(f"{documents.config.reference!r} has no usable documents ({found}); choose other data")
    for name, array in (("offsets", np.array(offsets, "<i8")), ("hashes", np.array(hashes, "<u8"))):
        np.save(directory / f"{name}.npy", array, allow_pickle=False)
        digest.update(array.tobytes())
    about = {"fingerprint": digest.hexdigest(), "encoding": encoder.settings, "counts": counts}
    (directory / "about.json").write_text(json.dumps(about, indent=2))


def _header(file: BinaryIO, length: int) -> None:
    """Writes a `.npy` header for uint32s; numpy pads it, so its size does not depend on the length."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<u4", "fortran_order": False, "shape": (length,)})
