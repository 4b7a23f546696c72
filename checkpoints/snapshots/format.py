"""What a snapshot is on disk, and how it is opened: complete and unaltered, or refused by name.

    step-<8 digits>/
        model.safetensors, optimizer.safetensors, …    or model-00001-of-00002.safetensors, …: what each rank held
        layout.json     of each tensor: shape, dtype, and which file has which part of it
        state.json      everything that is no tensor
        manifest.json   size and sha256 of the files above, and a sha256 of its own; written last

Tensors are read by the slices that are wanted, so that any number of ranks, in any strategy, continues from it.
Snapshots of format 1 have whole tensors and no layout.json. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.tensors import DTYPES, NAMES, Piece, StoredTensor, stored_in

log = logging.getLogger(__name__)
MANIFEST, STATE, LAYOUT = "manifest.json", "state.json", "layout.json"
FORMAT = 2
NAME = re.compile(r"step-\d{8}")
# A snapshot to be removed because its step is being saved again.
REPLACED = re.compile(r"\.(step-\d{8})\.\d+\.old")
GROUP = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors")
Tensors = Mapping[str, Mapping[str, Tensor]]
# group → name → {"shape", "dtype", "pieces": [[file, offset, shape], …]}
Layout = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Snapshot:
    """An opened snapshot. tensors: by group and name, to be read when they are wanted."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, StoredTensor]]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def file_name(group: str, rank: int, ranks: int) -> str:
    return f"{group}.safetensors" if ranks == 1 else f"{group}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def open_snapshot(path: Path, groups: Collection[str] | None = None) -> Snapshot:
    """Opens a snapshot, after reading all files of the groups that are wanted (by default all) to see that they are
    what was written. Raises CheckpointError naming the file that is missing or altered."""
    problem = problem_of(path, groups)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    return _opened(path, groups)


def _opened(path: Path, groups: Collection[str] | None) -> Snapshot:
    """One whose files are known to be what was written. Raises CheckpointError if that is no snapshot."""
    try:
        files = _listed(path)
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if LAYOUT in files:
            layout: Layout = json.loads((path / LAYOUT).read_text(encoding="utf-8"))
            tensors = {
                group: {name: _stored(path, name, entry) for name, entry in named.items()}
                for group, named in layout.items()
                if groups is None or group in groups
            }
        else:
            there = {group_of(name): path / name for name in files if group_of(name)}
            tensors = {group: stored_in(file) for group, file in there.items() if groups is None or group in groups}
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: it is no snapshot ({error})") from None
    return Snapshot(path, state, tensors)


def _stored(path: Path, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    pieces = tuple(Piece(path / file, name, tuple(offset), tuple(shape)) for file, offset, shape in entry["pieces"])
    return StoredTensor(tuple(entry["shape"]), DTYPES[entry["dtype"]], pieces)


def group_of(name: str) -> str:
    """The group that a file has tensors of; empty for another file."""
    match = GROUP.fullmatch(name)
    return "" if match is None else match[1]


def load_checkpoint(
    path: Path, groups: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(groups of whole tensors on the CPU, all or those named, state).

    Raises CheckpointError naming the file that is missing or altered.
    """
    snapshot = open_snapshot(path, groups)
    whole = {group: {name: t.whole() for name, t in named.items()} for group, named in snapshot.tensors.items()}
    return whole, snapshot.state


def newest_snapshot(directory: Path, groups: Collection[str] | None = None, every: int = 1) -> Snapshot | None:
    """The newest valid snapshot in a directory, of every so many steps; invalid ones are skipped with a warning."""
    for path in reversed(all_checkpoints(directory)):
        if int(path.name.removeprefix(".")[5:13]) % every:
            continue
        problem = problem_of(path, groups)
        if problem is None:
            return _opened(path, groups)
        log.warning("checkpoint %s is refused (%s); looking for an older one", path, problem)
    return None


def newest_checkpoint(directory: Path) -> Path | None:
    """The path of the newest valid snapshot in a directory; invalid ones are skipped with a warning."""
    newest = newest_snapshot(directory)
    return None if newest is None else newest.path


def find_snapshot(path: Path, groups: Collection[str] | None = None) -> Snapshot:
    """That at `path` if it is a snapshot, else the newest valid one of the run in it. Raises CheckpointError."""
    if NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return open_snapshot(path, groups)
    newest = newest_snapshot(path / "checkpoints", groups)
    if newest is None:
        raise CheckpointError(f"{path} has no valid checkpoint; give a checkpoint or a run directory")
    return newest


def find_checkpoint(path: Path) -> Path:
    """`path` if it is a snapshot, else the newest valid one of the run in it. Raises CheckpointError."""
    return find_snapshot(path).path


def all_checkpoints(directory: Path) -> list[Path]:
    """Snapshots, oldest first; a replaced one counts if a kill came before its successor was renamed."""
    if not directory.is_dir():
        return []
    paths = list(directory.iterdir())
    found = {match[1]: path for path in paths if (match := REPLACED.fullmatch(path.name))}
    found |= {path.name: path for path in paths if NAME.fullmatch(path.name)}
    return [found[name] for name in sorted(found)]


def manifest_text(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The only text that a manifest of these files can have, so that no byte of it can change unnoticed."""
    content = {"format": FORMAT, "files": {name: files[name] for name in sorted(files)}}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1)


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest. Raises the errors that `problem_of` names."""
    text = (path / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(text)
    files = {name: {key: entry[key] for key in ("bytes", "sha256")} for name, entry in content["files"].items()}
    whole = {STATE} if content["format"] == 1 else {STATE, LAYOUT}
    if content["format"] not in (1, FORMAT) or not whole <= files.keys():
        raise KeyError(MANIFEST)
    if content["format"] == FORMAT and text != manifest_text(files):
        raise KeyError(MANIFEST)
    if any(Path(name).name != name for name in files):
        raise KeyError(MANIFEST)
    return files


def problem_of(path: Path, groups: Collection[str] | None = None, read: bool = True) -> str | None:
    """What is wrong with a snapshot, if anything: with the files of the groups that are wanted, by default all.

    read: reads the files in full; otherwise only their sizes are compared.
    """
    if not path.is_dir():
        return "there is no such directory"
    try:
        files = _listed(path)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never completed"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    wanted = {n: e for n, e in files.items() if groups is None or not group_of(n) or group_of(n) in groups}
    for name, expected in wanted.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != expected["bytes"]:
            return f"{name} is incomplete"
    if read:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing holds no lock
            digests = pool.map(lambda name: _sha256(path / name), wanted)
            for (name, expected), digest in zip(wanted.items(), digests, strict=True):
                if digest != expected["sha256"]:
                    return f"{name} was altered"
    return None


def _sha256(path: Path) -> str | None:
    """None for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def layout_entry(tensor: Tensor, piece: Tensor, offset: tuple[int, ...], file: str) -> dict[str, Any]:
    """What the layout says of a tensor of which `piece` is in `file`."""
    pieces = [[file, list(offset), list(piece.shape)]]
    return {"shape": list(tensor.shape), "dtype": NAMES[tensor.dtype], "pieces": pieces}


def merged(layouts: Collection[Layout]) -> Layout:
    """The layout of what several ranks have written."""
    whole: Layout = {}
    for layout in layouts:
        for group, named in layout.items():
            for name, entry in named.items():
                known = whole.setdefault(group, {}).setdefault(name, {**entry, "pieces": []})
                known["pieces"] += entry["pieces"]
    return whole
