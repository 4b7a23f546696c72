"""A run's checkpoints: bit-exact, and refused by name when they are not what was written."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from checkpoints.references import CheckpointError
from checkpoints.run import find_checkpoint, load_checkpoint, newest_checkpoint, prune, save_checkpoint


def contents(step: int = 0):
    shared = torch.arange(6.0)
    tensors = {
        "model": {
            "fp32": torch.tensor([0.1, -0.0, float("inf")]) + step,
            "bf16": torch.tensor([[1.5, -3.0]], dtype=torch.bfloat16),
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
            assert loaded[group][name].dtype == tensor.dtype
            assert torch.equal(loaded[group][name], tensor)
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


DAMAGES = {
    "model.safetensors is incomplete": truncate,
    "model.safetensors was altered": flip,
    "random.safetensors is missing": lambda path: (path / "random.safetensors").unlink(),
    "it has no manifest.json, so it was never completed": lambda path: (path / "manifest.json").unlink(),
    "its manifest.json is damaged": lambda path: (path / "manifest.json").write_text("{"),
    "state.json is incomplete": lambda path: (path / "state.json").write_text(
        json.dumps(json.loads((path / "state.json").read_text()) | {"step": 9})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_used(damage, tmp_path, caplog):
    older, newer = saved(tmp_path, 5, 10)
    DAMAGES[damage](newer)
    with pytest.raises(CheckpointError, match=f"step-00000010 cannot be used: {damage}"):
        load_checkpoint(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == older
    assert "step-00000010 is refused" in caplog.text
    assert damage in caplog.text


def test_what_a_kill_leaves_behind_is_ignored(tmp_path):
    older, newer = saved(tmp_path, 5, 10)
    shutil.copytree(newer, tmp_path / ".step-00000015.123.tmp")
    (tmp_path / "step-9").mkdir()
    assert newest_checkpoint(tmp_path) == newer
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_pruning_keeps_the_newest(tmp_path):
    paths = saved(tmp_path, 5, 10, 15, 20)
    prune(tmp_path, keep=2)
    assert [p.exists() for p in paths] == [False, False, True, True]
    truncate(paths[3])
    prune(tmp_path, keep=1)
    assert paths[2].exists(), "the last valid checkpoint is gone"
    with pytest.raises(ValueError, match="at least one"):
        prune(tmp_path, keep=0)


def test_finding_a_checkpoint(tmp_path):
    older, newer = saved(tmp_path / "checkpoints", 5, 10)
    assert find_checkpoint(tmp_path) == newer
    assert find_checkpoint(older) == older
    truncate(newer)
    assert find_checkpoint(tmp_path) == older
    with pytest.raises(CheckpointError, match="step-00000010 cannot be used"):
        find_checkpoint(newer)
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        find_checkpoint(tmp_path / "checkpoints")
