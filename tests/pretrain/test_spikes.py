"""Updates that spike are skipped, and a continued run judges as one that was not interrupted; ranks skip together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from objectives import Step
from pretrain.spikes import SpikeGuard
from tests.pretrain.test_fit import OBJECTIVES, fit, lines, start, weights

WINDOW = 16


def test_what_a_spike_is_by_numpy():
    """Values of a heavy tail, so that some are on either side of the threshold."""
    rng = np.random.default_rng(0)
    losses, norms = 3 + rng.standard_t(1, 300) * 0.1, np.abs(1 + rng.standard_t(1, 300) * 0.2)
    guard, found = SpikeGuard(6.0, WINDOW), []
    for step in range(300):
        spike = guard.judge(0, losses[step], norms[step])
        expected = []
        for metric, values, least in (("grad_norm", norms, None), ("loss", losses, 0.01)):
            before = values[max(0, step - WINDOW) : step]
            if len(before) >= WINDOW // 2:
                middle = np.median(before)
                deviation = 1.4826 * np.median(np.abs(before - middle))
                deviation = max(deviation, 0.01 * middle if least is None else least)
                expected += [metric] if (values[step] - middle) / deviation > 6.0 else []
        assert (spike is not None) == bool(expected), step
        if spike is not None:
            assert spike.metric == expected[0]
        found += expected
    assert {*found} == {"loss", "grad_norm"}
    assert guard.count >= 5


def test_rounding_is_no_spike_and_a_new_level_becomes_normal():
    guard = SpikeGuard(10.0, WINDOW)
    assert all(guard.judge(0, 1e-9 * (n % 7 == 6), 1.0) is None for n in range(50))
    assert [guard.judge(0, 5.0, 1.0) is not None for _ in range(20)].count(True) == WINDOW // 2


@pytest.fixture
def spiking(monkeypatch):
    """The losses of some steps are a hundred times as large; the norms with them."""

    class Spiking(Step):
        def losses(self, counts=None):
            for output in super().losses(counts):
                output.loss = output.loss * (100 if self.rng.step in (2, 9, 13) else 1)
                yield output

    monkeypatch.setattr("pretrain.module.Step", Spiking)


def test_a_spike_is_skipped_and_told_of_also_in_a_continued_run(spiking, tiny_run, tmp_path, capsys):
    guarded = ["--optimizer.spike_threshold", "8", "--optimizer.spike_window", "12", "--optimizer.schedule", "constant"]
    arguments = [*tiny_run, *OBJECTIVES["next_token"], *guarded]
    for name, parts in (("alone", ("15",)), ("parted", ("9", "15"))):
        for steps in parts:
            assert fit(arguments, "--steps", steps, "--run-dir", str(tmp_path / name)) == 0
    assert "2 of 15 steps were skipped: spikes of loss or gradient" in capsys.readouterr().err
    alone, parted = weights(tmp_path / "alone"), weights(tmp_path / "parted")
    assert [name for name, tensor in alone.items() if not torch.equal(tensor, parted[name])] == []
    metrics = lines(tmp_path / "parted" / "metrics.jsonl")
    # Not the third: six steps must be there to judge by.
    assert [m["spikes"] for m in metrics] == [0] * 9 + [1] * 4 + [2] * 2
    assert [m["skipped"] for m in metrics] == [0] * 15
    warnings = [w for w in lines(tmp_path / "parted" / "warnings.jsonl") if w["name"] == "spike"]
    assert [(w["step"], w["metric"]) for w in warnings] == [(10, "grad_norm"), (14, "grad_norm")]
    assert "robust standard deviations above the median" in warnings[0]["message"]
    assert parted["optimizer/decoder.norm.weight/step"] == 13  # Adam has not seen the two


ONE_RANK = """
import torch.distributed as dist

from objectives import NextToken


class OneRank(NextToken):
    texts = 0

    def text_terms(self, model, state, batch):
        part = super().text_terms(model, state, batch)
        OneRank.texts += 1
        if dist.get_rank() == 1 and OneRank.texts in (2, 3):
            for term in part.terms:
                object.__setattr__(term, "sum", term.sum * float("nan"))
        return part
"""


def test_what_one_rank_cannot_use_all_skip(tiny_run, run_directory, tmp_path):
    (tmp_path / "one_rank.py").write_text(ONE_RANK)
    arguments = ["--objective", "one_rank:OneRank", "--devices", "2", "--strategy", "ddp", "--data.held_out", "0"]
    process = start([*tiny_run, *arguments, "--steps", "5"], tmp_path)
    errors = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 0, errors
    metrics = lines(run_directory / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 1, 2, 2, 2]
    assert [m["loss"] is None for m in metrics] == [False, True, True, False, False]
