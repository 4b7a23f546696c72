"""A run's own checkpoints: complete and unaltered, or refused.

Each is a directory `step-<8 digits>` of safetensors files, state.json, and a manifest with the size and sha256 of each,
written last. It is written under a temporary name, fsynced and renamed, so a killed process never leaves an incomplete
checkpoint under its final name. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.errors import CheckpointError

log = logging.getLogger(__name__)
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-\d{8}")
# A checkpoint to be removed because its step is being saved again.
REPLACED = re.compile(r"\.(step-\d{8})\.\d+\.old")


def save_checkpoint(directory: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Writes `directory/step-<step>` with one safetensors file per group of `tensors`, and a JSON-serialisable state.

    An existing checkpoint of the same step is replaced. When this returns, the checkpoint is on disk. Raises
    CheckpointError, and leaves nothing behind, if it cannot be written.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        _write(temporary, tensors, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} cannot be written ({error}); make room or give it write access, and repeat the "
            "command: it continues from the checkpoint before"
        ) from None
    if final.exists():
        replaced = directory / f".{final.name}.{os.getpid()}.old"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _flush(directory)
    for replaced in directory.glob(f".{final.name}.*.old"):
        shutil.rmtree(replaced)
    return final


def _write(temporary: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for group, named in tensors.items():
        # Cloned, because safetensors rejects tensors that share memory, such as tied weights.
        own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}
        save_file(own, temporary / f"{group}.safetensors")
    (temporary / STATE).write_text(json.dumps(state))
    files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _flush(path)


def load_checkpoint(
    path: Path, groups: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(groups of tensors on the CPU, all or those named, state).

    Raises CheckpointError naming the file that is missing or altered.
    """
    problem = _problem(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    files = [path / name for name in json.loads((path / MANIFEST).read_text())["files"]]
    # Cloned, because safetensors returns views of the memory-mapped file.
    tensors = {
        file.stem: {name: tensor.clone() for name, tensor in load_file(file).items()}
        for file in files
        if file.suffix == ".safetensors" and (groups is None or file.stem in groups)
    }
    return tensors, json.loads((path / STATE).read_text())


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest valid checkpoint in a directory; invalid ones are skipped with a warning."""
    for path in reversed(all_checkpoints(directory)):
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is refused (%s); looking for an older one", path, problem)
    return None


def find_checkpoint(path: Path) -> Path:
    """`path` if it is a checkpoint, else the newest valid one of the run in it. Raises CheckpointError."""
    if NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        problem = _problem(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{path} has no valid checkpoint; give a checkpoint or a run directory")
    return newest


def prune(directory: Path, keep: int) -> None:
    """Removes checkpoints older than the newest `keep` valid ones, which are read in full to validate them."""
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, got {keep}")
    valid = 0
    for path in reversed(all_checkpoints(directory)):
        if valid < keep:
            valid += _problem(path) is None
            continue
        _remove(path)


def remove_after(directory: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    for path in all_checkpoints(directory):
        if path.name > f"step-{step:08d}":
            _remove(path)


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes left half-written or half-removed; no other process may be writing there."""
    for path in directory.glob(".step-*"):
        replaced = REPLACED.fullmatch(path.name)
        # One whose successor was not renamed any more is a checkpoint.
        if replaced is None or (directory / replaced[1]).exists():
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    # Renamed first, so that an interrupted removal never leaves part of a checkpoint under its name.
    doomed = path.with_name(f".{path.name}.{os.getpid()}.gone")
    path.rename(doomed)
    shutil.rmtree(doomed)


def all_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints, oldest first; a replaced one counts if a kill came before its successor was renamed."""
    if not directory.is_dir():
        return []
    paths = list(directory.iterdir())
    found = {match[1]: path for path in paths if (match := REPLACED.fullmatch(path.name))}
    found |= {path.name: path for path in paths if NAME.fullmatch(path.name)}
    return [found[name] for name in sorted(found)]


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    if not path.is_dir():
        return "there is no such directory"
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"].items()
        files = {name: {key: entry[key] for key in ("bytes", "sha256")} for name, entry in listed}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never completed"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    if STATE not in files:
        return f"its {MANIFEST} is damaged"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != expected["bytes"]:
            return f"{name} is incomplete"
        if _describe(path / name) != expected:
            return f"{name} was altered"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
