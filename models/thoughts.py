"""Text and the thoughts anchored in it: the one data structure of every objective.

Text is a trunk, thoughts are branches off it. A thought hangs on an *anchor*, the last text position it may see, and
its k-th token (k = 1 for the first) stands at the position id of its anchor plus k.

Shapes: B rows, N text positions of a row, M anchors of a row, K thoughts of an anchor, S tokens of a thought.
The thought axis order is [B, K, S, M]: for anchors at every position, a slice over M then looks like a row of text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Values in `Thoughts.tokens_BKSM` that are not vocabulary ids.
START, END, PAD = -1, -2, -3
# Thoughts of a piece have at least this share of the tokens of its longest.
EVEN = 7 / 8


@dataclass(frozen=True, eq=False)
class Text:
    """Packed rows of documents.

    tokens_BN: int64 vocabulary ids.
    document_BN: int64, which document of its row a token belongs to; -1 on padding, which must close the row.
    position_BN: int64, position within the document, 0 at its first token.
    sample_id_B: int64, the row's number in the stream; keys the random draws of the row's thoughts.
    """

    tokens_BN: Tensor
    document_BN: Tensor
    position_BN: Tensor
    sample_id_B: Tensor

    @staticmethod
    def from_rows(tokens_BN: Tensor, sample_id_B: Tensor | None = None) -> Text:
        """Rows that hold one document each and no padding."""
        B, N = tokens_BN.shape
        position_BN = torch.arange(N, device=tokens_BN.device).expand(B, N)
        if sample_id_B is None:
            sample_id_B = torch.arange(B, device=tokens_BN.device)
        return Text(tokens_BN, torch.zeros_like(tokens_BN), position_BN, sample_id_B)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens_BN.shape[0], self.tokens_BN.shape[1]

    def to(self, device: torch.device | str) -> Text:
        return Text(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @staticmethod
    def joined(parts: Sequence[Text]) -> Text:
        """The rows of all parts, in order."""
        return Text(*(torch.cat([getattr(p, name) for p in parts]) for name in Text.__dataclass_fields__))

    def rows(self, part: slice) -> Text:
        return Text(*(getattr(self, name)[part] for name in self.__dataclass_fields__))

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(row, start, end) of every document. Synchronises with the host once per text."""
        spans = []
        for row, documents in enumerate(self.document_BN.tolist()):
            start = 0
            for n in range(1, len(documents) + 1):
                if n == len(documents) or documents[n] != documents[start]:
                    if documents[start] >= 0:
                        spans.append((row, start, n))
                    start = n
        return spans

    @cached_property
    def whole_rows(self) -> bool:
        """Whether every row is one document without padding."""
        return self.spans == [(row, 0, self.shape[1]) for row in range(self.shape[0])]

    @cached_property
    def document_start_BN(self) -> Tensor:
        """int64, row index of the first token of the document at each position."""
        return torch.arange(self.shape[1], device=self.tokens_BN.device) - self.position_BN

    @cached_property
    def document_end_BN(self) -> Tensor:
        """int32, row index behind the last token of the document at each position; on padding, where padding begins."""
        B, N = self.shape
        start_BN = torch.where(self.document_BN >= 0, self.document_start_BN, N)
        n_BN = torch.arange(N, device=start_BN.device).expand(B, N).contiguous()
        return torch.searchsorted(start_BN, n_BN, right=True, out_int32=True)

    def targets(self, ahead: int) -> tuple[Tensor, Tensor]:
        """The token `ahead` positions later: ids [B, N] (0 where there is none) and whether there is one [B, N].

        There is one where that position lies in the row and in the same document.
        """
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        ids_BN = torch.zeros_like(self.tokens_BN)
        valid_BN = torch.zeros_like(self.tokens_BN, dtype=torch.bool)
        if ahead < self.shape[1]:
            same = self.document_BN[:, ahead:] == self.document_BN[:, :-ahead]
            valid_BN[:, :-ahead] = same & (self.document_BN[:, ahead:] >= 0)
            ids_BN[:, :-ahead] = torch.where(valid_BN[:, :-ahead], self.tokens_BN[:, ahead:], 0)
        return ids_BN, valid_BN


@dataclass(frozen=True, eq=False)
class Anchors:
    """The text positions that thoughts hang on.

    text: the rows they lie in.
    index_BM: int64, position in the row; -1 is padding, where there is no anchor; what is computed there sees no text.
    window: (start, end) if the anchors of every row are these positions, in order; lets attention treat a slice over M
    as a piece of text.
    """

    text: Text
    index_BM: Tensor
    window: tuple[int, int] | None = None

    @staticmethod
    def everywhere(text: Text) -> Anchors:
        B, N = text.shape
        return Anchors(text, torch.arange(N, device=text.tokens_BN.device).expand(B, N), window=(0, N))

    @property
    def dense(self) -> bool:
        """Whether every position of the row is an anchor, in order (M = N)."""
        return self.window == (0, self.text.shape[1])

    def cuts(self, at_once: int | None) -> list[slice]:
        """Slices over M of `at_once` anchors each, the last of what remains; a single one for None."""
        M = self.index_BM.shape[1]
        step = at_once or max(1, M)
        return [slice(start, min(start + step, M)) for start in range(0, M, step)]

    def part(self, cut: slice) -> Anchors:
        """Some of each row's anchors, with all of the text; `cut` as `cuts` gives it."""
        window = None if self.window is None else (self.window[0] + cut.start, self.window[0] + cut.stop)
        return Anchors(self.text, self.index_BM[:, cut], window)

    def rows(self, part: slice) -> Anchors:
        """Those of some rows."""
        return Anchors(self.text.rows(part), self.index_BM[part], self.window)

    def padded(self, M: int) -> Anchors:
        """At least M anchors in each row, those that are added padding."""
        missing = M - self.index_BM.shape[1]
        if missing <= 0:
            return self
        return Anchors(self.text, torch.nn.functional.pad(self.index_BM, (0, missing), value=-1))

    @cached_property
    def prefixes(self) -> list[tuple[int, int, int, int]]:
        """(row, anchor number, start, end) of the text each anchor sees, for those that see any.

        Synchronises with the host once.
        """
        start_BN, document_BN = self.text.document_start_BN.tolist(), self.text.document_BN.tolist()
        return [
            (row, m, start_BN[row][n], n + 1)
            for row, anchors in enumerate(self.index_BM.tolist())
            for m, n in enumerate(anchors)
            if n >= 0 and document_BN[row][n] >= 0
        ]

    @cached_property
    def window_text(self) -> Text:
        """The text at the positions of the window alone, its documents cut off where it begins and ends."""
        assert self.window is not None
        if self.dense:
            return self.text
        text, here = self.text, slice(*self.window)
        return Text(text.tokens_BN[:, here], text.document_BN[:, here], text.position_BN[:, here], text.sample_id_B)

    @cached_property
    def before_window(self) -> list[tuple[int, int, int]]:
        """(row, start, anchors): where a document begins that reaches into the window from before it, and how many of
        the row's first anchors belong to it."""
        assert self.window is not None
        first, last = self.window
        spans = [span for span in self.text.spans if span[1] < first < span[2]]
        return [(row, start, min(end, last) - first) for row, start, end in spans]

    @cached_property
    def visible_BM(self) -> tuple[Tensor, Tensor]:
        """int32 start and end of the text each anchor sees, (N, 0) where it sees none. No synchronisation."""
        index_BM, text = self.index_BM.clamp(min=0), self.text
        sees_BM = (self.index_BM >= 0) & (text.document_BN.gather(1, index_BM) >= 0)
        start_BM = torch.where(sees_BM, text.document_start_BN.gather(1, index_BM), text.shape[1])
        end_BM = torch.where(sees_BM, index_BM + 1, 0)
        return start_BM.int(), end_BM.int()

    @cached_property
    def position_BM(self) -> Tensor:
        """int64, position id of each anchor within its document, -1 where there is none."""
        if self.window is not None:
            return self.text.position_BN[:, slice(*self.window)]
        position_BM = self.text.position_BN.gather(1, self.index_BM.clamp(min=0))
        return torch.where(self.index_BM >= 0, position_BM, -1)

    @cached_property
    def next_BM(self) -> Tensor:
        """int64, the token behind each anchor; 0 where there is none."""
        return self.text.targets(1)[0].gather(1, self.index_BM.clamp(min=0))

    @cached_property
    def predicting_BM(self) -> Tensor:
        """bool, whether the anchor exists and its document goes on behind it."""
        return self.text.targets(1)[1].gather(1, self.index_BM.clamp(min=0)) & (self.index_BM >= 0)


@dataclass(frozen=True, eq=False)
class Thoughts:
    """Thoughts of all anchors, each written from slot 0 on, padding only behind.

    tokens_BKSM: int64 vocabulary ids, START and END for the delimiters, PAD behind the end.
    anchors: the positions they hang on.
    """

    tokens_BKSM: Tensor
    anchors: Anchors

    @cached_property
    def lengths_BKM(self) -> Tensor:
        """int64, tokens of each thought."""
        return (self.tokens_BKSM != PAD).sum(dim=2)

    def part(self, cut: slice) -> Thoughts:
        """The thoughts of some of each row's anchors."""
        return Thoughts(self.tokens_BKSM[..., cut], self.anchors.part(cut))

    def rows(self, part: slice) -> Thoughts:
        """Those of some rows."""
        return Thoughts(self.tokens_BKSM[part], self.anchors.rows(part))

    def slots(self, S: int) -> Thoughts:
        """The same with S slots for tokens: the first, or empty ones behind."""
        more = S - self.tokens_BKSM.shape[2]
        return Thoughts(torch.nn.functional.pad(self.tokens_BKSM, (0, 0, 0, more), value=PAD), self.anchors)

    def trimmed(self) -> Thoughts:
        """The same with as many slots as the longest has tokens. Synchronises with the host."""
        return self.slots(int(self.lengths_BKM.max()))

    def pieces(self, at_once: int) -> tuple[list[list[Thoughts]], Tensor | None]:
        """The thoughts of each anchor from the longest to the shortest, `at_once` of them in a group, each group in
        pieces of about as long ones, which have as many slots as their longest needs. And int64 [B, K, S, M], which
        slot of all pieces, end to end, each of these is, behind a thought its piece's last; None where the only piece
        is all thoughts as they are. Synchronises with the host.
        """
        B, K, S, M = self.tokens_BKSM.shape
        order_BKM = self.lengths_BKM.argsort(dim=1, descending=True, stable=True)
        longest = self.lengths_BKM.gather(1, order_BKM).amax(dim=(0, 2)).clamp(min=1).tolist()
        firsts = [0]
        for k in range(1, K):
            if k % at_once == 0 or longest[k] < EVEN * longest[firsts[-1]]:
                firsts.append(k)
        if len(firsts) == 1:
            return [[self]], None
        sorted_BKSM = self.tokens_BKSM.gather(1, order_BKM[:, :, None].expand(-1, -1, S, -1))
        groups: list[list[Thoughts]] = []
        slots, filled = [], 0
        for first, end in itertools.pairwise([*firsts, K]):
            T = longest[first]
            piece = Thoughts(sorted_BKSM[:, first:end, :T], self.anchors)
            groups += [[]] if first % at_once == 0 else []
            groups[-1].append(piece)
            slot_BkTM = torch.arange(piece.tokens_BKSM.numel(), device=order_BKM.device).view(B, -1, T, M) + filled
            slots.append(torch.cat([slot_BkTM, slot_BkTM[:, :, -1:].expand(-1, -1, S - T, -1)], dim=2))
            filled += slot_BkTM.numel()
        place_BKM = order_BKM.argsort(dim=1)
        return groups, torch.cat(slots, dim=1).gather(1, place_BKM[:, :, None].expand(-1, -1, S, -1))

    @staticmethod
    def joined(parts: Sequence[Thoughts], anchors: Anchors) -> Thoughts:
        """The thoughts of all `anchors` from those of its parts, in order, all with as many slots."""
        return Thoughts(torch.cat([p.tokens_BKSM for p in parts], dim=-1), anchors)

    def followed_by(self, tokens_BKTM: Tensor) -> Thoughts:
        """The same thoughts with up to T more tokens each, right behind their last; PAD in `tokens_BKTM` adds none."""
        T = tokens_BKTM.shape[2]
        longer = torch.nn.functional.pad(self.tokens_BKSM, (0, 0, 0, T), value=PAD)
        slots_BKTM = self.lengths_BKM[:, :, None] + torch.arange(T, device=longer.device)[:, None]
        return Thoughts(longer.scatter(2, slots_BKTM, tokens_BKTM), self.anchors)
