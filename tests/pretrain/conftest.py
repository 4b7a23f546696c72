from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import PROSE


@pytest.fixture
def tiny_run(tiny_directory, tmp_path, monkeypatch) -> list[str]:
    """Arguments that make any recipe a run of seconds, on a tiny model and text of the test's own."""
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(PROSE * 3 + f"This is text number {number}.")
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(tmp_path / "cache"))
    return [
        *("--model", str(tiny_directory), "--data", str(tmp_path / "texts"), "--data.length", "32"),
        *("--data.held_out", "0.1", "--data.end_of_document", "<|endoftext|>", "--rows-per-step", "4"),
        *("--run-dir", str(tmp_path / "run"), "--logging.wandb", "disabled", "--evaluation.rows", "2"),
        *("--optimizer.lr", "1e-3", "--compute_dtype", "fp32"),
    ]


@pytest.fixture
def run_directory(tmp_path) -> Path:
    return tmp_path / "run"
