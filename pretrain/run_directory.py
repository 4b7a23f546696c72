"""The files of a run.

recipe.yaml, tokenizer/, metrics.jsonl, evaluations.jsonl, downstream.jsonl, samples.jsonl, warnings.jsonl,
checkpoints/, downstream/, report.html and report.png, lock, and control/, a run of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import yaml

from checkpoints.errors import CheckpointError
from checkpoints.snapshots import Snapshot, all_checkpoints, newest_snapshot, open_snapshot, remove_leftovers
from pretrain.recipe import Recipe, RecipeError, free_keys
from pretrain.recipe_files import Tree, read_yaml, recipe_from_tree, recipe_to_tree, recipe_to_yaml

log = logging.getLogger(__name__)
# Old names in the records of older runs.
RENAMED = {
    "flat_groups": "zero_variance_groups",
    "reward_spread": "reward_std",
    "causal": "counterfactual",
    "causal_minus_own": "counterfactual_minus_own",
}
# The model's card comes along for its licence.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md"),
)


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be written. The message is one line: what cannot, and the way out."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one line what cannot be written. Raises RunDirectoryError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way = "make room, and the same command continues" if full else "choose another --run-dir"
        raise RunDirectoryError(f"{path} cannot be written ({error.strerror}); {way}") from None


def is_run(path: str | Path) -> bool:
    """Whether it is a run directory, or a checkpoint in one."""
    return (Path(path) / "recipe.yaml").exists() or (Path(path) / "state.json").exists()


class RunDirectory:
    """Paths of a run, and its append-only records."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.downstream = self.path / "downstream.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.warnings = self.path / "warnings.jsonl"
        self.control = self.path / "control"
        self.records = (self.metrics, self.evaluations, self.downstream, self.samples, self.warnings)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of the directory; makes it, and removes it again if it stays empty.

        A POSIX record lock: it ends with the process, however that ends, and forked processes do not inherit it.
        Hazard: if other code of this process closes the file, the lock is released. Raises RecipeError if another
        process holds it, RunDirectoryError if it cannot be made.
        """
        path = self.path / "lock"
        with writing(self.path):
            handle = _lock(path)
        try:
            # Before anything is written, for which there may be room only then.
            with writing(self.path):
                remove_leftovers(self.checkpoints)
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                if list(self.path.iterdir()) == [path]:
                    path.unlink()
                    self.path.rmdir()
            os.close(handle)

    def settle(self, recipe: Recipe, restart: bool = False) -> Recipe:
        """The recipe with what it leaves to the run: the schedule's length, and where the run last went on from."""
        run = self.load_recipe() if self.recipe.exists() and not restart else recipe
        optimizer = recipe.optimizer
        unit = recipe.budget.unit
        if (optimizer.schedule != "constant" or recipe.stages) and optimizer.schedule_length(unit) is None:
            length = run.optimizer.schedule_length(unit) or getattr(run, unit)
            optimizer = optimizer.replaced(**{f"schedule_{unit}": length})
        # Only a command that names a step goes back to it; the next one, without, continues.
        step = recipe.continue_from or (run.continue_from if optimizer == run.optimizer else None)
        return recipe.replaced(optimizer=optimizer, continue_from=step)

    def check(self, recipe: Recipe) -> None:
        """Raises RecipeError, naming what differs, if the directory holds a run of another recipe."""
        if not self.recipe.exists():
            return
        free = free_keys(recipe) | ({"optimizer"} if self._goes_back(recipe) else set())
        if differing := self.differing(recipe, free):
            optimizer = any(key.startswith("optimizer.") for key in differing)
            raise RecipeError(
                f"{self.path} holds a run of another recipe ({', '.join(differing)} differ); "
                f"choose another --run-dir, or repeat the command that made it"
                + ("; optimizer.* may change from a checkpoint on, by --continue-from STEP" if optimizer else "")
            )

    def differing(self, recipe: Recipe, free: Set[str]) -> list[str]:
        """Dotted keys, but for those that are free, in which a settled recipe is not that of the run."""
        return [*_differences(recipe_to_tree(self.settle(self.load_recipe())), recipe_to_tree(recipe), free)]

    def changes(self, recipe: Recipe) -> str:
        """What a continuation by this recipe changes, as `key old → new, …`."""
        if not self.recipe.exists():
            return ""
        differing = _differences(recipe_to_tree(self.load_recipe()), recipe_to_tree(recipe), {"run_dir"})
        return ", ".join(f"{key} {json.dumps(a)} → {json.dumps(b)}" for key, (a, b) in differing.items())

    def _goes_back(self, recipe: Recipe) -> bool:
        """Whether the recipe goes on from a step that it names, as the command that is repeated does not."""
        if recipe.continue_from is None or not self.recipe.exists():
            return False
        run = self.settle(self.load_recipe())
        return (run.continue_from, run.optimizer) != (recipe.continue_from, recipe.optimizer)

    def checkpoint(self, recipe: Recipe) -> Snapshot | None:
        """What the recipe continues from: the checkpoint that it names, or the newest; None if there are none.

        Raises RecipeError if what it names is not there, CheckpointError if that or all that there are are invalid.
        """
        found = all_checkpoints(self.checkpoints)
        if self._goes_back(recipe):
            named = {path.name: path for path in found}.get(f"step-{recipe.continue_from:08d}")
            if named is None:
                there = ", ".join(str(int(path.name[-8:])) for path in found) or "none"
                raise RecipeError(
                    f"--continue-from {recipe.continue_from}: {self.path} has no such checkpoint; there are: {there}"
                )
            return open_snapshot(named)
        newest = newest_snapshot(self.checkpoints)
        if newest is None and found:
            raise CheckpointError(
                f"no checkpoint in {self.checkpoints} is valid ({', '.join(path.name for path in found)}); restore "
                "one, or give --restart to remove them and all records, and begin anew"
            )
        return newest

    def clear(self) -> None:
        """Removes a run and its control, to begin anew."""
        for path in (self.recipe, *self.records):
            path.unlink(missing_ok=True)
        for path in (
            self.checkpoints,
            self.tokenizer,
            self.control,
            *(self.path / name for name in ("downstream", "wandb")),
        ):
            shutil.rmtree(path, ignore_errors=True)

    def create(self, recipe: Recipe, tokenizer_directory: Path) -> None:
        """Writes recipe and tokenizer into the directory."""
        with writing(self.tokenizer):
            self.tokenizer.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (tokenizer_directory / name).exists():
                write_durably(self.tokenizer / name, (tokenizer_directory / name).read_text(encoding="utf-8"))
        write_durably(self.recipe, recipe_to_yaml(recipe))

    def load_recipe(self) -> Recipe:
        """Raises RecipeError, in one line, for a recipe that cannot be read."""
        try:
            return recipe_from_tree(read_yaml(self.recipe.read_text(encoding="utf-8")))
        except (RecipeError, yaml.YAMLError, UnicodeDecodeError) as error:
            first, *more = str(error).removeprefix("the recipe cannot be run:\n  - ").splitlines()
            others = f" and {len(more)} more" if more else ""
            raise RecipeError(
                f"{self.recipe} cannot be read ({first}{others}); restore it, or choose another --run-dir"
            ) from None

    def rewind(self, step: int) -> None:
        """Drops records of steps after `step`: the continuation will write them again."""
        for path in self.records:
            if path.exists():
                kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
                write_durably(path, "".join(line + "\n" for line in kept))

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether the records are those of a whole run of the recipe, its last evaluation included."""
        records = self.read(self.metrics)
        if not records:
            return False
        step, flops, seconds = (records[-1][name] for name in ("step", "flops", "seconds"))
        evaluated = recipe.data.held_out == 0 or self.is_evaluated(step)
        return evaluated and step >= recipe.budget.last_step(step, flops, seconds)

    def is_evaluated(self, step: int) -> bool:
        return any(record["step"] == step for record in self.read(self.evaluations))

    def append(self, path: Path, record: dict[str, Any]) -> None:
        # NaN is not JSON.
        finite = _mapped(record, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def read(self, path: Path) -> list[dict[str, Any]]:
        """The records of a file, those of older runs by today's names; null is read as nan."""
        lines = _complete_lines(path) if path.exists() else []
        records = [_mapped(json.loads(line), lambda x: math.nan if x is None else x) for line in lines]
        return [{RENAMED.get(name, name): value for name, value in record.items()} for record in records]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A JSON value with all that is neither mapping nor list changed."""
    if isinstance(value, dict):
        return {name: _mapped(below, change) for name, below in value.items()}
    return [_mapped(below, change) for below in value] if isinstance(value, (list, tuple)) else change(value)


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file that may end in the half-written one of a killed process."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _lock(path: Path) -> int:
    """The handle of a file that is now locked. Raises RecipeError if another process has locked it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(handle, 100).decode(errors="replace").strip()
            os.close(handle)
            raise RecipeError(
                f"{path.parent} is in use by another run ({owner or 'unknown'}); "
                "wait until it has ended, stop it, or choose another --run-dir"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s); see to it that only one run uses it", path.parent, error.strerror)
        # It may have been removed before it was locked, and then excludes nobody.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            # Whose it is only tells others; on a full disk, what was left behind is still to be removed.
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        os.close(handle)


def _differences(old: Tree, new: Tree, free: Set[str], where: str = "") -> dict[str, tuple[Any, Any]]:
    """By dotted key, the values that differ."""
    differing: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        path = f"{where}.{key}" if where else key
        if path in free:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            differing |= _differences(a, b, free, path)
        elif a != b:
            differing[path] = (a, b)
    return differing
