"""What a step costs: its peak memory, and how time and memory grow with each of its sizes."""

from __future__ import annotations

from functools import partial

from benchmarks.measure import Growth, Spread, Variant
from benchmarks.rows.row import Row, Rows, dtype_name, race_row
from benchmarks.settings import Curve, Settings
from benchmarks.workloads import make_model, make_text, model_bytes, next_token, quiet_star, rlp, training_step
from objectives import Objective


def memory_rows(settings: Settings) -> Rows:
    yield "quiet_star", partial(quiet_star_memory, settings)


def quiet_star_memory(settings: Settings) -> Row:
    """Peak memory of a Quiet-STaR step relative to a next-token step on the same text: weights, gradients and
    everything in between, without optimizer states. Nothing is timed."""
    c = settings.memory
    row = Row("memory", "quiet_star", dict(c) | {"dtype": dtype_name(settings.dtype)})
    model = make_model(settings.model, settings.dtype, settings.device)
    text = make_text(settings.model, 1, c["N"], settings.device)
    objectives: dict[str, Objective] = {
        "quiet_star": quiet_star(c["L"], c["A"], c["K"], c["at_once"]),
        "next_token": next_token(),
    }
    race_row(row, settings, {name: partial(training_step, o, model, text) for name, o in objectives.items()}, repeats=0)
    weights = row.setting["model_bytes"] = model_bytes(model)
    row.compare(
        "quiet_star / next_token, memory",
        row.added("quiet_star", weights),
        row.added("next_token", model_bytes(model, samples=False)),
    )
    row.compare("quiet_star / next_token, memory above weights", row.added("quiet_star"), row.added("next_token"))
    return row


def curve_rows(settings: Settings) -> Rows:
    for curve in settings.curves:
        yield curve.name, partial(cost_curve, settings, curve)


def cost_curve(settings: Settings, curve: Curve) -> Row:
    """Time of a step, and its memory above the weights, as one size grows and the others stay as in the base."""
    row = Row("curves", curve.name, {"objective": curve.objective, **curve.base, "dtype": dtype_name(settings.dtype)})
    model = make_model(settings.curve_model, settings.dtype, settings.device)

    def step(value: int) -> Variant:
        c = curve.at(value)
        if curve.objective == "quiet_star":
            text = make_text(settings.curve_model, 1, c["N"], settings.device)
            return partial(training_step, quiet_star(c["L"], c["A"], c["K"]), model, text)
        text = make_text(settings.curve_model, 1, c["P"], settings.device)
        return partial(training_step, rlp(c["P"], c["G"], c["T"], c["anchors"]), model, text)

    race_row(row, settings, {str(value): step(value) for value in curve.values}, repeats=min(3, settings.repeats))
    done = [value for value in curve.values if row.seconds(str(value))]
    for name, cost in (
        ("seconds", [Spread.of(row.seconds(str(v))).median for v in done]),
        ("bytes", [sum(row.added(str(v))) for v in done]),
    ):
        growth = Growth.of(done, cost) if cost else None
        if growth is not None:
            row.growth[name] = growth
            # Not for N and P, in which causal attention is quadratic.
            if curve.name in ("K", "L", "G", "T", "anchors"):
                row.ratios[f"{name}, worst deviation from a line"] = Spread.of([growth.line_worst])
    return row
