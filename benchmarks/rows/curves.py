"""How the cost of a step grows along each of its sizes."""

from __future__ import annotations

from functools import partial

from benchmarks.measure import Growth, Spread, Variant
from benchmarks.rows.row import Row, Rows, dtype_name, race_row
from benchmarks.settings import Curve, Settings
from benchmarks.workloads import make_model, make_text, quiet_star, rlp, training_step


def curve_rows(settings: Settings) -> Rows:
    for curve in settings.curves:
        yield curve.name, partial(cost_curve, settings, curve)


def cost_curve(settings: Settings, curve: Curve) -> Row:
    """Time of a step, and the memory it adds to the weights, along one of its sizes, the others as in the base."""
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
            # Not of N and P, whose cost grows as causal attention's does.
            if curve.name in ("K", "L", "G", "T", "anchors"):
                row.ratios[f"{name}, worst deviation from a line"] = Spread.of([growth.line_worst])
    return row
