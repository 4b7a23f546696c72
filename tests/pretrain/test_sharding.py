"""Two processes with half a model each end where one process with all of it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import relative_error
from tests.pretrain.sharded_step import results
from tests.pretrain.test_fit import OBJECTIVES, lines, weights

ROOT = Path(__file__).parents[2]


def started(arguments, run_directory: Path, devices: int, *more: Path) -> subprocess.CompletedProcess[str]:
    """`more`: directories that modules are imported from."""
    command = [sys.executable, "-m", "pretrain", "fit", "smollm2-quiet-star", *arguments]
    command += ["--run-dir", str(run_directory), "--devices", str(devices)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *more))), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def fit(arguments, run_directory: Path, devices: int) -> str:
    done = started(arguments, run_directory, devices)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("objective", ["next_token", "quiet_star", "rlp", "rpt"])
def test_two_processes_are_one(objective, tiny_run, tmp_path):
    """Same losses, tokens, FLOPs, evaluations and weights, also when one process continues the run of two.

    If two continue it, its weights are those of a run of two that was not interrupted, to the bit.
    """
    arguments = [*tiny_run, *OBJECTIVES[objective], "--optimizer.eps", "1e-3", "--steps", "4"]
    if objective == "quiet_star":
        # Rewards of a fresh mixing head are rounding errors; times 1e6 they would be compared with each other.
        arguments += ["--objective.policy_weight", "0"]
    if objective in ("rlp", "rpt"):
        # A thought that almost any token ends, in rows that end at different times: ranks must stop sampling together.
        arguments += ["--objective.length", "20", "--objective.close", "e"]
    fit(arguments, tmp_path / "one", 1)
    fit([*arguments, "--steps", "3"], tmp_path / "two", 2)
    said = fit(arguments, tmp_path / "two", 2 if objective in ("next_token", "rlp") else 1)
    assert said.count("continuing") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    if objective == "rlp":
        fit(arguments, tmp_path / "whole", 2)
        whole = weights(tmp_path / "whole")
        assert [name for name in two if not torch.equal(two[name], whole[name])] == []
    errors = {n: relative_error(two[n], one[n]) for n in one if n.startswith("model/")}
    assert max(errors.values()) <= 1e-5, errors
    a, b = (lines(d / "metrics.jsonl") for d in (tmp_path / "one", tmp_path / "two"))
    assert [m["step"] for m in b] == [1, 2, 3, 4]
    for x, y in zip(a, b, strict=True):
        for key in ("tokens", "flops"):
            assert x[key] == y[key]
        for key in ("loss", "nll_text", "grad_norm"):
            assert y[key] == pytest.approx(x[key], rel=1e-4), key
    a, b = (lines(d / "evaluations.jsonl")[-1]["nll_text"] for d in (tmp_path / "one", tmp_path / "two"))
    assert b == pytest.approx(a, rel=1e-5)
    assert torch.isfinite(torch.tensor(b))


def test_two_processes_are_one_in_bf16(tmp_path):
    """To fp32: head, norms, mixing head, delimiters, losses; to bf16: the gradients of blocks, which are that."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pretrain.sharded_step"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store"), str(tmp_path / "out")], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    two, one = load_file(tmp_path / "out"), results()
    assert two.keys() == one.keys()
    assert 0 < one["quiet_star/mixing_weight"].abs() < 0.002
    errors = {name: relative_error(two[name], one[name]) for name in one}
    assert all(errors[n] <= (2**-7 if "proj" in n else 1e-5) for n in errors), errors


@pytest.mark.parametrize(("objective", "at_once"), [("quiet_star", 12), ("rlp", 1), ("rpt", 3)])
def test_two_processes_in_parts_are_one_in_one_piece(objective, at_once, tiny_run, tmp_path):
    """Thoughts in parts, blocks computed again in backward, half a model each: the same update.

    Documents of different lengths: rows hold different numbers of them, and so one rank has more anchors than another.
    """
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"This is text number {number}. " * (1 + number**2))
    arguments = [*tiny_run, *OBJECTIVES[objective], "--optimizer.eps", "1e-3", "--steps", "3"]
    if objective == "quiet_star":
        arguments += ["--objective.policy_weight", "0"]
    if objective == "rlp":
        # Alone, the surrogate's value is a sum of advantages: 0 but for rounding.
        arguments += ["--objective.next_token_weight", "0.5"]
    fit(arguments, tmp_path / "one", 1)
    memory = ["--activation_checkpointing", "true", "--objective.anchors_at_once", str(at_once)]
    fit([*arguments, *memory], tmp_path / "two", 2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    errors = {n: relative_error(two[n], one[n]) for n in one if n.startswith("model/")}
    assert max(errors.values()) <= 1e-5, errors
    for x, y in zip(*(lines(tmp_path / run / "metrics.jsonl") for run in ("one", "two")), strict=True):
        for key in ("loss", "nll_text", "grad_norm"):
            assert y[key] == pytest.approx(x[key], rel=1e-4), key


POISONED = """
import torch

from objectives import {kind}


class Poisoned({kind}):
    def after_step(self, model):
        super().after_step(model)
        with torch.no_grad():
            model.decoder.layers[0].mlp.down_proj.weight.mul_(float("nan"))
"""


@pytest.mark.parametrize(("kind", "devices"), [("Rlp", 1), ("Rpt", 2)])
def test_a_model_that_becomes_nan_samples_and_its_steps_are_skipped(kind, devices, tiny_run, tmp_path):
    (tmp_path / "poisoned.py").write_text(POISONED.format(kind=kind))
    arguments = [*tiny_run, "--objective", "poisoned:Poisoned", *OBJECTIVES[kind.lower()][2:], "--steps", "9"]
    arguments += ["--objective.updates", "1", "--optimizer.max_skipped", "3", "--evaluation.every", "100"]
    done = started(arguments, tmp_path / "run", devices, tmp_path)
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    assert "3 steps in a row, up to step 4, had a non-finite loss or gradient" in done.stderr
    assert [record["skipped"] for record in lines(tmp_path / "run" / "metrics.jsonl")][:3] == [0, 1, 2]
