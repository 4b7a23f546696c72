"""What a run costs beside its arithmetic: `fit`, with Lightning, records and loggers, against a bare loop."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Variant, synchronise
from benchmarks.rows.row import Row, Rows, dtype_name, race_row
from benchmarks.settings import Settings
from models.philox import Rng
from models.thoughts import Text
from objectives import Step


def fitting_rows(settings: Settings) -> Rows:
    yield "next_token", partial(fitting_row, settings, {"name": "next_token"})
    thoughts = {name: settings.fitting[name] for name in ("thoughts", "length")}
    yield "rlp", partial(fitting_row, settings, {"name": "rlp", "positions": "marker", **thoughts})


def fitting_row(settings: Settings, objective: dict[str, Any]) -> Row:
    """Seconds from one step to the next, the first one aside, of a run and of a loop over the same batches that does
    nothing but the objective's arithmetic, clipping and the update. Their losses are the same to the last bit."""
    # Here, because a machine that only measures models may lack what recipes need.
    from checkpoints import config_to_hf
    from checkpoints.references import resolve
    from pretrain import run
    from pretrain.assembly import assemble
    from pretrain.module import PretrainModule, learning_rate, make_optimizer, micro_batches
    from pretrain.recipe_files import recipe_from_tree

    c = settings.fitting
    row = Row("fit", objective["name"], dict(c) | {"dtype": dtype_name(settings.dtype)})
    folder = tempfile.TemporaryDirectory()
    model = Path(folder.name) / "model"
    shutil.copytree(resolve("lab"), model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (model / "config.json").write_text(json.dumps(config_to_hf(settings.curve_model, torch.float32)))
    recipe = recipe_from_tree(
        {
            "steps": c["steps"],
            "objective": objective,
            "model": f"random:{model / 'config.json'}",
            "data": {"reference": "lab:tasks=sum,chain=4", "length": c["N"], "held_out": 0.0},
            "rows_per_step": c["rows"],
            "micro_batch_rows": c["micro_batch_rows"],
            "compute_dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[settings.dtype],
            "checkpoint": {"every": None},
            "logging": {"wandb": "disabled"},
        }
    )
    losses: dict[str, list[float]] = {}

    def whole() -> dict[str, float]:
        begun, step = [], PretrainModule.training_step

        def timed(module: PretrainModule, *arguments: Any) -> None:
            begun.append(time.perf_counter())
            step(module, *arguments)

        PretrainModule.training_step = timed  # type: ignore[method-assign, assignment]
        try:
            with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
                with contextlib.redirect_stderr(io.StringIO()):
                    run.fit(recipe.replaced(run_dir=directory))
                records = (Path(directory) / "metrics.jsonl").read_text().splitlines()
        finally:
            PretrainModule.training_step = step  # type: ignore[method-assign]
        return figures("fit", begun, [json.loads(record)["loss"] for record in records])

    def bare() -> dict[str, float]:
        parts = assemble(recipe)
        parts.load(settings.device)
        model, config = parts.model, recipe.optimizer
        optimizer, begun, found = make_optimizer(model, config), [], []
        for number in range(recipe.budget.steps):
            begun.append(time.perf_counter())
            text = Text(**parts.data.batch(number, recipe.rows_per_step)).to(settings.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, number + 1, recipe.budget.steps)
            pieces = micro_batches(text, recipe.micro_batch_rows)
            step = Step(parts.objectives[0], model, pieces, Rng(recipe.seed, number), parts.engine)
            optimizer.zero_grad()
            loss = torch.zeros((), dtype=torch.float64, device=settings.device)
            for output in step.losses():
                output.loss.backward()
                loss += output.loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            parts.objectives[0].after_step(model)
            found.append(loss.item())
        return figures("bare", begun, found)

    def figures(name: str, begun: list[float], found: list[float]) -> dict[str, float]:
        synchronise(settings.device)
        losses[name] = found
        if len(losses) == 2 and losses["fit"] != losses["bare"]:
            raise AssertionError(f"losses differ: {losses}")
        took = [after - before for before, after in itertools.pairwise(begun[1:])]
        return {"step": statistics.median(took), "steps": sum(took)}

    with folder:
        variants: dict[str, Variant] = {"fit": whole, "bare": bare}
        race_row(row, settings, variants)
    row.compare("fit / bare, time of a step", row.seconds("fit", "step"), row.seconds("bare", "step"))
    row.compare("fit / bare, time of all steps", row.seconds("fit", "steps"), row.seconds("bare", "steps"))
    return row
