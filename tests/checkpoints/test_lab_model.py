"""The shipped model `lab`: its skill is there and latent, and RLP brings it out."""

from __future__ import annotations

import json

import pytest

from checkpoints.references import LAB, resolve
from data_pipelines.lab import write_tokenizer
from pretrain.cli import main
from pretrain.opening import open_model

THINKING = ["--control", "null", "--evaluation.rows", "16", "--checkpoint.every", "null"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_has_the_labs_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((LAB / name).read_text()) == json.loads((tmp_path / name).read_text())
    assert resolve("lab") == resolve("random:lab") == LAB
    opened = open_model("lab")
    assert sum(p.numel() for p in opened.model.parameters()) < 1e6


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> list[dict]:
    """Evaluations before and after 40 steps of the quickstart."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    more = ["--steps", "40", "--evaluation.every", "null", "--run-dir", str(directory)]
    assert main(["fit", "quickstart", *THINKING, *more]) == 0
    return lines(directory / "evaluations.jsonl")


def test_the_skill_is_latent(learned):
    """It is near certain after a right thought, writes one less than half the time, and is at chance without."""
    before = learned[0]
    assert before["counterfactual"]["right"]["nll"] < 0.3
    assert 0.25 < before["thought_right"] < 0.5
    assert before["nll_thought"] > 1.2
    assert before["accuracy_text"] < 0.2


def test_rlp_brings_it_out(learned):
    """And the thought's content does it: without the order of its words, or with others', it is worth nothing."""
    after = learned[-1]
    assert after["thought_right"] > 0.8
    assert after["nll_thought"] < 0.5
    for condition in ("other", "shuffled", "filler"):
        assert after["counterfactual_minus_own"][condition]["low"] > 1.0, condition
