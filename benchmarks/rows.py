"""The benchmark's rows: what is compared with what, and the ratios that come of it.

Shapes: B rows, N = P text positions, K = G thoughts of an anchor, S = L + 1 + A tokens of a Quiet-STaR thought, T of
an RLP-shaped one, H query heads, G key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.environment import bf16_peak
from benchmarks.measure import Contestant, Growth, Measured, Spread, race, synchronise
from benchmarks.settings import AttentionShape, Curve, Settings
from benchmarks.workloads import (
    make_model,
    make_text,
    model_bytes,
    next_token,
    quiet_star,
    repeated,
    rlp,
    training_step,
    transformers_model,
    unserved,
)
from models import attention, native
from models.logprobs import token_logprobs
from models.native import filled_up, takes_native_steps
from models.philox import Rng
from models.pointwise import compile_chains
from models.rollout import rollout
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text, Thoughts
from objectives.base import Objective

# What a row may break down by outside its contestants, whose own failures `race` takes.
BREAKS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, MemoryError, ImportError)
GIVEN = 3  # the id that every thought of a deep rollout begins with


@dataclass
class Row:
    """One comparison. setting: its sizes. ratios: by what they say; growth: of curves, for seconds and bytes."""

    part: str
    name: str
    setting: dict[str, Any]
    measured: dict[str, Measured] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    growth: dict[str, Growth] = field(default_factory=dict)
    failed: str | None = None

    def seconds(self, name: str, figure: str = "seconds") -> list[float]:
        return self.measured[name].figures.get(figure, []) if name in self.measured else []

    def rate(self, name: str, figure: str = "flops") -> list[float]:
        return self.measured[name].rate(figure) if self.seconds(name, figure) else []

    def added(self, name: str, constant: int = 0) -> list[float]:
        """Bytes that a call takes and gives back, with `constant` ones that are there all the time."""
        found = self.measured[name].added_bytes if name in self.measured else None
        return [] if found is None else [float(found + constant)]

    def compare(self, what: str, over: list[float], under: list[float]) -> None:
        """Round by round; no ratio where one side has no figures."""
        if over and under and min(under) > 0:
            self.ratios[what] = Spread.of([a / b for a, b in zip(over, under, strict=False)])

    def failures(self) -> list[str]:
        rows = [f"{self.name}: {self.failed}"] if self.failed else []
        return rows + [f"{self.name}, {name}: {m.failed}" for name, m in self.measured.items() if m.failed]

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "name": self.name,
            "setting": self.setting,
            "measured": {name: measured.to_json() for name, measured in self.measured.items()},
            "ratios": {name: vars(ratio) for name, ratio in self.ratios.items()},
            **({"growth": {name: vars(growth) for name, growth in self.growth.items()}} if self.growth else {}),
            **({"failed": self.failed} if self.failed else {}),
        }


def _race(row: Row, settings: Settings, contestants: Mapping[str, Contestant], repeats: int | None = None) -> Row:
    row.measured |= race(
        contestants, settings.device, settings.repeats if repeats is None else repeats, settings.budget
    )
    return row


# Attention alone


def attention_rows(settings: Settings) -> Iterator[tuple[str, Callable[[], Row]]]:
    for shape in settings.attention:
        yield shape.name, partial(dense_attention, settings, shape)
    if settings.masked is not None:
        yield settings.masked.name, partial(masked_attention, settings, settings.masked)
    yield settings.rollout_step.name, partial(rollout_step, settings, settings.rollout_step)
    yield "deep step", partial(deep_attention, settings)
    if settings.deep_decode is not None:
        yield settings.deep_decode.name, partial(deep_decode, settings, settings.deep_decode)


def _attention_inputs(
    settings: Settings, B: int, N: int, M: int, K: int, S: int, T: int, heads: tuple[int, int, int]
) -> list[Tensor]:
    """q, k, v of thoughts and k, v of the text, as in models/attention."""
    H, G, D = heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, K, S, M, H, D), (B, K, T, M, G, D), (B, K, T, M, G, D), (B, N, G, D), (B, N, G, D)]
    return [torch.randn(s, generator=generator).to(settings.device, settings.dtype).requires_grad_() for s in shapes]


def _attend(inputs: Sequence[Tensor], anchors: Anchors, backend: str | None) -> Tensor:
    q, k, v, k_text, v_text = inputs
    return attention.thought_attention(q, k, v, k_text, v_text, anchors, backend)


def dense_attention(settings: Settings, shape: AttentionShape) -> Row:
    """Forward and backward over whole thoughts at every position, by each backend; `default` is the one chosen.

    `S causal calls` is the arithmetic floor: torch's own attention over the same text, once for each thought token;
    `one causal call` the same with all of them as rows of a batch.
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
    # Backward is five products of the forward's two (FlashAttention, 2205.14135).
    per_pair = 4 * H * D * 3.5

    def forward_backward(backend: str | None) -> dict[str, float]:
        with unserved():
            out = _attend(inputs, anchors, backend)
        torch.autograd.grad(out, inputs, grad)
        return {"flops": per_pair * pairs}

    # Layouts that torch's attention likes best: heads before positions.
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

    contestants: dict[str, Contestant] = {"default": partial(forward_backward, None)}
    contestants |= {backend: partial(forward_backward, backend) for backend in attention.BACKENDS}
    contestants |= {"S causal calls": causal_calls, "one causal call": causal_call}
    _race(row, settings, contestants)
    for backend in ("default", *attention.BACKENDS):
        if backend != "reference":
            row.compare(f"reference / {backend}, time", row.seconds("reference"), row.seconds(backend))
            row.compare(f"{backend} / reference, memory", row.added(backend), row.added("reference"))
            row.compare(f"{backend} / S causal calls, time", row.seconds(backend), row.seconds("S causal calls"))
            row.compare(f"{backend} / one causal call, FLOP/s", row.rate(backend), row.rate("one causal call"))
    return row


def masked_attention(settings: Settings, shape: AttentionShape) -> Row:
    """The same against what the public Quiet-STaR code computes: at each of a thought's steps every position's query
    over the keys that all positions have so far, under a mask. Those are N² · S(S + 3) / 2 pairs; `reference` holds
    N² · S, and beside them a thought's own."""
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
    with torch.no_grad():  # the same function, or there is nothing to compare
        torch.testing.assert_close(every_key(), ours(), rtol=0.02, atol=0.02)
    contestants: dict[str, Contestant] = {
        "default": partial(with_backward, ours),
        "reference": partial(with_backward, partial(_attend, inputs, anchors, "reference")),
        "every key, masked": partial(with_backward, every_key),
    }
    _race(row, settings, contestants)
    for slow in ("every key, masked", "reference"):
        row.compare(f"{slow} / default, time", row.seconds(slow), row.seconds("default"))
        row.compare(f"default / {slow}, memory", row.added("default"), row.added(slow))
    return row


def rollout_step(settings: Settings, shape: AttentionShape) -> Row:
    """The newest of S own tokens of thoughts at every position, without gradient."""
    row = Row("attention", shape.name, vars(shape) | {"dtype": str(settings.dtype)})
    text = Text.from_rows(torch.zeros(shape.B, shape.N, dtype=torch.int64, device=settings.device))
    anchors = Anchors.everywhere(text)
    _ = text.whole_rows
    heads = shape.H, shape.G, shape.D
    inputs = _attention_inputs(settings, shape.B, shape.N, shape.N, shape.K, 1, shape.S, heads)
    return _backends(row, settings, [x.detach() for x in inputs], anchors)


def deep_attention(settings: Settings) -> Row:
    """The newest token of thoughts at the text's last position, without gradient: half as many own tokens as a whole
    thought has."""
    c, model = settings.deep, settings.model
    row = Row("attention", "deep step", dict(c) | {"dtype": str(settings.dtype)})
    text = Text.from_rows(torch.zeros(1, c["P"], dtype=torch.int64, device=settings.device))
    anchors = Anchors(text, torch.tensor([[c["P"] - 1]], device=settings.device))
    _ = anchors.prefixes
    heads = model.heads, model.kv_heads, model.head_dim
    inputs = _attention_inputs(settings, 1, c["P"], 1, c["G"], 1, max(1, c["T"] // 2), heads)
    return _backends(row, settings, [x.detach() for x in inputs], anchors)


def deep_decode(settings: Settings, shape: AttentionShape) -> Row:
    """The newest of S own tokens of K thoughts at each text's last position, in bf16 and without gradient: what it
    reads and writes, each key and value once, over what a plain copy does in as much time."""
    settings = replace(settings, dtype=torch.bfloat16)
    row = Row("attention", shape.name, vars(shape) | {"dtype": str(settings.dtype)})
    text = Text.from_rows(torch.zeros(shape.B, shape.N, dtype=torch.int64, device=settings.device))
    anchors = _last_position(text)
    _ = anchors.prefixes
    heads = shape.H, shape.G, shape.D
    inputs = _attention_inputs(settings, shape.B, shape.N, 1, shape.K, 1, shape.S, heads)
    copy = partial(_copy, settings)
    _backends(row, settings, [x.detach() for x in inputs], anchors, {"copy": copy})
    for backend in ("default", *attention.BACKENDS):
        row.compare(f"{backend} / copy, bytes/s", row.rate(backend, "bytes"), row.rate("copy", "bytes"))
    return row


def _backends(
    row: Row,
    settings: Settings,
    inputs: list[Tensor],
    anchors: Anchors,
    others: Mapping[str, Contestant] | None = None,
) -> Row:
    """Each backend without gradient, and `others`; with the bytes of all inputs and of the output, once each."""
    moved = sum(x.nbytes for x in (*inputs, inputs[0]))

    def forward(backend: str | None) -> dict[str, float]:
        with torch.no_grad(), unserved():
            _attend(inputs, anchors, backend)
        return {"bytes": moved}

    contestants: dict[str, Contestant] = {"default": partial(forward, None)}
    contestants |= {backend: partial(forward, backend) for backend in attention.BACKENDS}
    _race(row, settings, contestants | dict(others or {}))
    for backend in ("default", *attention.BACKENDS):
        if backend != "reference":
            row.compare(f"reference / {backend}, time", row.seconds("reference"), row.seconds(backend))
    return row


def _copy(settings: Settings) -> dict[str, float]:
    """A copy within the device, of more than its caches hold; what it reads and what it writes."""
    source = torch.empty(settings.copy_bytes, dtype=torch.uint8, device=settings.device)
    torch.empty_like(source).copy_(source)
    return {"bytes": 2 * source.numel()}


# Training steps


def step_rows(settings: Settings) -> Iterator[tuple[str, Callable[[], Row]]]:
    yield "quiet_star", partial(quiet_star_step, settings)
    yield "rlp", partial(rlp_step, settings)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"public shape, {_name(dtype)}", partial(public_step, settings, dtype)
    if settings.large_model is not None:
        yield "large", partial(large_step, settings)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _others(settings: Settings) -> tuple[str, ...]:
    """Backends that whole steps are forced to; a CPU has one that is worth it."""
    if settings.device.type == "cpu" and settings.name != "tiny":
        return ()
    return tuple(backend for backend in attention.BACKENDS if backend != "reference")


def _forced(model: ThinkingModel, backend: str, run: Contestant) -> Contestant:
    """The same with that attention backend everywhere."""

    def with_backend() -> Mapping[str, float] | None:
        model.decoder.attention_backend = backend
        try:
            with unserved():
                return run()
        finally:
            model.decoder.attention_backend = None

    return with_backend


def _switched_on(model: ThinkingModel, switch: str, run: Contestant) -> Contestant:
    """The same with that switch of the model on."""

    def with_switch_on() -> Mapping[str, float] | None:
        setattr(model, switch, True)
        try:
            return run()
        finally:
            setattr(model, switch, False)

    return with_switch_on


def _compiled(run: Contestant) -> Contestant:
    """The same with its chains of pointwise operations compiled."""

    def with_compiled_chains() -> Mapping[str, float] | None:
        compile_chains()
        try:
            return run()
        finally:
            compile_chains(False)

    return with_compiled_chains


def quiet_star_step(settings: Settings) -> Row:
    """A Quiet-STaR step and a next-token step on the same rows, and the former compiled and by each backend."""
    c = settings.quiet_star
    row = Row("steps", "quiet_star", dict(c) | {"dtype": _name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, settings.device)
    text = make_text(settings.model, 1, c["N"], settings.device)
    step = partial(training_step, quiet_star(c["L"], c["A"], c["K"], c.get("at_once")), model, text)
    contestants: dict[str, Contestant] = {
        "quiet_star": step,
        "next_token": partial(training_step, next_token(), model, text),
    }
    if settings.name != "tiny":  # where compiling would take longer than all the rest
        contestants["quiet_star, compiled"] = _compiled(step)
    contestants |= {f"quiet_star, {b}": _forced(model, b, step) for b in _others(settings)}
    _race(row, settings, contestants)
    weights = row.setting["model_bytes"] = model_bytes(model)
    row.compare("quiet_star / next_token, FLOP/s", row.rate("quiet_star"), row.rate("next_token"))
    row.compare("quiet_star / next_token, time", row.seconds("quiet_star"), row.seconds("next_token"))
    row.compare(
        "quiet_star / next_token, memory",
        row.added("quiet_star", weights),
        row.added("next_token", model_bytes(model, samples=False)),
    )
    row.compare("compiled / default, time", row.seconds("quiet_star, compiled"), row.seconds("quiet_star"))
    for backend in _others(settings):
        forced = row.seconds(f"quiet_star, {backend}")
        row.compare(f"{backend} / default, time", forced, row.seconds("quiet_star"))
    return row


def rlp_step(settings: Settings) -> Row:
    """An RLP-shaped step (one anchor, no-think teacher included) and a next-token step on the same row."""
    c = settings.rlp
    row = Row("steps", "rlp", dict(c) | {"dtype": _name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, settings.device)
    text = make_text(settings.model, 1, c["P"], settings.device)
    objectives: dict[str, Objective] = {"rlp": rlp(c["P"], c["G"], c["T"]), "next_token": next_token()}
    _race(row, settings, {name: partial(training_step, o, model, text) for name, o in objectives.items()})
    weights = row.setting["model_bytes"] = model_bytes(model)
    all_weights = weights + sum(model_bytes(other) for other in objectives["rlp"].other_models(model))
    row.compare("rlp / next_token, FLOP/s", row.rate("rlp"), row.rate("next_token"))
    row.compare("rlp / next_token, time", row.seconds("rlp"), row.seconds("next_token"))
    row.compare(
        "rlp / next_token, memory",
        row.added("rlp", all_weights),
        row.added("next_token", model_bytes(model, samples=False)),
    )
    return row


def public_step(settings: Settings, dtype: torch.dtype) -> Row:
    """A Quiet-STaR step at the size at which the public code's cost was published.

    That code repeats every row K times and calls the result its batch, so a plain step is taken on the repeated rows,
    by which the published 39 to 73 times are counted, and on the rows once.
    """
    c = settings.public
    row = Row("steps", f"public shape, {_name(dtype)}", dict(c) | {"dtype": _name(dtype)})
    model = make_model(settings.public_model, dtype, settings.device)
    text = make_text(settings.public_model, 1, c["N"], settings.device)
    _race(
        row,
        settings,
        {
            "quiet_star": partial(training_step, quiet_star(c["L"], c["A"], c["K"], c["at_once"]), model, text),
            "next_token, K times": partial(training_step, next_token(), model, repeated(text, c["K"])),
            "next_token, once": partial(training_step, next_token(), model, text),
        },
    )
    weights = row.setting["model_bytes"] = model_bytes(model)
    for plain in ("next_token, K times", "next_token, once"):
        row.compare(f"quiet_star / {plain}, time", row.seconds("quiet_star"), row.seconds(plain))
    row.compare("peak, GB", row.added("quiet_star", weights), [1e9])
    return row


def large_step(settings: Settings) -> Row:
    """Model FLOPs utilisation of a Quiet-STaR and of a next-token step of a model of 1.7 billion parameters.

    By the ledger, which counts logits twice because they are computed twice: 6% of this model's next-token step.
    """
    assert settings.large_model is not None
    c, peak = settings.large, bf16_peak(settings.device)
    row = Row("steps", "large", dict(c) | {"dtype": _name(torch.bfloat16), "peak_flops": peak})
    model = make_model(settings.large_model, torch.bfloat16, settings.device)
    text = make_text(settings.large_model, 1, c["N"], settings.device)
    texts = make_text(settings.large_model, c["next_token_rows"], c["N"], settings.device)
    _race(
        row,
        settings,
        {
            "quiet_star": partial(training_step, quiet_star(c["L"], c["A"], c["K"]), model, text),
            "next_token": partial(training_step, next_token(), model, texts),
        },
    )
    row.setting["model_bytes"] = model_bytes(model)
    row.compare("quiet_star / next_token, FLOP/s", row.rate("quiet_star"), row.rate("next_token"))
    if peak is not None:
        for name in ("quiet_star", "next_token"):
            row.compare(f"{name}, MFU", row.rate(name), [peak] * len(row.rate(name)))
    return row


# Rollouts


def rollout_rows(settings: Settings) -> Iterator[tuple[str, Callable[[], Row]]]:
    yield "scoring", partial(scoring, settings, False)
    yield "scoring, gradients", partial(scoring, settings, True)
    yield "deep", partial(deep_rollout, settings)


def _last_position(text: Text) -> Anchors:
    B, N = text.shape
    return Anchors(text, torch.full((B, 1), N - 1, device=text.tokens_BN.device))


def deep_rollout(settings: Settings) -> Row:
    """G thoughts of T sampled tokens behind one text of P, against transformers' `generate` with the text repeated.

    Same weights, dtype and threads; sampling at temperature 1 from the whole distribution. Prefill is until the first
    token is drawn, or, here, until the text is read.
    """
    c, device = settings.deep, settings.device
    P, G, T = c["P"], c["G"], c["T"]
    row = Row("rollouts", "deep", dict(c) | {"dtype": _name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, device)
    text = make_text(settings.model, 1, P, device)
    anchors = _last_position(text)

    def ours() -> dict[str, float]:
        synchronise(device)
        started = time.perf_counter()
        with torch.no_grad():
            state = model.read(text)
        synchronise(device)
        read = time.perf_counter()
        drawn = rollout(model, state, anchors, G, T, Rng(0, 0), given=(GIVEN,))
        synchronise(device)
        decode = time.perf_counter() - read
        assert bool(drawn.sampled_BKSM[:, :, 1:].all())
        text_bytes = sum(x.numel() * x.element_size() for x in (*state.keys, *state.values))
        token_bytes = text_bytes // P
        if takes_native_steps(model, anchors, state):
            copied_bytes, own_bytes = token_bytes * filled_up(P), token_bytes * G * filled_up(1 + T)
        else:
            copied_bytes, own_bytes = 0 if state.by_head() is state else text_bytes, token_bytes * G * (1 + T)
        return {
            "prefill_seconds": read - started,
            "decode_tokens_per_second": G * T / decode,
            "kv_bytes": text_bytes + copied_bytes + own_bytes,
            # A step reads the weights, the text's keys and values once, and on average half of the thoughts' own.
            "decode_bytes_per_second": T * (_read_bytes(model, settings.dtype) + text_bytes + own_bytes / 2) / decode,
        }

    contestants: dict[str, Contestant] = {"rollout": ours}
    # Every token is a step of its own, so that a whole rollout takes seconds: just the one made for it.
    contestants |= {f"rollout, {b}": _forced(model, b, ours) for b in _others(settings) if b == "triton"}
    if device.type == "cuda":
        contestants["rollout, recorded"] = _switched_on(model, "records_steps", ours)
        contestants["rollout, recorded, triton"] = _forced(model, "triton", contestants["rollout, recorded"])
        contestants["copy"] = partial(_copy, settings)
    elif native.compiler() is not None:
        contestants["rollout, compiled"] = _switched_on(model, "native_steps", ours)
    if settings.name == "tiny":
        contestants["rollout, recorded"] = _switched_on(model, "records_steps", ours)
    try:
        theirs = transformers_model(model, settings.dtype)
    except BREAKS as error:  # of whatever release is installed; the rest of the row does without
        row.setting["generate"] = f"{type(error).__name__}: {error}"[:200]
        theirs = None
    if theirs is not None:
        prompt = torch.cat([text.tokens_BN, text.tokens_BN.new_tensor([[GIVEN]])], dim=1).repeat(G, 1)
        for cache in ("dynamic", "static"):
            contestants[f"generate, {cache} cache"] = partial(_generate, theirs, prompt, T, cache, device)
    _race(row, settings, contestants)

    tokens = "decode_tokens_per_second"
    for kind in ("compiled", "recorded", "triton", "recorded, triton"):
        other = row.seconds(f"rollout, {kind}", tokens)
        row.compare(f"{kind} / default, decode tokens/s", other, row.seconds("rollout", tokens))
    generated = [name for name in contestants if name.startswith("generate") and row.seconds(name)]
    if generated:
        fastest = max(generated, key=lambda name: Spread.of(row.seconds(name, tokens)).median)
        quickest = min(generated, key=lambda name: Spread.of(row.seconds(name)).median)
        smallest = min(generated, key=lambda name: min(row.seconds(name, "kv_bytes")))
        row.setting["best_decode"], row.setting["best_end_to_end"] = fastest, quickest
        for name in ("rollout", "rollout, compiled"):
            row.compare(f"{name} / generate, decode tokens/s", row.seconds(name, tokens), row.seconds(fastest, tokens))
            row.compare(f"generate / {name}, end to end", row.seconds(quickest), row.seconds(name))
            row.compare(f"{name} / generate, KV", row.seconds(name, "kv_bytes"), row.seconds(smallest, "kv_bytes"))
            row.compare(f"{name} / generate, peak memory", row.added(name), row.added(smallest))
    if "copy" in row.measured:
        bandwidth = row.seconds("rollout", "decode_bytes_per_second")
        row.compare("decode / copy, bytes/s", bandwidth, row.rate("copy", "bytes"))
    return row


def _read_bytes(model: ThinkingModel, dtype: torch.dtype) -> int:
    """Bytes of weights that a decoding step reads; of an untied embedding it reads next to nothing."""
    decoder = model.decoder
    parameters = sum(p.numel() for p in decoder.parameters())
    if decoder.lm_head is not None:
        parameters -= decoder.embed_tokens.weight.numel()
    return parameters * dtype.itemsize


def _generate(theirs, prompt: Tensor, T: int, cache: str, device: torch.device) -> dict[str, float]:
    """T sampled tokens for each row of the prompt."""
    from transformers import GenerationConfig, StoppingCriteriaList

    drawn_at: list[float] = []

    def clock(ids: Tensor, scores: Any, **_) -> Tensor:
        if not drawn_at:
            synchronise(device)
        drawn_at.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=T,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    synchronise(device)
    started = time.perf_counter()
    with torch.no_grad():
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    synchronise(device)
    ended = time.perf_counter()
    assert out.sequences.shape[1] == prompt.shape[1] + T
    layers = out.past_key_values.layers
    return {
        "prefill_seconds": drawn_at[0] - started,
        "decode_tokens_per_second": prompt.shape[0] * (T - 1) / (ended - drawn_at[0]),
        "kv_bytes": sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values)),
    }


def scoring(settings: Settings, gradients: bool) -> Row:
    """Log-probs of G thoughts of T tokens behind one text of P: with the text read once, against G whole sequences."""
    c, device = settings.deep, settings.device
    P, G, T = c["P"], c["G"], c["T"]
    name = "scoring, gradients" if gradients else "scoring"
    row = Row("rollouts", name, dict(c) | {"dtype": _name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, device)
    text, own = make_text(settings.model, 1, P, device), make_text(settings.model, G, T, device, seed=1)
    thoughts = Thoughts(own.tokens_BN[None, :, :, None], _last_position(text))
    whole = Text.from_rows(torch.cat([text.tokens_BN.expand(G, -1), own.tokens_BN], dim=1))
    # Whole sequences with gradients go a few at a time: all at once they would not fit beside a CPU.
    at_once = min(G, 4) if gradients else G
    parts = [(whole.rows(r), own.tokens_BN[r]) for g in range(0, G, at_once) for r in [slice(g, g + at_once)]]

    def scored(hidden_GTW: Tensor, tokens_GT: Tensor) -> Tensor:
        """Log-probs [G, T − 1] of all tokens of the thoughts but their first."""
        logprobs_GT = token_logprobs(hidden_GTW[:, :-1], model.head_weight_VW, tokens_GT[:, 1:])
        if gradients:
            logprobs_GT.sum().backward()
        return logprobs_GT.detach()

    def shared() -> Tensor:
        return scored(model.think(thoughts, model.read(text))[0, :, :, 0], own.tokens_BN)

    def separate() -> Tensor:
        return torch.cat([scored(model.read(part).hidden_BNW[:, P:], tokens) for part, tokens in parts])

    def contestant(run: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(gradients):
            run()

    _race(row, settings, {"shared": partial(contestant, shared), "separate": partial(contestant, separate)})
    if not gradients:
        with torch.no_grad():
            row.setting["largest_difference"] = (shared() - separate()).abs().max().item()
    row.setting["sequences_at_once"] = at_once
    row.compare("separate / shared, time", row.seconds("separate"), row.seconds("shared"))
    return row


# Memory


def memory_rows(settings: Settings) -> Iterator[tuple[str, Callable[[], Row]]]:
    yield "quiet_star", partial(quiet_star_memory, settings)


def quiet_star_memory(settings: Settings) -> Row:
    """Peak memory of a Quiet-STaR step over that of a next-token step on the same text: weights, gradients and all
    that is in between, without an optimizer's states. Nothing is timed."""
    c = settings.memory
    row = Row("memory", "quiet_star", dict(c) | {"dtype": _name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, settings.device)
    text = make_text(settings.model, 1, c["N"], settings.device)
    objectives: dict[str, Objective] = {
        "quiet_star": quiet_star(c["L"], c["A"], c["K"], c["at_once"]),
        "next_token": next_token(),
    }
    _race(row, settings, {name: partial(training_step, o, model, text) for name, o in objectives.items()}, repeats=0)
    weights = row.setting["model_bytes"] = model_bytes(model)
    row.compare(
        "quiet_star / next_token, memory",
        row.added("quiet_star", weights),
        row.added("next_token", model_bytes(model, samples=False)),
    )
    row.compare("quiet_star / next_token, memory above weights", row.added("quiet_star"), row.added("next_token"))
    return row


# Curves


def curve_rows(settings: Settings) -> Iterator[tuple[str, Callable[[], Row]]]:
    for curve in settings.curves:
        yield curve.name, partial(cost_curve, settings, curve)


def cost_curve(settings: Settings, curve: Curve) -> Row:
    """Time of a step, and the memory it adds to the weights, along one of its sizes, the others as in the base."""
    row = Row("curves", curve.name, {"objective": curve.objective, **curve.base, "dtype": _name(settings.dtype)})
    model = make_model(settings.curve_model, settings.dtype, settings.device)

    def step(value: int) -> Contestant:
        c = curve.at(value)
        if curve.objective == "quiet_star":
            text = make_text(settings.curve_model, 1, c["N"], settings.device)
            return partial(training_step, quiet_star(c["L"], c["A"], c["K"]), model, text)
        text = make_text(settings.curve_model, 1, c["P"], settings.device)
        return partial(training_step, rlp(c["P"], c["G"], c["T"], c["anchors"]), model, text)

    _race(row, settings, {str(value): step(value) for value in curve.values}, repeats=min(3, settings.repeats))
    done = [value for value in curve.values if row.seconds(str(value))]
    for name, cost in (
        ("seconds", [Spread.of(row.seconds(str(v))).median for v in done]),
        ("bytes", [sum(row.added(str(v))) for v in done]),
    ):
        growth = Growth.of(done, cost) if cost else None
        if growth is not None:
            row.growth[name] = growth
            # Not of N and P, whose cost grows as causal attention's does.
            if curve.name in ("K", "L", "G", "T", "anchors"):
                row.ratios[f"{name}, worst deviation from a line"] = Spread.of([growth.line_worst])
    return row


PARTS: dict[str, Callable[[Settings], Iterator[tuple[str, Callable[[], Row]]]]] = {
    "attention": attention_rows,
    "steps": step_rows,
    "rollouts": rollout_rows,
    "memory": memory_rows,
    "curves": curve_rows,
}


def run_row(part: str, name: str, measure: Callable[[], Row]) -> Row:
    """The row, or one that says why it failed."""
    try:
        return measure()
    except BREAKS as error:
        return Row(part, name, {}, failed=f"{type(error).__name__}: {error}"[:500])
