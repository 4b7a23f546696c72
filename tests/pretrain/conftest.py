from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import PROSE


def tiny_arguments(model: Path, at: Path) -> list[str]:
    """Arguments that make any recipe a run of seconds, on a tiny model and text of the test's own, written to `at`."""
    (at / "texts").mkdir()
    for number in range(12):
        (at / "texts" / f"{number}.txt").write_text(PROSE * 3 + f"This is text number {number}.")
    return [
        *("--model", str(model), "--data", str(at / "texts"), "--data.length", "32"),
        *("--data.held_out", "0.1", "--data.end_of_document", "<|endoftext|>", "--rows-per-step", "4"),
        *("--run-dir", str(at / "run"), "--logging.wandb", "disabled", "--evaluation.rows", "2"),
        *("--optimizer.lr", "1e-3", "--compute_dtype", "fp32"),
    ]


@pytest.fixture
def tiny_run(tiny_directory, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(tmp_path / "cache"))
    return tiny_arguments(tiny_directory, tmp_path)


@pytest.fixture
def run_directory(tmp_path) -> Path:
    return tmp_path / "run"
