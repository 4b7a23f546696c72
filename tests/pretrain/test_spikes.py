"""Updates that spike are skipped, and a continued run judges as one that was not interrupted; ranks skip together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from objectives import Step
from pretrain.spikes import SpikeGuard
from tests.helpers import relative_error
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
    """Given factors, multiplies the losses of these steps by them; the norms with them."""

    def spike(factors: dict[int, float]) -> None:
        class Spiking(Step):
            def losses(self, counts=None):
                for output in super().losses(counts):
                    output.loss = output.loss * factors.get(self.rng.step, 1.0)
                    yield output

        monkeypatch.setattr("pretrain.module.Step", Spiking)

    return spike


GUARDED = ["--optimizer.spike_threshold", "8", "--optimizer.spike_window", "12", "--optimizer.schedule", "constant"]


def test_a_spike_is_skipped_and_told_of_also_in_a_continued_run(spiking, tiny_run, tmp_path, capsys):
    spiking({2: 100.0, 9: 100.0, 13: 100.0})
    arguments = [*tiny_run, *OBJECTIVES["next_token"], *GUARDED]
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


SPIKY = """
from objectives import Rlp


class Spiky(Rlp):
    def text_terms(self, model, state, batch):
        part = super().text_terms(model, state, batch)
        if int(state.text.sample_id_B[0]) // 4 in (11, 13):
            for term in part.terms:
                object.__setattr__(term, "sum", term.sum * 100)
        return part
"""
LEARNING = [*OBJECTIVES["rlp"][2:], "--objective.next_token_weight", "1"]
BACK = ["--optimizer.on_spike", "rollback", "--checkpoint.every", "4"]


def test_a_run_goes_back_to_a_checkpoint_from_a_spike(spiking, tiny_run, tmp_path, capsys):
    """The oracle skips what is left out: steps 9 to 12, behind the checkpoint of step 8, and 13 and 14, behind that of
    step 12, which holds the same weights. In parts there is one of step 11, too; and two ranks hold shards."""
    arguments = [*tiny_run, "--data.held_out", "0", "--optimizer.schedule", "constant", "--run-dir"]
    spiking(dict.fromkeys(range(8, 14), float("nan")))
    assert fit([*arguments, str(tmp_path / "oracle"), "--objective", "rlp", *LEARNING, "--steps", "15"]) == 0
    spiking({11: 100.0, 13: 100.0})
    for name, parts in (("alone", ("15",)), ("parted", ("11", "15"))):
        for steps in parts:
            more = ["--objective", "rlp", *LEARNING, *GUARDED, *BACK, "--steps", steps]
            assert fit([*arguments, str(tmp_path / name), *more]) == 0
    assert (
        "2 of 15 steps were skipped: spikes of loss or gradient; for 2 of them the run went" in capsys.readouterr().err
    )
    (tmp_path / "spiky.py").write_text(SPIKY)
    more = ["--objective", "spiky:Spiky", *LEARNING, *GUARDED, *BACK, "--steps", "15", "--devices", "2"]
    process = start([*arguments, str(tmp_path / "ranks"), *more], tmp_path)
    errors = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, errors
    truth = weights(tmp_path / "oracle")
    for name in ("alone", "parted", "ranks"):
        got = weights(tmp_path / name)
        far = {key for key in truth if relative_error(got[key], truth[key]) > (1e-5 if name == "ranks" else 0)}
        assert got.keys() == truth.keys() and not far, name
        metrics = lines(tmp_path / name / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [*range(1, 16)]
        assert [m.get("rollbacks", 0) for m in metrics] == [0] * 11 + [1] * 2 + [2] * 2
        warnings = [w for w in lines(tmp_path / name / "warnings.jsonl") if w["name"] == "spike"]
        assert [w["step"] for w in warnings] == [12, 14]
        assert "weights are again those of step 8" in warnings[0]["message"]


def test_a_run_goes_back_so_many_times_and_not_without_checkpoints(spiking, tiny_run, tmp_path, capsys):
    spiking({11: 100.0, 13: 100.0})
    arguments = [*tiny_run, *OBJECTIVES["next_token"], *GUARDED, "--steps", "15", "--data.held_out", "0"]
    assert fit([*arguments, *BACK, "--optimizer.max_rollbacks", "1"]) == 0
    warnings = lines(tmp_path / "run" / "warnings.jsonl")
    assert ["its update was skipped" in w["message"] for w in warnings if w["name"] == "spike"] == [False, True]
    assert fit([*tiny_run, *OBJECTIVES["next_token"], *BACK[:2], "--steps", "15", "--checkpoint.every", "null"]) == 1
    said = capsys.readouterr().err
    assert "on_spike rollback takes a spike_threshold" in said and "set checkpoint.every" in said


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
