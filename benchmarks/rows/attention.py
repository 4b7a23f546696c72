"""Attention alone: thoughts at every position and at a few, against the reference and torch's kernels.

Shapes: B rows, N = P text positions, M anchors, K thoughts of an anchor, S query and T key tokens of a thought, H query
heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import Variant
from benchmarks.rows.row import Row, Rows, race_row
from benchmarks.settings import AttentionShape, Settings
from benchmarks.workloads import copy_bytes, last_position, unsupported_calls
from models import attention
from models.thoughts import Anchors, Text


def attention_rows(settings: Settings) -> Rows:
    if settings.deep_decode is not None:
        yield settings.deep_decode.name, partial(deep_decode, settings, settings.deep_decode)
    for shape in settings.attention:
        yield shape.name, partial(dense_attention, settings, shape)
    if settings.masked is not None:
        yield settings.masked.name, partial(masked_attention, settings, settings.masked)
    yield settings.rollout_step.name, partial(rollout_step, settings, settings.rollout_step)
    yield "deep step", partial(deep_attention, settings)


def _attention_inputs(
    settings: Settings, B: int, N: int, M: int, K: int, S: int, T: int, heads: tuple[int, int, int]
) -> list[Tensor]:
    """q, k, v of thoughts and k, v of the text, shaped as in models/attention."""
    H, G, D = heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, K, S, M, H, D), (B, K, T, M, G, D), (B, K, T, M, G, D), (B, N, G, D), (B, N, G, D)]
    return [torch.randn(s, generator=generator).to(settings.device, settings.dtype).requires_grad_() for s in shapes]


def _attend(inputs: Sequence[Tensor], anchors: Anchors, backend: str | None) -> Tensor:
    q, k, v, k_text, v_text = inputs
    return attention.thought_attention(q, k, v, k_text, v_text, anchors, backend)


def dense_attention(settings: Settings, shape: AttentionShape) -> Row:
    """Forward and backward over whole thoughts at every position, for each backend; `default` is the automatic choice.

    `S causal calls` is the arithmetic floor: torch's own attention over the same text, once per thought token;
    `one causal call` does the same with all of them as rows of one batch.
    """
    row = Row("attention", shape.name, vars(shape) | {"dtype": str(settings.dtype)})
    B, N, K, S, H, G, D = (getattr(shape, name) for name in "BNKSHGD")
    text = Text.from_rows(torch.zeros(B, N, dtype=torch.int64, device=settings.device))
    anchors = Anchors.everywhere(text)
    _ = text.whole_rows
    inputs = _attention_inputs(settings, B, N, N, K, S, S, (H, G, D))
    grad = torch.randn(B, K, S, N, H, D, device=settings.device).to(settings.dtype)
    floor_pairs = B * K * S * N * (N + 1) // 2
    pairs = floor_pairs + B * K * N * S * (S + 1) // 2
    # Backward takes five matrix products to the forward's two (FlashAttention, 2205.14135).
    per_pair = 4 * H * D * 3.5

    def forward_backward(backend: str | None) -> dict[str, float]:
        with unsupported_calls():
            out = _attend(inputs, anchors, backend)
        torch.autograd.grad(out, inputs, grad)
        return {"flops": per_pair * pairs}

    # The layout in which torch's attention is fastest: heads before positions.
    rows = [x.flatten(0, 1).transpose(1, 2).contiguous() for x in inputs[0].detach().unbind(2)]
    grads = [x.flatten(0, 1).transpose(1, 2).contiguous() for x in grad.unbind(2)]
    k, v = (
        x.detach().repeat_interleave(K, 0).transpose(1, 2).contiguous().requires_grad_() for x in (inputs[3], inputs[4])
    )

    # On CUDA torch has no flash kernel for fp32.
    flash = settings.device.type == "cpu" or settings.dtype != torch.float32
    kernels = [SDPBackend.FLASH_ATTENTION] if flash else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def causal(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        torch.autograd.grad(out, (q, k, v), grad)

    def causal_calls() -> dict[str, float]:
        with sdpa_kernel(kernels):
            for q, g in zip(rows, grads, strict=True):
                causal(q.requires_grad_(), k, v, g)
        return {"flops": per_pair * floor_pairs}

    all_rows, all_grads = torch.cat(rows).requires_grad_(), torch.cat(grads)
    all_k, all_v = (x.detach().repeat(S, 1, 1, 1).requires_grad_() for x in (k, v))

    def causal_call() -> dict[str, float]:
        with sdpa_kernel(kernels):
            causal(all_rows, all_k, all_v, all_grads)
        return {"flops": per_pair * floor_pairs}

    variants: dict[str, Variant] = {"default": partial(forward_backward, None)}
    variants |= {backend: partial(forward_backward, backend) for backend in attention.BACKENDS}
    variants |= {"S causal calls": causal_calls, "one causal call": causal_call}
    race_row(row, settings, variants)
    for backend in ("default", *attention.BACKENDS):
        if backend != "reference":
            row.compare(f"reference / {backend}, time", row.seconds("reference"), row.seconds(backend))
            row.compare(f"{backend} / reference, memory", row.added(backend), row.added("reference"))
            row.compare(f"{backend} / S causal calls, time", row.seconds(backend), row.seconds("S causal calls"))
            row.compare(f"{backend} / one causal call, FLOP/s", row.rate(backend), row.rate("one causal call"))
    return row


def masked_attention(settings: Settings, shape: AttentionShape) -> Row:
    """The same against what the public Quiet-STaR code computes: at each step of a thought, every position's query
    against the keys of all positions so far, under a mask. Those are N² · S(S + 3) / 2 pairs; `reference` computes
    N² · S, plus those within a thought."""
    row = Row("attention", shape.name, vars(shape) | {"dtype": str(settings.dtype)})
    B, N, K, S, H, G, D = (getattr(shape, name) for name in "BNKSHGD")
    text = Text.from_rows(torch.zeros(B, N, dtype=torch.int64, device=settings.device))
    anchors = Anchors.everywhere(text)
    inputs = _attention_inputs(settings, B, N, N, K, S, S, (H, G, D))
    grad = torch.randn(B, K, S, N, H, D, device=settings.device).to(settings.dtype)
    causal_NN = torch.ones(N, N, dtype=torch.bool, device=settings.device).tril()
    own_NN = torch.eye(N, dtype=torch.bool, device=settings.device)

    def with_backward(attend: Callable[[], Tensor]) -> None:
        torch.autograd.grad(attend(), inputs, grad)

    def every_key() -> Tensor:
        q, k, v, k_text, v_text = (x.unflatten(-2, (G, -1)) for x in inputs)
        keys, values = ([x[:, None, :, :, :1].expand(B, K, -1, -1, -1, -1)] for x in (k_text, v_text))
        mask_NT, out = causal_NN, []
        for s in range(S):
            keys.append(k[:, :, s])
            values.append(v[:, :, s])
            mask_NT = torch.cat([mask_NT, own_NN], dim=1)
            scores = torch.einsum("bkngrd,bktgud->bkgrnt", q[:, :, s], torch.cat(keys, dim=2)) * D**-0.5
            weights = scores.masked_fill(~mask_NT, float("-inf")).softmax(-1, dtype=torch.float32).to(scores.dtype)
            out.append(torch.einsum("bkgrnt,bktgud->bkngrd", weights, torch.cat(values, dim=2)).flatten(-3, -2))
        return torch.stack(out, dim=2)

    ours = partial(_attend, inputs, anchors, None)
    with torch.no_grad():  # both must compute the same function
        torch.testing.assert_close(every_key(), ours(), rtol=0.02, atol=0.02)
    variants: dict[str, Variant] = {
        "default": partial(with_backward, ours),
        "reference": partial(with_backward, partial(_attend, inputs, anchors, "reference")),
        "every key, masked": partial(with_backward, every_key),
    }
    race_row(row, settings, variants)
    for slow in ("every key, masked", "reference"):
        row.compare(f"{slow} / default, time", row.seconds(slow), row.seconds("default"))
        row.compare(f"default / {slow}, memory", row.added("default"), row.added(slow))
    return row


def rollout_step(settings: Settings, shape: AttentionShape) -> Row:
    """The newest of S tokens of thoughts at every position, without gradient."""
    row = Row("attention", shape.name, vars(shape) | {"dtype": str(settings.dtype)})
    text = Text.from_rows(torch.zeros(shape.B, shape.N, dtype=torch.int64, device=settings.device))
    anchors = Anchors.everywhere(text)
    _ = text.whole_rows
    heads = shape.H, shape.G, shape.D
    inputs = _attention_inputs(settings, shape.B, shape.N, shape.N, shape.K, 1, shape.S, heads)
    return _backends(row, settings, [x.detach() for x in inputs], anchors)


def deep_attention(settings: Settings) -> Row:
    """The newest token of thoughts at the text's last position, halfway through a thought, without gradient."""
    c, model = settings.deep, settings.model
    row = Row("attention", "deep step", dict(c) | {"dtype": str(settings.dtype)})
    text = Text.from_rows(torch.zeros(1, c["P"], dtype=torch.int64, device=settings.device))
    anchors = Anchors(text, torch.tensor([[c["P"] - 1]], device=settings.device))
    _ = anchors.prefixes
    heads = model.heads, model.kv_heads, model.head_dim
    inputs = _attention_inputs(settings, 1, c["P"], 1, c["G"], 1, max(1, c["T"] // 2), heads)
    return _backends(row, settings, [x.detach() for x in inputs], anchors)


def deep_decode(settings: Settings, shape: AttentionShape) -> Row:
    """The newest of S tokens of K thoughts at each text's last position, in bf16 and without gradient: bytes read and
    written per second, counting each key and value once, relative to a plain copy."""
    settings = replace(settings, dtype=torch.bfloat16)
    row = Row("attention", shape.name, vars(shape) | {"dtype": str(settings.dtype)})
    text = Text.from_rows(torch.zeros(shape.B, shape.N, dtype=torch.int64, device=settings.device))
    anchors = last_position(text)
    _ = anchors.prefixes
    heads = shape.H, shape.G, shape.D
    inputs = _attention_inputs(settings, shape.B, shape.N, 1, shape.K, 1, shape.S, heads)
    copy = partial(copy_bytes, settings.copy_bytes, settings.device)
    _backends(row, settings, [x.detach() for x in inputs], anchors, {"copy": copy})
    for backend in ("default", *attention.BACKENDS):
        row.compare(f"{backend} / copy, bytes/s", row.rate(backend, "bytes"), row.rate("copy", "bytes"))
    return row


def _backends(
    row: Row,
    settings: Settings,
    inputs: list[Tensor],
    anchors: Anchors,
    others: Mapping[str, Variant] | None = None,
) -> Row:
    """Each backend without gradient, and `others`; counts the bytes of all inputs and the output, once each."""
    moved = sum(x.nbytes for x in (*inputs, inputs[0]))

    def forward(backend: str | None) -> dict[str, float]:
        with torch.no_grad(), unsupported_calls():
            _attend(inputs, anchors, backend)
        return {"bytes": moved}

    variants: dict[str, Variant] = {"default": partial(forward, None)}
    variants |= {backend: partial(forward, backend) for backend in attention.BACKENDS}
    race_row(row, settings, variants | dict(others or {}))
    for backend in ("default", *attention.BACKENDS):
        if backend != "reference":
            row.compare(f"reference / {backend}, time", row.seconds("reference"), row.seconds(backend))
    return row
