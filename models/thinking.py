"""A decoder that thinks: the language model with what thinking adds to it.

Shapes: B rows, N text positions, M anchors, K thoughts, S tokens of a thought, R slots of thoughts end to end, W
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.decoder import Decoder, TextState, ThoughtCache
from models.flops import count_mixing, count_read, count_think
from models.precision import Linear
from models.thoughts import END, START, Anchors, Text, Thoughts


class Delimiters(nn.Module):
    """Embeddings of start- and end-of-thought, stored divided by `SCALE` and multiplied by it in use.

    Under Adam, whose steps do not depend on the gradient's size, that is a learning rate SCALE times the model's
    (Quiet-STaR, 2403.09629 appendix A). They have no vocabulary ids, so no text can contain and no sampler draw them.
    """

    SCALE = 100.0

    def __init__(self, width: int):
        super().__init__()
        self.start_W = nn.Parameter(torch.zeros(width))
        self.end_W = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def init_from(self, start_W: Tensor, end_W: Tensor) -> None:
        """They start as the embeddings of tokens, in Quiet-STaR both as that of the first sub-token of `---`."""
        self.start_W.copy_(start_W / self.SCALE)
        self.end_W.copy_(end_W / self.SCALE)


class MixingHead(nn.Module):
    """The weight w of a thought's prediction against the text's own (Quiet-STaR §4.3); w is not bounded.

    A three-layer MLP on [text hidden ; thought hidden] whose last layer starts at zero, so a fresh head gives w = 0:
    "ignore the thought". The first layer is held as its two halves, so that the text's is computed once per position
    and not once per thought.
    """

    def __init__(self, width: int):
        super().__init__()
        self.from_text = Linear(width, width, bias=False)
        self.from_thought = Linear(width, width)
        self.hidden = Linear(width, width)
        self.out = Linear(width, 1, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """As torch initialises linear layers, the first one as the single layer of 2W inputs that it is."""
        W = self.hidden.in_features
        for weight, fan_in in ((self.from_text, 2 * W), (self.from_thought, 2 * W), (self.hidden, W)):
            for parameter in weight.parameters():
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        self.out.weight.zero_()

    def forward(self, text_W: Tensor, thought_W: Tensor) -> Tensor:
        """Broadcasting hidden states [..., W] → w [...], fp32."""
        W = text_W.shape[-1]
        count_mixing(W, text_W.numel() // W, thought_W.numel() // W)
        first = (self.from_text(text_W) + self.from_thought(thought_W)).relu()
        second = self.hidden(first).relu()
        return self.out(second.to(self.out.weight.dtype))[..., 0]


@dataclass(frozen=True)
class TrainedThinking:
    """How a model was trained to think, for its use elsewhere.

    think: a thought behind every token, or one before an answer. length: sampled tokens of a thought (before an answer
    at most so many), None where that is not known. open_ids, close_ids: tokens that open and close a thought, where
    they are in the vocabulary.
    """

    think: Literal["every-token", "before-answer"]
    length: int | None
    open_ids: tuple[int, ...] = ()
    close_ids: tuple[int, ...] = ()


class ThinkingModel(nn.Module):
    """Decoder, delimiters, mixing head; what an objective does not use is None."""

    banned_V: Tensor
    # Whether all ranks say so: a sharded model's passes are collective, so its ranks must take as many of them.
    all_agree: Callable[[Tensor], bool] = staticmethod(bool)

    def __init__(self, decoder: Decoder, delimiters: bool = False, mixing_head: bool = False):
        super().__init__()
        self.decoder = decoder
        self.delimiters = Delimiters(decoder.config.width) if delimiters else None
        self.mixing_head = MixingHead(decoder.config.width) if mixing_head else None
        # Ids no thought may contain: control tokens and embedding rows without a token.
        self.register_buffer("banned_V", torch.zeros(decoder.config.vocab_size, dtype=torch.bool), persistent=False)

    def ban(self, tokenizer_size: int, control_ids: tuple[int, ...]) -> None:
        """Keeps control tokens and ids beyond the tokenizer's size out of every thought."""
        self.banned_V[tokenizer_size:] = True
        self.banned_V[list(control_ids)] = True

    @torch.no_grad()
    def allocate(self, device: torch.device) -> None:
        """Memory for parameters that are on the meta device, uninitialised; buffers keep their values."""
        buffers = dict(self.named_buffers())
        self.to_empty(device=device)
        for name, buffer in self.named_buffers():
            buffer.copy_(buffers[name])

    @property
    def head_weight_VW(self) -> Tensor:
        return self.decoder.head_weight_VW

    def read(self, text: Text) -> TextState:
        """See Decoder.read."""
        count_read(self.decoder, text)
        return self.decoder.read(text)

    def embed_thoughts(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., W] of thought tokens [...], delimiters included; PAD is embedded as id 0."""
        x = self.decoder.embed(tokens.clamp(min=0))
        if self.delimiters is None:
            return x
        for value, embedding_W in ((START, self.delimiters.start_W), (END, self.delimiters.end_W)):
            x = torch.where((tokens == value)[..., None], (embedding_W * Delimiters.SCALE).to(x.dtype), x)
        return x

    def think(self, thoughts: Thoughts, state: TextState, at_once: int | None = None) -> Tensor:
        """Hidden states [B, K, S, M, W] of whole thoughts in one differentiable pass; see Decoder.think.

        Where thoughts differ in length, little is computed behind their ends, and what is there is of another token.
        at_once: thoughts of an anchor whose activations are held at once; backward computes each such group again.
        """
        K = thoughts.tokens_BKSM.shape[1]
        groups, slot_BKSM = thoughts.pieces(at_once or K)
        again = len(groups) > 1 and torch.is_grad_enabled()
        count_think(self.decoder, thoughts, again)
        if slot_BKSM is None:
            return self.decoder.think(self.embed_thoughts(thoughts.tokens_BKSM), thoughts.anchors, state)
        hidden = []
        for pieces in groups:
            if again:
                hidden.append(checkpoint(self._think, pieces, state, use_reentrant=False, preserve_rng_state=False))
            else:
                hidden.append(self._think(pieces, state))
        return torch.cat(hidden).index_select(0, slot_BKSM.flatten()).unflatten(0, slot_BKSM.shape)

    def _think(self, pieces: Sequence[Thoughts], state: TextState) -> Tensor:
        """Hidden states [R, W] of all slots of these thoughts, end to end."""
        x_RW = self.embed_thoughts(torch.cat([piece.tokens_BKSM.flatten() for piece in pieces]))
        B, _, _, M = pieces[0].tokens_BKSM.shape
        shapes = [(B, *piece.tokens_BKSM.shape[1:3], M) for piece in pieces]
        return self.decoder.think_pieces(x_RW, shapes, pieces[0].anchors, state)

    def continue_thoughts(self, tokens_BKSM: Tensor, anchors: Anchors, state: TextState, cache: ThoughtCache) -> Tensor:
        """Hidden states [B, K, S, M, W] of the next S tokens of the thoughts in the cache, which they join."""
        return self.decoder.think(self.embed_thoughts(tokens_BKSM), anchors, state, cache)
