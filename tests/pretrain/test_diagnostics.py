"""Each failure provoked, and what must not be taken for one."""

from __future__ import annotations

import math
import random

import pytest

from objectives import RlpConfig
from objectives.metrics import METRICS
from pretrain.cli import main
from pretrain.diagnostics import DIAGNOSED, WINDOW, Diagnostics, RunWarning, at_start, length_trend
from tests.pretrain.test_fit import OBJECTIVES, lines

LONG = 3 * WINDOW
HEALTHY = {
    "loss": 0.1,
    "reward": 0.3,
    "reward_std": 0.4,
    "zero_variance_groups": 0.1,
    "thought_length": 40.0,
    "thought_closed": 0.8,
    "thought_distinct": 0.9,
    "entropy": 1.2,
    "target_in_thought": 0.2,
    "answered": 0.9,
}


def follow(records: list[dict], window: int = WINDOW) -> list[RunWarning]:
    diagnostics = Diagnostics(window)
    return [warning for record in records for warning in diagnostics.update(record)]


def run(length: int = LONG, **changed) -> list[dict]:
    """A healthy run in which a metric has another value, or goes linearly from one to another, or (None) is missing."""
    records = []
    for i in range(length):
        now = {"step": 5 * (i + 1), **HEALTHY}
        for name, value in changed.items():
            now[name] = value[0] + (value[1] - value[0]) * i / (length - 1) if isinstance(value, tuple) else value
        records.append({name: value for name, value in now.items() if value is not None})
    return records


def names(records: list[dict]) -> list[str]:
    return [warning.name for warning in follow(records)]


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("length_collapse", {"thought_length": (40.0, 5.0)}, "tokens"),
        (
            "entropy_collapse",
            {"length": 400, "entropy": (2.0, 0.0)},
            "nats per token (first and last 20 records), and 90% of thoughts",
        ),
        ("leakage", {"target_in_thought": (0.1, 0.9)}, "of thoughts contain the token"),
        ("leakage", {"target_in_thought": 0.95}, "95% of thoughts contain the token"),
        ("leakage", {"target_in_thought": 0.95, "thought_length": None}, "95% of thoughts contain the token"),
        ("dead_groups", {"zero_variance_groups": 0.97}, "(mean reward +0.300, 90% of thoughts distinct)"),
        (
            "dead_groups",
            {"zero_variance_groups": 1.0, "reward": None, "thought_distinct": None},
            "over 20 records, which",
        ),
        ("flat_reward", {"reward": 0.82, "reward_std": 0.008}, "differ by only 0.0080, around a mean of +0.820"),
        ("unclosed_thoughts", {"thought_closed": 0.02}, "2% of thoughts ended by themselves"),
        ("unopened_tags", {"answered": 0.04}, "4% of responses held a complete prediction"),
    ],
)
def test_each_failure_is_named_once_in_one_line(name, changed, said):
    warnings = follow(run(**changed))
    assert [warning.name for warning in warnings] == [name]
    assert said in warnings[0].message
    assert "try" in warnings[0].message
    assert "\n" not in warnings[0].message


def test_a_loss_far_above_chance_is_named():
    chance = math.log(61)

    def found(*losses):
        diagnostics = Diagnostics(chance=chance)
        return [w for n, loss in enumerate(losses) for w in diagnostics.update({"step": n, "nll_text": loss})]

    (warning,) = found(*[chance + 0.2] * 3, *[9.0] * LONG)
    assert (warning.name, warning.metric) == ("worse_than_chance", "nll_text")
    assert "is far above the 4.1 of a uniform guess" in warning.message
    assert found(*[chance + 0.5] * LONG, 9.0, *[chance] * LONG) == []


def test_advice_for_the_lab_fits_the_lab():
    """It thinks at its marker, its right thoughts end with the answer, and chains set how hard it is."""
    said = []
    for changed in (
        {"thought_length": (40.0, 5.0)},
        {"target_in_thought": (0.1, 0.9)},
        {"length": 400, "entropy": (2.0, 0.0)},
        {"zero_variance_groups": 0.97},
        {"reward": 0.82, "reward_std": 0.008},
        {"thought_closed": 0.02},
        {"answered": 0.04},
    ):
        diagnostics = Diagnostics(lab=True)
        said += [w for record in run(**changed) for w in diagnostics.update(record)]
    assert [w.name for w in said] == [
        "length_collapse",
        "dead_groups",
        "flat_reward",
        "unclosed_thoughts",
        "unopened_tags",
    ]
    advice = " ".join(w.message for w in said)
    assert advice.count("lab:chain=") == 3
    assert "objective.positions" not in advice
    assert "instruction" not in advice


def test_what_is_diagnosed_has_a_meaning():
    assert METRICS.keys() >= {*DIAGNOSED}


def test_a_healthy_run_gives_none():
    draw = random.Random(0)
    noisy = [
        {name: value if name == "step" else value * draw.uniform(0.6, 1.1) for name, value in record.items()}
        for record in run(10 * WINDOW)
    ]
    assert follow(noisy) == []


def test_a_run_that_has_few_of_the_metrics_gives_none():
    quiet_star = {"nll_text": 3.2, "nll_thought": 3.1, "reward": 0.001, "reward_positive": 0.5, "mixing_weight": 0.01}
    assert follow([{"step": step, **quiet_star} for step in range(LONG)]) == []


def test_thoughts_that_grow_and_improve_are_no_failure():
    assert names(run(thought_length=(20.0, 200.0), reward=(-0.5, 2.0), reward_std=(1.0, 0.2))) == []


def test_a_token_named_as_often_as_at_first_is_no_leak():
    """A long thought contains a frequent token by chance."""
    assert names(run(target_in_thought=0.92, thought_length=1500.0)) == []
    assert names(run(target_in_thought=(0.55, 0.7))) == []
    assert names(run(target_in_thought=(0.05, 0.4))) == []


def test_a_solved_task_is_no_flat_reward():
    """Spread and zero-variance groups as a solved task of the lab has them."""
    assert names(run(zero_variance_groups=0.88, reward=3.1, reward_std=0.05)) == []


def test_a_window_must_be_full_and_two_must_not_overlap():
    assert names(run(WINDOW - 1, thought_closed=0.0)) == []
    assert names(run(WINDOW, thought_closed=0.0)) == ["unclosed_thoughts"]
    collapsing = run(WINDOW // 2) + run(WINDOW // 2, thought_length=10.0)
    assert names(collapsing[:-1]) == []
    assert names(collapsing) == ["length_collapse"]
    assert [w.name for w in follow(run(4, thought_closed=0.0), window=4)] == ["unclosed_thoughts"]


def test_another_stage_is_judged_by_its_own_records():
    """Shorter thoughts are then what was asked for."""
    first, second = run(WINDOW), [r | {"stage": 1} for r in run(WINDOW, thought_length=5.0)]
    assert names(first + second) == []
    assert names([r | {"stage": 1} for r in first] + second) == ["length_collapse"]
    assert length_trend(first[:10] + second[:10]) == pytest.approx(0.0, abs=1e-9)


def test_values_that_are_missing_or_not_finite_are_passed_over():
    gaps = [record for bad in run(thought_closed=0.0) for record in ({"step": 0, "thought_closed": math.nan}, bad)]
    assert follow(gaps)[0] == follow(run(thought_closed=0.0))[0]


def test_the_records_of_an_interrupted_run_restore_it():
    records = run(thought_length=(40.0, 5.0), thought_closed=(0.1, 0.0))
    whole = Diagnostics()
    given = [whole.update(record) for record in records]
    for cut in (0, WINDOW, 2 * WINDOW, len(records) - 1):
        again = Diagnostics()
        for record in records[:cut]:
            again.update(record)
        assert [again.update(record) for record in records[cut:]] == given[cut:]


def test_length_trend():
    records = [{"step": 10 * i, "thought_length": 7.0 + 0.3 * i} for i in range(50)]
    assert length_trend(records) == pytest.approx(3.0)
    # Only the last window counts, and records without a length do not.
    bent = [{"step": -10 * i, "thought_length": 1e6} for i in range(50, 0, -1)] + records[-WINDOW:]
    assert length_trend(bent) == pytest.approx(3.0)
    assert length_trend(records + [{"step": 500}] * (WINDOW - 2)) == pytest.approx(3.0)
    assert length_trend([]) is None
    assert length_trend([{"step": 1}]) is None
    assert length_trend(records[:1]) is None
    assert length_trend([records[0], records[0]]) is None


def test_short_thoughts_on_a_real_model_are_warned_of_once(tiny_run, run_directory, capsys):
    for steps in ("1", "2"):
        assert main(["fit", "smollm2-quiet-star", *tiny_run, *OBJECTIVES["rlp"], "--steps", steps]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning, short_thoughts")]
    assert len(said) == 1
    assert "at most 4 tokens" in said[0] and "11.5 / 10.0 / 14.1 / 24.7 / 38.9 / 42.2" in said[0]
    assert [w["name"] for w in lines(run_directory / "warnings.jsonl")] == ["short_thoughts"]
    assert at_start("lab", [RlpConfig(length=8)]) == at_start("smollm2-135m", [RlpConfig(length=1024)]) == []
