"""Runs whose thoughts a stand-in for vLLM samples, and what is refused. `.ci/external` runs vLLM itself."""

from __future__ import annotations

import pytest

import pretrain.assembly
from pretrain.cli import main
from tests.pretrain.test_fit import lines
from tests.pretrain.test_lab_runs import fit

VLLM = ["--rollout.engine", "vllm"]


def test_a_run_and_its_control_share_an_engine_and_continue_exactly(vllm_double, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert fit("quickstart", whole, *VLLM) == 0
    records, samples = (lines(whole / name) for name in ("metrics.jsonl", "samples.jsonl"))
    assert [(r["engine"], r["weights_step"]) for r in records] == [("vllm", step) for step in range(4)]
    assert {(s["engine"], s["step"] - s["weights_step"]) for s in samples} == {("vllm", 1)}
    assert all(r["sampler_gap"] < 1e-4 for r in records)
    control = lines(whole / "control" / "metrics.jsonl")
    assert "engine" not in control[0] and len(vllm_double.started) == 1
    assert lines(whole / "control" / "evaluations.jsonl")[-1]["nll_thought"] > 0

    assert fit("quickstart", halves, *VLLM, "--steps", "2", "--optimizer.schedule_steps", "4", "--control", "null") == 0
    assert fit("quickstart", halves, *VLLM, "--optimizer.schedule_steps", "4", "--control", "null") == 0
    same = ("loss", "grad_norm", "reward", "entropy")
    again = lines(halves / "metrics.jsonl")
    assert [[r[name] for name in same] for r in again] == [[r[name] for name in same] for r in records]


def test_a_response_with_a_prediction_behind_its_thought(vllm_double, tmp_path):
    assert fit("lab-rpt", tmp_path / "run", *VLLM, "--steps", "2") == 0
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(r["engine"] == "vllm" and r["answered"] > 0 for r in records)


def test_tampered_weights_stop_a_run_with_one_line(vllm_double, tmp_path, monkeypatch, capsys):
    truth = pretrain.assembly.language_model_weights

    def weights(model):
        return ((name, tensor * (1.1 if name == "lm_head.weight" else 1.0)) for name, tensor in truth(model))

    monkeypatch.setattr(pretrain.assembly, "language_model_weights", weights)
    assert fit("quickstart", tmp_path / "run", *VLLM) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("forethought: vLLM does not sample from the weights that are trained")


REFUSED = {
    "delimiters": (
        ["lab-quiet-star"],
        "vllm cannot sample the thoughts of objective quiet_star: their delimiters have no",
    ),
    "several devices": (["quickstart", "--devices", "2", "--rows_per_step", "4"], "vllm samples on one device"),
    "keys of others": (["quickstart", "--compile", "true"], "compile is for rollout.engine auto; leave it out"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(vllm_double, what, tmp_path, capsys):
    arguments, message = REFUSED[what]
    assert main(["fit", *arguments, *VLLM, "--run-dir", str(tmp_path / "run"), "--dry-run"]) == 1
    assert message in capsys.readouterr().err


def test_where_vllm_is_not_there_or_does_not_start(tmp_path, capsys, request):
    command = ["fit", "quickstart", *VLLM, "--run-dir", str(tmp_path / "run"), "--dry-run"]
    if pretrain.assembly.importlib.util.find_spec("vllm") is None:
        assert main(command) == 1
        assert "vLLM is not installed; pip install" in capsys.readouterr().err
    double = request.getfixturevalue("vllm_double")
    double.refuses = "Head size 16 is not supported\nby CPU_ATTN"
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.endswith("vLLM cannot be started with this model: Head size 16 is not supported by CPU_ATTN\n")
