"""How a thought is written: an opening tag, sampled tokens, and a closing tag, which is appended to those that do not
write it; then, where a prediction in words is wanted, what asks for it.

    text up to the anchor [instruction] <think> the body </think> the true tokens

Shapes: B rows, M anchors of a row, K thoughts of an anchor, L tokens of a body, S all tokens of a thought, T tokens
appended, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.rollout import Rollout
from models.thoughts import PAD, Anchors, Thoughts
from objectives.base import SettingError, Vocabulary


@dataclass(frozen=True)
class Template:
    """Token ids. open: of instruction and opening tag, the prompt of every thought. close: of the closing tag. ask:
    between it and a prediction. allowed: ids a thought may contain though they are control tokens, beside `close`."""

    open: tuple[int, ...]
    close: tuple[int, ...]
    ask: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()

    def bodies(self, rollout: Rollout, length: int) -> Tensor:
        """The tokens between the tags [B, K, L, M] of thoughts of up to `length` tokens, PAD behind them."""
        P = len(self.open)
        inside_BKSM = rollout.sampled_BKSM & ~rollout.predicting_BKSM
        length_BKM = inside_BKSM.sum(dim=2) - rollout.closed_BKM * rollout.closing
        tokens_BKLM = rollout.thoughts.tokens_BKSM[:, :, P : P + length]
        slot_L1 = torch.arange(tokens_BKLM.shape[2], device=tokens_BKLM.device)[:, None]
        return tokens_BKLM.masked_fill(slot_L1 >= length_BKM[:, :, None], PAD)

    def write(self, body_BKLM: Tensor, anchors: Anchors) -> Thoughts:
        """Whole thoughts with these bodies: tags around them, and what asks for a prediction behind."""
        B, K, _, M = body_BKLM.shape

        def everywhere(ids: tuple[int, ...]) -> Tensor:
            tokens_T1 = torch.tensor(ids, dtype=torch.int64, device=body_BKLM.device)[:, None]
            return tokens_T1.expand(B, K, -1, M)

        opened = Thoughts(everywhere(self.open), anchors)
        return opened.followed_by(body_BKLM).followed_by(everywhere((*self.close, *self.ask)))

    def close_all(self, rollout: Rollout) -> Thoughts:
        """The thoughts, with the closing tag appended to those that lack it."""
        close_T1 = torch.tensor(self.close, device=rollout.closed_BKM.device)[:, None]
        return rollout.thoughts.followed_by(torch.where(rollout.closed_BKM[:, :, None], PAD, close_T1))

    def banned(self, banned_V: Tensor) -> Tensor:
        """bool [V], what a thought cannot contain, where a model bans `banned_V`."""
        banned_V = banned_V.clone()
        banned_V[[*self.close, *self.allowed]] = False
        return banned_V


def encode_tag(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """A tag's token if the vocabulary has it as one, else the tokens that spell it."""
    whole = vocabulary.token_id(text) if text else None
    return (whole,) if whole is not None else tuple(vocabulary.encode([text])[0])


def checked_tag(vocabulary: Vocabulary, name: str, text: str) -> tuple[int, ...]:
    """The ids of the text of setting `name`. Raises SettingError if they do not spell it."""
    ids = encode_tag(vocabulary, text)
    if not ids or text not in vocabulary.decode(list(ids)):
        raise SettingError(f"{name} {text!r} cannot be encoded by the tokenizer; choose another text")
    return ids
