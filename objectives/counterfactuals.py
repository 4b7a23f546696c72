"""Does the thought matter? The same tokens scored after the model's own thought, and after thoughts that are not.

A thought can lower a token's NLL without saying anything: through its length alone, its tags, or time to compute. So
each anchor is scored after its own thought and after

    other       a thought that another document led to
    shuffled    its own thought's tokens in random order
    filler      one and the same token, as many times as its own thought has tokens
    right       a right thought, where the data knows one

Only what `own` gains over all of the first three is the content of the thought. `other` is of another document, because
a thought written later in the same one has read the answer.

Shapes: B rows, N text positions, M anchors, L tokens of a thought's body, behind its opening and before its closing
tag, E all real anchors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models.philox import Rng
from models.thoughts import PAD, Anchors

# Draws of word orders are keyed apart from those of tokens by thought indices that no thought has.
WORD_ORDER_DRAW = 2**31 + 2**30


@dataclass(frozen=True, eq=False)
class Bodies:
    """What thoughts say, one at each anchor. tokens_BLM: int64, PAD behind their ends. real_BM: bool, the anchors that
    are scored, in the order of the text."""

    tokens_BLM: Tensor
    anchors: Anchors
    real_BM: Tensor


@dataclass(frozen=True)
class CounterfactualTest:
    """What the conditions are made of.

    filler_id: the token of `filler`. solutions: (sample id, anchor) → tokens of a right thought.
    """

    filler_id: int
    solutions: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def conditions(self, own: Sequence[Bodies], document_BN: Sequence[Tensor], rng: Rng) -> dict[str, list[Tensor]]:
        """Other bodies [B, L', M] by condition, for all parts of a held-out text; the same however it is cut.

        document_BN: int64, the number of the document that each token of a part is from. `other` is left out where all
        anchors are of one document, `right` where no solution is known.
        """
        found = {
            "shuffled": [_shuffled(part.tokens_BLM, part.anchors, rng) for part in own],
            "filler": [torch.where(part.tokens_BLM == PAD, PAD, self.filler_id) for part in own],
        }
        if (others := _others(own, document_BN)) is not None:
            found["other"] = others
        if self.solutions:
            found["right"] = [self.right(part.anchors) for part in own]
        return found

    def is_right(self, own: Bodies) -> Tensor:
        """fp64 [B, M]: 1 where the body is exactly the right one, else 0; nan where none is known."""
        same_BM = _same(own.tokens_BLM, self.right(own.anchors)).double()
        return same_BM.masked_fill(~self.known(own.anchors), torch.nan)

    def known(self, anchors: Anchors) -> Tensor:
        """bool [B, M]: where a right thought is known, be it an empty one."""
        rows = zip(anchors.text.sample_id_B.tolist(), anchors.index_BM.tolist(), strict=True)
        known = [[(sample_id, n) in self.solutions for n in row] for sample_id, row in rows]
        return torch.tensor(known, device=anchors.index_BM.device)

    def right(self, anchors: Anchors) -> Tensor:
        """Right bodies [B, L', M]; PAD alone where none is known."""
        sample_id_B, index_BM = anchors.text.sample_id_B.tolist(), anchors.index_BM.tolist()
        longest = max(map(len, self.solutions.values()), default=0)
        ids = [
            [self.solutions.get((sample_id, n), ()) for n in row]
            for sample_id, row in zip(sample_id_B, index_BM, strict=True)
        ]
        padded = [[[*body, *[PAD] * (longest - len(body))] for body in row] for row in ids]
        return torch.tensor(padded, device=anchors.index_BM.device).transpose(1, 2).contiguous()


def elsewhere(document_E: Sequence[int]) -> list[int] | None:
    """For each anchor the first of another document from half the list of all further on; None if all are of one."""
    if len(set(document_E)) < 2:
        return None
    E, found = len(document_E), []
    for i, document in enumerate(document_E):
        j = (i + E // 2) % E
        while document_E[j] == document:
            j = (j + 1) % E
        found.append(j)
    return found


def _others(own: Sequence[Bodies], document_BN: Sequence[Tensor]) -> list[Tensor] | None:
    """Each real anchor gets the body of the first one of another document from half the list of all further on."""
    longest = max(part.tokens_BLM.shape[1] for part in own)
    padded = [F.pad(part.tokens_BLM, (0, 0, 0, longest - part.tokens_BLM.shape[1]), value=PAD) for part in own]
    body_EL = torch.cat([x_BLM.transpose(1, 2)[part.real_BM] for x_BLM, part in zip(padded, own, strict=True)])
    numbers_BM = [
        document_BN[i].to(part.real_BM.device).gather(1, part.anchors.index_BM.clamp(min=0))
        for i, part in enumerate(own)
    ]
    document_E = torch.cat([x_BM[part.real_BM] for x_BM, part in zip(numbers_BM, own, strict=True)])
    giver_E = elsewhere(document_E.tolist())
    if giver_E is None:
        return None
    given = body_EL[giver_E].split([int(part.real_BM.sum()) for part in own])
    found = []
    for x_BLM, part, given_EL in zip(padded, own, given, strict=True):
        others_BML = x_BLM.transpose(1, 2).clone()
        others_BML[part.real_BM] = given_EL
        found.append(others_BML.transpose(1, 2))
    return found


def _shuffled(body_BLM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
    slot_L1 = torch.arange(body_BLM.shape[1], device=body_BLM.device)[:, None]
    sample_id_B11 = anchors.text.sample_id_B[:, None, None]
    draw_BLM = rng.uniform(sample_id_B11, anchors.index_BM[:, None], slot_L1 + WORD_ORDER_DRAW, 0)
    order_BLM = draw_BLM.masked_fill(body_BLM == PAD, 2.0).argsort(dim=1, stable=True)
    return body_BLM.gather(1, order_BLM)


def _same(a_BLM: Tensor, b_BTM: Tensor) -> Tensor:
    """bool [B, M]: whether two bodies, padded to different lengths, are the same."""
    longest = max(a_BLM.shape[1], b_BTM.shape[1])
    a, b = (F.pad(x, (0, 0, 0, longest - x.shape[1]), value=PAD) for x in (a_BLM, b_BTM))
    return (a == b).all(dim=1)
