"""The model card of an export says what is known, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import export
from data_pipelines import Tokenizer
from pretrain.cli import main
from pretrain.model_card import front_matter, model_card
from pretrain.opening import OpenedModel, open_model
from pretrain.recipe_files import load_recipe
from pretrain.run_directory import RunDirectory
from tests.helpers import tiny_model

EVALUATION = {"step": 40, "nll_text": 2.5, "counterfactual": {"own": {"nll": 2.25, "low": 2.0, "high": 2.75}}}


def opened(tmp_path, tiny_directory, *overrides: str) -> OpenedModel:
    """As from a checkpoint of step 50."""
    recipe = load_recipe("smollm2-rlp", ["--run-dir", str(tmp_path), *overrides])
    directory = RunDirectory(tmp_path)
    directory.create(recipe, tiny_directory)
    later = EVALUATION | {"step": 60, "nll_text": 1.0}
    directory.evaluations.write_text("".join(json.dumps(x) + "\n" for x in (EVALUATION, later)))
    state = {"step": 50, "tokens": 51200, "flops": 1.25e15}
    tokenizer = Tokenizer.from_directory(tiny_directory)
    return OpenedModel(tiny_model(torch.float32), tokenizer, directory.tokenizer, recipe, 8, state)


def test_what_a_run_knows_of_itself(tmp_path, tiny_directory):
    card = model_card(opened(tmp_path, tiny_directory, "--steps", "200"))
    (tmp_path / "card.md").write_text(card)
    assert front_matter(tmp_path / "card.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "tags": ["forethought", "rlp"],
    }
    for line in (
        "| steps | 50 of 200 |",
        "| text | 51,200 tokens |",
        "| compute | 1.25e+15 FLOPs |",
        "| without thoughts, step 40 | 2.5000 |",  # not the evaluation of a later step
        "| after its own thought, step 40 | 2.2500 (2.0000 to 2.7500) |",
        "| smollm2-135m | apache-2.0 |",
        "| python-docs | PSF-2.0, as Python |",
    ):
        assert line in card.splitlines()
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["objective"]["name"] == "rlp" and recipe["steps"] == 200


def test_the_licence_of_a_base_model_is_that_of_its_own_card(tmp_path, tiny_directory):
    changes = ("--model", "org/base@step9", "--data", "org/text")
    model = opened(tmp_path, tiny_directory, *changes)
    head = lambda: yaml.safe_load(model_card(model).split("---\n")[1])  # noqa: E731
    assert "license" not in head()
    assert (head()["base_model"], head()["datasets"]) == ("org/base", ["org/text"])
    own = model.tokenizer_directory / "README.md"
    own.write_text("---\nlicense: other\nlicense_name: gemma\nlanguage: en\n---\n# Base\n")
    assert (head()["license"], head()["license_name"]) == ("other", "gemma")
    assert "language" not in head() and "| org/base@step9 | gemma |" in model_card(model)
    own.write_text("---\nlicense: [broken\n---\n# Base\n")
    assert "license" not in head() and "| org/base@step9 | not known here; see its page |" in model_card(model)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_in_one_line(tmp_path, tiny_directory, capsys):
    size = Tokenizer.from_directory(tiny_directory).size
    export(tiny_model(torch.float32, vocab_size=size - 1), tmp_path / "small", tiny_directory)
    with pytest.raises(CheckpointError, match=f"has {size} tokens, its model only {size - 1} embeddings; give a"):
        open_model(str(tmp_path / "small"))
    assert main(["export", str(tmp_path / "small"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
    # Rows beyond the tokenizer's are the model's own and are exported as they are.
    export(tiny_model(torch.float32, vocab_size=size + 7), tmp_path / "padded", tiny_directory)
    assert main(["export", str(tmp_path / "padded"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size + 7


def test_a_directory_that_is_no_model_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["export", str(tmp_path / "empty"), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "has no config.json; give a Hugging Face model directory" in said and said.count("\n") == 1
