"""One run at a time in a directory, and the records of older runs."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from checkpoints.snapshots import find_checkpoint, load_checkpoint, writing
from objectives import NextTokenConfig, RptConfig
from pretrain.recipe import Recipe, RecipeError, free_keys
from pretrain.recipe_files import recipe_to_tree
from pretrain.run_directory import RunDirectory
from tests.pretrain.test_fit import OBJECTIVES, fit, lines, start, wait_for_step, weights

NEXT_TOKEN = OBJECTIVES["next_token"]
HOLD = """
import sys, time
from pretrain.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has locked a directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_fit_is_refused_in_one_line(holder, tiny_run, run_directory, capsys):
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "1") == 1
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert f"{run_directory} is in use by another run (process {holder.pid} on " in message
    assert message.endswith("wait until it has ended, stop it, or choose another --run-dir")
    assert [path.name for path in run_directory.iterdir()] == ["lock"]
    # A dry run writes nothing, and so needs no lock.
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "1", "--dry-run") == 0
    holder.kill()
    holder.wait()
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "1") == 0


def test_its_control_is_in_use_as_well(tiny_run, run_directory, capsys):
    """A run's directory and its control's are two: each can be the first to be taken."""
    with RunDirectory(run_directory / "control").locked():
        pass
    assert not (run_directory / "control").exists()
    assert fit(tiny_run, *OBJECTIVES["rlp"], "--control", "next_token", "--steps", "1") == 0
    assert (run_directory / "control" / "lock").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_killed_run_starts_again_at_once(workers, tiny_run, run_directory):
    """Also while a process that prepared its batches lives on."""
    arguments = [*tiny_run, *NEXT_TOKEN, "--steps", "300", "--checkpoint.every", "2", "--data_workers", workers]
    process = start(arguments)
    wait_for_step(run_directory, 5, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    # Stopped, so that they cannot notice that their parent is gone.
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    process.kill()
    process.wait()
    try:
        assert len(children) == int(workers)
        step = len(lines(run_directory / "metrics.jsonl"))
        assert fit(arguments, "--steps", str(step + 2), "--data_workers", "0") == 0
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == list(range(1, step + 3))


def test_nothing_is_left_of_a_lock_alone(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        assert directory.path.exists()
    assert not directory.path.exists()
    with pytest.raises(KeyError), directory.locked():
        raise KeyError
    assert not directory.path.exists()
    with directory.locked():
        (directory.path / "metrics.jsonl").write_text("")
    assert sorted(path.name for path in directory.path.iterdir()) == ["lock", "metrics.jsonl"]


# What cannot be written


@pytest.mark.parametrize(
    ("place", "why"),
    [("file", "File exists"), ("file/run", "Not a directory"), ("/proc/forethought", "No such file or directory")],
)
def test_a_directory_that_cannot_be_made_is_one_line(place, why, tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = tmp_path / place
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "1", "--run-dir", str(path)) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message == f"forethought: {path} cannot be written ({why}); choose another --run-dir"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_one_line(tiny_run, tmp_path, capsys):
    tmp_path.chmod(0o555)
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "1", "--run-dir", str(tmp_path)) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message == f"forethought: {tmp_path} cannot be written (Permission denied); choose another --run-dir"


def largest_file(size: int):
    """What a full disk does to a process, for files beyond a size."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@pytest.mark.parametrize(
    ("every", "part"),
    [
        ("2", "checkpoints/step-00000002 cannot be written ("),
        ("null", "metrics.jsonl cannot be written (File too large); make room, and the same command continues"),
    ],
)
def test_a_full_disk_is_one_line_and_the_same_command_continues(every, part, tiny_run, run_directory):
    arguments = [*tiny_run, *NEXT_TOKEN, "--steps", "300", "--checkpoint.every", every]
    # What a process that was killed left behind takes no room any more, even if there is none.
    left = run_directory / "checkpoints" / ".step-00000001.12345.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    process = start(arguments, **largest_file(40_000))
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert part in errors.splitlines()[-1]
    assert not list(run_directory.rglob("*.tmp"))
    assert fit(arguments, "--steps", "3") == 0
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == [1, 2, 3]


# Older runs


def test_records_of_older_runs_are_read_by_todays_names(tmp_path):
    directory = RunDirectory(tmp_path)
    old = {"step": 1, "flat_groups": 0.5, "reward_spread": 0.25, "reward": 1.0}
    directory.append(directory.metrics, old)
    directory.append(directory.evaluations, {"step": 1, "causal": {"own": {}}, "causal_minus_own": {}})
    assert directory.read(directory.metrics) == [
        {"step": 1, "zero_variance_groups": 0.5, "reward_std": 0.25, "reward": 1.0}
    ]
    assert directory.read(directory.evaluations) == [
        {"step": 1, "counterfactual": {"own": {}}, "counterfactual_minus_own": {}}
    ]


def test_recipes_of_older_runs_are_continued(tmp_path):
    recipe = Recipe(steps=3, objective=RptConfig(drop_zero_variance_from=7), control=NextTokenConfig())
    tree = recipe_to_tree(recipe)
    tree["objective"]["drop_flat_from"] = tree["objective"].pop("drop_zero_variance_from")
    tree["evaluation"]["causal"] = tree["evaluation"].pop("counterfactuals")
    # Keys that did not exist.
    del tree["objective"]["sampled_at_once"], tree["cuda_graphs"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    directory = RunDirectory(tmp_path)
    assert directory.load_recipe() == recipe
    directory.check(recipe.replaced(steps=9))
    with pytest.raises(RecipeError, match=r"\(objective.drop_zero_variance_from differ\)"):
        directory.check(recipe.replaced(objective=RptConfig()))


def test_a_recipe_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    for text, part in (
        (json.dumps({"steps": 1, "objective": "next_token", "sleep": 3, "optimizer": {"lr": "x"}}), "'x' and 1 more)"),
        ("[", "while parsing"),
        ("", "must be a mapping of keys to values, got None)"),
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            RunDirectory(tmp_path).load_recipe()
        (message,) = str(caught.value).splitlines()
        assert part in message
        assert "restore it, or choose another --run-dir" in message


def test_what_may_change_within_a_run():
    recipe = Recipe(steps=3, objective=RptConfig(), control=NextTokenConfig())
    assert free_keys(recipe) == {
        *("steps", "flops", "seconds", "control", "run_dir", "continue_from"),
        *("micro_batch_rows", "activation_checkpointing"),
        *("strategy", "shard_size", "gradient_sync", "rollout_weights", "rollout.cache_gib", "sampled_rows"),
        *("devices", "nodes", "data_workers", "data_changed", "evaluation", "checkpoint", "logging"),
        *(f"data.{key}" for key in ("reference", "config", "split", "revision", "patience")),  # by what it contains
        *(f"objective.{what}_at_once" for what in ("anchors", "thoughts", "sampled")),
    }
    assert "objective.anchors_at_once" not in free_keys(Recipe(steps=3, objective=NextTokenConfig()))


def test_checkpoints_are_kept_as_the_recipe_says(tiny_run, run_directory):
    """The newest, those of every fourth step, and the one of the lowest held-out NLL, which a rate too high soon leaves
    behind."""
    arguments = ["--steps", "9", "--checkpoint.every", "1", "--evaluation.every", "1", "--optimizer.lr", "0.3"]
    keeping = ["--checkpoint.keep", "1", "--checkpoint.keep_every", "4", "--checkpoint.keep_best", "1"]
    assert fit([*tiny_run, *NEXT_TOKEN], *arguments, *keeping) == 0
    nlls = {record["step"]: record["nll_text"] for record in lines(run_directory / "evaluations.jsonl")}
    best = min(range(1, 10), key=nlls.__getitem__)
    steps = {int(path.name[-8:]) for path in (run_directory / "checkpoints").iterdir()}
    assert steps == {4, 8, 9, best}


def test_a_checkpoint_that_cannot_be_written_in_the_background_ends_the_run_soon(
    tiny_run, run_directory, monkeypatch, capsys
):
    """At the step behind it, with the line that says why; what was saved before stays."""

    def full(path, tensors, write=writing.write_tensors):
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(writing, "write_tensors", full)
    assert fit([*tiny_run, *NEXT_TOKEN], "--steps", "40", "--checkpoint.every", "2") == 1
    assert (
        "step-00000004 cannot be written ([Errno 28] No space left on device); make room"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert 4 <= len(lines(run_directory / "metrics.jsonl")) <= 6  # the next save, at the latest, waits for it
    assert [path.name for path in (run_directory / "checkpoints").iterdir()] == ["step-00000002"]


def test_on_slow_storage_a_save_waits_for_the_one_before(tiny_run, run_directory, monkeypatch):
    """And the run's end for the last."""
    flush, at_once = writing.flush, []

    def slowly(path):
        at_once.append(len(list((run_directory / "checkpoints").glob(".step-*"))))
        time.sleep(0.1)
        flush(path)

    monkeypatch.setattr(writing, "flush", slowly)
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "4", "--checkpoint.every", "1") == 0
    assert max(at_once) == 1
    names = sorted(path.name for path in (run_directory / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]


def test_a_run_whose_checkpoints_are_of_format_1_is_continued(tiny_run, run_directory, tmp_path):
    """Whole tensors in one file a group, no layout, and the random states of rank 0 alone."""
    assert fit([*tiny_run, *NEXT_TOKEN], "--steps", "4", "--run-dir", str(tmp_path / "whole")) == 0
    assert fit([*tiny_run, *NEXT_TOKEN], "--steps", "2") == 0
    path = find_checkpoint(run_directory)
    tensors, state = load_checkpoint(path)
    tensors["random"] = {name.removeprefix("0/"): tensor for name, tensor in tensors["random"].items()}
    for file in path.iterdir():
        file.unlink()
    for group, named in tensors.items():
        save_file(named, path / f"{group}.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    files = {f.name: {"bytes": len(b := f.read_bytes()), "sha256": sha256(b).hexdigest()} for f in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=1))
    assert fit([*tiny_run, *NEXT_TOKEN], "--steps", "4") == 0
    expected, got = weights(tmp_path / "whole"), weights(run_directory)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
