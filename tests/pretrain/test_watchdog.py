"""One rank ends, and so do the others, with a line that names it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain import watchdog
from pretrain.stopping import Stopped
from pretrain.watchdog import Watchdog
from tests.pretrain.test_fit import OBJECTIVES, lines, start, wait_for_step

RANKS = 3


class Ranks:
    """Processes of nothing but a watchdog each. They do what they read: raise, leave, end."""

    def __init__(self, place: Path):
        self.place, context = place, multiprocessing.get_context("fork")
        self.orders = [context.Pipe() for _ in range(RANKS)]
        self.processes = [context.Process(target=self.run, args=(rank,), daemon=True) for rank in range(RANKS)]
        for process in self.processes:
            process.start()
        while len(list(place.glob("ready*"))) < RANKS:
            time.sleep(0.01)

    def run(self, rank: int) -> None:
        os.dup2(os.open(self.place / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        watching = Watchdog()
        strategy = SimpleNamespace(broadcast=self.broadcast)
        watching.setup(SimpleNamespace(global_rank=rank, world_size=RANKS, strategy=strategy), None, "fit")
        (self.place / f"ready{rank}").touch()
        while order := self.orders[rank][1].recv():
            if order == "leave":
                watching.teardown(None, None, "fit")
            else:
                watching.on_exception(None, None, order)
                os.write(2, b"at fault")
                os._exit(9)

    def broadcast(self, value):
        path = self.place / "broadcast"
        if value is not None:
            path.with_suffix(".part").write_text(json.dumps(value))
            path.with_suffix(".part").rename(path)
        while not path.exists():
            time.sleep(0.01)
        return json.loads(path.read_text())

    def tell(self, rank: int, order) -> None:
        self.orders[rank][0].send(order)

    def ended(self, *ranks: int) -> list[tuple[int, str]]:
        """Exit codes and what they said."""
        for rank in ranks:
            self.processes[rank].join(timeout=10)
        return [(self.processes[rank].exitcode, (self.place / f"stderr{rank}").read_text()) for rank in ranks]

    def name(self, rank: int) -> str:
        return f"rank {rank} (process {self.processes[rank].pid} on {os.uname().nodename})"


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "INTERVAL", 0.1)
    monkeypatch.setattr(watchdog, "SILENT", 10)
    monkeypatch.setattr(watchdog, "CLOSE", 0.5)
    started = Ranks(tmp_path)
    yield started
    for process in started.processes:
        process.kill()
        process.join()


@pytest.mark.parametrize(("dead", "speaks", "silent"), [(0, 1, 2), (1, 0, 2)])
def test_a_rank_is_killed(dead, speaks, silent, ranks):
    ranks.processes[dead].kill()
    said = f"forethought: {ranks.name(dead)} died; the same command continues\n"
    assert ranks.ended(speaks, silent) == [(1, said), (1, "")]


@pytest.mark.parametrize(("hung", "speaks", "silent"), [(0, 1, 2), (2, 0, 1)])
def test_a_rank_hangs(hung, speaks, silent, ranks):
    os.kill(ranks.processes[hung].pid, signal.SIGSTOP)
    said = f"forethought: {ranks.name(hung)} has not answered for 1 seconds; the same command continues\n"
    assert ranks.ended(speaks, silent) == [(1, said), (1, "")]


def test_a_rank_fails(ranks):
    ranks.tell(1, ValueError("bad\nin detail"))
    said = f"forethought: {ranks.name(1)}: ValueError: bad; the same command continues\n"
    assert ranks.ended(0, 1, 2) == [(1, said), (9, "at fault"), (1, "")]


def test_the_cause_is_named_and_not_its_consequences(ranks):
    ranks.tell(2, RuntimeError("connection closed by peer"))
    time.sleep(0.05)
    ranks.processes[1].kill()
    said = f"forethought: {ranks.name(1)} died; the same command continues\n"
    assert ranks.ended(0, 2) == [(1, said), (1, "")]


def test_what_all_fail_from_rank_0_says(ranks):
    for rank in (2, 0, 1):
        ranks.tell(rank, ValueError("bad"))
        time.sleep(0.02)
    assert ranks.ended(0, 1, 2) == [(9, "at fault"), (1, ""), (1, "")]


def test_one_that_is_stopped_stops_all(ranks):
    ranks.tell(1, Stopped("stopped by SIGTERM; the same command starts again"))
    said = f"forethought: {ranks.name(1)}: stopped by SIGTERM; the same command continues\n"
    assert ranks.ended(0, 1, 2) == [(75, said), (9, "at fault"), (0, "")]


def test_at_the_end_all_leave_in_any_order(ranks):
    ranks.tell(2, "leave")
    ranks.tell(2, None)
    assert ranks.ended(2) == [(0, "")]
    ranks.tell(0, "leave")
    ranks.tell(0, None)
    assert ranks.ended(0) == [(0, "")]
    time.sleep(0.5)
    ranks.tell(1, "leave")
    ranks.tell(1, None)
    assert ranks.ended(1) == [(0, "")]


def test_under_lightning_the_death_of_rank_0_ends_the_other(tiny_run, run_directory):
    arguments = [*tiny_run, *OBJECTIVES["next_token"], "--steps", "4000", "--devices", "2"]
    process = start(arguments)
    wait_for_step(run_directory, 3, process)
    process.kill()
    # Both have its stderr, which ends with the last of them.
    errors = process.communicate(timeout=60)[1].decode()
    assert f"forethought: rank 0 (process {process.pid} on {os.uname().nodename}) died" in errors
    assert "Traceback" not in errors


def test_torchrun_starts_all_again_when_one_has_died(tiny_run, run_directory):
    arguments = [*tiny_run, *OBJECTIVES["next_token"], "--steps", "40", "--checkpoint.every", "2"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m"]
    process = start(arguments, program=[*torchrun, "pretrain"])
    wait_for_step(run_directory, 5, process)
    killed = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()][1]
    os.kill(killed, signal.SIGKILL)
    errors = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 0, errors
    assert f"rank 1 (process {killed} on" in errors
    assert errors.count("started by torchrun") == 2  # at once, and not after attempts that did not find each other
    assert errors.count("continuing") == 1
    assert [m["step"] for m in lines(run_directory / "metrics.jsonl")] == [*range(1, 41)]
