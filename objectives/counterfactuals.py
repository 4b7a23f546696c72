"""Does the thought matter? The same tokens scored after the model's own thought, and after thoughts that are not.

A thought can lower a token's NLL without saying anything: through its length alone, its tags, or time to compute. So
each anchor is scored after its own thought and after

    other       the thought that another anchor's text led to
    shuffled    its own thought's tokens in random order
    filler      one and the same token, as many times as its own thought has tokens
    right       a right thought, where the data knows one

Only what `own` gains over all of the first three is the content of the thought.

Shapes: B rows, M anchors, L tokens of a thought's body, behind its opening and before its closing tag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.philox import Rng
from models.thoughts import PAD, Anchors

# Draws of word orders are keyed apart from those of tokens by thought indices that no thought has.
WORD_ORDER_DRAW = 2**31 + 2**30


@dataclass(frozen=True)
class Counterfactuals:
    """nll_BM: NLL of each anchor's target by condition, in nats. right_BM: 1 where the own thought is exactly the right
    one, else 0; nan where none is known, where nll_BM["right"] has no meaning; None where none is known at all."""

    nll_BM: dict[str, Tensor]
    right_BM: Tensor | None = None


@dataclass(frozen=True)
class CounterfactualTest:
    """What the conditions are made of.

    filler_id: the token of `filler`. solutions: (sample id, anchor) → tokens of a right thought.
    """

    filler_id: int
    solutions: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def score(
        self,
        body_BLM: Tensor,
        own_nll_BM: Tensor,
        anchors: Anchors,
        real_BM: Tensor,
        rng: Rng,
        nll_after: Callable[[Tensor], Tensor],
    ) -> Counterfactuals:
        """The targets' NLL after every condition. body: the own thoughts'. nll_after: bodies [B, L', M], PAD behind
        their ends, → the NLL [B, M] of the targets after thoughts with these bodies."""
        conditions = self.conditions(body_BLM, anchors, real_BM, rng)
        nll_BM = {"own": own_nll_BM}
        nll_BM |= {name: nll_after(other_BLM) for name, other_BLM in conditions.items() if name != "own"}
        if "right" not in conditions:
            return Counterfactuals(nll_BM)
        same_BM = _same(body_BLM, conditions["right"]).double()
        return Counterfactuals(nll_BM, same_BM.masked_fill(~self.known(anchors), torch.nan))

    def conditions(self, body_BLM: Tensor, anchors: Anchors, real_BM: Tensor, rng: Rng) -> dict[str, Tensor]:
        """Bodies [B, L', M] by condition, PAD behind their ends; `own` is `body_BLM`.

        `other` is left out where there is one anchor only, `right` where no solution is known.
        """
        found = {"own": body_BLM}
        if int(real_BM.sum()) > 1:
            found["other"] = _others(body_BLM, real_BM)
        found["shuffled"] = _shuffled(body_BLM, anchors, rng)
        found["filler"] = torch.where(body_BLM == PAD, PAD, self.filler_id)
        if self.solutions:
            found["right"] = self.right(anchors)
        return found

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


def _others(body_BLM: Tensor, real_BM: Tensor) -> Tensor:
    """Each real anchor gets the body of the one half the list of all further on: mostly of another row."""
    body_BML, others = body_BLM.transpose(1, 2), body_BLM.transpose(1, 2).clone()
    listed = body_BML[real_BM]
    others[real_BM] = listed.roll(max(1, len(listed) // 2), dims=0)
    return others.transpose(1, 2)


def _shuffled(body_BLM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
    slot_L1 = torch.arange(body_BLM.shape[1], device=body_BLM.device)[:, None]
    sample_id_B11 = anchors.text.sample_id_B[:, None, None]
    draw_BLM = rng.uniform(sample_id_B11, anchors.index_BM[:, None], slot_L1 + WORD_ORDER_DRAW, 0)
    order_BLM = draw_BLM.masked_fill(body_BLM == PAD, 2.0).argsort(dim=1, stable=True)
    return body_BLM.gather(1, order_BLM)


def _same(a_BLM: Tensor, b_BTM: Tensor) -> Tensor:
    """bool [B, M]: whether two bodies, padded to different lengths, are the same."""
    longest = max(a_BLM.shape[1], b_BTM.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1]), value=PAD) for x in (a_BLM, b_BTM))
    return (a == b).all(dim=1)
