"""Recipes: the shipped ones load, overrides reach every key, and all mistakes come in one message."""

from __future__ import annotations

import math
import re
from importlib import resources

import pytest
import yaml
from pydantic import ValidationError

from checkpoints.references import HUB_ID
from objectives.next_token import NextTokenConfig
from objectives.quiet_star import QuietStarConfig
from objectives.rlp import RlpConfig
from objectives.rpt import RptConfig
from pretrain.cli import main
from pretrain.recipe import Recipe, RecipeError, keys
from pretrain.recipe_files import (
    help_on_keys,
    load_recipe,
    recipe_from_tree,
    recipe_to_tree,
    recipe_to_yaml,
    shipped,
)
from pretrain.run_directory import RunDirectory


def test_shipped_recipes():
    assert set(shipped()) >= {"smollm2-next-token", "smollm2-quiet-star", "mistral-7b-quiet-star"}


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_loads_and_survives_yaml(name):
    recipe = load_recipe(name)
    assert recipe.run_dir == f"runs/{name}"
    assert recipe_from_tree(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


def test_the_papers_run():
    recipe = load_recipe("mistral-7b-quiet-star")
    assert (recipe.objective.L, recipe.objective.A, recipe.objective.thoughts) == (9, 4, 2)
    assert (recipe.rows_per_step, recipe.data.length, recipe.steps) == (8, 256, 100)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.weight_decay, optimizer.clip) == (1e-6, 20, 1e-3, 1.0)


def test_the_sweep_over_pretraining_names_checkpoints_of_one_repository():
    """The revisions to sweep are in the recipe's comment, and a row and its thought fit OLMo 2's 4,096 positions."""
    recipe = load_recipe("olmo2-1b-rlp")
    repository, _, revision = recipe.model.partition("@")
    assert HUB_ID.fullmatch(recipe.model) and recipe.control == NextTokenConfig()
    text = (resources.files("pretrain") / "recipes" / "olmo2-1b-rlp.yaml").read_text()
    swept = text.partition("for at in ")[2].partition(";")[0].split()
    assert f"--model {repository}@$at" in text and revision in swept
    for name in swept:
        step, tokens = map(int, re.fullmatch(r"stage1-step(\d+)-tokens(\d+)B", name).groups())
        assert tokens == math.ceil(step * 512 * 4096 / 1e9)  # a step is 512 rows of 4,096 tokens
    assert recipe.data.length + recipe.objective.length < 4096 and not recipe.objective.cautions()


def test_the_control_differs_in_its_objective_alone():
    a, b = (recipe_to_tree(load_recipe(name)) for name in ("smollm2-quiet-star", "smollm2-next-token"))
    differing = {key for key in a if a[key] != b[key]}
    assert differing == {"objective", "run_dir", "micro_batch_rows"}


def test_overrides():
    arguments = "--steps 7 --seed=3 --run-dir out --data text.jsonl --data.length 64 --optimizer.lr 1e-4".split()
    arguments += (
        "--objective.thoughts 4 --optimizer.betas [0.8,0.9] --evaluation.every null --logging.csv false".split()
    )
    recipe = load_recipe("smollm2-quiet-star", arguments)
    assert (recipe.steps, recipe.seed, recipe.run_dir) == (7, 3, "out")
    assert (recipe.data.reference, recipe.data.length) == ("text.jsonl", 64)
    assert recipe.data.end_of_document == "<|endoftext|>"
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-4, (0.8, 0.9))
    assert (recipe.objective.thoughts, recipe.objective.L) == (4, 4)
    assert recipe.evaluation.every is None and recipe.logging.csv is False


def test_one_line_changes_the_objective():
    recipe = load_recipe("smollm2-quiet-star", ["--objective", "next_token"])
    assert recipe.objective == NextTokenConfig()
    recipe = load_recipe("smollm2-next-token", "--objective quiet_star --objective.length 12".split())
    assert recipe.objective == QuietStarConfig(length=12)
    same = load_recipe("smollm2-quiet-star", "--objective quiet_star".split())
    assert same.objective == load_recipe("smollm2-quiet-star").objective


def test_every_objective_of_a_recipe_can_be_named_in_short(tmp_path):
    for key in ("objective", "control", "evaluation.objective"):

        def found(*arguments, reference="smollm2-next-token", key=key):
            recipe = load_recipe(reference, arguments)
            return recipe.evaluation.objective if key == "evaluation.objective" else getattr(recipe, key)

        assert found(f"--{key}", "rlp") == RlpConfig()
        assert found(f"--{key}", "rlp", f"--{key}.length", "5") == RlpConfig(length=5)
        path = tmp_path / "recipe.yaml"
        tree = {"steps": 1, "objective": "next_token", "evaluation": {"rows": 2}}
        if key == "evaluation.objective":
            tree["evaluation"]["objective"] = "rlp"
        else:
            tree[key] = "rlp"
        path.write_text(yaml.safe_dump(tree))
        assert found(reference=str(path)) == RlpConfig()
        assert found(f"--{key}.length", "5", reference=str(path)) == RlpConfig(length=5)
        # The same one keeps its settings, another one has its own.
        five = (f"--{key}.length", "5")
        assert found(*five, f"--{key}", "rlp", reference=str(path)) == RlpConfig(length=5)
        assert found(*five, f"--{key}", "rpt", reference=str(path)) == RptConfig()
    text = help_on_keys()
    for key in ("objective", "control", "evaluation.objective"):
        assert f"--{key} next_token|quiet_star|rlp|rpt|pause" in text


def test_all_mistakes_in_one_message(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(
        """
steps: -3
stpes: 4
objective: {name: quiet_star, length: 0, thougts: 3, variant: codes}
data: {reference: here, length: one}
rows_per_step: 3
devices: 2
optimizer: {lr: fast, betas: [0.9], clip: -1}
logging: 5
"""
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), ["--seed", "x", "oops", "--evaluation.rows", "0"])
    message = str(caught.value)
    for part in (
        "steps must be at least 1, got -3",
        "unknown key 'stpes'; did you mean 'steps'?",
        "unknown key 'objective.thougts'; did you mean 'thoughts'?",
        "objective.length must be at least 1, got 0 (L, sampled tokens of a thought",
        "objective.variant must be one of paper, public_code, got 'codes'",
        "data.length must be a whole number, got 'one'",
        "rows_per_step 3 must be a multiple of the 2 devices; use 4",
        "optimizer.lr must be a number, got 'fast'",
        "optimizer.betas must be a list of 2 values, got [0.9]",
        "optimizer.clip must be above 0, got -1 (largest global gradient norm)",
        "logging must be a mapping of keys to values, got 5",
        "seed must be a whole number, got 'x'",
        "'oops' is neither a key nor its value; write --key value",
        "evaluation.rows must be at least 1, got 0",
    ):
        assert part in message, part
    assert message.count("\n  - ") == 14


def mistakes(*arguments, reference="smollm2-next-token") -> list[str]:
    """The lines of a message about what is wrong, but for the first."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(reference, arguments)
    first, *found = str(caught.value).splitlines()
    assert first == "the recipe cannot be run:"
    return [line.removeprefix("  - ") for line in found]


def test_ten_mistakes_are_ten_lines_with_the_way_out():
    arguments = ["--stpes", "3", "--lr", "0.1", "--objective", "sorcery", "--seed", "-1", "--rows_per_step", "5"]
    arguments += ["--nodes", "2", "--optimizer.betas", "[0.9, 1]", "--compute_dtype", "fp64", "--compile", "perhaps"]
    arguments += ["--evaluation.filler", "7", "--checkpoint", "null"]
    found = mistakes(*arguments)
    assert found == [
        "objective must be one of next_token, quiet_star, rlp, rpt, pause or an import path package.module:Class, "
        "got 'sorcery'",
        "seed must be at least 0, got -1 (of data order, sampling and fresh weights)",
        "compute_dtype must be one of auto, bf16, fp32, got 'fp64'",
        "compile must be true or false, got 'perhaps'",
        "optimizer.betas[1] must be below 1, got 1 (decay of Adam's first and second moments)",
        "evaluation.filler must be text, got 7; put it in quotes",
        "checkpoint must be a mapping of keys to values, got None",
        "unknown key 'stpes'; did you mean 'steps'?",
        "unknown key 'lr'; did you mean 'optimizer.lr'?",
        "rows_per_step 5 must be a multiple of the 2 devices; use 6",
    ]


@pytest.mark.parametrize(
    ("devices", "nodes", "strategy", "shard_size", "problem"),
    [
        (4, 1, "hsdp", 2, None),
        (2, 4, "hsdp", None, None),
        (1, 1, "fsdp", None, None),
        (4, 1, "fsdp", 2, "shard_size is for strategy hsdp; leave it out"),
        (1, 1, "hsdp", None, "strategy hsdp takes several devices and there is one; leave it out"),
        (4, 1, "hsdp", 3, "shard_size 3 does not divide the 4 devices; use one that does"),
        (
            *(8, 1, "hsdp", None),
            "strategy hsdp with groups of 8 of 8 devices is fsdp; set shard_size to one of 2, 4, or use strategy fsdp",
        ),
        (1, 2, "hsdp", None, "strategy hsdp with groups of 1 of 2 devices is ddp; use strategy ddp"),
    ],
)
def test_devices_that_hold_a_model_together(devices, nodes, strategy, shard_size, problem):
    arguments = ["--devices", str(devices), "--nodes", str(nodes), "--strategy", strategy]
    arguments += ["--rows-per-step", "8"]
    arguments += [] if shard_size is None else ["--shard_size", str(shard_size)]
    if problem is None:
        recipe = load_recipe("smollm2-next-token", arguments)
        assert recipe.shards == (shard_size or devices)
    else:
        assert mistakes(*arguments) == [problem]


@pytest.mark.parametrize("rows", [None, "4"])
def test_rows_sampled_at_once_are_at_least_a_micro_batch(rows):
    (found,) = mistakes("--sampled_rows", "2", *(() if rows is None else ("--micro_batch_rows", rows)))
    assert found.startswith(f"sampled_rows 2 is less than the {rows or 'rows'} of a micro-batch, which are sampled at")
    assert load_recipe("smollm2-next-token", ["--sampled_rows", "2", "--micro_batch_rows", "2"]).sampled_rows == 2


def test_a_message_repeats_no_huge_value():
    (found,) = mistakes("--logging", str(list(range(1000))))
    assert found.startswith("logging must be a mapping of keys to values, got [0, 1, 2")
    assert len(found) < 150


def test_what_is_wrong_hides_no_other_mistake():
    found = mistakes(
        *("--objective", "quiet_star", "--objective.length", "3", "--objective.n_ahead", "5", "--data.length", "4"),
        *("--objective.thoughts", "0", "--control", "sorcery", "--steps", "x", "--evaluation.objective", "rpt"),
        *("--evaluation.objective.box_open", "''"),
    )
    assert "objective: length and n_ahead are two ways of saying one thing; give one of them" in found
    assert "data.length 4 is too short for objective quiet_star with these settings; use at least 6" in found
    assert any(line.startswith("evaluation.objective: box_open and box_close cannot be empty") for line in found)
    assert len(found) == 6


def test_old_names_of_keys_are_read_and_said_once(tmp_path, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text("{steps: 1, objective: {name: rpt, drop_flat_from: 3}, evaluation: {causal: false}}")
    recipe = load_recipe(str(path))
    assert (recipe.objective.drop_zero_variance_from, recipe.evaluation.counterfactuals) == (3, False)
    (record,) = caplog.records
    assert "evaluation.causal is now evaluation.counterfactuals" in record.message
    assert "objective.drop_flat_from is now objective.drop_zero_variance_from" in record.message
    recipe = load_recipe(str(path), ["--objective.drop_flat_from", "5", "--evaluation.causal=true"])
    assert (recipe.objective.drop_zero_variance_from, recipe.evaluation.counterfactuals) == (5, True)
    new = load_recipe("smollm2-rpt", ["--objective.drop_flat_from", "null", "--control", "rpt"])
    assert new.objective.drop_zero_variance_from is None
    shuffled = load_recipe("smollm2-rlp", ["--objective.shuffle_rewards", "true", "--control", "rpt"])
    assert (shuffled.objective.rewards, shuffled.control.rewards) == ("shuffled", "earned")
    caplog.clear()
    load_recipe("smollm2-rpt", ["--objective.drop_zero_variance_from", "5"])
    assert not caplog.records


def test_numbers_as_people_write_them():
    recipe = load_recipe("smollm2-rlp", ["--steps", "1e3", "--optimizer.lr", "3e-5", "--objective.eps_low", "1"])
    assert (recipe.steps, recipe.optimizer.lr, recipe.objective.eps_low) == (1000, 3e-5, 1.0)
    assert isinstance(recipe.steps, int) and isinstance(recipe.objective.eps_low, float)
    assert mistakes("--steps", "1.5e0", "--seed", "2.0") == [
        "steps must be a whole number, got 1.5",
        "seed must be a whole number, got 2.0",
    ]
    assert mistakes("--optimizer.lr", ".inf") == ["optimizer.lr must be a finite number, got inf"]
    assert load_recipe("smollm2-rlp", ["--objective.marker", "="]).objective.marker == "="


def test_a_changed_copy_is_checked():
    recipe = load_recipe("smollm2-quiet-star")
    changed = recipe.replaced(steps=3, objective=RlpConfig(length=4))
    assert (changed.steps, changed.objective, changed.data) == (3, RlpConfig(length=4), recipe.data)
    for change in ({"steps": 0}, {"objective": RlpConfig(length=0)}, {"stpes": 3}):
        with pytest.raises(ValidationError):
            recipe.replaced(**change)


def test_numbers_beyond_what_tensors_hold_are_refused(capsys):
    for number in ("1e20", "99999999999999999999", str(-(2**63))):
        (found,) = mistakes("--objective", "rlp", "--objective.band", f"[-1, {number}]")
        assert found.startswith("objective.band[1] must be within ±2**63, got "), found
    for key in ("steps", "seed", "rows_per_step", "data.length", "optimizer.lr"):
        assert main(["fit", "smollm2-next-token", "--dry-run", f"--{key}", "99999999999999999999"]) == 1
        (first, line) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"  - {key} must be "), line
    assert load_recipe("smollm2-next-token", ["--seed", str(2**63 - 1)]).seed == 2**63 - 1


def test_an_override_of_an_aliased_block_leaves_its_twin_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 1\nobjective: &thinking {name: rlp, length: 9}\ncontrol: *thinking\n")
    recipe = load_recipe(str(path), ["--objective.length", "5", "--control.thoughts", "3"])
    assert recipe.objective == RlpConfig(length=5)
    assert recipe.control == RlpConfig(length=9, thoughts=3)
    path.write_text("steps: 1\nobjective: &thinking {name: rlp, length: 9}\ncontrol: {<<: *thinking, length: 7}\n")
    assert load_recipe(str(path)).control == RlpConfig(length=7)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("steps: 1\nobjective: next_token\nsteps: 2", "key 'steps' is on line 1 and again on 3; keep one$"),
        ("{steps: 1, objective: next_token, optimizer: {lr: 1, lr: 2}}", "key 'lr' is on line 1 and again on 1"),
        ("{steps: 1, objective: next_token, run_dir: 2020-13-45}", "is not valid YAML: month must be in 1..12"),
        ("{steps: 1, objective: {name: [1], length: 3}}", "objective needs a name; give next_token"),
        ("{steps: 1, objective: {name: '.mine:Mine'}}", "or an import path package.module:Class, got '.mine:Mine'"),
        ("objective: next_token", "steps is missing; write it into the recipe or give --steps"),
        ("steps: 3", "objective is missing"),
        ("{steps: 3, objective: sorcery}", "objective must be one of next_token, quiet_star"),
        (
            "{steps: 3, objective: quiet_star, data: {length: 5}}",
            "data.length 5 is too short for objective quiet_star with these settings; use at least 6",
        ),
        ("steps: 3\nobjective: [", "is not valid YAML"),
        ("just words", "must be a mapping"),
        ("{steps: true, objective: next_token}", "steps must be a whole number, got True"),
        ("{steps: 1, objective: next_token, data: {held_out: 0.9}}", "data.held_out must be at most 0.5, got 0.9"),
        ("{steps: 1, objective: {length: 3}}", r"objective needs a name; give next_token \| quiet_star"),
        ("{steps: 1, objective: 5}", "objective must be a mapping of keys to values, got 5"),
        ("{steps: 1, objective: next_token, model: null}", "model needs a value"),
        ("{steps: 1, objective: {name: rlp, close: ''}}", r"objective.close must not be empty \(ends a thought"),
        ("{steps: 1, objective: {name: rlp, band: 3}}", "objective.band must be a list of 2 values, got 3"),
        ("{steps: 1, objective: next_token, data: &a {length: *a}}", "contains itself"),
        ("{steps: 1, objective: next_token, evaluation: {causal: 1, counterfactuals: true}}", "unknown key"),
    ],
)
def test_single_mistakes(tmp_path, text, part):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=part):
        load_recipe(str(path))


def test_a_recipe_that_is_not_utf8_is_refused_in_one_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"# caf\xe9\nsteps: 1\nobjective: next_token\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml is not UTF-8 \(at byte 5\); save it as UTF-8$"):
        load_recipe(str(path))
    with pytest.raises(RecipeError, match=r"^[^\n]*recipe.yaml cannot be read [^\n]*; restore it"):
        RunDirectory(tmp_path).load_recipe()


def test_unknown_recipe_and_bad_overrides():
    with pytest.raises(RecipeError, match=r"no recipe 'magic': give a YAML file or one of .*smollm2-quiet-star"):
        load_recipe("magic")
    with pytest.raises(RecipeError, match="--steps needs a value"):
        load_recipe("smollm2-next-token", ["--steps"])
    with pytest.raises(RecipeError, match="--steps needs a value"):
        load_recipe("smollm2-next-token", ["--steps", "--seed", "3"])
    with pytest.raises(RecipeError, match="steps is a value and has no keys"):
        load_recipe("smollm2-next-token", ["--steps.deep", "3"])
    negative = load_recipe("smollm2-next-token", ["--data.held_out", "0.0", "--steps", "3"])
    assert negative.data.held_out == 0


def test_every_key_is_explained():
    text = help_on_keys()

    def paths(kind, prefix):
        for key in keys(kind).values():
            if prefix + key.name == "objective.name":
                continue
            assert key.description, prefix + key.name
            yield from paths(key.kind, f"{prefix}{key.name}.") if key.kind else [prefix + key.name]

    for name in [*paths(Recipe, ""), *paths(QuietStarConfig, "objective.")]:
        assert f"--{name} " in text, name
    assert "--optimizer.lr float (default 1e-06): peak learning rate" in text
    assert "--optimizer.betas [float, float] (default [0.9, 0.999])" in text
    assert "--evaluation.every int (default null)" in text
    assert "--data REF" in text
    assert "--objective.variant paper|public_code (default paper): whom to follow" in text
