"""Runs whose objective changes: every stage is that objective's own run, whoever is interrupted where."""

from __future__ import annotations

import html
import itertools
import json

import pytest
import torch

from checkpoints.snapshots import open_snapshot
from data_pipelines import Tokenizer, open_data
from models.philox import Rng
from models.thoughts import Text
from objectives import Step
from pretrain.assembly import assemble, make_objective
from pretrain.cli import main
from pretrain.module import PretrainModule, learning_rate, make_optimizer
from pretrain.opening import open_model
from pretrain.recipe_files import load_recipe
from pretrain.state import restore_before_setup, restore_trained
from tests.helpers import relative_error
from tests.pretrain.conftest import tiny_arguments
from tests.pretrain.test_fit import QUIET, fit, lines, weights

# RLP with a teacher that moves, between two stages of other objectives.
SETTINGS = {"name": "rlp", "length": 4, "thoughts": 3, "anchors_per_document": 2, "ema_decay": 0.5}
STAGES = {
    "think": {"after": 2, "objective": SETTINGS},
    "quiet": {"after": 4, "objective": {"name": "quiet_star", "length": 2, "lookahead": 2}},
    "read": {"after": 5, "objective": "next_token"},
}
STAGED = ["--objective", "next_token", "--stages", json.dumps(STAGES), "--steps", "6", "--checkpoint.every", "1"]
STAGED += ["--checkpoint.keep", "10", "--logging.csv", "false", "--data.held_out", "0"]
# Another objective's loss, which is no spike.
STAGED += ["--optimizer.spike_threshold", "3", "--optimizer.spike_window", "4"]


@pytest.fixture(scope="module")
def staged(tiny_directory, tmp_path_factory):
    """A run through all stages: its arguments and directory."""
    at = tmp_path_factory.mktemp("staged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORETHOUGHT_CACHE", str(at / "cache"))
        arguments = [*tiny_arguments(tiny_directory, at), *STAGED]
        assert fit(arguments) == 0
        yield arguments, at / "run"


def test_each_update_is_that_of_its_stage_alone(staged):
    """Against a step of each objective taken by hand from the checkpoint before it, teacher and moments included."""
    _, directory = staged
    records = lines(directory / "metrics.jsonl")
    assert [record["stage"] for record in records] == [0, 0, 1, 1, 2, 3]
    assert [record["objective"] for record in records] == [
        *("next_token", "next_token", "rlp", "rlp", "quiet_star", "next_token")
    ]
    assert [record["spikes"] for record in records] == [0] * 6
    assert all(b["flops"] > a["flops"] for a, b in itertools.pairwise(records))
    page = html.unescape((directory / "report.html").read_text()).replace("\xa0", " ")
    assert (
        "Stages" in page
        and "rlp (length 4, anchors_per_document 2, thoughts 3" in page
        and "next_token, then rlp, then quiet_star" in page
    )

    recipe = load_recipe(str(directory / "recipe.yaml"))
    tokenizer = Tokenizer.from_directory(directory / "tokenizer")
    data = open_data(recipe.data, tokenizer, recipe.seed)
    first, think, quiet, read = recipe.trained.values()
    teacher = None
    for step, config in [(1, first), (2, think), (3, think), (4, quiet), (5, read)]:
        before, after = at(directory, step), at(directory, step + 1)
        model = open_model(str(before.path)).model
        objective = make_objective(recipe.replaced(objective=config, stages={}), tokenizer)
        objective.load_state(model, teacher or {})
        optimizer = make_optimizer(model, recipe.optimizer)
        for key, stored in before.tensors["optimizer"].items():
            name, entry = key.rsplit("/", 1)
            optimizer.state[model.get_parameter(name)][entry] = stored.whole()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optimizer, step + 1, 6)
        text = Text(**data.batch(step, recipe.rows_per_step))
        for output in Step(objective, model, [text], Rng(recipe.seed, step)).losses():
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        objective.after_step(model)
        for name, parameter in model.named_parameters():
            assert relative_error(parameter, after.tensors["model"][name].whole()) < 1e-6, (step, name)
        # Of the teacher's second step, which goes on from its first.
        teacher = objective.state() if step == 2 else None
        for name, weight in (teacher or {}).items():
            assert relative_error(weight, after.tensors["objective"][name].whole()) < 1e-6, name


def at(directory, step):
    return open_snapshot(directory / "checkpoints" / f"step-{step:08d}")


def test_a_run_that_stops_within_stages_and_between_them_ends_the_same(staged, tmp_path):
    """Stopped where a stage was to begin, and in the middle of it."""
    arguments, directory = staged
    whole, again = weights(directory), tmp_path / "again"
    for steps in ("2", "3", "6"):
        more = ["--run-dir", str(again), "--optimizer.schedule_steps", "6", "--steps", steps]
        assert fit(arguments, *more) == 0
    ended = weights(again)
    assert ended.keys() == whole.keys()
    assert all(torch.equal(ended[name], whole[name]) for name in whole)
    a, b = (lines(path / "metrics.jsonl") for path in (directory, again))
    for record in (*a, *b):
        record.pop("seconds"), record.pop("tokens_per_second")
    assert a == b


def test_shares_are_of_what_the_run_may_spend(tiny_run, run_directory):
    """In FLOPs: the stage begins with the first step that starts beyond its share, and moves no more when the run is
    given more."""
    stages = {"read": {"after": 0.5, "objective": "next_token"}}
    arguments = [*QUIET, "--stages", json.dumps(stages), "--data.held_out", "0"]
    assert fit(tiny_run, *arguments, "--steps", "2") == 0
    cost = lines(run_directory / "metrics.jsonl")[0]["flops"]
    assert [r["stage"] for r in lines(run_directory / "metrics.jsonl")] == [0, 1]
    assert fit(tiny_run, *arguments, "--steps", "3") == 0
    assert [r["stage"] for r in lines(run_directory / "metrics.jsonl")] == [0, 1, 1]
    spent = run_directory.with_name("by-flops")
    more = ["--steps", "null", "--flops", f"{3 * cost}", "--run-dir", str(spent)]
    assert fit(tiny_run, *arguments, *more) == 0
    records = lines(spent / "metrics.jsonl")
    begun = [0, *(r["flops"] for r in records[:-1])]
    assert [r["stage"] for r in records] == [int(spent_before >= 1.5 * cost) for spent_before in begun]
    assert records[-1]["stage"] == 1 and records[-1]["flops"] == pytest.approx(3 * cost, rel=0.1)


def test_a_rollback_into_an_earlier_stage_begins_the_objective_anew(staged):
    """The teacher is then the model that the run went back to."""
    _, directory = staged
    recipe = load_recipe(str(directory / "recipe.yaml"))
    run = assemble(recipe, at(directory, 3))
    run.load(torch.device("cpu"))
    after = [stage.after for stage in recipe.stages.values()]
    module = PretrainModule(
        *(run.model, run.objectives, run.engine, recipe.optimizer, recipe.budget, 0, []), after=after
    )
    restore_before_setup(module, run.checkpoint)
    module.configure_optimizers()
    assert (module.stage, module.objective.config.name) == (1, "rlp")
    restore_trained(module, at(directory, 1))
    teacher, model = module.objective.state(), module.model.state_dict()
    assert all(torch.equal(teacher[name], model[name]) for name in model)
    restore_trained(module, at(directory, 3))
    assert any(not torch.equal(teacher[name], model[name]) for name in model)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"a": {"after": 1.5, "objective": "next_token"}}, "stages.a.after 1.5 is neither a whole number of steps"),
        ({"a": {"after": 9, "objective": "next_token"}}, "stages.a.after 9 is never reached in 6 steps"),
        (
            {"a": {"after": 3, "objective": "next_token"}, "b": {"after": 2, "objective": "next_token"}},
            "stages.b.after 2 must be above the 3 of stages.a",
        ),
        (
            {"a": {"after": 0.5, "objective": "next_token"}, "b": {"after": 4, "objective": "next_token"}},
            "stages.b.after 4 and the 0.5 of stages.a are a share and a number of steps",
        ),
        ({"a": {"objective": "next_token"}}, "stages.a.after is missing"),
        ({"a": {"after": 0, "objective": "next_token"}}, "stages.a.after must be above 0, got 0"),
        ({"a": {"after": 3}}, "stages.a.objective is missing"),
        ({"a": {"after": 3, "objective": "nonsense"}}, "stages.a.objective must be one of next_token"),
        (
            {"a": {"after": 3, "objective": {"name": "rlp", "lenght": 3}}},
            "unknown key 'stages.a.objective.lenght'; did you mean",
        ),
        (
            {"a": {"after": 3, "objective": {"name": "rlp", "length": 0}}},
            "stages.a.objective.length must be at least 1, got 0",
        ),
        (
            {"a": {"after": 3, "objective": {"name": "quiet_star", "length": 3, "n_ahead": 6}}},
            "stages.a.objective: length and n_ahead are two ways",
        ),
        (
            {"a": {"after": 3, "objective": {"name": "quiet_star", "start_from": "=", "end_from": "."}}},
            "stages.a.objective begins a thought's delimiters as ('=', '.'), objective as ('---', '---')",
        ),
        (
            {"a": {"after": 3, "objective": {"name": "rlp", "length": 2000}}},
            "stages.a.objective.length to at most",
        ),
    ],
)
def test_mistakes_are_named(stages, said, tiny_run, capsys):
    arguments = [*QUIET, "--stages", json.dumps(stages), "--steps", "6", "--rows_per_step", "0"]
    more = ["--rows_per_step", "4"] if "begins" in said or "at most" in said else []
    assert fit(tiny_run, *arguments, *more) == 1
    shown = capsys.readouterr().err
    assert said in shown and (more or "rows_per_step must be at least 1" in shown)


def test_stages_are_changed_on_the_command_line_and_planned(tiny_run, capsys):
    stages = {"a": {"after": 2, "objective": "next_token"}, "b": {"after": 4, "objective": "next_token"}}
    arguments = [*tiny_run, *QUIET, "--stages", json.dumps(stages), "--steps", "6"]
    changed = ["--stages.a.objective", "rlp", "--stages.a.objective.length", "5", "--micro-batch-rows", "auto"]
    recipe = load_recipe("smollm2-quiet-star", [*arguments, *changed])
    assert [config.name for config in recipe.trained.values()] == ["quiet_star", "rlp", "next_token"]
    assert recipe.stages["a"].objective.length == 5
    assert recipe.thinking_key == "stages.a.objective"
    assert recipe.steps_of_stages([1.0] * 3, [1.0] * 3) == [2, 2, 2]
    assert main(["plan", "smollm2-quiet-star", *arguments, *changed, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["stages"]
    assert [*plans] == ["objective", "stages.a.objective", "stages.b.objective"]
    idle = [plan["memory"]["states"].get("teachers of other stages") for plan in plans.values()]
    assert idle[1] is None and idle[0] == idle[2] == plans["stages.a.objective"]["memory"]["states"]["teacher"]
    assert len({plan["parameters"] for plan in plans.values()}) == 1
    assert main(["plan", "smollm2-quiet-star", *arguments, *changed]) == 0
    assert "all stages: 6 steps" in capsys.readouterr().out
    assert not load_recipe("smollm2-quiet-star", [*arguments, "--stages={}"]).stages
    control = recipe.replaced(control=recipe.objective).control_recipe(6, 1e9, "control")
    assert not control.stages and control.evaluation.objective == recipe.stages["a"].objective
