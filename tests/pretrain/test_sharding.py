"""Two processes with half a model each end where one process with all of it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.rollout.eager import LOOK_EVERY
from models.thoughts import PAD
from tests.helpers import relative_error
from tests.pretrain.sharded_step import results, sampled
from tests.pretrain.strategies import OBJECTIVES as ALL
from tests.pretrain.strategies import TOLERANCE, compare
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


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """What two processes of `sharded_step` leave behind: `out`, and `out-RANK` of each."""
    directory = tmp_path_factory.mktemp("sharded")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pretrain.sharded_step"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(directory / "store"), str(directory / "out")], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    return directory


def test_two_processes_are_one_in_bf16(sharded):
    """To fp32: head, norms, mixing head, delimiters, losses; to bf16: the gradients of blocks, which are that."""
    two, one = load_file(sharded / "out"), results()
    assert two.keys() == one.keys()
    assert 0 < one["quiet_star/mixing_weight"].abs() < 0.002
    errors = {name: relative_error(two[name], one[name]) for name in one}
    assert all(errors[n] <= (2**-7 if "proj" in n else 1e-5) for n in errors), errors


@pytest.mark.parametrize("weights_of", ["replica", "gathered"])
def test_sampling_gathers_as_often_for_long_thoughts_as_for_short_ones(weights_of, sharded):
    """And samples the thoughts that one process does, also when one rank's end before another's."""
    one, lengths, left = sampled(), [], 0
    for rank in (0, 1):
        found = load_file(sharded / f"out-{rank}")
        for i in range(3):
            tokens_BKSM = found[f"{weights_of}/{i}"]
            assert torch.equal(tokens_BKSM, one[f"{weights_of}/{i}"][2 * rank : 2 * rank + 2])
            begins, ends = found[f"{weights_of}/{i} rows"].tolist()
            left += ends < begins
        assert not torch.equal(found[f"{weights_of}/0"], found[f"{weights_of}/2"])  # the update
        lengths.append((found[f"{weights_of}/0"] != PAD).sum(dim=2).max().item())
        calls = [found[f"{weights_of}/{i} calls"].item() for i in range(3)]
        # Of two blocks: a copy takes one for each weight, once per update; where blocks stay gathered it is one for
        # the matrices and one for the norms. What is outside of them the text's reading has gathered.
        assert calls == ([2 * 9, 0, 2 * 9] if weights_of == "replica" else [4, 4, 4])
    assert min(lengths) + LOOK_EVERY <= max(lengths)
    assert left >= 2  # of 4 times with long thoughts; which they are depends on the machine's bf16


def test_a_replica_takes_what_its_formula_says(sharded):
    V, W, F, L, H, G, D = 61, 24, 40, 2, 4, 2, 6  # of tests.helpers
    blocks = L * (2 * W * H * D + 2 * W * G * D + 3 * W * F)
    outside = 2 * V * W + (2 * L + 1) * W + 2 * W + (3 * W * W + 2 * W + W)  # head, norms, delimiters, mixing head
    assert load_file(sharded / "out-0")["bytes"].tolist() == [2 * blocks + 4 * outside] * 2


@pytest.mark.parametrize(
    ("ranks", "objectives", "names"),
    [(2, list(ALL), ["ddp", "fsdp"]), (4, ["rlp"], ["hsdp", "hsdp, each backward"])],
)
def test_several_processes_in_parts_are_one_in_one_piece(ranks, objectives, names, tmp_path):
    """A row of a micro-batch, thoughts in chunks, weights whole and in shards; the script has all the combinations."""
    found = list(compare(tmp_path, "fp64", ranks, objectives, names, steps=2))
    assert len(found) == len(objectives) * len(names)
    assert all(max(apart) <= TOLERANCE["fp64"] for _, _, (apart, *_) in found), found


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


def test_a_run_goes_on_with_another_number_of_ranks_and_another_strategy(tiny_run, tmp_path):
    """Four in shards of two, then two whole ones, then one: the weights, teacher and moments of one process alone."""
    arguments = [*tiny_run, *OBJECTIVES["rlp"], "--optimizer.eps", "1e-3"]
    fit([*arguments, "--steps", "3"], tmp_path / "one", 1)
    parts = ["--optimizer.schedule_steps", "3", "--steps"]
    fit([*arguments, "--strategy", "hsdp", "--shard_size", "2", *parts, "1"], tmp_path / "many", 4)
    fit([*arguments, "--strategy", "ddp", *parts, "2"], tmp_path / "many", 2)
    fit([*arguments, *parts, "3"], tmp_path / "many", 1)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert one.keys() == many.keys()
    errors = {name: relative_error(many[name], one[name]) for name in one if not name.startswith("optimizer/")}
    assert max(errors.values()) <= 1e-5, errors
