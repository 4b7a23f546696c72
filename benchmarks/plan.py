"""Plans against runs: peak memory and FLOPs of recipes, each run by `fit` in a process of its own.

    python -m benchmarks.plan [--only "CASE;…"] [--out FILE.json]

Memory is resident memory as the system counts it. Of its peak during the steps, that of the process before the model
is there is taken off, which is not planned: interpreter, libraries, and what a run of a model of no size leaves. malloc
is told to hand back what is freed, a habit that arithmetic could not know. FLOPs are the ledger's, in metrics.jsonl.
Prints planned and measured figures, and their ratios, as JSON.

The long thoughts are 16 of 2048 tokens at one anchor, under a model of Qwen3-1.7B's shape of which two layers are kept.
They are not sampled but of random tokens, and FLOPs are those of their update. A quarter of an hour each on two cores.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.environment import environment
from benchmarks.workloads import TINY
from models.decoder import DecoderConfig
from models.rollout import Rollout, RolloutRequest
from models.thoughts import Thoughts

# 34M parameters of which 8M are the embedding's, tied.
MODEL = DecoderConfig(
    vocab_size=16384,
    width=512,
    ffn_width=1536,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    max_positions=2048,
    tie_embeddings=True,
)
QWEN3 = DecoderConfig(
    vocab_size=151936,
    width=2048,
    ffn_width=6144,
    layers=2,
    heads=16,
    kv_heads=8,
    head_dim=128,
    max_positions=4096,
    rope_theta=1e6,
    qk_norm=True,
    tie_embeddings=True,
    family="qwen3",
)
LENGTH, SHORT, SHORT_THOUGHT = 256, 64, 48
LONG = {"name": "rlp", "length": 2048, "thoughts": 16, "anchors_at_once": 1, "close": "=+=+=+"}
CASES: dict[str, dict[str, Any]] = {
    "next_token, fp32": {"objective": {"name": "next_token"}, "rows_per_step": 4, "micro_batch_rows": 2},
    "quiet_star in parts, fp32": {
        "objective": {"name": "quiet_star", "length": 4, "lookahead": 3, "thoughts": 2, "anchors_at_once": 64},
        "rows_per_step": 1,
    },
    "rlp with checkpointing, fp32": {
        "objective": {"name": "rlp", "length": 48, "thoughts": 16, "anchors_per_document": 2, "close": "=+=+=+"},
        "rows_per_step": 2,
        "activation_checkpointing": True,
    },
    "long thoughts, checkpointing, fp32": {
        "objective": LONG,
        "length": 1024,
        "rows_per_step": 1,
        "steps": 1,
        "activation_checkpointing": True,
    },
    "long thoughts, four at once, fp32": {
        "objective": LONG | {"thoughts_at_once": 4},
        "length": 1024,
        "rows_per_step": 1,
        "steps": 1,
    },
}


@dataclass(frozen=True)
class Given:
    """Stands in for an engine: thoughts of random tokens, all of full length, which cost nothing."""

    name: ClassVar[str] = "given"
    reproducible: ClassVar[bool] = True
    lag: ClassVar[int] = 0

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        return True, ""

    def sample(self, request: RolloutRequest) -> Rollout:
        (B, M), K, P = request.anchors.index_BM.shape, request.thoughts, len(request.prompt)
        ids = (~request.model.banned_V).nonzero()[:, 0]
        tokens_BKSM = ids[torch.randint(len(ids), (B, K, P + request.length, M))]
        tokens_BKSM[:, :, :P] = torch.tensor(request.prompt)[:, None]
        sampled_BKSM = (torch.arange(P + request.length) >= P)[:, None].expand(tokens_BKSM.shape)
        logprobs_BKSM = torch.where(sampled_BKSM, -math.log(len(ids)), 0.0)
        no_BKM = torch.zeros(B, K, M, dtype=torch.bool)
        thoughts = Thoughts(tokens_BKSM, request.anchors)
        return Rollout(
            thoughts, sampled_BKSM, logprobs_BKSM, no_BKM, torch.zeros_like(sampled_BKSM), ~no_BKM, len(request.close)
        )


def recipe_tree(case: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """Of a case, with a model of random weights, and texts of its own of which each is longer than a row."""
    from checkpoints import config_to_hf
    from checkpoints.references import resolve

    tree = copy.deepcopy(CASES[case])
    long, length = case.startswith("long"), tree.pop("length", LENGTH)
    model = TINY if tiny else QWEN3 if long else MODEL
    if tiny:
        length = SHORT
    if long:
        tree["objective"]["min_prefix"] = length - 8  # so that it is known what its thoughts see
        tree["objective"]["length"] = SHORT_THOUGHT if tiny else tree["objective"]["length"]
    directory, texts = folder / "model", folder / "texts"
    shutil.copytree(resolve("lab"), directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (directory / "config.json").write_text(json.dumps(config_to_hf(model, torch.float32)))
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"{number}+7=" * 10 * length)
    return {
        "compute_dtype": "fp32",
        "steps": 2,
        **tree,
        "model": f"random:{directory / 'config.json'}",
        "data": {"reference": str(texts), "length": length, "held_out": 0.0},
        "checkpoint": {"every": None},
        "logging": {"wandb": "disabled", "csv": False},
        "run_dir": str(folder / "run"),
    }


def measured(case: str, tiny: bool) -> dict[str, float]:
    """Bytes of a run in this process at its fullest, FLOPs and seconds of its last step, and its plan."""
    from benchmarks.measure import peak_memory, present_memory, reset_peak
    from pretrain import assembly, run
    from pretrain.module import PretrainModule
    from pretrain.plan import jobs_of
    from pretrain.planner import HARDWARE
    from pretrain.recipe_files import recipe_from_tree

    cpu, peaks, step = torch.device("cpu"), [], PretrainModule.training_step

    def counted(module: PretrainModule, *arguments: Any) -> None:
        assert module.optimizer is not None
        if not module.optimizer.state:  # Adam's moments, which else the first step would be the last to make
            for parameter in module.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            module.optimizer.step()
            module.optimizer.zero_grad()
            if module.model.mixing_head is not None:  # a fresh one rewards no thought, as no run does for long
                torch.nn.init.constant_(module.model.mixing_head.out.weight, 0.01)
        reset_peak(cpu)
        step(module, *arguments)
        peaks.append(peak_memory(cpu))

    given = case.startswith("long")
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        run.fit(recipe_from_tree(recipe_tree(case, Path(small), tiny=True)))
        before = present_memory(cpu)
        recipe = recipe_from_tree(recipe_tree(case, Path(large), tiny))
        PretrainModule.training_step = counted  # type: ignore[method-assign, assignment]
        if given:
            assembly.make_engine = lambda *_: Given()
        run.fit(recipe)
        lines = (Path(large) / "run" / "metrics.jsonl").read_text().splitlines()
        before_last, last = [{"flops": 0, "seconds": 0.0}, *map(json.loads, lines)][-2:]
        job = jobs_of(recipe, dataclasses.replace(HARDWARE["cpu"], memory=16e9))["objective"]
    return {
        "planned, bytes": job.peak,
        "measured, bytes": max(peaks) - before,
        "planned, FLOPs": sum(job.flops.values()) - given * job.flops["rollout"],
        "measured, FLOPs": last["flops"] - before_last["flops"],
        "seconds": last["seconds"] - before_last["seconds"],
    }


def in_a_process(case: str, tiny: bool) -> dict[str, float]:
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
    command = [sys.executable, "-m", "benchmarks.plan", "--run", case, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, env=os.environ | malloc, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for what in ("bytes", "FLOPs"):
        found[f"planned / measured, {what}"] = found[f"planned, {what}"] / found[f"measured, {what}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="CASE;…", help=f"default: {'; '.join(CASES)}")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see that it runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(measured(arguments.run, arguments.tiny)))
        return
    chosen = [case for case in CASES if arguments.only is None or case in arguments.only.split(";")]
    cases = {case: in_a_process(case, arguments.tiny) for case in chosen}
    said = json.dumps({"environment": environment(torch.device("cpu")), "cases": cases}, indent=1)
    print(said)
    if arguments.out is not None:
        arguments.out.write_text(said + "\n")


if __name__ == "__main__":
    main()
