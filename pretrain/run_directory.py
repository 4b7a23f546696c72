"""The files of a run.

recipe.yaml, tokenizer/, metrics.jsonl, evaluations.jsonl, samples.jsonl, warnings.jsonl, checkpoints/, report.html and
report.png, and control/, a run of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from pretrain.recipe import Recipe, RecipeError, recipe_from_tree, recipe_to_tree, recipe_to_yaml

# What may differ between a run and its continuation: nothing that changes what a step computes.
FREE_KEYS = (
    "steps",
    "control",
    "run_dir",
    "micro_batch_rows",
    "activation_checkpointing",
    "objective.anchors_at_once",
    "devices",
    "nodes",
    "data_workers",
    "evaluation",
    "checkpoint",
    "logging",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class RunDirectory:
    """Paths of a run, and its append-only records."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.warnings = self.path / "warnings.jsonl"
        self.control = self.path / "control"

    def check(self, recipe: Recipe) -> None:
        """Raises RecipeError naming what differs if the directory holds a run of another recipe."""
        if self.recipe.exists():
            differing = _differences(yaml.safe_load(self.recipe.read_text()), recipe_to_tree(recipe))
            if differing:
                raise RecipeError(
                    f"{self.path} holds a run of another recipe ({', '.join(differing)} differ); "
                    "choose another --run-dir, or repeat the command that made it"
                )

    def create(self, recipe: Recipe, tokenizer_directory: Path) -> None:
        """Makes the directory, or brings its recipe up to date."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            if (tokenizer_directory / name).exists():
                shutil.copyfile(tokenizer_directory / name, self.tokenizer / name)
        _write_durably(self.recipe, recipe_to_yaml(recipe))

    def load_recipe(self) -> Recipe:
        return recipe_from_tree(yaml.safe_load(self.recipe.read_text()))

    def rewind(self, step: int) -> None:
        """Drops records of steps after `step`: the continuation will write them again."""
        for path in (self.metrics, self.evaluations, self.samples, self.warnings):
            if path.exists():
                kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
                _write_durably(path, "".join(line + "\n" for line in kept))

    def append(self, path: Path, record: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self, path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in _complete_lines(path)] if path.exists() else []


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file that may end in the half-written one of a killed process."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    differing = []
    for key in sorted(old.keys() | new.keys()):
        path = f"{where}.{key}" if where else key
        if path in FREE_KEYS:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            differing += _differences(a, b, path)
        elif a != b:
            differing.append(path)
    return differing
