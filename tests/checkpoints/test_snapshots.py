"""A run's checkpoints: bit-exact, and refused by name when they are not what was written."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import load_thinking_model
from checkpoints.references import LAB
from checkpoints.snapshots import (
    SnapshotWriter,
    find_checkpoint,
    format,
    load_checkpoint,
    name_of,
    newest_checkpoint,
    newest_snapshot,
    open_snapshot,
    prune,
    remove_leftovers,
    save_checkpoint,
)
from checkpoints.snapshots.format import manifest_text
from checkpoints.tensors import fill, write_tensors
from data_pipelines import DataError, Tokenizer


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


# Sharded: what several ranks write, and any other number of ranks reads


@contextmanager
def acting_as(rank: int, replicas: int, shards: int):
    """Torch's process group that communicates with nobody: this process is one rank of replicas × shards."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=replicas * shards)
    try:
        yield init_device_mesh("cpu", (replicas, shards))
    finally:
        dist.destroy_process_group()


WHOLE = {
    "even": torch.randn(8, 3, generator=torch.Generator().manual_seed(0)),
    "uneven": torch.arange(7, dtype=torch.float64),
    "fewer rows than ranks": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
}


def shards_of(mesh, empty: bool = False) -> dict[str, DTensor]:
    found = {}
    for name, whole in WHOLE.items():
        placements = (Replicate(), Shard(0))
        shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
        local = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].clone()
        local = torch.zeros_like(local) if empty else local
        found[name] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return found


def save_sharded(directory, step, replicas, shards):
    ranks = replicas * shards
    for rank in reversed(range(ranks)):  # rank 0 commits what the others have written
        with acting_as(rank, replicas, shards) as mesh:
            tensors = {
                "model": {**shards_of(mesh), "scalar": torch.tensor(float(step))},
                "random": {f"{rank}/torch": torch.tensor([rank, step])},
            }
            writer = SnapshotWriter(directory, rank, ranks)
            writer.save(step, tensors, {"step": step, "rank": rank})
            assert writer.error() is None
    return directory / name_of(step)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (2, 1), (1, 4), (2, 2), (1, 3)])
def test_what_ranks_have_written_any_other_ranks_read(replicas, shards, tmp_path):
    path = save_sharded(tmp_path, 5, replicas, shards)
    loaded, state = load_checkpoint(path)
    assert state == {"step": 5, "rank": 0}
    assert all(torch.equal(loaded["model"][name], whole) for name, whole in WHOLE.items())
    assert loaded["model"]["scalar"] == 5
    assert [t.tolist() for t in loaded["random"].values()] == [[rank, 5] for rank in range(replicas * shards)]
    # Nothing is written twice.
    sizes = [load_file(file)[name].numel() for file in path.glob("model*") for name in load_file(file)]
    assert sum(sizes) == 1 + sum(whole.numel() for whole in WHOLE.values())
    snapshot = open_snapshot(path)
    for other in ((1, 1), (1, 2), (2, 2), (1, 8)):
        for rank in range(other[0] * other[1]):
            with acting_as(rank, *other) as mesh:
                # No operations on whole DTensors, whose caches take this process for the rank that it was before.
                got = shards_of(mesh, empty=True)
                for name, expected in shards_of(mesh).items():
                    fill(got[name], snapshot.tensors["model"][name])
                    assert torch.equal(got[name].to_local(), expected.to_local()), (other, rank, name)


def test_a_rank_reads_no_more_than_its_slice(tmp_path, monkeypatch):
    """The other rank's file is not opened."""
    path = save_sharded(tmp_path, 5, 1, 2)
    snapshot = open_snapshot(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    with acting_as(0, 1, 4) as mesh:
        got = shards_of(mesh, empty=True)["even"]
        fill(got, snapshot.tensors["model"]["even"])
        assert torch.equal(got.to_local(), WHOLE["even"][:2])
    with (
        acting_as(3, 1, 4) as mesh,
        pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors cannot be read"),
    ):
        fill(shards_of(mesh)["even"], snapshot.tensors["model"]["even"])


# Every file, every region


def damages(path: Path):
    """(what must be named, damage to do) for each file: bytes flipped all over it, cut short, gone."""
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        chance = random.Random(file.name)
        places = {0, 7, 8, 9, size // 2, size - 1, *(chance.randrange(size) for _ in range(40))}
        for place in sorted(place for place in places if place < size):
            bit = 1 << chance.randrange(8)
            yield file.name, lambda file=file, place=place, bit=bit: flip_at(file, place, bit)
        for left in (0, size // 2, size - 1):
            yield file.name, lambda file=file, left=left: os.truncate(file, left)
        yield file.name, file.unlink


def flip_at(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(content)


def test_every_flipped_byte_truncation_and_missing_file_is_named_and_the_run_falls_back(tmp_path, caplog):
    older = save_sharded(tmp_path, 5, 1, 2)
    newer = save_sharded(tmp_path, 10, 1, 2)
    content = {file: file.read_bytes() for file in newer.iterdir()}
    assert len(content) == 7
    done = 0
    for name, damage in list(damages(newer)):
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = newest_snapshot(tmp_path)
        assert found is not None and found.path == older, name
        assert "step-00000010 is refused" in caplog.text
        # A manifest whose hash of a file has changed names that file, or itself.
        assert name in caplog.text
        with pytest.raises(CheckpointError, match="step-00000010 cannot be used"):
            load_checkpoint(newer)
        for file, before in content.items():
            file.write_bytes(before)
        done += 1
    assert done > 200
    assert newest_checkpoint(tmp_path) == newer


def described(file: Path) -> dict:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["MALICIOUS_MARK"]),))


def test_a_pickle_anywhere_is_never_executed(tmp_path, monkeypatch):
    """In every file of a snapshot or of a model's directory, and beside them under the names that others unpickle."""
    monkeypatch.setenv("MALICIOUS_MARK", str(tmp_path / "mark"))
    payload = pickle.dumps(Malicious())
    pickle.loads(payload)
    (tmp_path / "mark").unlink()  # it works
    torch.save(Malicious(), tmp_path / "saved.pt")
    payloads = (payload, (tmp_path / "saved.pt").read_bytes())
    more = ("data.pkl", ".metadata", "model.pt", "pytorch_model.bin", "checkpoint.ckpt", "random.pkl", "optimizer.pt")

    path = save_sharded(tmp_path / "run" / "checkpoints", 5, 1, 2)
    model = shutil.copytree(LAB, tmp_path / "model")
    for directory in (path, model):
        content = {file: file.read_bytes() for file in directory.iterdir() if file.is_file()}
        for payload in payloads:
            for name in more:
                (directory / name).write_bytes(payload)
            opened = load_checkpoint(path) if directory == path else load_thinking_model(model)
            assert opened
            for file in content:
                file.write_bytes(payload)
                with suppress(CheckpointError, DataError):
                    if directory == path:
                        load_checkpoint(path)
                    else:
                        load_thinking_model(model)
                        Tokenizer.from_directory(model)
                if directory == path:
                    # Also where whoever wrote it has made a manifest of it.
                    files = {
                        f.name: {"bytes": len(b := f.read_bytes()), "sha256": sha256(b).hexdigest()} for f in content
                    }
                    files.pop("manifest.json")
                    (path / "manifest.json").write_text(manifest_text(files))
                    with suppress(CheckpointError):
                        load_checkpoint(path)
                for again, old in content.items():
                    again.write_bytes(old)
    assert not (tmp_path / "mark").exists()


# In the background


def test_a_snapshot_is_of_the_moment_it_was_saved(tmp_path):
    """What training does to its tensors in the meantime is not in it; buffers are used again once it is written."""
    weight = torch.zeros(1000, 1000)
    writer = SnapshotWriter(tmp_path)
    for step in (1, 2, 3):
        weight.fill_(step)
        writer.save(step, {"model": {"weight": weight}}, {"step": step})
        weight.fill_(-1)
        assert writer.error() is None
    for step in (1, 2, 3):
        assert (load_checkpoint(tmp_path / name_of(step))[0]["model"]["weight"] == step).all()


def test_there_is_no_snapshot_before_all_ranks_have_written_theirs(tmp_path, monkeypatch):
    tensors = {"model": {"weight": torch.ones(3)}, "random": {}}
    first, second = (SnapshotWriter(tmp_path, rank, 2) for rank in (0, 1))
    first.save(1, tensors, {"step": 1})
    assert first.own_error() is None
    assert newest_checkpoint(tmp_path) is None and not first.failed
    second.save(1, tensors, {})
    assert first.error() is None and second.error() is None
    assert newest_checkpoint(tmp_path) == tmp_path / name_of(1)
    first.save(2, tensors, {"step": 2})
    first.abandon(0.1)  # the other rank is gone
    assert first.failed
    assert "rank-00001.json" in str(first.error())
    assert [path.name for path in tmp_path.iterdir()] == [name_of(1)]


def test_the_hash_is_of_what_was_meant_to_be_written(tmp_path):
    """A page that goes bad between memory and disk is found, as it would not be by a hash of what the file has."""
    tensors = {"a": torch.arange(10.0), "b": torch.tensor([True]), "c": torch.tensor(3, dtype=torch.int64)}
    known = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert known == {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(tmp_path / "x.safetensors").items())


def test_snapshots_of_format_1_are_read(tmp_path):
    """As the first release wrote them: whole tensors, one file a group, no layout."""
    path = tmp_path / name_of(4)
    path.mkdir()
    save_file({"weight": torch.arange(4.0)}, path / "model.safetensors")
    (path / "state.json").write_text('{"step": 4}')
    files = {file.name: described(file) for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=1))
    tensors, state = load_checkpoint(path)
    assert torch.equal(tensors["model"]["weight"], torch.arange(4.0))
    assert newest_checkpoint(tmp_path) == path and state == {"step": 4}


# Retention


def test_snapshots_kept_for_good_and_the_best_stay(tmp_path):
    saved(tmp_path, *range(1, 13))
    prune(tmp_path, keep=2, every=5, best=(3, 7))
    assert [path.name[-2:] for path in sorted(tmp_path.iterdir())] == ["03", "05", "07", "10", "11", "12"]


def test_pruning_reads_only_what_this_process_has_not_seen(tmp_path, monkeypatch):
    paths = saved(tmp_path, 1, 2, 3)
    flip(paths[1])
    read = []
    monkeypatch.setattr(
        format, "_sha256", lambda path, _sha256=format._sha256: read.append(path.parent) or _sha256(path)
    )
    prune(tmp_path, keep=2, known={paths[2].name})
    assert {path.name for path in read} == {paths[0].name, paths[1].name}
    assert paths[0].exists(), "a damaged snapshot took the place of a valid one"
