"""The lab's benchmark in small: what it trains, and that its table matches the runs' own records."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import lab
from pretrain.recipe_files import load_recipe
from tests.pretrain.test_fit import lines


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two seeds of two steps on a model with random weights."""
    work = tmp_path_factory.mktemp("work")

    def small(name: str):
        recipe = load_recipe(name)
        data, evaluation = recipe.data.model_copy(update={"length": 64}), recipe.evaluation.replaced(rows=2, every=1)
        changes = {"length": 4, "thoughts": 2} if recipe.objective.name != "next_token" else {}
        objective = recipe.objective.replaced(**changes)
        model = "random:lab" if recipe.model == "lab" else recipe.model
        return recipe.replaced(
            steps=2, model=model, data=data, evaluation=evaluation, rows_per_step=1, objective=objective
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "load_recipe", small)
        patch.setattr(lab, "BASE", "random:lab")
        patch.setattr(lab, "ROWS", 2)
        patch.setattr(lab, "STEPS", 2)
        patch.setattr(lab, "ROWS_PER_STEP", 1)
        patch.setattr(lab, "SHIFTS", dict(list(lab.SHIFTS.items())[:2]))
        patch.setattr(sys, "argv", ["lab", "--seeds", "2", "--work", str(work), "--out", str(work / "lab.json")])
        lab.main()
    return work, json.loads((work / "lab.json").read_text())


def test_all_controls_are_there_and_matched(results):
    work, found = results
    assert set(found["objectives"]) == {"base", "rlp", "next_token", "shuffled", "rpt", "quiet_star"}
    assert found["seeds"] == [0, 1]
    assert {"commit", "torch", "device", "threads"} <= found["environment"].keys()
    for seed in (0, 1):
        recipes = {
            name: load_recipe(str(work / f"lab-{name}-{seed}" / "recipe.yaml"))
            for name in found["objectives"]
            if name != "base"
        }
        assert {recipe.seed for recipe in recipes.values()} == {seed}
        assert recipes["shuffled"].objective == recipes["rlp"].objective.replaced(rewards="shuffled")
        assert all(recipe.data == recipes["rlp"].data for recipe in recipes.values())
        ends = {name: lines(work / f"lab-{name}-{seed}" / "metrics.jsonl")[-1] for name in recipes}
        first = lines(work / f"lab-next_token-{seed}" / "metrics.jsonl")[0]["flops"]
        assert abs(ends["next_token"]["flops"] - ends["rlp"]["flops"]) <= first
        assert found["by_seed"]["rlp"][seed]["flops"] == ends["rlp"]["flops"]


def test_medians_and_ranges_are_those_of_the_seeds(results):
    _, found = results
    for name, scores in found["by_seed"].items():
        for metric, summary in found["objectives"][name].items():
            a, b = sorted(one[metric] for one in scores)
            assert (summary["min"], summary["median"], summary["max"]) == (a, pytest.approx((a + b) / 2), b)
    for base, after in found["shift"].values():
        assert base.keys() == after.keys() >= {"nll_own", "nll_none", "thought_right"}
    first = next(iter(found["shift"].values()))
    assert first[1]["nll_own"] == found["objectives"]["rlp"]["nll_own"]
    assert {"mixed_nll_own", "mixed_nll_none"} <= found["objectives"]["quiet_star"].keys()
