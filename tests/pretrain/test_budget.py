"""Runs that end by what they may spend, on a tiny model."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from objectives import Step
from pretrain.evaluation.held_out import score_held_out
from pretrain.recipe import Budget, Recipe, RecipeError
from pretrain.recipe_files import load_recipe
from pretrain.report import write_report
from pretrain.run_directory import RunDirectory
from tests.pretrain.test_fit import OBJECTIVES, fit, lines, weights

# Thoughts that end at a comma, which is not where all of them do.
RAGGED = [*OBJECTIVES["rlp"], "--objective.close", ",", "--objective.length", "8", "--objective.temperature", "3.0"]
COSINE = ["--optimizer.schedule", "cosine", "--optimizer.warmup_steps", "2"]


@pytest.fixture(autouse=True)
def reports(monkeypatch) -> None:
    """Not drawn, which takes longer than these runs."""
    monkeypatch.setattr("pretrain.run.write_report", lambda *rest: None)


def costs(directory) -> list[int]:
    """FLOPs of each step."""
    spent = [0, *(record["flops"] for record in lines(directory / "metrics.jsonl"))]
    return [after - before for before, after in pairwise(spent)]


@pytest.fixture
def whole(tiny_run, tmp_path) -> list[int]:
    """What each step of RLP costs, of a run that ends by steps."""
    assert fit(tiny_run, *RAGGED, "--steps", "8", "--run-dir", str(tmp_path / "whole")) == 0
    return costs(tmp_path / "whole")


def test_a_run_ends_at_the_step_nearest_to_its_flops(whole, tiny_run, tmp_path):
    assert len(set(whole)) > 6  # steps that cost differently
    for last, share in ((6, 0.3), (7, 0.7)):
        budget, directory = sum(whole[:6]) + share * whole[6], tmp_path / str(last)
        arguments = ["--steps", "null", "--flops", str(budget), "--run-dir", str(directory)]
        assert fit(tiny_run, *RAGGED, *arguments) == 0
        assert costs(directory) == whole[:last]
        assert abs(sum(costs(directory)) - budget) <= max(whole) / 2
        assert [e["step"] for e in lines(directory / "evaluations.jsonl")] == [0, last]
        assert (directory / "checkpoints" / f"step-{last:08d}").exists()
    write_report(RunDirectory(directory), load_recipe(str(directory / "recipe.yaml")))
    assert "7 steps of 4 × 32 tokens" in (directory / "report.html").read_text()


def test_stopped_anywhere_it_ends_the_same(whole, tiny_run, tmp_path, run_directory, monkeypatch, capsys):
    """Schedule, last step and evaluations by FLOPs are functions of what is saved; and so are all bits."""
    budget = sum(whole[:7])
    arguments = [*tiny_run, *RAGGED, *COSINE, "--steps", "null", "--flops", str(budget), "--checkpoint.every", "2"]
    arguments += ["--evaluation.every_flops", str(budget / 3)]
    assert fit(arguments, "--run-dir", str(tmp_path / "alone")) == 0

    class Stopping(Step):
        def __init__(self, *rest):
            super().__init__(*rest)
            if self.rng.step in stops:
                stops.remove(self.rng.step)
                raise InterruptedError

    stops = {3, 5}
    monkeypatch.setattr("pretrain.module.Step", Stopping)
    while stops:
        with pytest.raises(InterruptedError):
            fit(arguments)
    assert fit(arguments) == 0
    expected, got = weights(tmp_path / "alone"), weights(run_directory)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    timing = {"seconds", "tokens_per_second"}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        a, b = (lines(directory / name) for directory in (tmp_path / "alone", run_directory))
        assert [{k: r[k] for k in r.keys() - timing} for r in a] == [{k: r[k] for k in r.keys() - timing} for r in b]
    records = lines(run_directory / "metrics.jsonl")
    assert records[-1]["step"] in (6, 7, 8)  # with another schedule it learns to think at other lengths
    spent = [0, *(record["flops"] for record in records)]
    rates = [1e-3 / 2, 1e-3, *(1e-3 * (1 + math.cos(math.pi * min(s / budget, 1))) / 2 for s in spent[2:-1])]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    thirds = [step for step in range(1, len(spent)) if spent[step] * 3 // budget > spent[step - 1] * 3 // budget]
    assert [e["step"] for e in lines(run_directory / "evaluations.jsonl")] == sorted({0, *thirds, records[-1]["step"]})

    capsys.readouterr()
    assert fit(arguments) == 0
    assert f"is already at step {len(records)} of {len(records)}; raise --flops" in capsys.readouterr().err
    # More of it: the schedule stays that of the first run.
    assert fit(arguments, "--flops", str(budget + 3 * whole[0])) == 0
    said = capsys.readouterr().err
    assert "(optimizer.schedule_flops), and the learning rate is 0 after it" in said
    more = lines(run_directory / "metrics.jsonl")
    assert len(more) > len(records) and more[-1]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_run_that_lacks_its_last_evaluation_takes_no_further_step(tiny_run, run_directory, monkeypatch):
    arguments = [*tiny_run, *OBJECTIVES["next_token"], "--steps", "null", "--flops", "1"]
    evaluations = []

    def failing(*rest):
        evaluations.append(rest)
        if len(evaluations) == 2:
            raise MemoryError
        return score_held_out(*rest)

    monkeypatch.setattr("pretrain.callbacks.score_held_out", failing)
    with pytest.raises(MemoryError):
        fit(arguments)
    assert not RunDirectory(run_directory).is_finished(load_recipe(str(run_directory / "recipe.yaml")))
    assert fit(arguments) == 0
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == [1]
    assert [e["step"] for e in lines(run_directory / "evaluations.jsonl")] == [0, 1]


def test_steps_bound_a_budget_and_it_says_so(tiny_run, run_directory, capsys):
    assert fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "2", "--flops", "1e21") == 0
    assert "the run ends at --steps 2 with 0% of its flops spent; raise --steps" in capsys.readouterr().err
    assert fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "3", "--flops", "1") == 0
    assert "is already at step 2 of 2; raise --flops to go on" in capsys.readouterr().err


def test_a_run_ends_by_seconds(tiny_run, run_directory, capsys):
    arguments = [*OBJECTIVES["next_token"], "--steps", "null", "--seconds"]
    assert fit(tiny_run, *arguments, "1e-6", "--dry-run") == 0
    assert "; 1 steps of 4 × 32 tokens are 128" in capsys.readouterr().err
    assert fit(tiny_run, *arguments, "1e-6") == 0
    (record,) = lines(run_directory / "metrics.jsonl")
    assert fit(tiny_run, *arguments, str(record["seconds"] + 0.2)) == 0
    spent = [r["seconds"] for r in lines(run_directory / "metrics.jsonl")]
    ends = [s >= record["seconds"] + 0.2 - s / n / 2 for n, s in enumerate(spent, start=1)]
    assert ends.index(True) == len(ends) - 1 > 1


def test_the_last_step_by_arithmetic():
    budget = Budget(steps=50, unit="flops", amount=1000.0)
    assert budget.last_step(0, 0, 0.0) == 50
    assert budget.last_step(4, 400, 0.0) == 10
    assert budget.last_step(9, 955, 0.0) == 9 and budget.last_step(9, 940, 0.0) == 10  # half a step is 53 and 52
    assert budget.last_step(1, 5000, 0.0) == 1  # one step at least
    assert budget.last_step(1, 1, 0.0) == 50
    assert Budget(7, "steps", 7).last_step(3, 10**18, 1.0) == 7


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--flops", "1e15", "--seconds", "60"], "flops and seconds are two ways of ending a run; give one of them"),
        (
            ["--flops", "1e15", "--optimizer.schedule_steps", "9"],
            "optimizer.schedule_steps is of runs that end by steps, and this one ends by flops; give "
            "optimizer.schedule_flops, or leave it out",
        ),
        (["--steps", "null"], "steps is missing; write it into the recipe or give --steps, or what a run may spend"),
        (["--flops", "0"], "flops must be above 0, got 0"),
    ],
)
def test_budgets_that_cannot_be(arguments, part):
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2-next-token", arguments)
    (line,) = str(caught.value).splitlines()[1:]
    assert part in line


def test_a_budget_in_yaml():
    recipe = load_recipe("smollm2-next-token", ["--flops", "1e21", "--steps", "null"])
    assert isinstance(recipe, Recipe)
    assert recipe.budget == Budget(2**32 - 2, "flops", 1e21)
