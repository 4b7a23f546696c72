"""Random access to the rows of an endless stream of packed text.

The documents of an epoch, shuffled by (seed, epoch), are concatenated, and so are the epochs. Row r is tokens
r·N to (r + 1)·N of that stream: nothing is dropped at the end of an epoch, and a row can be built without
those before it. A document that does not fit into a row is split into fragments, each of which the model
sees as a document of its own.

Suffixes: B rows, N tokens of a row, D documents, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.corpus import Corpus
from data_pipelines.rows import PackedText, packed_rows

REPEAT = 32  # a power of 2: tokens in a row that two texts hardly have in common by chance
Fragment = tuple[int, int]  # start and stop among the corpus's tokens


@dataclass(frozen=True)
class _Line:
    """Concatenated documents: each is tokens `start_D` to `stop_D` of the corpus and ends at `end_D` here."""

    start_D: np.ndarray
    stop_D: np.ndarray
    end_D: np.ndarray

    @classmethod
    def of(cls, start_D: np.ndarray, stop_D: np.ndarray) -> _Line:
        return cls(start_D, stop_D, np.cumsum(stop_D - start_D))

    @property
    def tokens(self) -> int:
        return int(self.end_D[-1]) if len(self.end_D) else 0

    def permuted(self, order_D: np.ndarray) -> _Line:
        return _Line.of(self.start_D[order_D], self.stop_D[order_D])

    def between(self, first: int, last: int) -> Iterator[Fragment]:
        """The fragments that make up tokens `first` to `last` of the line."""
        document = int(np.searchsorted(self.end_D, first, side="right"))
        while first < last:
            end, stop = int(self.end_D[document]), int(self.stop_D[document])
            yield stop - (end - first), stop - max(end - last, 0)
            first, document = end, document + 1


class CorpusText(PackedText):
    """Rows packed from a corpus."""

    def __init__(self, corpus: Corpus, length: int, held_out: float, seed: int):
        self.corpus = corpus
        self.length = length
        self.seed = seed
        self._train, self._held_out = _split(corpus, held_out)
        self._epoch = (-1, self._train)
        self.tokens_per_epoch: int = self._train.tokens
        self.counts = corpus.counts
        what = json.dumps([corpus.fingerprint, length, held_out, seed])
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        starts = range(first * self.length, (first + count) * self.length, self.length)
        return self._pack(first, [self._stream(start, start + self.length) for start in starts])

    def held_out_rows(self, limit: int) -> dict[str, Tensor]:
        return self._pack(0, self._held_out_fragments(limit))

    def held_out_documents(self, limit: int) -> Tensor:
        _, text_D = np.unique(self.corpus.hash_D, return_inverse=True)
        rows = [
            [
                (int(text_D[np.searchsorted(self.corpus.offsets, start, side="right") - 1]), stop - start)
                for start, stop in row
            ]
            for row in self._held_out_fragments(limit)
        ]
        documents = [[np.full(tokens, text) for text, tokens in row] for row in rows]
        packed = packed_rows(0, documents, self.length)
        return torch.where(packed["document_BN"] < 0, -1, packed["tokens_BN"])

    def _held_out_fragments(self, limit: int) -> list[Iterator[Fragment]]:
        line = self._held_out
        starts = range(0, line.tokens, self.length)[:limit]
        return [line.between(start, min(start + self.length, line.tokens)) for start in starts]

    def repeated(self) -> tuple[int, int]:
        """(those that the training text has as well, all): the held-out text's stretches of REPEAT tokens.

        By 64-bit hashes, in one pass over the training text.
        """
        tokens_T, spans = self.corpus.tokens_T, zip(self._held_out.start_D, self._held_out.stop_D, strict=True)
        held = [_hashes(tokens_T[start:stop])[::REPEAT] for start, stop in spans]
        hash_H = np.concatenate(held) if held else np.zeros(0, np.uint64)
        # Most hashes of the training text are dismissed by their first bits.
        maybe = np.zeros(1 << 20, bool)
        maybe[hash_H >> np.uint64(44)] = True
        found = [np.zeros(0, np.uint64)]
        for start, stop in self._training_spans():
            for first in range(start, stop, 1 << 20):
                hash_T = _hashes(tokens_T[first : min(first + (1 << 20) + REPEAT - 1, stop)])
                found.append(np.intersect1d(hash_T[maybe[hash_T >> np.uint64(44)]], hash_H))
        return int(np.isin(hash_H, np.concatenate(found)).sum()), len(hash_H)

    def _training_spans(self) -> Iterator[Fragment]:
        """The corpus without what is held out."""
        start = 0
        for first, last in sorted(zip(self._held_out.start_D, self._held_out.stop_D, strict=True)):
            yield start, int(first)
            start = int(last)
        yield start, len(self.corpus.tokens_T)

    def _pack(self, first: int, rows: list[Iterator[Fragment]]) -> dict[str, Tensor]:
        tokens_T = self.corpus.tokens_T
        return packed_rows(first, [(tokens_T[start:stop] for start, stop in row) for row in rows], self.length)

    def _stream(self, first: int, last: int) -> Iterator[Fragment]:
        while first < last:
            epoch, place = divmod(first, self.tokens_per_epoch)
            until = min(place + last - first, self.tokens_per_epoch)
            yield from self._line(epoch).between(place, until)
            first += until - place

    def _line(self, epoch: int) -> _Line:
        if self._epoch[0] != epoch:
            key = np.array([self.seed, epoch], np.uint64)
            # Raw words: unlike Generator.permutation, they are the same in every numpy version.
            words_D = np.random.Philox(key=key).random_raw(len(self._train.end_D))
            self._epoch = (epoch, self._train.permuted(np.argsort(words_D, kind="stable")))
        return self._epoch[1]


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64: a hash of each stretch of REPEAT tokens, by where it starts."""
    hashes, span, factor = tokens.astype(np.uint64) + np.uint64(1), 1, 0x9E3779B97F4A7C15
    while span < REPEAT:
        hashes = hashes[:-span] * np.uint64(factor) + hashes[span:]
        span, factor = 2 * span, factor * factor % 2**64
    return hashes ^ (hashes << np.uint64(32))


def _split(corpus: Corpus, share: float) -> tuple[_Line, _Line]:
    """Training and held-out documents.

    Documents are held out in the order of their hashes until they contain `share` of the tokens. Equal texts
    stay together, and texts that would bring the total above half of all tokens are skipped. If every text is
    too large for that, as when there is only one, the tail of the longest document is held out.
    """
    start_D, stop_D = corpus.offsets[:-1], corpus.offsets[1:]
    size_D = stop_D - start_D
    wanted = math.ceil(share * len(corpus.tokens_T))
    _, text_D = np.unique(corpus.hash_D, return_inverse=True)
    tokens_of_text = np.bincount(text_D, weights=size_D).astype(np.int64)
    chosen, held = [], 0
    for text, tokens in enumerate(tokens_of_text):
        if held >= wanted:
            break
        if 2 * (held + tokens) <= len(corpus.tokens_T):
            chosen.append(text)
            held += int(tokens)
    if wanted and not chosen:
        longest = int(np.argmax(size_D))
        tail = min(wanted, int(size_D[longest]) // 2)
        cut = stop_D[longest] - tail
        held_out = _Line.of(np.array([cut]), stop_D[longest : longest + 1])
        stop_D = stop_D.copy()
        stop_D[longest] = cut
        return _Line.of(start_D, stop_D), held_out
    held_D = np.isin(text_D, chosen)
    return _Line.of(start_D[~held_D], stop_D[~held_D]), _Line.of(start_D[held_D], stop_D[held_D])
