"""Documents to arrays of token ids, many at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipelines.config import DataConfig, DataError
from data_pipelines.tokenizer import Tokenizer

Part = tuple[str, int, int]  # of a text, from start to stop


class Encoder:
    """Encodes documents as [bos, if the tokenizer adds it] + tokens + [the end-of-document token].

    Raises DataError if the tokenizer lacks that token.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.end_id = end_of_document(config, tokenizer)
        self._longest = config.max_document_characters
        self._before = np.array([tokenizer.bos_id] if tokenizer.add_bos else [], "<u4")
        self._after = np.array([self.end_id], "<u4")

    @property
    def settings(self) -> tuple:
        """JSON-able: whatever the ids of a text depend on."""
        tokenizer = self.tokenizer
        kept = (tokenizer.fingerprint, tokenizer.control_ids, tokenizer.add_bos, tokenizer.bos_id, self.end_id)
        return (*kept, self._longest)

    def is_enormous(self, text: str) -> bool:
        """Whether the text is encoded in pieces."""
        return len(text) > self._longest

    def documents(self, texts: Iterable[str], characters: int) -> Iterator[np.ndarray | None]:
        """uint32 ids of each text, None where the normaliser leaves nothing; up to so many `characters` are encoded at
        a time, to use the tokenizer's threads.

        The tokenizer takes some hundred bytes for a token, so that a long text must not be encoded in one go.
        """
        done: list[np.ndarray] = []
        for batch in _batches(self._parts(texts), characters):
            encoded = self.tokenizer.arrays([text[start:stop] for text, start, stop in batch])
            for (text, _, stop), ids in zip(batch, encoded, strict=True):
                done.append(ids)
                if stop == len(text):
                    yield np.concatenate([self._before, *done, self._after]) if any(map(len, done)) else None
                    done = []

    def _parts(self, texts: Iterable[str]) -> Iterator[Part]:
        """Cuts long texts, before whitespace where possible."""
        limit = self._longest
        for text in texts:
            start = 0
            while len(text) - start > limit:
                cut = max(text.rfind(space, start + 1, start + limit + 1) for space in " \n\t")
                stop = cut if cut > start else start + limit
                yield text, start, stop
                start = stop
            yield text, start, len(text)


def end_of_document(config: DataConfig, tokenizer: Tokenizer) -> int:
    """The id of the token that ends every document. Raises DataError if the tokenizer lacks it."""
    token = config.end_of_document
    end_id = tokenizer.eos_id if token is None else tokenizer.token_id(token)
    if end_id is None:
        lacks = "has no eos token" if token is None else f"has no token {token!r}"
        raise DataError(f"the tokenizer {lacks}; set data.end_of_document to a token in its vocabulary")
    return end_id


def text_hash(text: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _batches(parts: Iterable[Part], most: int) -> Iterator[list[Part]]:
    """Of `most` characters in the end, but fewer at first, so that whoever waits for the first text has it soon."""
    batch: list[Part] = []
    characters, limit = 0, most // 16
    for text, start, stop in parts:
        if batch and characters + stop - start > limit:
            yield batch
            batch, characters, limit = [], 0, min(2 * limit, most)
        batch.append((text, start, stop))
        characters += stop - start
    if batch:
        yield batch
