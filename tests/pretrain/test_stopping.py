"""Signals: wherever a run is, it ends soon, in order, and with an exit code that says that it is unfinished."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from checkpoints.snapshots import find_checkpoint, load_checkpoint
from objectives import Rlp
from pretrain import assembly
from pretrain.callbacks import Checkpoints
from pretrain.evaluation import held_out
from tests.pretrain.test_fit import OBJECTIVES, fit, lines, start, wait_for_step, weights

NEXT_TOKEN = OBJECTIVES["next_token"]
SLOW = """
import time
from objectives import NextToken

class Slow(NextToken):
    def after_step(self, model):
        print("training", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "1"), (signal.SIGINT, "2")])
def test_a_signal_to_the_process_group_stops_after_the_step(number, workers, tiny_run, run_directory):
    arguments = [*tiny_run, *NEXT_TOKEN, "--checkpoint.every", "null", "--data_workers", workers]
    process = start([*arguments, "--steps", "4000"], start_new_session=True)
    wait_for_step(run_directory, 3, process)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert "stopping after this step; Ctrl-C ends the run at once" in errors
    step = load_checkpoint(find_checkpoint(run_directory))[1]["step"]
    assert f"stopped at step {step} of 4000; the same command continues" in errors
    assert step == len(lines(run_directory / "metrics.jsonl")) < 4000
    assert fit(arguments, "--steps", str(step + 1), "--data_workers", "0") == 0
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == list(range(1, step + 2))


def test_a_signal_to_one_rank_stops_all(tiny_run, run_directory):
    arguments = [*tiny_run, *NEXT_TOKEN, "--checkpoint.every", "null", "--devices", "2"]
    process = start([*arguments, "--steps", "4000"])
    wait_for_step(run_directory, 3, process)
    (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGUSR1)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75, errors
    assert load_checkpoint(find_checkpoint(run_directory))[1]["step"] == len(lines(run_directory / "metrics.jsonl"))


PHASES = {
    "rollout": (Rlp, "sample"),
    "scoring": (Rlp, "thought_terms"),
    "optimizer": (torch.optim.AdamW, "step"),
    "save": (Checkpoints, "_save"),
    "evaluation": (Rlp, "evaluate"),
    "last evaluation": (Rlp, "nll_after"),
}


@pytest.fixture(scope="module")
def undisturbed():
    """Weights and records of a run that no signal has reached, once it is known."""
    return {}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_at_any_moment_of_a_step(phase, undisturbed, tiny_run, run_directory, tmp_path, monkeypatch, capsys):
    """It is saved within a step's time, and goes on as if nothing had happened."""
    arguments = [*tiny_run, *OBJECTIVES["rlp"], "--steps", "4", "--evaluation.every", "2", "--checkpoint.every", "2"]
    if not undisturbed:
        assert fit(arguments, "--run-dir", str(tmp_path / "alone")) == 0
        undisturbed |= {"weights": weights(tmp_path / "alone"), "evaluations": evaluations(tmp_path / "alone")}
    at = 4 if phase == "last evaluation" else 2
    of, name = PHASES[phase]
    original = getattr(of, name)

    def interrupted(*arguments, **options):
        steps = lines(run_directory / "metrics.jsonl") if (run_directory / "metrics.jsonl").exists() else []
        if len(steps) >= at - (phase in ("rollout", "scoring", "optimizer")):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(of, name, interrupted)
        assert fit(arguments) == 75
    assert f"forethought: stopped at {'the last ' * (at == 4)}step" in capsys.readouterr().err
    assert load_checkpoint(find_checkpoint(run_directory))[1]["step"] == at
    assert len(lines(run_directory / "metrics.jsonl")) == at
    assert [e["step"] for e in evaluations(run_directory)] == ([0] if at == 2 else [0, 2])
    assert fit(arguments) == 0
    again = weights(run_directory)
    assert [n for n, w in undisturbed["weights"].items() if not torch.equal(again[n], w)] == []
    assert evaluations(run_directory) == undisturbed["evaluations"]
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == [1, 2, 3, 4]


def evaluations(run: Path) -> list[dict]:
    return lines(run / "evaluations.jsonl")


@pytest.mark.parametrize(
    ("where", "what", "left"),
    [
        ("pretrain.run.assemble", assembly.assemble, False),
        ("pretrain.callbacks.score_held_out", held_out.score_held_out, True),
    ],
)
def test_before_the_first_step_a_signal_ends_it_at_once(
    where, what, left, tiny_run, run_directory, monkeypatch, capsys
):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return what(*arguments)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(where, interrupted)
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "1") == 75
    assert capsys.readouterr().err.splitlines()[-1] == "forethought: stopped by SIGINT; the same command starts again"
    assert run_directory.exists() == left
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert fit(tiny_run, *NEXT_TOKEN, "--steps", "1") == 0


def test_ctrl_c_after_a_signal_ends_it_at_once(tiny_run, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    process = start([*tiny_run, "--objective", "slow:Slow", "--steps", "9"], tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"training\n"
    process.send_signal(signal.SIGUSR1)
    while b"stopping after this step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # from a scheduler whose patience ends
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def test_asked_to_stop_at_its_end_a_run_does_not_begin_its_control(tiny_run, run_directory, monkeypatch, capsys):
    def last(*arguments):
        scores = held_out.score_held_out(*arguments)
        if (run_directory / "checkpoints").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return scores

    monkeypatch.setattr("pretrain.callbacks.score_held_out", last)
    assert fit(tiny_run, *OBJECTIVES["rlp"], "--control", "next_token", "--steps", "1") == 75
    assert "is finished, its control not begun; the same command goes on" in capsys.readouterr().err
    assert [e["step"] for e in lines(run_directory / "evaluations.jsonl")] == [0, 1]
    assert not (run_directory / "control").exists()


@pytest.mark.parametrize("command", [["fit", "quickstart"], ["export", "a", "b"]])
def test_a_signal_during_import_is_one_line(command, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = start([], tmp_path, command=command)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75
    assert errors == "forethought: stopped by SIGINT; the same command starts again\n"
