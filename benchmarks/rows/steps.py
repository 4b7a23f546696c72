"""Whole training steps: Quiet-STaR and RLP-shaped ones against next-token prediction.

Shapes: B rows, N = P text positions, K = G thoughts of an anchor, L sampled tokens, A tokens predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.environment import bf16_peak
from benchmarks.measure import Variant
from benchmarks.rows.row import Row, Rows, dtype_name, race_row
from benchmarks.settings import Settings
from benchmarks.workloads import (
    make_model,
    make_text,
    model_bytes,
    next_token,
    optimizer_step,
    quiet_star,
    repeated,
    rlp,
    training_step,
    unsupported_calls,
)
from models import attention
from models.rollout import Native
from models.rollout.native import compiler
from models.thinking import ThinkingModel
from objectives import Objective


def step_rows(settings: Settings) -> Rows:
    if settings.large_model is not None:
        yield "large", partial(large_step, settings)
    yield "quiet_star", partial(quiet_star_step, settings)
    yield "rlp", partial(rlp_step, settings)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"public shape, {dtype_name(dtype)}", partial(public_step, settings, dtype)


def other_backends(settings: Settings) -> tuple[str, ...]:
    """Backends to time whole steps with, besides the default; on a CPU no other is worth timing."""
    if settings.device.type == "cpu" and settings.name != "tiny":
        return ()
    return tuple(backend for backend in attention.BACKENDS if backend != "reference")


def forced(model: ThinkingModel, backend: str, run: Variant) -> Variant:
    """The same variant with this attention backend everywhere."""

    def with_backend() -> Mapping[str, float] | None:
        model.decoder.attention_backend = backend
        try:
            with unsupported_calls():
                return run()
        finally:
            model.decoder.attention_backend = None

    return with_backend


def quiet_star_step(settings: Settings) -> Row:
    """A Quiet-STaR step and a next-token step on the same rows; the former also with each backend."""
    c = settings.quiet_star
    row = Row("steps", "quiet_star", dict(c) | {"dtype": dtype_name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, settings.device)
    text = make_text(settings.model, 1, c["N"], settings.device)
    step = partial(training_step, quiet_star(c["L"], c["A"], c["K"], c.get("at_once")), model, text)
    variants: dict[str, Variant] = {
        "quiet_star": step,
        "next_token": partial(training_step, next_token(), model, text),
    }
    variants |= {f"quiet_star, {b}": forced(model, b, step) for b in other_backends(settings)}
    race_row(row, settings, variants)
    weights = row.setting["model_bytes"] = model_bytes(model)
    row.compare("quiet_star / next_token, FLOP/s", row.rate("quiet_star"), row.rate("next_token"))
    row.compare("quiet_star / next_token, time", row.seconds("quiet_star"), row.seconds("next_token"))
    row.compare(
        "quiet_star / next_token, memory",
        row.added("quiet_star", weights),
        row.added("next_token", model_bytes(model, samples=False)),
    )
    for backend in other_backends(settings):
        other = row.seconds(f"quiet_star, {backend}")
        row.compare(f"{backend} / default, time", other, row.seconds("quiet_star"))
    return row


def rlp_step(settings: Settings) -> Row:
    """An RLP-shaped step (one anchor, no-think teacher included) and a next-token step on the same row; on a CPU the
    former also with the compiled step of sampling."""
    c = settings.rlp
    row = Row("steps", "rlp", dict(c) | {"dtype": dtype_name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, settings.device)
    text = make_text(settings.model, 1, c["P"], settings.device)
    objectives: dict[str, Objective] = {"rlp": rlp(c["P"], c["G"], c["T"]), "next_token": next_token()}
    variants: dict[str, Variant] = {name: partial(training_step, o, model, text) for name, o in objectives.items()}
    if settings.device.type == "cpu" and compiler() is not None:
        variants["rlp, compiled"] = partial(training_step, objectives["rlp"], model, text, Native())
    race_row(row, settings, variants)
    weights = row.setting["model_bytes"] = model_bytes(model)
    all_weights = weights + sum(model_bytes(other) for other in objectives["rlp"].other_models(model))
    for name in ("rlp", "rlp, compiled"):
        row.compare(f"{name} / next_token, FLOP/s", row.rate(name), row.rate("next_token"))
        row.compare(f"{name} / next_token, time", row.seconds(name), row.seconds("next_token"))
    row.compare(
        "rlp / next_token, memory",
        row.added("rlp", all_weights),
        row.added("next_token", model_bytes(model, samples=False)),
    )
    return row


def public_step(settings: Settings, dtype: torch.dtype) -> Row:
    """A Quiet-STaR step at the size for which the public code's cost was published.

    That code repeats every row K times and calls the result its batch, so plain steps are measured on the repeated
    rows, to which the published factors of 39 to 73 refer, and on the rows once.
    """
    c = settings.public
    row = Row("steps", f"public shape, {dtype_name(dtype)}", dict(c) | {"dtype": dtype_name(dtype)})
    model = make_model(settings.public_model, dtype, settings.device)
    text = make_text(settings.public_model, 1, c["N"], settings.device)
    race_row(
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
    """Model FLOPs utilisation of steps of Quiet-STaR and of next-token prediction with 1.7 billion parameters,
    the former also with `aten`, and with the optimizer's update, which takes the same time whatever the objective.
    """
    assert settings.large_model is not None
    c, peak = settings.large, bf16_peak(settings.device)
    row = Row("steps", "large", dict(c) | {"dtype": dtype_name(torch.bfloat16), "peak_flops": peak})
    model = make_model(settings.large_model, torch.bfloat16, settings.device)
    text = make_text(settings.large_model, 1, c["N"], settings.device)
    texts = make_text(settings.large_model, c["next_token_rows"], c["N"], settings.device)
    steps: dict[str, Variant] = {
        "quiet_star": partial(training_step, quiet_star(c["L"], c["A"], c["K"]), model, text),
        "next_token": partial(training_step, next_token(), model, texts),
    }
    steps["quiet_star, aten"] = forced(model, "aten", steps["quiet_star"])
    race_row(row, settings, steps | {"optimizer": partial(optimizer_step, model)})
    row.setting["model_bytes"] = model_bytes(model)
    row.compare("quiet_star / next_token, FLOP/s", row.rate("quiet_star"), row.rate("next_token"))
    for name in steps:
        row.compare(f"{name}, recomputed FLOPs", row.seconds(name, "recomputed_flops"), row.seconds(name, "flops"))
        row.compare(f"optimizer / {name}, time", row.seconds("optimizer"), row.seconds(name))
        if peak is not None:
            for what, also in (("MFU", None), ("MFU with the optimizer", "optimizer")):
                row.compare(f"{name}, {what}", row.model_rate(name, also), [peak] * len(row.seconds(name)))
    return row
