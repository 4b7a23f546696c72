"""Plans against runs: peak memory and FLOPs of three recipes, each run by `fit` in a process of its own.

    python -m benchmarks.plan [--only "CASE;…"] [--out FILE.json]

Memory is resident memory as the system counts it. Of its peak during the steps, that of the process before the model
is there is taken off, which is not planned: interpreter, libraries, and what a run of a model of no size leaves. malloc
is told to hand back what is freed, a habit that arithmetic could not know. FLOPs are the ledger's, in metrics.jsonl.
Prints planned and measured figures, and their ratios, as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.workloads import TINY
from models.decoder import DecoderConfig

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
LENGTH, SHORT, STEPS = 256, 64, 2
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
}


def recipe_tree(case: str, folder: Path, model: DecoderConfig, length: int) -> dict[str, Any]:
    """Of a case, with a model of random weights, and texts of its own of which each is longer than a row."""
    from checkpoints import config_to_hf
    from checkpoints.references import resolve

    directory, texts = folder / "model", folder / "texts"
    shutil.copytree(resolve("lab"), directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (directory / "config.json").write_text(json.dumps(config_to_hf(model, torch.float32)))
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"{number}+7=" * 10 * length)
    return {
        "compute_dtype": "fp32",
        **CASES[case],
        "steps": STEPS,
        "model": f"random:{directory / 'config.json'}",
        "data": {"reference": str(texts), "length": length, "held_out": 0.0},
        "checkpoint": {"every": None},
        "logging": {"wandb": "disabled", "csv": False},
        "run_dir": str(folder / "run"),
    }


def measured(case: str, model: DecoderConfig, length: int) -> dict[str, float]:
    """Bytes, and FLOPs of a step, of a run in this process, and of its plan."""
    from benchmarks.measure import peak_memory, present_memory, reset_peak
    from pretrain import run
    from pretrain.module import PretrainModule
    from pretrain.plan import job_of
    from pretrain.planner import HARDWARE
    from pretrain.recipe_files import recipe_from_tree

    cpu, peaks, step = torch.device("cpu"), [], PretrainModule.training_step

    def counted(module: PretrainModule, *arguments: Any) -> None:
        reset_peak(cpu)
        step(module, *arguments)
        peaks.append(peak_memory(cpu))

    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        run.fit(recipe_from_tree(recipe_tree(case, Path(small), TINY, SHORT)))
        before = present_memory(cpu)
        recipe = recipe_from_tree(recipe_tree(case, Path(large), model, length))
        PretrainModule.training_step = counted  # type: ignore[method-assign, assignment]
        run.fit(recipe)
        records = (Path(large) / "run" / "metrics.jsonl").read_text().splitlines()
        job = job_of(recipe, dataclasses.replace(HARDWARE["cpu"], memory=16e9), thought_tokens=None)
    flops = [json.loads(record)["flops"] for record in records]
    # The first step has no moments of Adam yet.
    return {
        "planned, bytes": job.peak,
        "measured, bytes": max(peaks[1:]) - before,
        "planned, FLOPs": sum(job.flops.values()),
        "measured, FLOPs": (flops[-1] - flops[0]) / (len(flops) - 1),
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
        model, length = (TINY, SHORT) if arguments.tiny else (MODEL, LENGTH)
        print(json.dumps(measured(arguments.run, model, length)))
        return
    chosen = [case for case in CASES if arguments.only is None or case in arguments.only.split(";")]
    cases = {case: in_a_process(case, arguments.tiny) for case in chosen}
    said = json.dumps({"environment": environment(torch.device("cpu")), "cases": cases}, indent=1)
    print(said)
    if arguments.out is not None:
        arguments.out.write_text(said + "\n")


if __name__ == "__main__":
    main()
