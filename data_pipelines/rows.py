"""Rows of packed text: what every kind of text provides, and the form it provides them in.

Shapes: B rows, N tokens of a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class PackedText(ABC):
    """Random access to training rows, and held-out rows.

    Rows are dicts that hold, all int64:
        tokens_BN: token ids.
        document_BN: which document or fragment of its row a token belongs to, from 0; -1 is padding, always last.
        position_BN: position within the document or fragment, from 0.
        sample_id_B: the number of each row.

    Attributes:
        length: N.
        seed: of the training rows.
        tokens_per_epoch: tokens of all training documents, `math.inf` if none ever repeats.
        counts: how many documents were of each kind in `sources.COUNTS`.
        fingerprint: hex digest of everything the rows depend on; equal fingerprints mean equal rows.
    """

    length: int
    seed: int
    tokens_per_epoch: float
    counts: Counter[str]
    fingerprint: str

    @abstractmethod
    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        """Training rows `first` to `first + count`, a pure function of the fingerprint and these numbers."""

    @abstractmethod
    def held_out_rows(self, limit: int) -> dict[str, Tensor]:
        """The first `limit` held-out rows, or as many as there are."""

    def held_out_documents(self, limit: int) -> Tensor:
        """int64 [B, N]: the number of the document that each token of these rows is from, -1 on padding. A document's
        fragments, and documents of equal text, have the same number; by default no document is in fragments."""
        document_BN = self.held_out_rows(limit)["document_BN"]
        row_B1 = torch.arange(len(document_BN))[:, None]
        return torch.where(document_BN < 0, -1, row_B1 * self.length + document_BN)

    def solutions(self, limit: int) -> dict[tuple[int, int], tuple[int, ...]]:
        """Correct thoughts, where known, by (sample id, index in the row), for the first `limit` held-out rows."""
        return {}

    def about(self) -> str:
        """How much there is, in words."""
        return "endless" if math.isinf(self.tokens_per_epoch) else f"{self.tokens_per_epoch:,} tokens per epoch"

    def batch(self, step: int, rows_per_step: int) -> dict[str, Tensor]:
        """The rows of a training step; steps are counted from 0."""
        return self.rows(step * rows_per_step, rows_per_step)


def packed_rows(first: int, rows: Sequence[Iterable[Sequence[int] | np.ndarray]], length: int) -> dict[str, Tensor]:
    """Packs rows, numbered from `first`: each is the token ids of its documents, at most `length` in all."""
    parts: list[Sequence[int] | np.ndarray] = []
    index_of, size_of = [], []  # each part's
    for documents in rows:
        room = length
        for index, ids in enumerate(documents):
            parts.append(ids)
            index_of.append(index)
            size_of.append(len(ids))
            room -= len(ids)
        parts.append(np.zeros(room, np.int64))
        index_of.append(-1)
        size_of.append(room)
    tokens_T = np.concatenate([np.zeros(0, np.int64), *parts])
    document_T = np.repeat(np.array(index_of, np.int64), size_of)
    end_of = np.cumsum(np.array(size_of, np.int64))
    position_T = np.where(document_T < 0, 0, np.arange(len(tokens_T)) - np.repeat(end_of - size_of, size_of))
    of = {"tokens_BN": tokens_T, "document_BN": document_T, "position_BN": position_T}
    packed = {name: torch.from_numpy(array_T.reshape(len(rows), length)) for name, array_T in of.items()}
    return packed | {"sample_id_B": torch.arange(first, first + len(rows))}
