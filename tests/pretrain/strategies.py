"""One process and several, by every strategy, end with the same model, for every objective:

    python -m tests.pretrain.strategies [--dtypes fp32 fp64 bf16] [--ranks 2 4] [--objectives rlp …] [--steps 4]

Trains a tiny model on one process whose rows go through it at once, and on several, which cut them into micro-batches
and, where they think, into chunks of anchors; prints how far losses and weights are apart: at most 1e-9 in fp64. In
fp32, where rewards are small differences of log-probs, several processes may err twice what one process errs against
fp64 when it cuts its rows in different ways, or 1e-6. In bf16 thoughts that are sampled otherwise can follow; there
several processes may be as far from one as it is from itself when it cuts its rows in different ways.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pretrain import run
from pretrain.assembly import Assembled, assemble
from pretrain.launcher import launched
from pretrain.module import PretrainModule
from pretrain.recipe_files import load_recipe
from pretrain.sharding import full
from tests.data_pipelines.streams import documents, write
from tests.helpers import relative_error
from tests.pretrain.chaos import write_model

ROOT = Path(__file__).parents[2]
# All of every objective: Quiet-STaR's policy and mixing, RLP's KL to a sharded teacher, RPT's several updates.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "next_token": {},
    "quiet_star": {"length": 3, "lookahead": 2},
    "rlp": {"length": 12, "thoughts": 4, "anchors_per_document": 2, "close": "e", "kl_weight": 0.1,
            "next_token_weight": 0.1},
    "rpt": {"length": 3, "thoughts": 16, "anchors_per_document": 6, "temperature": 1.0, "template": "forced",
            "box_open": "[", "box_close": "", "answer_length": 1, "hard_entropy": 0.1, "updates": 2},
}  # fmt: skip
AT_ONCE = {
    "quiet_star": {"anchors_at_once": 20},
    "rlp": {"anchors_at_once": 1, "thoughts_at_once": 3},
    "rpt": {"anchors_at_once": 2, "thoughts_at_once": 9},
}
# By ranks: what a recipe says.
STRATEGIES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one": {},
        "one, in parts": {"micro_batch_rows": 1},
        "one, in halves": {"micro_batch_rows": 2},
        "one, anchors in parts": {"micro_batch_rows": 4},
        "one, rows in parts": {"micro_batch_rows": 1, "anchors": "together"},
        "one, rows in halves": {"micro_batch_rows": 2, "anchors": "together"},
    },
    2: {
        "ddp": {"strategy": "ddp", "micro_batch_rows": 1},
        "fsdp": {"strategy": "fsdp", "micro_batch_rows": 1},
        "fsdp, each backward": {"strategy": "fsdp", "micro_batch_rows": 1, "gradient_sync": "backward"},
    },
    4: {
        "ddp": {"strategy": "ddp"},
        "fsdp": {"strategy": "fsdp"},
        "hsdp": {"strategy": "hsdp", "shard_size": 2},
        "hsdp, each backward": {"strategy": "hsdp", "shard_size": 2, "gradient_sync": "backward"},
    },
}
# By dtype: what losses and weights may differ by in any case, relatively.
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-6, "bf16": 0.0}


class Kept(PretrainModule):
    """Leaves its final weights, and those of a teacher, in OUT."""

    def configure_model(self) -> None:
        super().configure_model()
        if self.model.mixing_head is not None:  # with weights of 0 rewards would be rounding errors
            torch.nn.init.constant_(self.model.mixing_head.out.weight, 0.05)

    def on_train_end(self) -> None:
        states = {"model": self.model.state_dict(), "objective": self.objective.state()}
        tensors = {
            f"{group}/{n}": full(t).detach().clone() for group, named in states.items() for n, t in named.items()
        }
        if self.global_rank == 0:
            save_file(tensors, os.environ["OUT"])


def prepared(fp64: bool):
    def prepare(*arguments: Any) -> Assembled:
        """Everything in fp64 if asked; thoughts and predictions in the few tokens that the text is made of, some of
        which are right."""
        parts = assemble(*arguments)
        parts.model.banned_V.fill_(True)
        parts.model.banned_V[[ids[0] for ids in parts.tokenizer.encode(list("0123456789 "))]] = False
        if fp64:
            parts.model.double()
        return parts

    return prepare


def work(directory: Path, dtype: str, objectives: list[str], strategies: list[str], steps: int) -> None:
    """What each process does: all these runs, one after the other, into <directory>/<objective>/<strategy>."""
    run.PretrainModule, run.assemble = Kept, prepared(dtype == "fp64")  # type: ignore[misc]
    launch = launched()
    ranks = launch.devices if launch else 1
    for objective in objectives:
        for strategy in strategies:
            changes = dict(STRATEGIES[ranks][strategy])
            settings = {"name": objective, **OBJECTIVES[objective]}
            if changes.pop("anchors", "apart" if changes else "together") == "apart":
                settings |= AT_ONCE.get(objective, {})
            recipe = {
                "steps": steps,
                "objective": settings,
                "model": str(directory / "model"),
                "data": {"reference": str(directory / "text"), "length": 48, "end_of_document": "<|endoftext|>",
                         "held_out": 0.0},
                "rows_per_step": 4,
                "compute_dtype": "bf16" if dtype == "bf16" else "fp32",
                # Adam divides by the gradient's size: an entry that is all rounding error would move as far as others.
                "optimizer": {"lr": 1e-3, "warmup_steps": 0, "eps": 1e-3, "weight_decay": 0.1},
                "logging": {"wandb": "disabled", "csv": False},
                "devices": ranks,
                **changes,
            }  # fmt: skip
            out = directory / f"{objective}/{ranks} {strategy}"
            os.environ["OUT"] = f"{out}.safetensors"
            path = directory / f"{objective}-{os.environ.get('RANK', 0)}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(recipe))
            run.fit(load_recipe(str(path), ["--run-dir", str(out)]))


def start(directory: Path, ranks: int, *arguments: str) -> None:
    """Raises CalledProcessError if a process fails."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["tests.pretrain.strategies", "--in", str(directory), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FORETHOUGHT_CACHE": str(directory / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])


def losses(directory: Path) -> torch.Tensor:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["grad_norm"] > 0 for record in records) >= len(records) / 2, "nothing was learned"
    return torch.tensor([record["loss"] for record in records], dtype=torch.float64)


def distance(a: Path, b: Path) -> tuple[float, float]:
    """The relative norm of the difference of all steps' losses, and the largest one of a weight."""
    x, y = losses(a), losses(b)
    one, other = (load_file(f"{path}.safetensors") for path in (a, b))
    assert one.keys() == other.keys() and len(x) == len(y)
    return relative_error(x, y), max(relative_error(one[name], other[name]) for name in one)


def compare(
    directory: Path, dtype: str, ranks: int, objectives: list[str], strategies: list[str], steps: int
) -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """(objective, strategy, how far it is from one process, from what it is measured by, and how far it may be)."""
    exact = directory / "fp64" if dtype == "fp32" else None
    for place in filter(None, (directory, exact)):
        if not (place / "model").exists():
            write("jsonl", place / "text", documents(60, 0))
            write_model(place)
    alone = [s for s in STRATEGIES[1] if dtype != "fp64" or s == "one"]
    if todo := [o for o in objectives if not (directory / o / "1 one").exists()]:
        start(directory, 1, dtype, str(steps), ",".join(todo), "|".join(alone))
        if exact is not None:
            start(exact, 1, "fp64", str(steps), ",".join(todo), "one")
    start(directory, ranks, dtype, str(steps), ",".join(objectives), "|".join(strategies))
    for objective in objectives:
        one = directory / objective / "1 one"
        cuts = [directory / objective / f"1 {strategy}" for strategy in alone]
        reference = one if exact is None else exact / objective / "1 one"
        errors = [distance(*pair) for pair in itertools.combinations(cuts, 2)]
        if exact is not None:
            errors = [(2 * x, 2 * y) for x, y in (distance(cut, reference) for cut in cuts)]
        allowed = max([TOLERANCE[dtype], *(x for x, _ in errors)]), max([TOLERANCE[dtype], *(x for _, x in errors)])
        for strategy in strategies:
            several = directory / objective / f"{ranks} {strategy}"
            yield objective, strategy, [distance(several, one), distance(several, reference), allowed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "fp64", "bf16"], default=["fp32", "fp64", "bf16"])
    parser.add_argument("--ranks", nargs="+", type=int, choices=[2, 4], default=[2, 4])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    print("                                                    from one process    from its measure    allowed")
    print("dtype  ranks  objective    strategy               " + 3 * "loss      weights   ")
    failed = False
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            for ranks in arguments.ranks:
                for objective, strategy, distances in compare(
                    Path(folder), dtype, ranks, arguments.objectives, list(STRATEGIES[ranks]), arguments.steps
                ):
                    failed |= any(x > y for x, y in zip(*distances[1:], strict=True))
                    numbers = "  ".join(f"{x:.2e}" for x in itertools.chain(*distances))
                    print(f"{dtype:6} {ranks:<6} {objective:12} {strategy:22} {numbers}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        _, _, folder, dtype, steps, objectives, strategies = sys.argv
        work(Path(folder), dtype, objectives.split(","), strategies.split("|"), int(steps))
    else:
        main()
