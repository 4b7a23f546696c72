"""Peak memory of a step; nothing is timed."""

from __future__ import annotations

from functools import partial

from benchmarks.rows.row import Row, Rows, dtype_name, race_row
from benchmarks.settings import Settings
from benchmarks.workloads import make_model, make_text, model_bytes, next_token, quiet_star, training_step
from objectives import Objective


def memory_rows(settings: Settings) -> Rows:
    yield "quiet_star", partial(quiet_star_memory, settings)


def quiet_star_memory(settings: Settings) -> Row:
    """Peak memory of a Quiet-STaR step over that of a next-token step on the same text: weights, gradients and all
    that is in between, without an optimizer's states. Nothing is timed."""
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
