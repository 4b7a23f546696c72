"""Where to think: the positions of a text that become anchors, for objectives that think at a few of them.

Shapes: B rows, N text positions, M anchors of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import token_entropies, token_logprobs
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text

# Draws of positions are keyed apart from draws of tokens by a thought index that no thought has.
POSITION_DRAW = 2**31
# RPT's proxy entropies look at so many tokens (2506.08007 §3.2).
TOP = 16


class PositionSettings(Protocol):
    """The settings that say where; see AnchoredConfig."""

    @property
    def anchors_per_document(self) -> int: ...
    @property
    def min_prefix(self) -> int: ...
    @property
    def positions(self) -> str: ...
    @property
    def band(self) -> tuple[float, float]: ...
    @property
    def entropy_quantile(self) -> float: ...
    @property
    def hard_entropy(self) -> float: ...


@dataclass(frozen=True, eq=False)
class AnchorChoice:
    """horizon: true tokens that must follow an anchor. marker_id: for positions=marker. target_V: bool, tokens that may
    be targets; None: all."""

    settings: PositionSettings
    horizon: int = 1
    marker_id: int | None = None
    target_V: Tensor | None = None

    def eligible(self, text: Text) -> Tensor:
        """bool [B, N]: positions that can be anchors, with a long enough prefix and the whole horizon behind them."""
        long_enough_BN = text.position_BN + 1 >= self.settings.min_prefix
        eligible_BN = long_enough_BN & text.targets(self.horizon)[1]
        if self.settings.positions == "marker":
            eligible_BN = eligible_BN & (text.tokens_BN == self.marker_id)
        if self.target_V is not None:
            eligible_BN = eligible_BN & self.target_V.to(eligible_BN.device)[text.targets(1)[0]]
        return eligible_BN

    def count(self, text: Text) -> int:
        """Anchors of a text before model-based filtering."""
        eligible_BN, most = self.eligible(text).cpu(), self.settings.anchors_per_document
        return sum(min(most, int(eligible_BN[row, start:end].sum())) for row, start, end in text.spans)

    def choose(self, text: Text, rng: Rng, no_think: TextState, head_weight_VW: Tensor) -> Anchors:
        """Up to `anchors_per_document` anchors of each document, filtered by a model's predictions without thoughts.

        A document without an eligible position has none.
        """
        c = self.settings
        eligible_BN = self.eligible(text)
        if c.positions == "band":
            logprob_BN = token_logprobs(no_think.hidden_BNW, head_weight_VW, text.targets(1)[0])
            eligible_BN = eligible_BN & (logprob_BN >= c.band[0]) & (logprob_BN <= c.band[1])
        if c.positions == "hard":
            eligible_BN = eligible_BN & (token_entropies(no_think.hidden_BNW, head_weight_VW, TOP) >= c.hard_entropy)
        if c.positions == "entropy":
            entropy_BN = token_entropies(no_think.hidden_BNW, head_weight_VW)
            for row, start, end in text.spans:
                here = eligible_BN[row, start:end]
                if here.any():
                    threshold = entropy_BN[row, start:end][here].quantile(c.entropy_quantile)
                    eligible_BN[row, start:end] = here & (entropy_BN[row, start:end] >= threshold)
        return self._draw(eligible_BN, text, rng)

    def choose_without_model(self, text: Text, rng: Rng) -> Anchors:
        """The same from all eligible positions: the same anchors whatever the model has learned."""
        return self._draw(self.eligible(text), text, rng)

    def _draw(self, eligible_BN: Tensor, text: Text, rng: Rng) -> Anchors:
        """Anchors [B, M] in the order of a draw of their own; −1 pads."""
        device = text.tokens_BN.device
        place_BN = torch.arange(text.shape[1], device=device).expand(text.shape)
        draw_BN = rng.uniform(text.sample_id_B[:, None], place_BN, torch.tensor(POSITION_DRAW, device=device), 0)
        draw_BN = draw_BN.masked_fill(~eligible_BN, 2.0).cpu()
        eligible_BN = eligible_BN.cpu()
        chosen: list[list[int]] = [[] for _ in range(text.shape[0])]
        for row, start, end in text.spans:
            count = min(self.settings.anchors_per_document, int(eligible_BN[row, start:end].sum()))
            chosen[row] += sorted((draw_BN[row, start:end].argsort()[:count] + start).tolist())
        M = max(1, *map(len, chosen))
        return Anchors(text, torch.tensor([row + [-1] * (M - len(row)) for row in chosen], device=device))


def same_number_of_chunks(model: ThinkingModel, anchors: Anchors, at_once: int | None) -> Anchors:
    """The anchors, padded until every rank has as many chunks of `at_once`: a sharded model's passes are collective."""
    if at_once is None:
        return anchors
    M, chunks = anchors.index_BM.shape[1], 1
    while not model.all_agree(torch.tensor(chunks * at_once >= M, device=anchors.index_BM.device)):
        chunks += 1
    return anchors.padded((chunks - 1) * at_once + 1)
