"""Runs in the lab: with a control, with the counterfactual test, and the mistakes one can make with tags."""

from __future__ import annotations

import json
import shutil
from itertools import accumulate

import pytest

from checkpoints.references import LAB
from data_pipelines import open_data
from models.philox import Rng
from models.rollout import native
from models.rollout.native import NativeStep
from models.thoughts import PAD, Text
from pretrain.assembly import make_objective
from pretrain.cli import main
from pretrain.opening import open_model
from pretrain.recipe_files import load_recipe, recipe_from_tree, recipe_to_tree
from tests.pretrain.test_fit import lines

SMALL = [
    "--model",
    "random:lab",
    "--steps",
    "4",
    "--rows-per-step",
    "1",
    "--data.length",
    "64",
    "--evaluation.rows",
    "2",
]
SMALL += ["--objective.length", "4", "--objective.thoughts", "3", "--evaluation.every", "2", "--logging.every", "1"]


def fit(recipe: str, directory, *more: str) -> int:
    return main(["fit", recipe, *SMALL, "--run-dir", str(directory), *more])


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A tiny quickstart, its control included."""
    directory = tmp_path_factory.mktemp("runs") / "quickstart"
    assert fit("quickstart", directory) == 0
    return directory


def test_a_control_of_several_updates_spends_as_much(tmp_path):
    control = ["--control", "rlp", "--control.updates", "3", "--control.length", "4", "--control.thoughts", "3"]
    assert fit("quickstart", tmp_path / "run", *control) == 0
    metrics = [lines(directory / "metrics.jsonl") for directory in (tmp_path / "run", tmp_path / "run" / "control")]
    main_run, its_control = (of[-1]["flops"] for of in metrics)
    assert abs(its_control - main_run) <= metrics[1][0]["flops"]


def test_the_control_spends_as_much_on_the_same_problems(quickstart):
    main_run, control = lines(quickstart / "metrics.jsonl"), lines(quickstart / "control" / "metrics.jsonl")
    assert main_run[-1]["step"] == 4 < control[-1]["step"]
    assert abs(control[-1]["flops"] - main_run[-1]["flops"]) <= control[0]["flops"] / 2
    recipe = load_recipe(str(quickstart / "control" / "recipe.yaml"))
    assert (recipe.objective.name, recipe.control) == ("next_token", None)
    of_run = load_recipe(str(quickstart / "recipe.yaml")).optimizer
    # The whole of either run.
    assert recipe.optimizer == of_run.replaced(schedule_steps=None, schedule_flops=main_run[-1]["flops"])
    ours, theirs = (lines(d / "evaluations.jsonl") for d in (quickstart, quickstart / "control"))
    # Before the first step both are the same model, put to the same test.
    for key in ours[0].keys() - {"step", "tokens", "flops"}:
        assert ours[0][key] == theirs[0][key], key
    # As often over the same FLOPs; a step of its own may come nearest to the last of them.
    assert len(theirs) in (len(ours), len(ours) + 1)


def test_a_control_that_does_not_think_is_scored_with_thoughts_as_well(tmp_path):
    """It has the parts that its evaluation needs, as they begin."""
    quiet = ["--objective", "quiet_star", "--objective.length", "3", "--objective.lookahead", "1"]
    assert fit("quickstart", tmp_path / "run", *quiet, "--steps", "2", "--control", "next_token") == 0
    last = lines(tmp_path / "run" / "control" / "evaluations.jsonl")[-1]
    assert last["nll_thought"] == pytest.approx(last["nll_text"])  # no weight was learned for a thought
    assert open_model(str(tmp_path / "run" / "control")).model.mixing_head is not None


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
def test_a_compiled_run_learns_the_same(tmp_path, monkeypatch):
    """On CPU its thoughts are sampled by the compiled step, whose numbers differ by rounding."""
    steps, step = [], NativeStep.__call__
    monkeypatch.setattr(NativeStep, "__call__", lambda self, *row: steps.append(1) or step(self, *row))
    found = {}
    for compiled in ("false", "true"):
        assert fit("quickstart", tmp_path / compiled, "--compile", compiled, "--control", "null") == 0
        assert bool(steps) == (compiled == "true")
        found[compiled] = lines(tmp_path / compiled / "evaluations.jsonl")
    assert len(found["true"]) > 1
    for plain, natively in zip(found["false"], found["true"], strict=True):
        assert natively["nll_thought"] == pytest.approx(plain["nll_thought"], rel=1e-4)


def test_a_run_that_is_to_compile_takes_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "compiler", lambda: None)
    native.library.cache_clear()
    assert fit("quickstart", tmp_path, "--compile", "true", "--dry-run") == 1
    message = capsys.readouterr().err.strip()
    assert "compile takes a C++ compiler on CPU and there is none; install g++ or leave the key out" in message
    assert len(message.splitlines()) == 1


def test_the_counterfactual_test_is_in_every_evaluation(quickstart):
    for record in lines(quickstart / "evaluations.jsonl"):
        assert set(record["counterfactual"]) == {"own", "other", "shuffled", "filler", "right", "none"}
        assert set(record["counterfactual_minus_own"]) == {"other", "shuffled", "filler", "right", "none"}
        assert record["counterfactual"]["own"]["nll"] == pytest.approx(record["nll_thought"])
        assert record["counterfactual"]["none"]["nll"] == pytest.approx(record["nll_text"])
        for condition, found in record["counterfactual"].items():
            assert found["low"] <= found["nll"] <= found["high"], condition
            if condition != "own":
                difference = found["nll"] - record["counterfactual"]["own"]["nll"]
                assert record["counterfactual_minus_own"][condition]["nll"] == pytest.approx(difference)
        # Four sums with spaces between them are seven tokens, and a thought has four at most.
        assert record["thought_right"] == 0


def test_right_thoughts_are_counted(tmp_path):
    """The share of thoughts that are right, against reading what the shipped model thinks."""
    more = ["--model", "lab", "--objective.length", "8", "--steps", "1", "--control", "null", "--evaluation.rows", "8"]
    assert fit("quickstart", tmp_path / "run", *more) == 0
    before = lines(tmp_path / "run" / "evaluations.jsonl")[0]
    opened, recipe = open_model("lab"), load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    text = Text(**open_data(recipe.data, opened.tokenizer, 0).held_out_rows(8))
    objective = make_objective(recipe, opened.tokenizer, evaluation=True)
    thoughts = objective.evaluate(opened.model, text, Rng(recipe.seed, 2**32 - 1)).thoughts
    right = []
    for b, m in (thoughts.anchors.index_BM >= 0).nonzero().tolist():
        n = int(thoughts.anchors.index_BM[b, m])
        problem = opened.tokenizer.decode(text.tokens_BN[b, text.document_start_BN[b, n] : n].tolist())
        sums = [total % 10 for total in accumulate(map(int, problem.split("+")))][1:]
        said = opened.tokenizer.decode([t for t in thoughts.tokens_BKSM[b, 0, :, m].tolist() if t != PAD])
        right.append(said == f"<think>{' '.join(map(str, sums))}</think>")
    assert 0 < sum(right) < len(right) == before["tokens_scored"]
    assert before["thought_right"] == pytest.approx(sum(right) / len(right))


def test_a_finished_run_goes_on_to_its_control(quickstart, tmp_path, capsys):
    """What was killed between the two continues with the second, and leaves the first alone."""
    copy = tmp_path / "copy"
    shutil.copytree(quickstart, copy)
    expected = (copy / "control" / "evaluations.jsonl").read_text()
    before = (copy / "metrics.jsonl").read_text()
    shutil.rmtree(copy / "control")
    assert fit("quickstart", copy) == 0
    assert "already at step 4" in capsys.readouterr().err
    assert (copy / "control" / "evaluations.jsonl").read_text() == expected
    assert (copy / "metrics.jsonl").read_text() == before


def test_without_the_counterfactual_test(tmp_path):
    assert fit("lab-rpt", tmp_path / "run", "--evaluation.counterfactuals", "false") == 0
    assert "counterfactual" not in lines(tmp_path / "run" / "evaluations.jsonl")[-1]


@pytest.mark.parametrize(
    ("recipe", "arguments", "part"),
    [
        ("quickstart", ["--objective.open", "'{'"], "objective.open '{' cannot be encoded by the tokenizer"),
        (
            "quickstart",
            ["--objective.close", "é"],
            "objective.close 'é' cannot be encoded by the tokenizer; choose another text (model random:lab)",
        ),
        (
            "quickstart",
            ["--objective.marker", "=="],
            "objective.marker '==' must be one token, the tokenizer makes 2 of it",
        ),
        ("lab-rpt", ["--objective.box_open", "\\boxed{"], "objective.box_open '\\\\boxed{' cannot be encoded"),
        ("quickstart", ["--evaluation.filler", "''"], "evaluation.filler is empty"),
        # What a control cannot do is said before the run that it follows.
        (
            "quickstart",
            ["--control", "rlp", "--control.open", "é"],
            "control.open 'é' cannot be encoded by the tokenizer",
        ),
        ("quickstart", ["--control", "rlp", "--control.length", "9999"], "exceed the 512 positions"),
        ("quickstart", ["--data.length", "8"], "raise it"),
        (
            "quickstart",
            ["--objective.min_prefix", "20"],
            "no held-out token can be scored: no position of the 2 held-out rows fits objective's min_prefix 20, "
            "positions marker, marker '='; change these, or raise evaluation.rows",
        ),
        ("quickstart", ["--objective.marker", "'*'"], "no held-out token can be scored"),
        ("lab-rpt", ["--objective.min_prefix", "20"], "no held-out token can be scored"),
        ("quickstart", ["--objective.horizon", "9"], "horizon 9"),
    ],
)
def test_what_cannot_be_written_is_named(recipe, arguments, part, tmp_path, capsys):
    assert fit(recipe, tmp_path / "run", *arguments, "--dry-run") == 1
    message = capsys.readouterr().err.strip()
    assert part in message
    assert len(message.splitlines()) == 1


def test_settings_are_checked_together(tmp_path, capsys):
    more = ["--objective.thoughts", "1", "--objective.length", "0", "--objective.horizon", "0"]
    assert main(["fit", "quickstart", "--run-dir", str(tmp_path / "run"), *more]) == 1
    message = capsys.readouterr().err
    assert message.count("  - ") == 3
    assert "objective.thoughts must be at least 2, got 1 (G, thoughts of an anchor, which are compared" in message


def test_a_proxy_reads_the_same_tokens(tmp_path, tiny_directory, capsys):
    like = ["--objective.positions", "hard", "--objective.hard_entropy", "0"]
    assert fit("lab-rpt", tmp_path / "run", *like, "--objective.proxy", "random:lab", "--steps", "2") == 0
    assert fit("lab-rpt", tmp_path / "other", *like, "--objective.proxy", str(tiny_directory)) == 1
    assert "has another tokenizer than random:lab" in capsys.readouterr().err


def test_a_free_response_needs_an_end(tmp_path, capsys):
    directory = tmp_path / "endless"
    shutil.copytree(LAB, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<|unknown|>"}))
    free = ["--objective.template", "free", "--objective.box_open", "':'", "--objective.box_close", "'>'"]
    more = [*free, "--model", f"random:{directory}", "--data.end_of_document", "<|endoftext|>"]
    assert fit("lab-rpt", tmp_path / "run", *more) == 1
    assert (
        "objective.template free takes an end-of-sequence token to end a response; use template forced"
        in capsys.readouterr().err
    )


def test_a_control_survives_yaml():
    recipe = load_recipe("quickstart")
    assert recipe_from_tree(recipe_to_tree(recipe)) == recipe
    assert recipe.control is not None
    control = recipe.control_recipe(100, 1e30, "there")
    assert recipe_from_tree(recipe_to_tree(control)) == control
    evaluation = control.evaluation
    assert (control.steps, control.flops, evaluation.every, evaluation.every_flops) == (None, 1e30, None, 2e29)
    assert evaluation.objective == recipe.objective


def test_sample_shows_a_thought_where_the_run_thinks(quickstart, capsys):
    assert main(["sample", str(quickstart), "--text", "3+5+9=7", "--length", "3", "--temperature", "1"]) == 0
    out = capsys.readouterr().out
    (thinking,) = [line for line in out.splitlines() if "<think>" in line]
    assert thinking.split("│")[1].strip() == "="
    assert 0 <= float(thinking.split("│")[4]) <= 1
    assert main(["sample", str(quickstart / "control"), "--text", "3+5+9=7"]) == 1
    assert "sample a run of quiet_star" in capsys.readouterr().err


def test_a_run_that_fails_says_so_once_and_also_when_continued(tmp_path, capsys):
    """A model that never closes its thoughts, in groups of which it learns nothing."""
    never = [
        "--objective.close",
        "T",
        "--objective.temperature",
        "1e-6",
        "--optimizer.lr",
        "0",
        "--evaluation.every",
        "null",
    ]
    assert fit("quickstart", tmp_path / "run", *never, "--control", "null", "--steps", "30") == 0
    shown = capsys.readouterr().err
    assert shown.count("warning, unclosed_thoughts:") == shown.count("warning, dead_groups:") == 1
    given = lines(tmp_path / "run" / "warnings.jsonl")
    assert {w["name"] for w in given} >= {"unclosed_thoughts", "dead_groups"}
    assert all(w["step"] == 20 for w in given)
    assert fit("quickstart", tmp_path / "run", *never, "--control", "null", "--steps", "33") == 0
    assert "warning" not in capsys.readouterr().err
    assert lines(tmp_path / "run" / "warnings.jsonl") == given
    assert "thought_length_trend" in lines(tmp_path / "run" / "metrics.jsonl")[-1]
