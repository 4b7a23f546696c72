"""A run's checkpoints: bit-exact, and refused by name when they are not what was written."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from checkpoints.errors import CheckpointError
from checkpoints.run import (
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    prune,
    remove_leftovers,
    save_checkpoint,
)


def contents(step: int = 0):
    shared = torch.arange(6.0)
    tensors = {
        "model": {
            "fp32": torch.tensor([0.1, float("inf")]) + step,
            "odd": torch.tensor([-0.0, float("nan"), -float("nan"), 1e-45]),
            "bf16": torch.tensor([[1.5, -3.0]], dtype=torch.bfloat16),
            "fp16": torch.zeros(0, 3, dtype=torch.float16),
            "fp64": torch.tensor(1 / 3, dtype=torch.float64),
            "tied": shared,
            "tied again": shared,
            "strided": torch.arange(12).view(3, 4).t(),
        },
        "random": {"bytes": torch.arange(5, dtype=torch.uint8), "flags": torch.tensor([True, False])},
    }
    return tensors, {"step": step, "seconds": 0.1, "nested": {"list": [1, 2]}}


def saved(directory, *steps):
    return [save_checkpoint(directory, step, *contents(step)) for step in steps]


def test_round_trip_is_exact(tmp_path):
    tensors, state = contents(3)
    path = save_checkpoint(tmp_path, 3, tensors, state)
    assert path.name == "step-00000003"
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for group in tensors:
        assert loaded[group].keys() == tensors[group].keys()
        for name, tensor in tensors[group].items():
            # Serialised: dtype, shape and every bit, those of NaN and -0 included.
            assert save({"": loaded[group][name]}) == save({"": tensor.contiguous()})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_same_step_is_replaced(tmp_path):
    (path,) = saved(tmp_path, 3)
    tensors, _ = contents(8)
    save_checkpoint(tmp_path, 3, tensors, {"step": 3, "again": True})
    loaded, state = load_checkpoint(path)
    assert state["again"]
    assert torch.equal(loaded["model"]["fp32"], tensors["model"]["fp32"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def truncate(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1])


def flip(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def manifest(content):
    return lambda path: (path / "manifest.json").write_text(content)


DAMAGES = [
    ("model.safetensors is incomplete", truncate),
    ("model.safetensors was altered", flip),
    ("random.safetensors is missing", lambda path: (path / "random.safetensors").unlink()),
    ("it has no manifest.json, so it was never completed", lambda path: (path / "manifest.json").unlink()),
    ("its manifest.json is damaged", manifest("{")),
    ("its manifest.json is damaged", manifest('{"files": [1]}')),
    ("its manifest.json is damaged", manifest('{"files": {}}')),
    ("its manifest.json is damaged", manifest('{"files": {"state.json": 3}}')),
    ("state.json is incomplete", lambda path: (path / "state.json").write_text('{"step": 9}')),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_used(message, damage, tmp_path, caplog):
    older, newer = saved(tmp_path, 5, 10)
    damage(newer)
    with pytest.raises(CheckpointError, match=f"step-00000010 cannot be used: {message}"):
        load_checkpoint(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == older
    assert "step-00000010 is refused" in caplog.text
    assert message in caplog.text


def test_what_a_kill_leaves_behind_is_ignored(tmp_path):
    older, newer = saved(tmp_path, 5, 10)
    shutil.copytree(newer, tmp_path / ".step-00000015.123.tmp")
    (tmp_path / "step-9").mkdir()
    assert newest_checkpoint(tmp_path) == newer
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_what_a_kill_leaves_behind_is_removed_unless_it_is_a_checkpoint(tmp_path):
    older, newer = saved(tmp_path, 5, 10)
    for name in (".step-00000015.123.tmp", ".step-00000001.123.gone", ".step-00000010.123.old"):
        shutil.copytree(newer, tmp_path / name)
    older.rename(tmp_path / ".step-00000005.123.old")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-00000005.123.old", "step-00000010"]
    remove_leftovers(tmp_path / "nothing")


def test_what_the_manifest_does_not_name_is_not_loaded(tmp_path):
    (path,) = saved(tmp_path, 5)
    shutil.copy(path / "model.safetensors", path / "more.safetensors")
    assert load_checkpoint(path)[0].keys() == {"model", "random"}


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_a_step_is_saved_again_loses_nothing(at, tmp_path, monkeypatch):
    """Between the renames, and before the second one's predecessor is removed."""
    saved(tmp_path, 3)
    rename, renames = Path.rename, []

    def killed(path, target):
        renames.append(target)
        if len(renames) > at:
            raise KeyboardInterrupt
        return rename(path, target)

    def removal_killed(path, **_):
        if len(renames) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", removal_killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, contents(3)[0], {"again": True})
    monkeypatch.undo()
    found = newest_checkpoint(tmp_path)
    assert load_checkpoint(found)[1] == ({"again": True} if at == 2 else contents(3)[1])
    assert find_checkpoint(found) == found
    (path,) = saved(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_pruning_keeps_the_newest(tmp_path):
    paths = saved(tmp_path, 5, 10, 15, 20)
    prune(tmp_path, keep=2)
    assert [p.exists() for p in paths] == [False, False, True, True]
    truncate(paths[3])
    prune(tmp_path, keep=1)
    assert paths[2].exists(), "the last valid checkpoint is gone"
    saved(tmp_path, 25)
    prune(tmp_path, keep=2)
    assert paths[2].exists(), "a damaged checkpoint took the place of a valid one"
    saved(tmp_path, 30)
    prune(tmp_path, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000025", "step-00000030"]
    with pytest.raises(ValueError, match="at least one"):
        prune(tmp_path, keep=0)


def test_finding_a_checkpoint(tmp_path):
    older, newer = saved(tmp_path / "checkpoints", 5, 10)
    assert find_checkpoint(tmp_path) == newer
    assert find_checkpoint(older) == older
    assert find_checkpoint(shutil.copytree(older, tmp_path / "best")) == tmp_path / "best"
    truncate(newer)
    assert find_checkpoint(tmp_path) == older
    with pytest.raises(CheckpointError, match="step-00000010 cannot be used"):
        find_checkpoint(newer)
    with pytest.raises(CheckpointError, match="has no valid checkpoint"):
        find_checkpoint(tmp_path / "checkpoints")
