"""The arms that objectives/README.md lists: each is a recipe that can be run, and reads what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import objectives
from checkpoints.references import LAB
from data_pipelines import Tokenizer, open_data
from data_pipelines.lab import LabConfig, document
from pretrain.cli import main
from pretrain.study.definition import load_study

PAGE = Path(objectives.__file__).with_name("README.md").read_text()
TOKENIZER = Tokenizer.from_directory(LAB)


def problems(path: str, settings: str, numbers: range) -> None:
    config = LabConfig.parse(f"lab:{settings}")
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps({"text": document(config, 0, n)}) + "\n" for n in numbers))


def test_the_arms_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(tmp_path / "cache"))
    problems("corpus/problems.jsonl", "tasks=sum,chain=4", range(1000))
    problems("worked.jsonl", "tasks=sum,chain=4,worked=1,garbage=0", range(1000, 1300))
    arguments = ["--documents", "40", "--marker", "=", "--length", "8"]
    assert main(["sample", "lab", "--augment", "corpus/problems.jsonl", "thinking.jsonl", *arguments]) == 0
    (arms,) = re.findall(r"```yaml\n(arms:.*?)```", PAGE, re.DOTALL)
    Path("study.yaml").write_text(f"base: quickstart\n{arms}seeds: [0]\n")
    small = ["--steps", "1", "--data.length", "128", "--data.lanes", "2", "--evaluation.rows", "1"]
    planned = load_study("study.yaml", small, "out")
    recipes = {run.cell.arm: run.recipe for run in planned.runs}

    def tokens(arm: str, rows: int) -> list[int]:
        return open_data(recipes[arm].data, TOKENIZER, 0).rows(0, rows)["tokens_BN"].flatten().tolist()

    opening, end = (TOKENIZER.token_id(tag) for tag in ("<think>", "<|endoftext|>"))
    # A worked problem has 21 tokens with its end.
    mixed = tokens("mixed-sft", 400)
    assert mixed.count(opening) * 21 / len(mixed) == pytest.approx(0.1, abs=0.005)
    augmented = tokens("thinking-augmented", 6)
    assert 30 < augmented.count(opening) == pytest.approx(augmented.count(end), abs=2)
    assert opening not in tokens("next-token", 10)
