"""Whole runs on a tiny model: what they leave behind, and that a killed one ends as if it had not been.

Shapes as in the modules under test.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints.hugging_face import load_thinking_model
from checkpoints.snapshots import find_checkpoint, load_checkpoint, save_checkpoint
from data_pipelines import Tokenizer, open_data
from models.philox import Rng
from models.thoughts import Text
from objectives import NextToken, Step
from pretrain import assembly
from pretrain.assembly import make_objective
from pretrain.cli import main
from pretrain.evaluation.held_out import score_held_out
from pretrain.module import learning_rate
from pretrain.opening import open_model
from pretrain.recipe import OptimizerConfig
from pretrain.recipe_files import load_recipe
from tests.data_pipelines.streams import documents, write
from tests.helpers import relative_error
from tests.pretrain.wandb_file import run_and_rows

ROOT = Path(__file__).parents[2]
QUIET = ["--objective", "quiet_star", "--objective.length", "3", "--objective.lookahead", "2"]
RLP = [
    "--objective",
    "rlp",
    "--objective.length",
    "4",
    "--objective.thoughts",
    "3",
    "--objective.anchors_per_document",
    "2",
]
# Two updates a step, and zero-variance groups left out from the third on.
RPT = [
    *(
        "--objective",
        "rpt",
        "--objective.template",
        "forced",
        "--objective.box_open",
        "[",
        "--objective.box_close",
        "]",
    ),
    *("--objective.length", "4", "--objective.thoughts", "6", "--objective.answer_length", "2"),
    *("--objective.anchors_per_document", "4", "--objective.hard_entropy", "0.1", "--objective.updates", "2"),
    *("--objective.drop_zero_variance_from", "3", "--objective.temperature", "1.5"),
]
OBJECTIVES = {"next_token": ["--objective", "next_token"], "quiet_star": QUIET, "rlp": RLP, "rpt": RPT}


def fit(arguments, *more) -> int:
    return main(["fit", "smollm2-quiet-star", *arguments, *more])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    tensors, _ = load_checkpoint(find_checkpoint(directory))
    return {
        f"{group}/{name}": t
        for group in ("model", "optimizer", "objective")
        for name, t in tensors.get(group, {}).items()
    }


def lines(path: Path) -> list[dict]:
    """Of strictly valid JSON."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in {path}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_and_what_it_leaves(objective, tiny_run, run_directory, capsys):
    assert fit(tiny_run, *OBJECTIVES[objective], "--steps", "3", "--evaluation.every", "2") == 0
    out = capsys.readouterr().out
    assert "Held-out NLL" in out
    assert "without thoughts" in out
    assert ("raw gain" in out) == (objective != "next_token")
    metrics = lines(run_directory / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert {"step", "tokens", "flops", "loss", "lr", "seconds", "nll_text", "data/documents"} <= m.keys()
    assert metrics[2]["tokens"] == 3 * 4 * 32
    assert metrics[2]["flops"] == pytest.approx(3 * metrics[0]["flops"], rel=0.2)
    evaluations = lines(run_directory / "evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [0, 2, 3]
    deciles = evaluations[0]["nll_text_deciles"]
    known = [decile for decile in deciles if decile is not None]  # null where a decile has no tokens
    assert known == sorted(known)
    assert (run_directory / "csv").exists()
    samples = lines(run_directory / "samples.jsonl") if objective != "next_token" else []
    assert len(samples) == (12 if objective != "next_token" else 0)
    for sample in samples:
        assert {"step", "text", "thought", "continues", "reward", "advantage"} <= sample.keys()
    again = load_recipe(str(run_directory / "recipe.yaml"))
    assert (again.steps, again.objective.name) == (3, objective)


@pytest.mark.parametrize("objective", ["next_token", "rlp"])
def test_without_held_out_text_nothing_is_evaluated(objective, tiny_run, run_directory, capsys):
    arguments = [*OBJECTIVES[objective], "--data.held_out", "0", "--evaluation.every", "1"]
    for steps in ("1", "2"):
        assert fit(tiny_run, *arguments, "--steps", steps) == 0
        shown = capsys.readouterr()
        assert "data.held_out is 0: nothing is evaluated" in shown.err
        assert "Held-out" not in shown.out
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == [1, 2]
    assert not (run_directory / "evaluations.jsonl").exists()
    assert "No text was held out" in (run_directory / "report.html").read_text()


def test_before_the_run_a_thinking_model_is_its_base(tiny_run, run_directory):
    assert fit(tiny_run, *QUIET, "--steps", "1") == 0
    first = lines(run_directory / "evaluations.jsonl")[0]
    assert first["nll_text"] == first["nll_thought"]
    assert first["nll_text_deciles"] == first["nll_thought_deciles"]


def start(
    arguments, *places: Path, program=("pretrain",), command=("fit", "smollm2-quiet-star"), **options
) -> subprocess.Popen:
    """places: directories that modules are imported from, before ours."""
    # One thread each: a tiny model gains nothing from more, and loses much where other processes want the cores.
    path = os.pathsep.join(map(str, (*places, ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [sys.executable, "-m", *program, *command, *arguments], cwd=ROOT, env=environment, **options
    )


def wait_for_step(directory: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = directory / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step} in time: {process.stderr.read().decode()}")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_twice_and_started_again_is_bit_identical(objective, tiny_run, tmp_path):
    """SIGKILL at random steps, each continuation in a fresh process, against a run that was left alone."""
    common = [*tiny_run, *OBJECTIVES[objective], "--steps", "24", "--checkpoint.every", "4", "--evaluation.every", "9"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start([*common, "--run-dir", str(whole)])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    if objective == "next_token":
        common += [
            "--logging.wandb",
            "offline",
            "--logging.wandb_name",
            "study/arm/seed-0",
            "--logging.wandb_group",
            "study",
        ]
    chance, identities = random.Random(objective), set()
    for step in sorted(chance.sample(range(5, 23), 2)):
        process = start([*common, "--run-dir", str(killed)])
        wait_for_step(killed, step, process)
        process.kill()
        process.wait()
        identities |= {path.read_text() for path in killed.glob("wandb/id")}
    process = start([*common, "--run-dir", str(killed)])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "continuing" in errors.decode()
    expected, got = weights(whole), weights(killed)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    # Its records are those of one run, too.
    timing = {"seconds", "tokens_per_second"}
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        if (whole / name).exists():
            a, b = ([{k: v for k, v in m.items() if k not in timing} for m in lines(d / name)] for d in (whole, killed))
            assert a == b, name
    if objective == "next_token":  # wandb's file, too
        run, rows = run_and_rows(killed)
        assert (run.display_name, run.run_group, {run.run_id}) == ("study/arm/seed-0", "study", identities)
        for name, value, logged in (("metrics", "loss", "loss"), ("evaluations", "nll_text", "held_out/nll_text")):
            expected = [(record["step"], record[value]) for record in lines(killed / f"{name}.jsonl")]
            assert [(row["trainer/global_step"], row[logged]) for row in rows if logged in row] == expected


def test_an_evaluation_that_fails_costs_no_training(tiny_run, run_directory, monkeypatch, capsys):
    """The checkpoint of its step is there, and the same command evaluates that."""

    evaluations = []

    def failing(*arguments):
        evaluations.append(arguments)
        if len(evaluations) == 2:
            raise MemoryError
        return score_held_out(*arguments)

    monkeypatch.setattr("pretrain.callbacks.score_held_out", failing)
    with pytest.raises(MemoryError):
        fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "2")
    monkeypatch.undo()
    assert load_checkpoint(find_checkpoint(run_directory))[1]["step"] == 2
    assert fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "2") == 0
    assert "Held-out NLL" in capsys.readouterr().out
    assert [e["step"] for e in lines(run_directory / "evaluations.jsonl")] == [0, 2]
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == [1, 2]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_run, run_directory, caplog):
    common = [*OBJECTIVES["next_token"], "--checkpoint.every", "2"]
    assert fit(tiny_run, *common, "--steps", "4") == 0
    expected = weights(run_directory)
    newest = find_checkpoint(run_directory)
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert fit(tiny_run, *common, "--steps", "4") == 0
    assert "step-00000004 is refused" in caplog.text
    assert all(torch.equal(weights(run_directory)[n], t) for n, t in expected.items())


def test_the_update_does_not_depend_on_micro_batches(tiny_run, tmp_path):
    for rows in ("4", "1"):
        # Without what blows up fp32's rounding: Adam dividing one error by another, and the policy loss, whose weight
        # of 1e6 meets rewards of a fresh mixing head no larger than that rounding. The objective's own test is in fp64.
        arguments = ["--micro_batch_rows", rows, "--run-dir", str(tmp_path / rows), "--steps", "3"]
        arguments += ["--optimizer.eps", "1e-3", "--objective.policy_weight", "0"]
        assert fit(tiny_run, *QUIET, *arguments) == 0
    a, b = weights(tmp_path / "4"), weights(tmp_path / "1")
    errors = {name: relative_error(b[name], a[name]) for name in a if name.startswith("model/")}
    assert max(errors.values()) <= 1e-4, errors


def test_what_sets_the_memory_may_change_within_a_run(tiny_run, tmp_path):
    """Anchors in parts and activation checkpointing: the same bits however often it is started, and the same update."""
    common = [*tiny_run, *QUIET, "--optimizer.eps", "1e-3", "--objective.policy_weight", "0"]
    memory = ["--objective.anchors_at_once", "7", "--activation_checkpointing", "true"]
    for run, first, then in (
        ("parts", [], memory),
        ("twice", memory, memory),
        ("changed", [], memory),
        ("whole", [], []),
    ):
        if run in ("twice", "changed"):
            assert fit(common, *first, "--run-dir", str(tmp_path / run), "--steps", "2") == 0
        assert fit(common, *then, "--run-dir", str(tmp_path / run), "--steps", "4") == 0
    parts, twice, changed, whole = (weights(tmp_path / run) for run in ("parts", "twice", "changed", "whole"))
    assert [n for n in parts if not torch.equal(twice[n], parts[n])] == []
    for other in (parts, changed):
        errors = {n: relative_error(other[n], whole[n]) for n in whole if n.startswith("model/")}
        assert max(errors.values()) <= 1e-4, errors
    assert any(not torch.equal(parts[n], whole[n]) for n in whole)
    samples = lines(tmp_path / "parts" / "samples.jsonl")
    assert max(sample["position"] for sample in samples) >= 7


def test_non_finite_steps_are_skipped_and_too_many_stop_the_run(tiny_run, run_directory, monkeypatch, capsys):
    class Poisoned(Step):
        def losses(self, counts=None):
            for output in super().losses(counts):
                output.loss = output.loss * (float("nan") if self.rng.step in (1, 4, 5, 6) else 1)
                yield output

    monkeypatch.setattr("pretrain.module.Step", Poisoned)
    arguments = [*QUIET, "--steps", "9", "--optimizer.max_skipped", "3", "--checkpoint.every", "2"]
    assert fit(tiny_run, *arguments) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert "3 steps in a row, up to step 7, had a non-finite loss or gradient" in said[-1]
    assert sum("no checkpoint at step" in line for line in said) == 2  # once at 2, once at 6
    assert "4 of 7 steps were skipped: non-finite loss or gradient" in said
    metrics = lines(run_directory / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 1, 1, 1, 2, 3, 4]
    assert [m["loss"] is None for m in metrics] == [False, True, False, False, True, True, True]
    assert load_checkpoint(find_checkpoint(run_directory))[1]["step"] == 4
    assert [path.name for path in sorted((run_directory / "checkpoints").iterdir())] == [
        "step-00000003",  # due at 2
        "step-00000004",
    ]


@pytest.fixture
def explosive(monkeypatch):
    """Rates of 1 and more are infinite, as a recipe's may not be."""
    rate = lambda config, *rest: config.lr if config.lr < 1 else math.inf  # noqa: E731
    monkeypatch.setattr("pretrain.module.learning_rate", rate)


def test_weights_that_become_infinite_are_never_saved_and_the_advice_works(tiny_run, run_directory, explosive, capsys):
    """With a learning rate that overflows: what was saved before stays, and the printed options go on from it."""
    common = [*tiny_run, *OBJECTIVES["next_token"], "--checkpoint.every", "1", "--optimizer.warmup_steps", "0"]
    assert fit(common, "--steps", "2") == 0
    good = weights(run_directory)
    blown = [*common, "--steps", "5", "--continue-from", "2", "--optimizer.lr", "1e9"]
    assert fit(blown) == 3
    said = capsys.readouterr().err.splitlines()
    assert sum("no checkpoint at step 3: step 3 left a model that is not finite" in line for line in said) == 1
    assert "2 steps in a row, up to step 5, had a non-finite loss or gradient" in said[-1]
    assert all(torch.equal(good[name], tensor) for name, tensor in weights(run_directory).items())
    advice = shlex.split(said[-1][said[-1].index("--continue-from") :])
    assert advice == ["--continue-from", "2", "--optimizer.lr", "1e+08"]
    # Still too high; and the third time it names what is needed.
    assert fit([*common, "--steps", "5", *advice]) == 3
    assert fit([*common, "--steps", "5", *advice[:3], "1e-3"]) == 0
    assert "it changes optimizer.lr 100000000.0 → 0.001" in capsys.readouterr().err
    assert [m["skipped"] for m in lines(run_directory / "metrics.jsonl")] == [0, 0, 0, 0, 0]
    # The same command continues what it began, and does not go back again.
    assert fit([*common, "--steps", "6", *advice[:3], "1e-3"]) == 0
    assert "at step 5 of 6; it changes steps 5 → 6" in capsys.readouterr().err
    assert fit([*common, "--steps", "6", "--optimizer.lr", "1e-4"]) == 1
    assert "optimizer.* may change from a checkpoint on, by --continue-from STEP" in capsys.readouterr().err
    assert fit([*common, "--steps", "6", "--continue-from", "9", "--optimizer.lr", "1e-4"]) == 1
    assert "has no such checkpoint; there are: 5, 6" in capsys.readouterr().err


def test_a_run_that_was_never_finite_begins_anew_by_its_advice(tiny_run, run_directory, explosive, capsys):
    common = [*tiny_run, *OBJECTIVES["next_token"], "--steps", "3", "--optimizer.warmup_steps", "0"]
    assert fit(common, "--optimizer.lr", "1e9") == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("with a lower learning rate, like --restart --optimizer.lr 1e+08")
    assert fit(common, "--restart") == 0
    assert [m["skipped"] for m in lines(run_directory / "metrics.jsonl")] == [0, 0, 0]


def test_another_recipe_or_other_data_in_the_same_directory_is_refused(tiny_run, run_directory, tmp_path, capsys):
    common = [*OBJECTIVES["next_token"], "--steps", "2"]
    assert fit(tiny_run, *common) == 0
    assert fit(tiny_run, *common, "--optimizer.lr", "5e-4", "--seed", "3") == 1
    assert "(optimizer.lr, seed differ); choose another --run-dir" in capsys.readouterr().err
    (tmp_path / "texts" / "0.txt").write_text("Other words altogether.")
    assert fit(tiny_run, *common, "--steps", "3") == 1
    assert "the data is not what" in capsys.readouterr().err
    assert load_checkpoint(find_checkpoint(run_directory))[1]["step"] == 2


def test_a_stream_that_changed_is_refused_or_read_from_its_beginning(
    tiny_run, run_directory, tmp_path, monkeypatch, capsys
):
    known = []  # what is asked to be as it was, commits of hub datasets included
    monkeypatch.setattr(assembly, "open_data", lambda *a, **kw: known.append(kw["contents"]) or open_data(*a, **kw))
    reference = write("jsonl", tmp_path / "web", [text[:20] for text in documents(300)])
    common = [*OBJECTIVES["next_token"], "--data", reference, "--data.stream", "true", "--data.lanes", "4"]
    common, begin = [*common, "--optimizer.schedule", "constant"], ["--data_changed", "begin"]
    assert fit(tiny_run, *common, "--steps", "3") == 0
    with (tmp_path / "web" / "001.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")

    assert fit(tiny_run, *common, "--steps", "5") == 1
    said = capsys.readouterr().err
    assert "(001.jsonl has changed)" in said and "with --data_changed begin" in said
    assert known[0] is None and known[1] is not None
    before = find_checkpoint(run_directory)
    model, state = open_model(str(before)).model, load_checkpoint(before)[1]
    assert state["step"] == 3

    shutil.copytree(run_directory, tmp_path / "again")
    assert fit(tiny_run, *common, "--steps", "5", *begin) == 0
    recipe = load_recipe(str(run_directory / "recipe.yaml"))
    tokenizer = Tokenizer.from_directory(Path(recipe.model))
    changed = open_data(recipe.data, tokenizer, recipe.seed, rows_per_step=4)
    # The fourth step's loss is that of the weights after the third, on the first rows of the new text.
    scores = NextToken().evaluate(model, Text(**changed.rows(0, 4)), Rng(0, 0))
    metrics = lines(run_directory / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5]
    expected = (scores.text_nll_BN.double().sum() / scores.valid_BN.sum()).item()
    assert metrics[3]["loss"] == pytest.approx(expected, rel=1e-6)
    assert 0 < metrics[3]["data/documents"] < metrics[2]["data/documents"]
    state = load_checkpoint(find_checkpoint(run_directory))[1]
    assert [lane["rows"] for lane in state["lanes"].values()] == [5, 5, 5, 5]  # numbered on

    # From then on it is the run's own text.
    assert fit(tiny_run, *common, "--steps", "6", "--data_changed", "refuse") == 0
    assert known[2:] == [None, state["data_contents"]]
    assert fit([*tiny_run, "--run-dir", str(tmp_path / "again")], *common, "--steps", "6", *begin) == 0
    expected, got = weights(tmp_path / "again"), weights(run_directory)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_longer_run_keeps_its_schedule_and_says_what_it_changes(tiny_run, run_directory, tmp_path, capsys):
    """Against one that had all its steps from the start, with the schedule of the first."""
    common = [*tiny_run, *OBJECTIVES["next_token"], "--optimizer.schedule", "cosine", "--optimizer.warmup_steps", "0"]
    common += ["--checkpoint.every", "2"]
    assert fit(common, "--steps", "4") == 0
    first = lines(run_directory / "metrics.jsonl")
    assert [m["lr"] for m in first] == pytest.approx([1e-3 * (1 + math.cos(math.pi * s / 4)) / 2 for s in (1, 2, 3, 4)])
    capsys.readouterr()
    assert fit(common, "--steps", "6", "--evaluation.every", "2") == 0
    said = capsys.readouterr().err
    assert "at step 4 of 6; it changes evaluation.every null → 2, steps 4 → 6\n" in said
    assert "the schedule ends at step 4 (optimizer.schedule_steps), and the learning rate is 0 after it" in said
    assert [m["lr"] for m in lines(run_directory / "metrics.jsonl")] == [m["lr"] for m in first] + [0, 0]
    assert fit(common, "--steps", "6", "--optimizer.schedule_steps", "6") == 1
    assert "(optimizer.schedule_steps differ)" in capsys.readouterr().err
    # From a checkpoint on it may be stretched.
    stretched = ["--steps", "6", "--optimizer.schedule_steps", "6", "--continue-from", "4"]
    assert fit(common, *stretched) == 0
    rates = [1e-3 * (1 + math.cos(math.pi * s / 6)) / 2 for s in (5, 6)]
    assert [m["lr"] for m in lines(run_directory / "metrics.jsonl")][4:] == pytest.approx(rates)
    assert load_recipe(str(run_directory / "recipe.yaml")).optimizer.schedule_steps == 6
    whole = ["--run-dir", str(tmp_path / "whole"), "--optimizer.schedule_steps", "4", "--steps"]
    assert fit(common, *whole, "4") == 0
    assert [m["lr"] for m in lines(tmp_path / "whole" / "metrics.jsonl")] == [m["lr"] for m in first]


def test_a_control_has_a_schedule_of_its_own():
    recipe = load_recipe("quickstart", ["--continue-from", "4"])
    assert recipe.control_recipe(100, 4e9, "x").optimizer.schedule_flops is None
    half = load_recipe("quickstart", ["--continue-from", "4", "--optimizer.schedule_steps", str(recipe.steps // 2)])
    control = half.control_recipe(100, 4e9, "x")
    assert (control.optimizer.schedule_steps, control.optimizer.schedule_flops) == (None, 2e9)
    assert control.continue_from is None


def test_fewer_steps_than_are_done_change_nothing(tiny_run, run_directory, capsys):
    common = [*OBJECTIVES["next_token"], "--steps"]
    assert fit(tiny_run, *common, "3") == 0
    before = {path.name: path.read_bytes() for path in run_directory.iterdir() if path.suffix in (".yaml", ".jsonl")}
    assert fit(tiny_run, *common, "2") == 0
    assert "already at step 3 of 2" in capsys.readouterr().err
    after = {path.name: path.read_bytes() for path in run_directory.iterdir() if path.suffix in (".yaml", ".jsonl")}
    assert before == after


def test_without_a_valid_checkpoint_a_run_asks_and_removes_nothing(tiny_run, run_directory, capsys):
    common = [*OBJECTIVES["next_token"], "--steps"]
    assert fit(tiny_run, *common, "2", "--checkpoint.every", "1") == 0
    for path in (run_directory / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in run_directory.rglob("*") if path.is_file() and path.name != "lock"}
    capsys.readouterr()
    assert fit(tiny_run, *common, "3") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "is valid (step-00000001, step-00000002); restore one, or give --restart" in message
    after = {path: path.read_bytes() for path in run_directory.rglob("*") if path.is_file() and path.name != "lock"}
    assert before == after
    # Nor does a recipe that cannot be run.
    assert fit(tiny_run, *common, "3", "--restart", "--data.length", "300") == 1
    assert all(path.exists() for path in before)
    assert fit(tiny_run, *common, "3", "--restart") == 0
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == [1, 2, 3]
    assert [path.name for path in (run_directory / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_finished_run_is_reported_again(tiny_run, capsys):
    assert fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "2") == 0
    capsys.readouterr()
    assert fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "2") == 0
    captured = capsys.readouterr()
    assert "already at step 2 of 2; raise --steps" in captured.err
    assert "Held-out NLL" in captured.out


def test_csv_is_one_file_that_loses_no_row(tiny_run, run_directory):
    """Killed at any step, and continued: the rows of metrics.jsonl, and those of evaluations."""
    arguments = [*tiny_run, *OBJECTIVES["next_token"], "--checkpoint.every", "2", "--evaluation.every", "3"]
    process = start([*arguments, "--steps", "400"])
    wait_for_step(run_directory, 5, process)
    process.kill()
    process.wait()
    path = run_directory / "csv" / "metrics.csv"
    steps = len(lines(run_directory / "metrics.jsonl"))
    with path.open() as file:
        assert sum(bool(row["loss"]) for row in csv.DictReader(file)) >= steps - 1
    assert fit(arguments, "--steps", str(steps + 2)) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    trained, evaluated = ([row for row in rows if row[key]] for key in ("loss", "held_out/nll_text"))
    assert [(int(r["step"]), float(r["loss"])) for r in trained] == [
        (m["step"], m["loss"]) for m in lines(run_directory / "metrics.jsonl")
    ]
    assert [(int(r["step"]), float(r["held_out/nll_text"])) for r in evaluated] == [
        (e["step"], e["nll_text"]) for e in lines(run_directory / "evaluations.jsonl")
    ]
    assert not [file for file in run_directory.rglob("*.csv") if file != path]


# After the run


def test_export_loads_in_transformers_and_thinks_here(tiny_run, run_directory, tmp_path, capsys):
    assert fit(tiny_run, *QUIET, "--steps", "3") == 0
    assert main(["export", str(run_directory), str(tmp_path / "out")]) == 0
    opened = open_model(str(run_directory))
    text = Text.from_rows(torch.tensor(opened.tokenizer.encode(["The reader thinks while it reads."])))
    with torch.no_grad():
        ours = opened.model.read(text).hidden_BNW @ opened.model.head_weight_VW.T
        engine = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert relative_error(engine(text.tokens_BN).logits, ours) <= 1e-5
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("thinks while")["input_ids"]
    assert words == opened.tokenizer.encode(["thinks while"])[0]
    thinking = load_thinking_model(tmp_path / "out")
    assert all(torch.equal(thinking.state_dict()[n], t) for n, t in opened.model.state_dict().items())
    capsys.readouterr()
    # By default thoughts are as long as the run's, also where only thinking.json says so.
    tables = set()
    for length in ([], ["--length", "2"]):
        shown = []
        for place in (run_directory, find_checkpoint(run_directory), tmp_path / "out"):
            assert main(["sample", str(place), "--text", "The reader thinks", *length]) == 0
            # The first line says which model it is.
            shown.append(capsys.readouterr().out.partition("\n")[2])
        assert shown[0] == shown[1] == shown[2]
        assert "p without" in shown[0]
        tables.add(shown[0])
    assert len(tables) == 2
    # A run goes on from it, with its thinking parts.
    assert (
        fit(tiny_run, *QUIET, "--steps", "1", "--model", str(tmp_path / "out"), "--run-dir", str(tmp_path / "on")) == 0
    )
    (tmp_path / "out" / "thinking" / "thinking.json").write_text(
        '{"format": 1, "parts": ["delimiters", "mixing_head"], "length": 0}'
    )
    assert main(["sample", str(tmp_path / "out"), "--text", "The reader thinks"]) == 1
    assert "out has a thought length of 0, not a number of tokens; export the run again" in capsys.readouterr().err
    assert main(["export", str(run_directory), str(tmp_path / "out")]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_a_thinking_model_can_be_trained_on(tiny_run, run_directory, tmp_path):
    """Delimiters and mixing head of an exported model are where a further run starts from."""
    assert fit(tiny_run, *QUIET, "--steps", "3") == 0
    assert main(["export", str(run_directory), str(tmp_path / "out")]) == 0
    more = ["--model", str(tmp_path / "out"), "--run-dir", str(tmp_path / "more"), "--steps", "1"]
    assert fit(tiny_run, *QUIET, *more, "--optimizer.lr", "0") == 0
    expected, got = weights(run_directory), weights(tmp_path / "more")
    parts = [n for n in expected if n.startswith(("model/delimiters", "model/mixing_head"))]
    assert len(parts) == 8
    assert all(torch.equal(expected[n], got[n]) for n in parts)


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "optimizer"])
def test_a_checkpoint_whose_tensors_do_not_fit_is_named_in_one_line(change, tiny_run, run_directory, tmp_path, capsys):
    """Its manifest is that of its files, and its state.json is of another model."""
    assert fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "1") == 0
    tensors, state = load_checkpoint(find_checkpoint(run_directory))
    weights, name = tensors["model"], "decoder.norm.weight"
    if change == "name":
        weights["decoder.another"] = weights.pop(name)
        part = f"model.safetensors does not fit its state.json (missing {name}; unexpected decoder.another)"
    elif change == "shape":
        weights[name] = torch.ones(25)
        part = f"({name} is (25,) float32, not (24,) float32)"
    elif change == "dtype":
        weights[name] = weights[name].bfloat16()
        part = f"({name} is (24,) bfloat16, not (24,) float32)"
    else:
        tensors["optimizer"][f"{name}/exp_avg"] = torch.ones(25)
        part = f"optimizer.safetensors does not fit its state.json ({name}/exp_avg is (25,) float32, not (24,) float32)"
    save_checkpoint(run_directory / "checkpoints", 1, tensors, state)
    capsys.readouterr()
    assert fit(tiny_run, *OBJECTIVES["next_token"], "--steps", "2") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("forethought: checkpoint step-00000001 cannot be used: ")
    assert part in message
    assert main(["export", str(run_directory), str(tmp_path / "out")]) == (0 if change == "optimizer" else 1)


def test_what_sample_and_export_cannot_do_is_said_in_one_line(tiny_run, run_directory, tmp_path, capsys):
    assert fit(tiny_run, *QUIET, "--steps", "1") == 0
    (tmp_path / "file").write_text("")
    words = ["--text", "The reader thinks"]
    for arguments, part in (
        (["sample", *words, "--length", "0"], "--length must be at least 1, got 0"),
        (["sample", *words, "--length", "-2"], "--length must be at least 1, got -2"),
        (["sample", *words, "--length", "300"], "thoughts of 302 exceed the model's 256 positions; give a shorter"),
        (["sample", *words, "--temperature", "-1"], "--temperature must be 0 (greedy) or at least 1e-6, got -1.0"),
        (["sample", *words, "--temperature", "nan"], "at least 1e-6, got nan"),
        (["sample", *words, "--temperature", "1e-40"], "at least 1e-6, got 1e-40"),
        (["sample", "--text", "a"], "no position of this text, which must be followed by a token to predict; give"),
        (["export", str(tmp_path / "file" / "below")], "; choose another directory to export to"),
        (["export", "/proc/unwritable"], "/proc/unwritable cannot be written ("),
    ):
        capsys.readouterr()
        assert main([arguments[0], str(run_directory), *arguments[1:]]) == 1
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert part in message, message


def test_sample_needs_a_model_that_thinks(tiny_directory, capsys):
    assert main(["sample", str(tiny_directory), "--text", "hello"]) == 1
    assert "sample a run of quiet_star, rlp or rpt, or an export of one" in capsys.readouterr().err


def test_dry_run_writes_nothing(tiny_run, run_directory, capsys):
    for memory in ([], ["--objective.anchors_at_once", "5", "--activation_checkpointing", "true"]):
        assert fit(tiny_run, *QUIET, "--steps", "5", *memory, "--dry-run") == 0
        said = capsys.readouterr().err
        assert "the recipe can be run" in said
    assert not run_directory.exists()


def test_dry_run_lists_what_cannot_be_reached():
    arguments = ["--data.patience", "0", "--model", "org/absent"]
    run = subprocess.run(
        [sys.executable, "-m", "pretrain", "fit", "smollm2-mixture", *arguments, "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    *unreachable, last = run.stderr.strip().splitlines()
    parts = ["HuggingFaceFW/fineweb-edu", "open-web-math/open-web-math", "codeparrot/codeparrot-clean", "org/absent"]
    assert all(part in line for part, line in zip(parts, unreachable, strict=True))
    assert last == "otherwise, as far as can be told without these, the recipe is valid"


# Bad input, seen from the command line: one line, exit code 1, no traceback


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "nowhere at all"], "no model 'nowhere at all'; give a local Hugging Face directory"),
        (["--data", "nowhere/at/all.txt"], "nowhere/at/all.txt"),
        # Thoughts are 3 sampled tokens, an end, and 2 true ones.
        (["--data.length", "252"], "; set data.length to at most 250 or objective.length to at most 1"),
        (["--data.length", "300"], "exceed the 256 positions"),
        (["--objective.length", "2000"], "; set objective.length to at most 221"),
        (["--objective.length", "null", "--objective.n_ahead", "2000"], "; set objective.n_ahead to at most 224"),
        (["--objective.length", "2000", "--data.length", "300"], "; lower data.length and objective.length"),
        (["--data.end_of_document", "<none>"], "<none>"),
    ],
)
def test_references_that_cannot_be_read(tiny_run, arguments, part, capsys):
    for more in ([], ["--dry-run"]):
        assert fit(tiny_run, *QUIET, *arguments, *more) == 1
        message = capsys.readouterr().err.strip()
        assert part in message
        assert len(message.splitlines()) == 1, message


@pytest.mark.parametrize(
    ("there", "arguments", "part"),
    [
        (False, [], "cuda_graphs needs a CUDA device and there is none; leave the key out"),
        (True, ["--devices", "2", "--rollout_weights", "gathered"], "cuda_graphs records no sharded model"),
    ],
)
def test_graphs_take_a_cuda_device_and_whole_weights(tiny_run, monkeypatch, there, arguments, part, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert fit(tiny_run, *QUIET, "--cuda_graphs", "true", "--dry-run", *arguments) == 1
    message = capsys.readouterr().err.strip()
    assert part in message
    assert len(message.splitlines()) == 1, message


def test_several_mistakes_come_together(tiny_run, capsys):
    assert fit(tiny_run, *QUIET, "--steps", "0", "--objective.thoughts", "0", "--sed", "1") == 1
    message = capsys.readouterr().err
    assert message.count("  - ") == 3
    assert "did you mean 'seed'?" in message


def test_hard_documents_are_counted_and_harmless(tiny_run, run_directory, tmp_path, capsys):
    """Empty, binary, not UTF-8, very long, with the delimiters and control tokens as text."""
    texts = tmp_path / "texts"
    (texts / "empty.txt").write_text("  \n")
    (texts / "binary.txt").write_bytes(b"PK\0\0 words")
    (texts / "latin.txt").write_bytes("naïve café".encode("latin-1") * 20)
    (texts / "long.txt").write_text("many words " * 3000)
    (texts / "control.txt").write_text("a <|startofthought|> b <|endofthought|> c <|endoftext|> d " * 40)
    arguments = ["--data.max_document_characters", "5000", "--steps", "2"]
    assert fit(tiny_run, *QUIET, *arguments) == 0
    assert "documents, 1 empty, 1 binary, 1 not utf8, 1 enormous, 1 control text\n" in capsys.readouterr().err
    last = lines(run_directory / "metrics.jsonl")[-1]
    counts = {name: last[f"data/{name}"] for name in ("empty", "binary", "not_utf8", "enormous", "control_text")}
    assert counts == dict.fromkeys(counts, 1)
    recipe = load_recipe(str(run_directory / "recipe.yaml"))
    tokenizer = Tokenizer.from_directory(Path(recipe.model))
    data = open_data(recipe.data, tokenizer, 0)
    tokens = data.corpus.tokens_T
    # The end-of-document token is the only control token there is, once for each document.
    assert (tokens == tokenizer.eos_id).sum() == data.counts["documents"]


def test_command_line_help(capsys):
    for arguments in ([], ["fit"], ["export"], ["sample"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "--optimizer.lr" in out
    assert "The same command on the same run directory continues" in out
    assert "75 unfinished" in out
    with pytest.raises(SystemExit):
        main(["export", "a", "b", "--unknown"])
    done = subprocess.run([sys.executable, "-m", "pretrain", "--help"], cwd=ROOT, capture_output=True, check=True)
    assert b"forethought" in done.stdout


# Pieces


def test_learning_rate():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="cosine")
    assert [learning_rate(config, step, 12) for step in (1, 4, 8, 12)] == pytest.approx([0.5, 2.0, 1.0, 0.0])
    constant = OptimizerConfig(lr=2.0, warmup_steps=0)
    assert learning_rate(constant, 1, 12) == learning_rate(constant, 12, 12) == 2.0


def test_difficulty_survives_a_resume(tiny_run, run_directory):
    """The deciles are those of the first evaluation, also in a continued run."""
    common = [*OBJECTIVES["next_token"], "--evaluation.every", "2"]
    assert fit(tiny_run, *common, "--steps", "2") == 0
    first = load_checkpoint(find_checkpoint(run_directory))[0]["evaluation"]["difficulty_E"]
    assert fit(tiny_run, *common, "--steps", "4") == 0
    assert torch.equal(load_checkpoint(find_checkpoint(run_directory))[0]["evaluation"]["difficulty_E"], first)
    assert [e["step"] for e in lines(run_directory / "evaluations.jsonl")] == [0, 2, 4]


def test_an_evaluation_that_brought_parts_may_be_left_out(tiny_run, run_directory):
    """The model keeps its delimiters and mixing head, whose moments are in the checkpoint."""
    common = [*OBJECTIVES["next_token"], "--evaluation.counterfactuals", "false"]
    assert fit(tiny_run, *common, "--evaluation.objective.name", "quiet_star", "--steps", "1") == 0
    first = load_checkpoint(find_checkpoint(run_directory))[0]
    assert fit(tiny_run, *common, "--steps", "2") == 0
    second = load_checkpoint(find_checkpoint(run_directory))[0]
    assert second["model"].keys() == first["model"].keys() and "mixing_head.out.weight" in first["model"]


ONE_ANCHOR = [
    *("--evaluation.objective.name", "rlp", "--evaluation.objective.anchors_per_document", "1"),
    *("--evaluation.objective.length", "4", "--evaluation.objective.thoughts", "3"),
]


@pytest.mark.parametrize(
    "changed",
    [["--evaluation.rows", "2"], ["--evaluation.rows", "8"], ONE_ANCHOR],
    ids=["fewer rows", "more rows", "another evaluator"],
)
def test_difficulty_is_measured_anew_where_other_tokens_are_evaluated(changed, tiny_run, run_directory, capsys):
    common = [*RLP, "--evaluation.every", "2", "--evaluation.counterfactuals", "false"]
    assert fit(tiny_run, *common, "--evaluation.rows", "4", "--steps", "2") == 0
    assert fit(tiny_run, *common, "--evaluation.rows", "4", *changed, "--steps", "4") == 0
    assert "difficulty is measured anew" in capsys.readouterr().err
    records = lines(run_directory / "evaluations.jsonl")
    assert [e["step"] for e in records] == [0, 2, 2, 4]
    (old,), (new,) = ({e["held_out"] for e in part} for part in (records[:2], records[2:]))
    assert old != new
    tensors = load_checkpoint(find_checkpoint(run_directory))[0]
    assert len(tensors["evaluation"]["difficulty_E"]) == records[-1]["tokens_scored"] != records[0]["tokens_scored"]


def test_evaluation_matches_the_objective(tiny_run, run_directory):
    assert fit(tiny_run, *QUIET, "--steps", "2") == 0
    opened = open_model(str(run_directory))
    data = open_data(opened.recipe.data, opened.tokenizer, 0)
    held_out = Text(**data.held_out_rows(2))
    scores = make_objective(opened.recipe, opened.tokenizer).evaluate(opened.model, held_out, Rng(0, 0))
    expected = scores.thought_nll_BN[scores.valid_BN].double().mean().item()
    assert lines(run_directory / "evaluations.jsonl")[-1]["nll_thought"] == pytest.approx(expected, rel=1e-5)


def test_a_control_is_evaluated_like_what_it_controls(tiny_run, run_directory):
    """evaluation.objective: a next-token run scored at RLP's anchors, with thoughts, though it trains none."""
    like = ["--evaluation.objective.name", "rlp", "--evaluation.objective.length", "4"]
    assert fit(tiny_run, *OBJECTIVES["next_token"], *like, "--evaluation.objective.thoughts", "3", "--steps", "1") == 0
    first = lines(run_directory / "evaluations.jsonl")[0]
    opened = open_model(str(run_directory))
    evaluator = make_objective(opened.recipe, opened.tokenizer, evaluation=True)
    held_out = Text(**open_data(opened.recipe.data, opened.tokenizer, 0).held_out_rows(2))
    anchors = evaluator.scored(held_out)
    assert first["tokens_scored"] == anchors
    assert first["nll_thought"] != first["nll_text"]
    assert opened.recipe.objective.name == "next_token"
