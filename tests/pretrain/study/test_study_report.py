"""The report of a study on run directories made by hand, two arms with two seeds, against figures worked out here."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import DataConfig
from objectives.next_token import NextTokenConfig
from objectives.rlp import RlpConfig
from pretrain.recipe import Recipe
from pretrain.report import RunRecords
from pretrain.study.definition import Cell, Planned, Run, Study
from pretrain.study.report import evaluated, mean_curve, write_report
from pretrain.study.results import Finished, passes, results
from pretrain.study.scores import Scores
from tests.pretrain.test_report import HOSTILE, evaluation, make, metrics, rows, sample

T = 12.7062047362  # 97.5% of Student's t with one degree of freedom
RLP, NEXT = (Cell(arm, (("optimizer.lr", 0.1),)) for arm in ("rlp", "next-token"))
BY = ("tokens", "FLOPs", "time")


def deciles(shuffled: float) -> dict:
    return {"shuffled": [{"nll": shuffled + i, "low": 0.0, "high": 9.0, "documents": 30} for i in range(10)]}


def scores(own: list[float], shuffled: list[float], first_right: float = 1.0) -> Scores:
    nll = {"none": [3.0, 3.0], "own": own, "shuffled": shuffled}
    # Of one token and of three.
    correct = {"none": [0.0, 1 / 3], "own": [first_right, 2 / 3]}
    as_tensors = [
        {name: torch.tensor(values, dtype=torch.float64) for name, values in of.items()} for of in (nll, correct)
    ]
    return Scores(torch.tensor([4, 9]), torch.tensor([1, 3]), *as_tensors, None)


@pytest.fixture
def planned(tmp_path) -> Planned:
    data = DataConfig(reference="lab:chain=4")
    recipes = {
        RLP: Recipe(steps=20, objective=RlpConfig(rewards="shuffled"), data=data),
        NEXT: Recipe(flops=2e12, objective=NextTokenConfig(), data=data),
    }
    runs = [
        Run(cell, recipe.replaced(seed=seed, run_dir=str(tmp_path / cell.name / f"seed-{seed}")))
        for seed in (0, 1)
        for cell, recipe in recipes.items()
    ]
    for run in runs:
        seed, records = run.recipe.seed, {}
        if run.cell == RLP:
            thoughts = [sample(1, "early") | {"reward": 99.0}]
            thoughts += [sample(20, f"thought {seed}{n} {HOSTILE}") | {"reward": n + seed / 2} for n in range(4)]
            task = {"task": "sums", "metric": "acc", "temperature": 0.0, "low": 0.0, "high": 1.0, "documents": 9}
            downstream = [
                {"step": step, "think": "off", "scores": [task | {"value": value}]}
                for step, value in ((10, 0.9), (20, 0.25 + seed / 2))
            ]
            warning = {"step": 20, "name": "leakage", "message": f"<b>seed</b> {seed}"}
            records = {"samples": thoughts, "downstream": downstream, "warnings": [warning]}
        last = {"counterfactual_minus_own_deciles": deciles(1.0 + seed)} if run.cell == RLP else {}
        make(
            run.directory.path,
            run.recipe,
            metrics=[metrics(step, seconds=step / 2, reward=1.0, thought_length=7.0) for step in (10, 20)],
            evaluations=[evaluation(0, 4.0, 3.0), evaluation(15, 3.0, 2.0), evaluation(20, 2.0 + seed, 1.0, **last)],
            **records,
        )
    study = Study(base="quickstart", arms={"rlp": {}, "next-token": {}}, seeds=[0, 1], controls=["next-token"])
    return Planned(study, [], tmp_path, recipes[RLP], runs)


def read(*none: float) -> dict[str, Scores]:
    """Of two documents of one token each, elsewhere and without thoughts."""
    of = {"none": torch.tensor(none, dtype=torch.float64)}
    return {"far": Scores(torch.tensor([1, 2]), torch.tensor([1, 1]), of, {"none": torch.zeros(2).double()}, None)}


def report(planned: Planned) -> str:
    own = {RLP: 1.0, NEXT: 2.0}
    finished = []
    for run in planned.runs:
        nll, seed = own[run.cell], run.recipe.seed
        scored = scores([nll + seed, nll], [2.5, 2.5], float(run.cell == RLP))
        spent = {"step": 20, "tokens": 2000, "flops": 2e12, "seconds": 10.0}
        finished.append(Finished(run.cell, seed, spent, 0.0, replace(scored, shifts=read(nll + seed, nll + seed + 2))))
    before = replace(scores([2.0, 2.0], [2.25, 2.25]), shifts=read(3.0, 3.0))
    found = results(finished, ["next-token"], before)
    return write_report(planned, found, "All spent alike.").read_text(encoding="utf-8")


def test_the_mean_of_curves_is_over_shares_of_the_runs():
    first = (np.array([0.0, 5.0, 10.0]), np.array([4.0, 4.0, 2.0]))
    second = (np.array([0.0, 20.0]), np.array([6.0, 2.0]))
    curve = mean_curve([first, second])
    assert curve.x_P.tolist() == [0.0, 7.5, 15.0]
    assert [mean.mean for mean in curve.mean] == [5.0, 4.0, 2.0]
    # Standard deviation √2 of 4 and 6, over √2 for two of them.
    assert (curve.mean[0].low, curve.mean[0].high) == pytest.approx((5 - T, 5 + T))
    assert (curve.mean[2].low, curve.mean[2].high) == (2.0, 2.0)
    # A curve that begins later says nothing of what was before.
    late = (np.array([5.0, 10.0]), np.array([1.0, 3.0]))
    curve = mean_curve([late, second])
    assert curve.x_P.tolist() == [7.5, 15.0] and [mean.mean for mean in curve.mean] == [2.5, 2.5]


def test_evaluations_by_time(planned):
    run = RunRecords(planned.runs[0].directory, planned.runs[0].recipe)
    assert evaluated(run, "seconds", "nll_text") == ([0.0, 7.5, 10.0], [4.0, 3.0, 2.0])
    assert evaluated(run, "tokens", "nll_thought") == ([0, 1500, 2000], [3.0, 2.0, 1.0])
    assert evaluated(run, "flops", "nll_nothing") == ([], [])


def test_the_page(planned):
    page = report(planned)
    table, text = rows(page), unescape(page.replace("&nbsp;", " "))
    # Of documents with one and three tokens: (0 + 1)/4 more than 1 and 2, by seed; minus 2.5.
    own = {RLP.name: (1.0 + 1.25) / 2, NEXT.name: (2.0 + 2.25) / 2}
    for arm, mean in own.items():
        half = T * 0.125
        shown = f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"
        assert any(row[0] == arm and shown in row for row in table), (arm, shown)
        (row,) = [row for row in table if row[0] == arm and len(row) == 3 and row[1].startswith("-")]
        assert row[1].startswith(f"{mean - 2.5:+.3f} [") and row[2].startswith(f"{mean - 3:+.3f} [")
    assert ["the model before", "-0.250 [-0.250, -0.250]", "-1.000 [-1.000, -1.000]"] in table
    # By difficulty: minus 1 and 2 nats in the first decile, minus 10 and 11 in the last; Student's t of two seeds.
    assert ["1", f"-1.500 [{-1.5 - T / 2:+.3f}, {-1.5 + T / 2:+.3f}]"] in table
    assert ["10", f"-10.500 [{-10.5 - T / 2:+.3f}, {-10.5 + T / 2:+.3f}]"] in table
    # Scores are of the models at the end, of the seeds that were evaluated.
    half = T * 0.25
    assert ["sums", "acc", "off", "0", f"0.500 [{0.5 - half:.3f}, {0.5 + half:.3f}], n = 2", ""] in table
    # What the recipes differ in, and not what only one objective has.
    assert [row for row in table if row[0] in ("objective.name", "objective.rewards", "flops", "seed")] == [
        ["flops", "null", "2e+12"],
        ["objective.name", "rlp", "next_token"],
    ]
    # Rewards 0 to 3 of one seed, 0.5 to 3.5 of the other: best, worst, and others at random.
    picked = [(row[0], row[-1]) for row in table if len(row) == 6 and "seed" in row[0]]
    assert picked[:4] == [
        ("best, seed 1", "+3.500"),
        ("best, seed 0", "+3.000"),
        ("worst, seed 1", "+0.500"),
        ("worst, seed 0", "+0.000"),
    ]
    assert {how[:9] for how, _ in picked[4:]} == {"at random"} and len({*picked}) == 6
    assert {reward for _, reward in picked[4:]} <= {"+1.000", "+1.500", "+2.000", "+2.500"}
    assert "early" not in text
    # One right answer of four without a thought; after it two of four, with RLP three.
    right = {"the model before": ["25.0%", "75.0%"]}
    right |= {RLP.name: ["25.0% [25.0%, 25.0%]", "75.0% [75.0%, 75.0%]"]}
    right |= {NEXT.name: ["25.0% [25.0%, 25.0%]", "50.0% [50.0%, 50.0%]"]}
    for arm, shown in right.items():
        assert shown in [row[2:4] for row in table if row[0] == arm], arm
    (row,) = [row for row in table if row[:3] == [RLP.name, NEXT.name, "right answers after its own thought"]]
    assert row[3].startswith("+25.0 [+0.0, ")
    # Elsewhere (1 + 3)/2 and (2 + 4)/2 nats with RLP, 3 before; a nat more with next-token prediction.
    far = [row for row in table if row[0] == "far"]
    shown = [f"{mean:.3f} [{mean - T / 2:.3f}, {mean + T / 2:.3f}]" for mean in (2.5, 3.5)]
    assert len(far) == 2 and far[0] == ["far", "3.000", *shown]
    assert [cell.partition(" ")[0] for cell in far[1]] == ["far", "-0.500", "+0.500"]
    assert "far: of fewer than 20 documents" in text
    # The same documents and seeds: one nat less in each of them, so that nothing is left to chance.
    assert [RLP.name, NEXT.name, "own minus shuffled", "-1.000 [-1.000, -1.000]"] in [row[:4] for row in table]
    assert "5 comparisons were made" in text
    assert f"{RLP.name}, seed 1: leakage (step 20): <b>seed</b> 1" in text
    assert "controls:\n- next-token" in text

    # Nothing is loaded and nothing runs, whatever a thought holds.
    assert "<script" not in page and "<b>" not in page and "\x1b" not in page
    assert not re.search(r"https?:|//|<link|url\((?!#)|href=\"(?!#)|@import", page)
    # Every plot is there twice.
    plots = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert plots[5:12] == [
        *(f"NLL {how}, by {by}" for how in ("without a thought", "after its own thought") for by in BY),
        "Reward",
    ]
    assert len(plots) == len({*plots}) == len(list((planned.directory / "pictures").iterdir())) == 17
    with Image.open(planned.directory / "pictures" / "nll-without-a-thought-by-flops.png") as image:
        colours = [(r, g, b) for _, (r, g, b) in image.convert("RGB").getcolors(1 << 24)]
        # Both arms' lines are drawn, in their colours.
        assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= {*colours}


def test_the_k_from_which_the_model_before_is_ahead():
    def at(*shares: float) -> Scores:
        both = {
            k: torch.tensor([share, share], dtype=torch.float64) for k, share in zip((1, 2, 4), shares, strict=True)
        }
        return replace(scores([1.0, 1.0], [1.0, 1.0]), passes=both)

    spent = {"step": 1, "tokens": 1, "flops": 1.0, "seconds": 1.0}
    curves = {"sharper": (0.5, 0.5, 0.5), "better": (0.5, 0.75, 1.0), "worse": (0.0, 0.5, 0.5), "once": (0.5, 0.5, 1.0)}
    finished = [Finished(Cell(arm, ()), 0, spent, 0.0, at(*shares)) for arm, shares in curves.items()]
    found = results(finished, [], at(0.25, 0.625, 0.875))
    assert found["passes"]["overtaken"] == {"sharper": 2, "better": None, "worse": 1, "once": None}
    table = passes(found)
    assert [row[-1] for row in table.rows] == ["", "2", "none", "1", "none"]
    assert table.rows[1][1:3] == ["50.0% [50.0%, 50.0%]"] * 2
