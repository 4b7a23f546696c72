"""The decoder of the Llama, Mistral, Qwen, OLMo and SmolLM families, which reads text and thinks.

`read` is one causal, document-masked pass over packed text; `think` runs thought tokens that see that text up to their
anchor and their own thought. Parameter names are those of the families' Hugging Face checkpoints without the leading
`model.`, so that import and export rename nothing.

Shapes: B rows, N text positions, M anchors, K thoughts, S new tokens of a thought, T all tokens of a thought so far,
R slots of several thoughts, W width, H query heads, G key-value heads, D head size, V vocabulary, `_` leading axes of
any number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import text_attention, thought_attention
from models.pointwise import gated, rms_norm, rotate
from models.precision import Linear, accumulation_dtype, together
from models.rope import cos_and_sin, inverse_frequencies
from models.thoughts import Anchors, Text


@dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes the supported models. Sizes in units, not bytes."""

    vocab_size: int  # rows of the embedding, which may exceed the tokenizer's size
    width: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # of each head, or
    qk_norm_all_heads: bool = False  # one norm over all heads of queries, and one over those of keys
    post_norm: bool = False  # norms of what attention and MLP return, not of what they are given
    rotary: tuple[str, ...] = ()  # of each layer: scaled, plain (without rope_scaling) or none; all scaled if empty
    sliding_window: int | None = None  # texts longer than this are refused, not windowed
    windowed_layers: tuple[int, ...] | None = None  # that the window limits, all if None; only export asks for them
    family: str = "llama"  # of checkpoints.families: the architecture named on export
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("rotary", "windowed_layers"):  # lists in JSON
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else tuple(value))
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads evenly")
        if self.rotary and len(self.rotary) != self.layers:
            raise ValueError(f"rotary embeddings are given for {len(self.rotary)} of {self.layers} layers")


class RMSNorm(nn.Module):
    """See pointwise.rms_norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass
class TextState:
    """What thoughts need of a text that was read.

    hidden_BNW: final-norm output. keys, values: per layer [B, N, G, D], keys already rotated. All carry gradient.
    """

    text: Text
    hidden_BNW: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.hidden_BNW, *self.keys, *self.values]

    def detached(self) -> TextState:
        return TextState(
            self.text, self.hidden_BNW.detach(), [k.detach() for k in self.keys], [v.detach() for v in self.values]
        )

    def by_head(self) -> TextState:
        """The same with each head's keys and values in one piece of memory where steps of a few thoughts gain by it: in
        bf16 on CPU, where the flash kernel then takes a fourth less time. Itself elsewhere."""
        if self.hidden_BNW.device.type != "cpu" or self.hidden_BNW.dtype != torch.bfloat16:
            return self
        keys, values = ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs] for xs in (self.keys, self.values))
        return TextState(self.text, self.hidden_BNW, keys, values)


class _AccumulatedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, accumulated, *tensors):
        ctx.accumulated = accumulated
        return tensors[0].new_zeros((), dtype=accumulation_dtype(tensors[0].dtype))

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.accumulated


def _accumulate(accumulated: list[Tensor | None], i: int, leaf: Tensor) -> None:
    """Moves a leaf's gradient to entry i, where it is summed in the accumulation dtype: `leaf.grad` may be bf16."""
    grad, total = leaf.grad, accumulated[i]
    assert grad is not None
    leaf.grad = None
    accumulated[i] = grad.to(accumulation_dtype(grad.dtype)) if total is None else total.add_(grad)


class Trunk:
    """A text that was read once, for losses of its thoughts that are computed one chunk at a time.

    state: the text's, cut off from the graph of its reading. Backward of a loss on it ends there and leaves the
    gradient of hidden states, keys and values behind, summed over the losses, which `accumulated_gradient`
    backpropagates through the text.
    """

    def __init__(self, read: TextState):
        self._read = read
        self.state = read.detached()
        self._accumulated: list[Tensor | None] = [None] * len(self.state.tensors)
        for i, leaf in enumerate(self.state.tensors):
            leaf.requires_grad_().register_post_accumulate_grad_hook(
                functools.partial(_accumulate, self._accumulated, i)
            )

    def accumulated_gradient(self) -> Tensor:
        """A loss of 0 whose backward is that of all losses taken on `state` so far, through the text.

        Whatever those were multiplied by before their backward is in the gradient already and is passed on as it is: a
        factor on this loss changes nothing.
        """
        tensors = self._read.tensors
        pairs = zip(self._accumulated, tensors, strict=True)
        return _AccumulatedGradient.apply([g if g is None else g.to(x.dtype) for g, x in pairs], *tensors)


class ThoughtCache:
    """Static buffers for the keys and values of thoughts that are being sampled: per layer [B, K, T, M, G, D].

    length: tokens written.
    """

    # How much of the buffers is filled, where only the device knows; None if attention gets just what is filled.
    filled_1: Tensor | None = None

    def __init__(self, config: DecoderConfig, B: int, K: int, T: int, M: int, like: Tensor):
        shape = (config.layers, B, K, T, M, config.kv_heads, config.head_dim)
        if like.device.type == "cpu":  # See TextState.by_head; CUDA kernels take sequences end to end.
            layers, B, K, T, M, G, D = shape
            self.keys, self.values = (
                like.new_empty(layers, B, K, M, G, T, D).permute(0, 1, 2, 5, 3, 4, 6) for _ in range(2)
            )
        else:
            self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def next_tokens(self, S: int) -> Tensor:
        """int64 [S], the numbers of the next S tokens of a thought, counted from 1."""
        return torch.arange(self.length + 1, self.length + S + 1, device=self.keys.device)

    def extend(self, layer: int, k_BKSMGD: Tensor, v_BKSMGD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes behind what is there and returns all keys and values so far; the last layer moves `length` on."""
        end = self.length + k_BKSMGD.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = k_BKSMGD
        values[:, :, self.length : end] = v_BKSMGD
        if layer == len(self.keys) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]


class RecordableCache(ThoughtCache):
    """The buffers of another cache, one token after the other, with the number of tokens held on the device.

    What a step does is then the same at every length, so that it can be recorded once and replayed. Attention gets the
    whole buffers and `filled_1`.
    """

    def __init__(self, cache: ThoughtCache):
        self.keys, self.values = cache.keys, cache.values
        self.length = self.keys.shape[3] - 1  # the most that may be there when a step begins
        self._written_1 = torch.empty(1, dtype=torch.int64, device=self.keys.device)
        self.restart(cache.length)

    def restart(self, length: int) -> None:
        """Back to so many tokens."""
        self._written_1.fill_(length)

    def next_tokens(self, S: int) -> Tensor:
        assert S == 1
        self.filled_1 = (self._written_1 + 1).int()
        return self._written_1 + 1

    def extend(self, layer: int, k_BKSMGD: Tensor, v_BKSMGD: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self._written_1, k_BKSMGD)
        self.values[layer].index_copy_(2, self._written_1, v_BKSMGD)
        if layer == len(self.keys) - 1:
            self._written_1 += 1
        return self.keys[layer], self.values[layer]


# Attention of queries [_, H, D] over keys and values [_, G, D] and whatever else may be seen → [_, H, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# cos and sin [_, 1, D] of a layer's rotary embedding, as pointwise.rotate takes them; None for a layer without.
Rotation = tuple[Tensor, Tensor] | None


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        H, G, D = config.heads, config.kv_heads, config.head_dim
        self.head_dim = D
        self.q_proj = Linear(config.width, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, G * D, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, G * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, config.width, bias=config.out_bias)
        self.norms_all_heads = config.qk_norm_all_heads
        q_size, k_size = (H * D, G * D) if config.qk_norm_all_heads else (D, D)
        normed = config.qk_norm or config.qk_norm_all_heads
        self.q_norm = RMSNorm(q_size, config.rms_norm_eps) if normed else None
        self.k_norm = RMSNorm(k_size, config.rms_norm_eps) if normed else None

    def project(self, x_W: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [_, H, D] and keys [_, G, D], and values [_, G, D], of x [_, W]."""
        q, k, v = together(x_W, self.q_proj, self.k_proj, self.v_proj)
        if self.norms_all_heads:
            q, k = self._normed(q, k)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in (q, k, v))
        if not self.norms_all_heads:
            q, k = self._normed(q, k)
        return (q, k, v) if rotation is None else (rotate(q, *rotation), rotate(k, *rotation), v)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = Linear(config.width, config.ffn_width, bias=config.mlp_bias)
        self.up_proj = Linear(config.width, config.ffn_width, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_width, config.width, bias=config.mlp_bias)

    def forward(self, x_W: Tensor) -> Tensor:
        gate, up = together(x_W, self.gate_proj, self.up_proj)
        return self.down_proj(gated(gate, up))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = MLP(config)

    @property
    def norms(self) -> tuple[RMSNorm, RMSNorm]:
        """Of attention and of the MLP."""
        return self.input_layernorm, self.post_attention_layernorm

    def forward(self, x_W: Tensor, rotation: Rotation, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        """x [_, W] → x [_, W], keys and values [_, G, D]; `attend` is attention over whatever these tokens may see.

        Keys and values are results like x, because thoughts send gradient into a text's: what hooks a block's results,
        as sharding does, must see all three.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x_W), rotation)
        x_W = x_W + self.self_attn.o_proj(attend(q, k, v).flatten(-2))
        return x_W + self.mlp(self.post_attention_layernorm(x_W)), k, v


class PostNormBlock(nn.Module):
    """Block with the norms of OLMo 2 (2501.00656 §2): of what attention and MLP return."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.width, config.rms_norm_eps)

    @property
    def norms(self) -> tuple[RMSNorm, RMSNorm]:
        """Of attention and of the MLP."""
        return self.post_attention_layernorm, self.post_feedforward_layernorm

    def forward(self, x_W: Tensor, rotation: Rotation, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        """As Block.forward."""
        q, k, v = self.self_attn.project(x_W, rotation)
        x_W = x_W + self.post_attention_layernorm(self.self_attn.o_proj(attend(q, k, v).flatten(-2)))
        return x_W + self.post_feedforward_layernorm(self.mlp(x_W)), k, v


class Decoder(nn.Module):
    """The language model. Parameters are the masters (fp32; fp64 in tests); activations are in `compute_dtype`."""

    inverse_frequencies: Tensor

    def __init__(self, config: DecoderConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        block = PostNormBlock if config.post_norm else Block
        self.layers = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("inverse_frequencies", None, persistent=False)
        self.init_rotary()
        self.attention_backend: str | None = None
        # Whether a pass with gradient keeps only each block's inputs, and backward computes the block again.
        self.activation_checkpointing = False

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of the config's standard deviation, zero biases, unit norms."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def init_rotary(self) -> None:
        """Computes the rotary frequencies, which no file of weights holds: fp32 [2, D / 2], plain and scaled."""
        c = self.config
        plain, scaled = (
            inverse_frequencies(c.head_dim, c.rope_theta, scaling, c.max_positions) for scaling in ({}, c.rope_scaling)
        )
        self.inverse_frequencies = torch.stack([plain[0], scaled[0]])
        self._rope_factors = plain[1], scaled[1]

    @property
    def head_weight_VW(self) -> Tensor:
        """The language-model head, in the masters' dtype."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 vocabulary ids [...] → [..., W] in the compute dtype."""
        embedded = self.embed_tokens(tokens)
        return embedded if self.compute_dtype is None else embedded.to(self.compute_dtype)

    def read(self, text: Text) -> TextState:
        """One causal pass over packed text, documents apart. Raises ValueError for rows the model cannot hold."""
        return self.read_embedded(self.embed(text.tokens_BN), text)

    def read_embedded(self, x_BNW: Tensor, text: Text) -> TextState:
        """The same with the tokens of `text` given as embeddings."""
        self.check_positions(text.shape[1])
        x = x_BNW
        rotations = self.rotations_at(text.position_BN, x.dtype)
        keys, values = [], []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return text_attention(q, k, v, text, self.attention_backend)

        for block, rotation in zip(self.layers, rotations, strict=True):
            x, k, v = self._pass(block, x, rotation, attend)
            keys.append(k)
            values.append(v)
        return TextState(text, self.norm(x), keys, values)

    def think(self, x_BKSMW: Tensor, anchors: Anchors, state: TextState, cache: ThoughtCache | None = None) -> Tensor:
        """Final-norm hidden states [B, K, S, M, W] of thought tokens given as embeddings.

        Without a cache the S tokens are whole thoughts and everything is differentiable, the text's keys and values
        included. With a cache they continue the thoughts in it.
        """
        written, S = (0 if cache is None else cache.length), x_BKSMW.shape[2]
        self.check_positions(state.text.shape[1] + written + S)
        steps_S = torch.arange(1, S + 1, device=x_BKSMW.device) if cache is None else cache.next_tokens(S)
        position_B1SM = anchors.position_BM[:, None, None, :] + steps_S[:, None]
        rotations = self.rotations_at(position_B1SM, x_BKSMW.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            filled_1 = None
            if cache is not None:
                k, v = cache.extend(layer, k, v)
                filled_1 = cache.filled_1
            text = state.keys[layer], state.values[layer]
            return thought_attention(q, k, v, *text, anchors, self.attention_backend, filled_1)

        return self._through(x_BKSMW, rotations, attend)

    def think_pieces(
        self, x_RW: Tensor, shapes: Sequence[tuple[int, int, int, int]], anchors: Anchors, state: TextState
    ) -> Tensor:
        """The same [R, W] of whole thoughts in several pieces [B, K, S, M] of these shapes, one behind the other: K and
        S differ. Their tokens go through all but attention together."""
        self.check_positions(state.text.shape[1] + max(S for _, _, S, _ in shapes))
        sizes, positions = [math.prod(shape) for shape in shapes], []
        for B, K, S, M in shapes:
            steps_S1 = torch.arange(1, S + 1, device=x_RW.device)[:, None]
            positions.append((anchors.position_BM[:, None, None, :] + steps_S1).expand(B, K, S, M).flatten())
        rotations = self.rotations_at(torch.cat(positions), x_RW.dtype)

        def pieces(x_R: Tensor) -> list[Tensor]:
            return [piece.unflatten(0, shape) for piece, shape in zip(x_R.split(sizes), shapes, strict=True)]

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            text = state.keys[layer], state.values[layer]
            out = [
                thought_attention(q, k, v, *text, anchors, self.attention_backend)
                for q, k, v in zip(*map(pieces, qkv), strict=True)
            ]
            return torch.cat([piece.flatten(0, 3) for piece in out])

        return self._through(x_RW, rotations, attend)

    def _through(self, x_W: Tensor, rotations: list[Rotation], attend: Callable[..., Tensor]) -> Tensor:
        """x [_, W] through all blocks, whose attention is `attend` of the layer's number, queries, keys and values."""
        for layer, block in enumerate(self.layers):
            x_W, _, _ = self._pass(block, x_W, rotations[layer], functools.partial(attend, layer))
        return self.norm(x_W)

    def _pass(self, block: nn.Module, x_W: Tensor, rotation: Rotation, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # No random state to restore: no block uses random numbers.
            return checkpoint(block, x_W, rotation, attend, use_reentrant=False, preserve_rng_state=False)
        return block(x_W, rotation, attend)

    def rotations_at(self, position: Tensor, dtype: torch.dtype) -> list[Rotation]:
        """Of each layer at int64 positions [...]."""
        layers = self.config.rotary or ("scaled",) * self.config.layers
        rotations: dict[str, Rotation] = {"none": None}
        for i, kind in enumerate(("plain", "scaled")):
            if kind in layers:
                cos, sin = cos_and_sin(position, self.inverse_frequencies[i], self._rope_factors[i], dtype)
                rotations[kind] = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return [rotations[kind] for kind in layers]

    def check_positions(self, length: int) -> None:
        """Raises ValueError where so many positions are more than the model has, or than its sliding window."""
        window = self.config.sliding_window
        if window is not None and length > window:
            raise ValueError(f"{length} positions exceed the model's sliding window of {window}; use shorter rows")
        if length > self.config.max_positions:
            raise ValueError(f"{length} positions exceed the model's {self.config.max_positions}; use shorter rows")
