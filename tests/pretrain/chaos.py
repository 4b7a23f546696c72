"""Runs that are killed at random moments and started again end as the run that was left alone:

    python -m tests.pretrain.chaos --objective rlp [--kills 100] [--steps 300] [--ranks 1 2 4] [--fork [--fp64]]
        [--directory D]

One rank or all are killed with SIGKILL, in steps, saves, evaluations and while they start; the run goes on with another
number of ranks and of data workers. It ends with the weights, optimizer and lanes of the run that was left alone: to
the bit where --ranks names one number, else the weights up to the order of sums. Each step is in metrics.jsonl
once, and each evaluation in evaluations.jsonl; no checkpoint is lost that had its name; and where one rank is killed
the others are gone within a minute, with a line that names it. With --directory the same command goes on after an
interruption. With --fork ranks are forked from this process, as torchrun would start them, which saves most of what
100 starts cost: importing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_only

import pretrain.assembly
import pretrain.run
import pretrain.state
from checkpoints.hugging_face import export
from checkpoints.loading import empty_model
from checkpoints.snapshots import find_checkpoint, load_checkpoint
from models.decoder import Decoder
from models.thinking import MixingHead, ThinkingModel
from pretrain import cli
from tests.data_pipelines.conftest import byte_level, save
from tests.data_pipelines.streams import documents, write
from tests.helpers import relative_error, tiny_config

# Relative norm of each weight, where the number of ranks changed. Adam's moments are not compared then: an objective's
# gradient may be the small difference of large ones, and their sum is another with every order.
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9}
# A step that is lost or taken twice moves weights by 1e-4 of their norm. With a hundred times this rate rounding errors
# grow tenfold in ten steps, until thoughts are sampled otherwise.
LEARNING_RATE = 1e-5
GONE = 60.0  # seconds after the death of a rank
AGENT = 30  # seconds after which what has started the ranks ends the others; torchrun would at once
OBJECTIVES: dict[str, dict] = {
    "next_token": {"name": "next_token"},
    # In fp32 its delimiters, which learn at a hundred times the rate from rewards that are small differences, are
    # 3e-3 apart after 100 kills: compare it on one number of ranks, or in fp64.
    "quiet_star": {"name": "quiet_star", "length": 3, "lookahead": 2, "thoughts": 2, "policy_weight": 1.0},
    "rlp": {"name": "rlp", "length": 4, "thoughts": 2, "anchors_per_document": 1, "min_prefix": 4},
    "rpt": {
        "name": "rpt",
        "length": 4,
        "thoughts": 8,
        "anchors_per_document": 4,
        "min_prefix": 4,
        "template": "forced",
        "box_open": "",
        "box_close": "",
        "answer_length": 1,
        "temperature": 1.0,
    },
}


def write_model(directory: Path) -> Path:
    tokenizer = save(byte_level("<|endoftext|>"), directory / "tokenizer", eos_token="<|endoftext|>")
    decoder = Decoder(tiny_config(vocab_size=300, max_positions=128))
    decoder.init_weights(torch.Generator().manual_seed(0))
    export(ThinkingModel(decoder), directory / "model", tokenizer)
    return directory / "model"


def recipe(directory: Path, model: str, objective: str, steps: int) -> Path:
    web, code = (write(kind, directory / kind, documents(300, n)) for n, kind in enumerate(("jsonl", "tar")))
    mixture = {"web": {"reference": web, "weight": [[0, 3.0], [steps, 1.0]]}, "code": {"reference": code}}
    data = {"mixture": mixture, "lanes": 8} | ({"end_of_document": None} if model == "lab" else {})
    return write_recipe(directory / f"{objective}.yaml", model, OBJECTIVES[objective], steps, data)


def write_recipe(path: Path, model: str | Path, objective: dict, steps: int, data: dict) -> Path:
    """A YAML file; JSON is YAML."""
    settings = {
        "steps": steps,
        "objective": objective,
        "model": str(model),
        "data": {"length": 48, "lanes": 4, "end_of_document": "<|endoftext|>", **data},
        "rows_per_step": 4,
        "compute_dtype": "fp32",
        # Adam's first steps are signs of gradients, which rounding turns where they are nearly 0: not by this eps.
        "optimizer": {"lr": LEARNING_RATE, "eps": 1e-3},
        "evaluation": {"rows": 2, "counterfactuals": False, "every": max(1, steps // 6)},
        "checkpoint": {"every": 3},
        "logging": {"wandb": "disabled", "csv": False},
    }
    path.write_text(json.dumps(settings))
    return path


def use_fp64() -> None:
    """From here on models are in fp64, and a new mixing head mixes: with weights of 0 it would reward Quiet-STaR's
    thoughts with rounding errors."""
    init = MixingHead.init_weights

    def init_weights(head: MixingHead, *arguments: Any) -> None:
        init(head, *arguments)
        torch.nn.init.constant_(head.out.weight, 0.05)

    def empty(*arguments: Any, **named: Any) -> ThinkingModel:
        return empty_model(*arguments, **named).double()

    MixingHead.init_weights = init_weights  # type: ignore[method-assign]
    pretrain.assembly.empty_model = pretrain.state.empty_model = empty


def fit(recipe: Path, run: Path, workers: int) -> list[str]:
    return ["fit", str(recipe), "--run-dir", str(run), "--data_workers", str(workers)]


def start(recipe: Path, run: Path, workers: int, ranks: int = 1, log: Path | None = None) -> subprocess.Popen:
    """log: what it says goes there; None: to a pipe."""
    command = [sys.executable, "-m", "pretrain", *fit(recipe, run, workers), "--devices", str(ranks)]
    said = subprocess.PIPE if log is None else log.open("w")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, start_new_session=True, stdout=said, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen) -> str:
    """What it said."""
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


class Process(Protocol):
    """What is killed: one process or, if they were forked, that which waits for all ranks. It leads its group."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


class Forked:
    """The ranks of a run, forked from this process, in a group that is led by their parent. Where one dies the others
    have AGENT seconds to end by themselves, as they do once they watch each other."""

    def __init__(self, recipe: Path, run: Path, workers: int, ranks: int, log: Path):
        self.returncode: int | None = None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            with log.open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            started = [_rank(fit(recipe, run, workers), rank, ranks, port) for rank in range(ranks)]
            os._exit(_wait_for(started))
        while os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        self._wait(0)
        assert self.returncode is not None
        return self.returncode

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _wait_for(ranks: list[int]) -> int:
    """The exit code of them all."""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    failed = 0
    for _ in ranks:
        if os.wait()[1] and not failed:
            failed = 1
            signal.alarm(AGENT)
    return failed


def _rank(arguments: list[str], rank: int, ranks: int, port: int) -> int:
    """Forks a rank that knows what torchrun would tell it; its process id."""
    if pid := os.fork():
        return pid
    if ranks > 1:
        # Which Lightning reads when it is imported.
        rank_zero_only.rank = rank
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        places |= {"GROUP_WORLD_SIZE": 1, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in places.items()} | {"TORCHELASTIC_RUN_ID": "forked"}
    code = 1
    try:
        code = cli.main(arguments)
    finally:
        if (error := sys.exception()) is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        os._exit(code)


def final(run: Path, steps: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and optimizer, and lanes, after the last step."""
    tensors, state = load_checkpoint(find_checkpoint(run / "checkpoints" / f"step-{steps:08d}"))
    # Not the global generators: no objective uses them, and every process has others to begin with.
    kept = {f"{group}/{name}": t for group, named in tensors.items() if group != "random" for name, t in named.items()}
    return kept, state["lanes"]


class Chaos:
    """A run that is killed. What has happened to it so far is in `kills.jsonl`."""

    def __init__(self, directory: Path, recipe: Path, steps: int, ranks: Sequence[int], seed: int, fork: bool):
        self.directory, self.recipe, self.steps, self.ranks, self.seed = directory, recipe, steps, ranks, seed
        self.fork = fork
        self.run, self.kills = directory / "killed", directory / "kills.jsonl"
        self.happened = (
            [json.loads(line) for line in self.kills.read_text().splitlines()] if self.kills.exists() else []
        )
        # The newest checkpoint of which a killed process knew that it was there, and that which the next goes on from.
        self.durable = self.promised = max([0, *(record["durable"] for record in self.happened)])
        self.seconds_to_start = 10.0

    def begin(self) -> Process:
        self.rng = random.Random(f"{self.seed}/{len(self.happened)}")
        self.now = self.rng.choice(self.ranks)
        self.log = self.directory / f"log-{len(self.happened):03d}.txt"
        self.began = time.monotonic()
        begin = Forked if self.fork else start
        return begin(self.recipe, self.run, self.rng.choice((0, 2)), self.now, self.log)

    def kill(self, kills: int) -> bool:
        """Starts it and kills it; false if it came to its end before."""
        process = self.begin()
        try:
            return self._kill(process, kills)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _kill(self, process: Process, kills: int) -> bool:
        rng = self.rng
        before = self.recorded()
        left = self.steps - before
        some = 2 * left // (kills - len(self.happened))
        moment, further = rng.choice(("start", "step", "step", "save", "save")), min(rng.randint(1, some + 1), left - 4)
        if further < 1:
            moment = "start"
        if moment == "start":
            wait(process, lambda: False, rng.random() * self.seconds_to_start)
        else:
            wait(process, lambda: self.recorded() > before)
            self.seconds_to_start = time.monotonic() - self.began
            wait(process, lambda: self.recorded() >= before + further)
            seconds_per_step = (time.monotonic() - self.began - self.seconds_to_start) / further
            if moment == "save":
                wait(process, lambda: any((self.run / "checkpoints").glob(".*")), 5.0)
            time.sleep(rng.random() * (0.02 if moment == "save" else seconds_per_step))
        if process.poll() is not None:
            assert process.returncode == 0, self.log.read_text()
            return False
        processes = children(process.pid) if self.fork else [process.pid, *other_ranks(process.pid)]
        self.durable = max([self.durable, *(int(path.name[-8:]) for path in self.named())])
        one = len(processes) == self.now > 1 and rng.random() < 0.5
        rank = rng.randrange(self.now) if one else None
        if rank is None:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(processes[rank], signal.SIGKILL)
        took = self.until_gone(process)
        said = self.log.read_text()
        if one and moment != "start":
            named = f"rank {rank} (process {processes[rank]} on", f"[rank: {rank}] Child process with PID"
            assert any(name in said for name in named), said
        self.check_start(said)
        record = {"moment": moment, "rank": rank, "ranks": self.now, "step": self.recorded()}
        record |= {"durable": self.durable, "gone": round(took, 1)}
        self.happened.append(record)
        with self.kills.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return True

    def finish(self) -> None:
        process = self.begin()
        assert process.wait() == 0, self.log.read_text()
        self.check_start(self.log.read_text())

    def check_start(self, said: str) -> None:
        """It went on from the newest checkpoint that had its name, or a later one."""
        continued = re.search(r"(?:continuing .* at|is already at) step (\d+) of", said)
        assert continued is None or int(continued[1]) >= self.promised, said
        self.promised = self.durable

    def until_gone(self, process: Process) -> float:
        """Seconds until nothing of it is left."""
        began = time.monotonic()
        while process.poll() is None or alive(process.pid):
            if time.monotonic() - began > GONE:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"not gone after {GONE:.0f} seconds: {self.log.read_text()}")
            time.sleep(0.02)
        return time.monotonic() - began

    def recorded(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def named(self) -> list[Path]:
        return [*(self.run / "checkpoints").glob("step-*")]


def wait(process: Process, until: Callable[[], bool], seconds: float = 600.0) -> None:
    """Until something holds, the process has ended, or time is up."""
    deadline = time.monotonic() + seconds
    while not until() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def other_ranks(process: int) -> list[int]:
    """Those that rank 0 has started, in their order; data workers have no rank of their own in their environment."""
    found = {}
    for child in children(process):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(entry[11:]): child for entry in environment if entry.startswith(b"LOCAL_RANK=")}
    return [found[rank] for rank in sorted(found)]


def alive(group: int) -> bool:
    """Whether a process group has processes that have not ended. One whose main thread is a zombie still has its files,
    and the run's lock, while another of its threads waits for the disk."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()  # proc_pid_stat(5), from the third on
            if int(fields[2]) == group and (fields[0] != "Z" or int(fields[17]) > 1):
                return True
    return False


def records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def check(
    directory: Path,
    model: str,
    objective: str,
    kills: int,
    steps: int,
    ranks: Sequence[int],
    seed: int,
    fork: bool,
    dtype: str,
) -> str:
    """What happened."""
    began = time.monotonic()
    path = recipe(directory, model, objective, steps)
    alone = (Forked if fork else start)(path, directory / "alone", 0, ranks[0], directory / "alone.txt")
    assert alone.wait() == 0, (directory / "alone.txt").read_text()
    chaos = Chaos(directory, path, steps, ranks, seed, fork)
    while len(chaos.happened) < kills and chaos.kill(kills):
        print(f"{objective}: {len(chaos.happened)} of {kills} kills: {chaos.happened[-1]}", flush=True)
    chaos.finish()
    (tensors, lanes), (again, lanes_again) = (final(directory / name, steps) for name in ("alone", "killed"))
    assert lanes == lanes_again
    assert tensors.keys() == again.keys()
    if len(ranks) == 1:
        assert [name for name, tensor in tensors.items() if not torch.equal(again[name], tensor)] == []
    # Nor, in fp64, is what is evaluated, which is kept in fp32.
    not_weights = ("optimizer/", "evaluation/") if dtype == "fp64" else ("optimizer/",)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(not_weights)}
    errors = {name: relative_error(again[name], tensor) for name, tensor in weights.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE[dtype], errors
    for name in ("metrics", "evaluations"):
        expected, found = ([record["step"] for record in records(directory / run, name)] for run in ("alone", "killed"))
        assert found == expected, (name, found)
    assert [record["step"] for record in records(directory / "killed", "metrics")] == list(range(1, steps + 1))
    counts = Counter(f"{'all' if kill['rank'] is None else 'one'} in {kill['moment']}" for kill in chaos.happened)
    watched = [kill for kill in chaos.happened if kill["rank"] is not None and kill["moment"] != "start"]
    gone = max((kill["gone"] for kill in watched), default=0.0)
    return (
        f"{objective}, {dtype}: killed {len(chaos.happened)} times in {steps} steps ({dict(counts)}), {ranks} ranks: "
        f"{'the same to the bit' if not errors[worst] else f'{worst} differs by {errors[worst]:.1e}'}; after the death "
        f"of one rank in a step or save all were gone within {gone} s; {time.monotonic() - began:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks to choose from")
    parser.add_argument("--model", default="lab")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="ranks from this process")
    parser.add_argument("--fp64", action="store_true", help="all weights and activations; with --fork")
    parser.add_argument("--directory", type=Path, help="kept, and gone on with; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.fp64 and not arguments.fork:
        parser.error("--fp64 needs --fork, since no recipe asks for it")
    if arguments.fp64:
        use_fp64()
    dtype = "fp64" if arguments.fp64 else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        for objective in arguments.objective:
            place = (arguments.directory or Path(folder)) / objective
            place.mkdir(parents=True, exist_ok=True)
            asked = (arguments.kills, arguments.steps, arguments.ranks, arguments.seed, arguments.fork, dtype)
            print(check(place, arguments.model, objective, *asked), flush=True)


if __name__ == "__main__":
    main()
