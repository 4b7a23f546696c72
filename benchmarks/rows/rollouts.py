"""Sampling and scoring of thoughts at one anchor of a row.

Shapes: B rows, P text positions, M anchors of a row, K = G thoughts of an anchor, S = T tokens of a thought, W width, R
thoughts that are sampled now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Spread, Unsupported, Variant, synchronise
from benchmarks.rows.row import FAILURES, Row, Rows, dtype_name, race_row
from benchmarks.rows.steps import forced, other_backends
from benchmarks.settings import Settings
from benchmarks.workloads import (
    copy_bytes,
    ending_at_random,
    last_position,
    make_model,
    make_text,
    transformers_model,
)
from models.logprobs import token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Eager, Engine, Native, Recorded, Rollout, RolloutRequest
from models.rollout.eager import AllAtOnce, InFlight, sample_thoughts
from models.rollout.native import InTurn, compiler, filled_up
from models.thinking import ThinkingModel
from models.thoughts import Text, Thoughts

PROMPT = 3  # the token id that every thought of a deep rollout starts with


def rollout_rows(settings: Settings) -> Rows:
    yield "scoring", partial(scoring, settings, False)
    yield "scoring, gradients", partial(scoring, settings, True)
    yield "deep", partial(deep_rollout, settings)
    yield "ragged", partial(ragged_rollout, settings)


def deep_rollout(settings: Settings) -> Row:
    """G thoughts of T sampled tokens after one text of P, against transformers' `generate` with the text repeated.

    Same weights, dtype and threads; sampling at temperature 1 from the full distribution. Prefill ends with the first
    sampled token, or here, once the text is read.
    """
    c, device = settings.deep, settings.device
    P, G, T = c["P"], c["G"], c["T"]
    row = Row("rollouts", "deep", dict(c) | {"dtype": dtype_name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, device)
    text = make_text(settings.model, 1, P, device)
    anchors = last_position(text)

    def ours(engine: Engine = EAGER) -> dict[str, float]:
        synchronise(device)
        started = time.perf_counter()
        with torch.no_grad():
            state = model.read(text)
        synchronise(device)
        read = time.perf_counter()
        request = RolloutRequest(model, state, anchors, G, T, Rng(0, 0), prompt=(PROMPT,))
        supported, reason = engine.supports(request)
        if not supported:
            raise Unsupported(reason)
        rollout = engine.sample(request)
        synchronise(device)
        decode = time.perf_counter() - read
        assert bool(rollout.sampled_BKSM[:, :, 1:].all())
        text_bytes = sum(x.numel() * x.element_size() for x in (*state.keys, *state.values))
        token_bytes = text_bytes // P
        if isinstance(engine, Native):
            copied_bytes, own_bytes = token_bytes * filled_up(P), token_bytes * G * filled_up(1 + T)
        else:
            copied_bytes, own_bytes = 0 if state.by_head() is state else text_bytes, token_bytes * G * (1 + T)
        return {
            "prefill_seconds": read - started,
            "decode_tokens_per_second": G * T / decode,
            "kv_bytes": text_bytes + copied_bytes + own_bytes,
            # A step reads the weights and the text's keys and values once, and on average half of the thoughts'.
            "decode_bytes_per_second": T * (_read_bytes(model, settings.dtype) + text_bytes + own_bytes / 2) / decode,
        }

    variants: dict[str, Variant] = {"rollout": ours}
    # A whole rollout takes seconds, so of the other backends only the one made for it is timed.
    variants |= {f"rollout, {b}": forced(model, b, ours) for b in other_backends(settings) if b == "triton"}
    if device.type == "cuda":
        variants["rollout, recorded"] = partial(ours, Recorded())
        variants["rollout, recorded, triton"] = forced(model, "triton", variants["rollout, recorded"])
        variants["copy"] = partial(copy_bytes, settings.copy_bytes, device)
    elif compiler() is not None:
        variants["rollout, compiled"] = partial(ours, Native())
    if settings.name == "tiny":
        variants["rollout, recorded"] = partial(ours, Recorded())
    try:
        theirs = transformers_model(model, settings.dtype)
    except FAILURES as error:  # depends on the installed release; the rest of the row is still measured
        row.setting["generate"] = f"{type(error).__name__}: {error}"[:200]
        theirs = None
    if theirs is not None:
        prompt = torch.cat([text.tokens_BN, text.tokens_BN.new_tensor([[PROMPT]])], dim=1).repeat(G, 1)
        for cache in ("dynamic", "static"):
            variants[f"generate, {cache} cache"] = partial(_generate, theirs, prompt, T, cache, device)
    race_row(row, settings, variants)

    tokens = "decode_tokens_per_second"
    for kind in ("compiled", "recorded", "triton", "recorded, triton"):
        other = row.seconds(f"rollout, {kind}", tokens)
        row.compare(f"{kind} / default, decode tokens/s", other, row.seconds("rollout", tokens))
    generated = [name for name in variants if name.startswith("generate") and row.seconds(name)]
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


class Together:
    """Thoughts in flight of which none leaves before the last has ended: what sampling costs without compaction."""

    def __init__(self, flight: InFlight):
        self._flight, self.look_every = flight, flight.look_every

    @property
    def thought_R(self) -> Tensor:
        return self._flight.thought_R

    def step(self, tokens_R: Tensor) -> Tensor:
        return self._flight.step(tokens_R)

    def draw(self, hidden_RW: Tensor, uniforms_R: Tensor, banned_V: Tensor) -> tuple[Tensor, Tensor]:
        return self._flight.draw(hidden_RW, uniforms_R, banned_V)

    def turn_over(self, ended_R: Tensor) -> bool:
        return False


def ragged_rollout(settings: Settings) -> Row:
    """K thoughts of very different lengths after each of B texts of P tokens, by each engine: against as many tokens in
    thoughts of one length, and against the same thoughts when none leaves the batch before all have ended.

    Only sampling is timed: the texts are read before.
    """
    c, device = settings.ragged, settings.device
    row = Row("rollouts", "ragged", dict(c) | {"dtype": dtype_name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, device)
    close = ending_at_random(model, c["mean"])
    text = make_text(settings.model, c["B"], c["P"], device)
    anchors = last_position(text)
    with torch.no_grad():
        state = model.read(text)
    engines: dict[str, Eager] = {"default": EAGER}
    if device.type == "cuda" or settings.name == "tiny":
        engines["recorded"] = Recorded()
    if device.type == "cpu" and compiler() is not None:
        engines["compiled"] = Native()
    found: dict[str, Rollout] = {}

    def sample(
        name: str, engine: Eager, length: int, close: tuple[int, ...] = (), together: bool = False
    ) -> dict[str, float]:
        request = RolloutRequest(model, state, anchors, c["K"], length, Rng(0, 0), prompt=(PROMPT,), close=close)
        supported, reason = engine.supports(request)
        if not supported:
            raise Unsupported(reason)
        if together:
            native = isinstance(engine, Native)
            flight = InTurn(request, c["B"] * c["K"]) if native else AllAtOnce(request, engine.steps(request))
            found[name] = sample_thoughts(request, Together(flight))
        else:
            found[name] = engine.sample(request)
        return {"tokens": int(found[name].sampled_BKSM.sum())}

    *_, quickest = engines.values()
    sample("lengths", quickest, c["longest"], close)
    length_BKM = found["lengths"].sampled_BKSM.sum(dim=2)
    row.setting["lengths"] = length_BKM.flatten().tolist()
    equal = round(length_BKM.double().mean().item())
    variants: dict[str, Variant] = {}
    for name, engine in engines.items():
        variants[f"{name}, ragged"] = partial(sample, f"{name}, ragged", engine, c["longest"], close)
        variants[f"{name}, equal"] = partial(sample, f"{name}, equal", engine, equal)
        variants[f"{name}, together"] = partial(sample, f"{name}, together", engine, c["longest"], close, True)
    race_row(row, settings, variants, repeats=min(3, settings.repeats))

    for name in engines:
        ragged, together = (row.seconds(f"{name}, {kind}") for kind in ("ragged", "together"))
        row.compare(f"{name}: together / ragged, time", together, ragged)
        per_token = {kind: [1 / rate for rate in row.rate(f"{name}, {kind}", "tokens")] for kind in ("ragged", "equal")}
        row.compare(f"{name}: ragged / equal, time per token", per_token["ragged"], per_token["equal"])
    tokens = {name: rollout.thoughts.slots(1 + c["longest"]).tokens_BKSM for name, rollout in found.items()}
    row.setting["thoughts that differ"] = {
        name: int((tokens[name] != tokens["default, together"]).any(dim=2).sum())
        for name in variants
        if name in tokens and not name.endswith("equal")
    }
    return row


def _read_bytes(model: ThinkingModel, dtype: torch.dtype) -> int:
    """Bytes of weights that a decoding step reads, which are next to none of an untied embedding."""
    decoder = model.decoder
    parameters = sum(p.numel() for p in decoder.parameters())
    if decoder.lm_head is not None:
        parameters -= decoder.embed_tokens.weight.numel()
    return parameters * dtype.itemsize


def _generate(theirs, prompt: Tensor, T: int, cache: str, device: torch.device) -> dict[str, float]:
    """T sampled tokens for each row of the prompt."""
    from transformers import GenerationConfig, StoppingCriteriaList

    sampled_at: list[float] = []

    def clock(ids: Tensor, scores: Any, **_) -> Tensor:
        if not sampled_at:
            synchronise(device)
        sampled_at.append(time.perf_counter())
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
        "prefill_seconds": sampled_at[0] - started,
        "decode_tokens_per_second": prompt.shape[0] * (T - 1) / (ended - sampled_at[0]),
        "kv_bytes": sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values)),
    }


def scoring(settings: Settings, gradients: bool) -> Row:
    """Log-probs of G thoughts of T tokens after one text of P: reading the text once, against G whole sequences."""
    c, device = settings.deep, settings.device
    P, G, T = c["P"], c["G"], c["T"]
    name = "scoring, gradients" if gradients else "scoring"
    row = Row("rollouts", name, dict(c) | {"dtype": dtype_name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, device)
    text, own = make_text(settings.model, 1, P, device), make_text(settings.model, G, T, device, seed=1)
    thoughts = Thoughts(own.tokens_BN[None, :, :, None], last_position(text))
    whole = Text.from_rows(torch.cat([text.tokens_BN.expand(G, -1), own.tokens_BN], dim=1))
    # With gradients, whole sequences go a few at a time: all at once, they need more memory than CPU machines have.
    at_once = min(G, 4) if gradients else G
    parts = [(whole.rows(r), own.tokens_BN[r]) for g in range(0, G, at_once) for r in [slice(g, g + at_once)]]

    def scored(hidden_GTW: Tensor, tokens_GT: Tensor) -> Tensor:
        """Log-probs [G, T − 1] of all thought tokens but the first."""
        logprobs_GT = token_logprobs(hidden_GTW[:, :-1], model.head_weight_VW, tokens_GT[:, 1:])
        if gradients:
            logprobs_GT.sum().backward()
        return logprobs_GT.detach()

    def shared() -> Tensor:
        return scored(model.think(thoughts, model.read(text))[0, :, :, 0], own.tokens_BN)

    def separate() -> Tensor:
        return torch.cat([scored(model.read(part).hidden_BNW[:, P:], tokens) for part, tokens in parts])

    def variant(run: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(gradients):
            run()

    race_row(row, settings, {"shared": partial(variant, shared), "separate": partial(variant, separate)})
    if not gradients:
        with torch.no_grad():
            row.setting["largest_difference"] = (shared() - separate()).abs().max().item()
    row.setting["sequences_at_once"] = at_once
    row.compare("separate / shared, time", row.seconds("separate"), row.seconds("shared"))
    return row
