"""An objective by import path, from a module that the project does not know: as good as a built-in one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints.snapshots import find_checkpoint, load_checkpoint
from pretrain.cli import main
from tests.pretrain.test_fit import lines

SOURCE = """
from dataclasses import dataclass

import torch

from models import token_logprobs
from objectives import Mean, Metric, NextToken, ObjectiveConfig, Term, TextPart, setting


@dataclass(frozen=True, kw_only=True)
class Settings(ObjectiveConfig):
    focus: float = setting(1.0, "weight of tokens that surprise more than the average one", ge=0)
    memory: float = setting(0.9, "of the average, per step", ge=0, lt=1)
    weights: tuple[float, float] = setting((1.0, 1.0), "least and largest weight")

    def problems(self):
        least, most = self.weights
        return [] if least <= most else ["weights must be in order; swap them"]


class Surprise(NextToken):
    Config = Settings
    sentence = "Tokens that surprise <more> than the average one weigh more."
    metrics = {"surprising": Metric("share of surprising tokens", "mean of 1[NLL > its moving average]")}

    def __init__(self, config):
        super().__init__(config)
        self.average = torch.zeros(())
        self.newest = torch.zeros(())

    def text_terms(self, model, state, batch=None):
        target_BN, valid_BN = state.text.targets(1)
        nll_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
        self.newest = nll_BN.detach().sum() / valid_BN.sum()
        surprising_BN = nll_BN.detach() > self.average
        weighted = (nll_BN * torch.where(surprising_BN, self.config.focus, 1.0)).sum()
        metrics = {"nll_text": Mean.over(nll_BN, valid_BN), "surprising": Mean.over(surprising_BN.double(), valid_BN)}
        return TextPart([Term(weighted, "text")], metrics)

    def after_step(self, model):
        self.average = self.config.memory * self.average + (1 - self.config.memory) * self.newest

    def state(self):
        return {"average": self.average}

    def load_state(self, model, state):
        self.average = state["average"]
"""
NAME = "surprising_reading:Surprise"


@pytest.fixture
def arguments(tiny_run, tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "surprising_reading.py").write_text(SOURCE)
    # Where the command is given is where the module is looked for.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield ["fit", "smollm2-next-token", *tiny_run, "--objective", NAME, "--objective.focus", "3"]
    sys.modules.pop("surprising_reading", None)


def test_it_trains_resumes_exports_and_is_reported(arguments, run_directory, tmp_path, capsys):
    assert main([*arguments, "--steps", "4", "--run-dir", str(tmp_path / "whole")]) == 0
    for steps in ("2", "4"):
        assert main([*arguments, "--steps", steps]) == 0
    assert "continuing" in capsys.readouterr().err
    whole, resumed = (load_checkpoint(find_checkpoint(d))[0] for d in (tmp_path / "whole", run_directory))
    for group in ("model", "optimizer", "objective"):
        assert whole[group].keys() == resumed[group].keys()
        assert all(torch.equal(resumed[group][name], tensor) for name, tensor in whole[group].items()), group
    assert whole["objective"]["average"] > 0
    assert all(0 < record["surprising"] <= 1 for record in lines(run_directory / "metrics.jsonl"))

    assert main(["export", str(run_directory), str(tmp_path / "out")]) == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size > 0

    page = (run_directory / "report.html").read_text()
    assert f"trained with {NAME} on" in page
    assert "Tokens that surprise &lt;more&gt; than the average one weigh more." in page
    cells = re.findall("<td[^>]*>(.*?)</td>", page)
    metric = cells.index("surprising")
    assert cells[metric + 1 : metric + 3] == ["share of surprising tokens", "mean of 1[NLL &gt; its moving average]"]
    # It does not think, so that there is nothing to sample.
    assert "forethought sample" not in page
    assert main(["sample", str(run_directory), "--text", "hello"]) == 1
    assert "sample a run of quiet_star" in capsys.readouterr().err


def test_its_settings_are_validated(arguments, capsys):
    wrong = [*arguments, "--steps", "1", "--objective.focus", "-1", "--objective.memery", "0.5"]
    wrong += ["--objective.weights", "[2, 1]"]
    assert main(wrong) == 1
    said = capsys.readouterr().err
    assert "objective.focus must be at least 0, got -1 (weight of tokens that surprise more than" in said
    assert "unknown key 'objective.memery'; did you mean 'memory'?" in said
    assert "objective: weights must be in order; swap them" in said
    assert main([*arguments, "--objective.weights", "[2]"]) == 1
    assert "objective.weights must be a list of 2 values, got [2]" in capsys.readouterr().err


def test_its_settings_are_in_help(arguments, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"steps": 1, "objective": NAME}))
    for asked in ([*arguments, "--help"], ["fit", str(recipe), "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(asked)
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert f"with --objective {NAME}:" in said
        assert "--objective.memory float (default 0.9): of the average, per step" in said
        assert "--objective.weights [float, float] (default [1.0, 1.0]): least and largest weight" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all:Surprise", "'nowhere_at_all:Surprise' names a module that cannot be imported"),
        ("surprising_reading:Surprize", "surprising_reading has no subclass of objectives.Objective named 'Surprize'"),
        (
            "surprising_reading",
            "must be one of next_token, quiet_star, rlp, rpt, pause or an import path package.module:Class",
        ),
    ],
)
def test_one_that_is_not_there_is_named(arguments, name, said, capsys):
    assert main([*arguments[:-4], "--objective", name]) == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n  - ") == 1


def test_a_run_whose_objective_is_gone_is_refused_in_one_line(arguments, run_directory, tmp_path, capsys):
    assert main([*arguments, "--steps", "1"]) == 0
    (tmp_path / "surprising_reading.py").unlink()
    sys.modules.pop("surprising_reading")
    capsys.readouterr()
    assert main(["export", str(run_directory), str(tmp_path / "out")]) == 1
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert f"{Path(run_directory) / 'recipe.yaml'} cannot be read (objective '{NAME}' names a module that" in message
