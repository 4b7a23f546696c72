"""`forethought plan`: what a recipe takes on given hardware, and the sizes that fit, which a recipe takes by `auto`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from checkpoints.families import config_from_hf
from checkpoints.hugging_face import read_json
from checkpoints.references import resolve
from data_pipelines import Tokenizer
from models.decoder import DecoderConfig
from objectives import ObjectiveConfig
from objectives.base import Needs, Vocabulary
from objectives.workload import Workload
from pretrain import planner
from pretrain.assembly import build_objective
from pretrain.opening import compute_dtype
from pretrain.planner import HARDWARE, Hardware, Job, Parameters, fitting, machine
from pretrain.recipe import Recipe, RecipeError

SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _AnyTags:
    """Stands in for a tokenizer that is not there: every text is one token."""

    eos_id = 0
    token_bytes = (b"",)

    def __init__(self) -> None:
        self._texts: list[str] = [""]

    def token_id(self, token: str) -> int | None:
        return None

    def encode(self, texts: list[str]) -> list[list[int]]:
        start = len(self._texts)
        self._texts += texts
        return [[start + i] if text else [] for i, text in enumerate(texts)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self._texts[i] for i in ids)


def _model(reference: str) -> tuple[DecoderConfig, Vocabulary]:
    """Of a reference, of which no weights are fetched. Raises CheckpointError."""
    directory = resolve(reference, weights=False)
    path = Path(reference.removeprefix("random:"))
    config = config_from_hf(read_json(path if path.is_file() else directory / "config.json"))
    there = (directory / "tokenizer.json").exists()
    return config, Tokenizer.from_directory(directory) if there else _AnyTags()


def jobs_of(
    recipe: Recipe,
    hardware: Hardware,
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    documents: float = 1.0,
    thought_tokens: float | None = None,
) -> dict[str, Job]:
    """Each stage of the recipe on so many devices, by default its own, by the key of its objective.

    Raises RecipeError and CheckpointError.
    """
    config, vocabulary = _model(recipe.model)
    objectives = {key: build_objective(key, of, vocabulary, recipe.model) for key, of in recipe.trained.items()}
    needs = [objective.needs for objective in objectives.values()]
    # Every stage holds what any of them needs.
    delimiters = next((n.delimiters for n in needs if n.delimiters is not None), None)
    parameters = Parameters.of(config, Needs(delimiters, any(n.mixing_head for n in needs)))
    works: dict[str, Workload] = {}
    for key, objective in objectives.items():
        work = objective.workload(recipe.data.length, documents)
        if work is None:
            name = objective.config.name
            raise RecipeError(f"{key} {name} has no workload, so that nothing of it can be planned")
        works[key] = work
    teachers = sum(work.teacher for work in works.values())
    job = partial(_job, recipe, hardware, config, parameters, gpus, gpus_per_node, thought_tokens)
    return {key: job(recipe.trained[key], work, teachers - work.teacher) for key, work in works.items()}


def _job(
    recipe: Recipe,
    hardware: Hardware,
    config: DecoderConfig,
    parameters: Parameters,
    gpus: int | None,
    gpus_per_node: int | None,
    thought_tokens: float | None,
    of_objective: ObjectiveConfig,
    work: Workload,
    idle_teachers: int,
) -> Job:
    ranks, devices = gpus or recipe.ranks, gpus_per_node or recipe.devices
    dtype = torch.bfloat16 if hardware.cuda and recipe.compute_dtype == "auto" else compute_dtype(recipe.compute_dtype)
    return Job(
        config,
        parameters,
        work,
        hardware,
        rows=recipe.rows_per_step,
        ranks=ranks,
        devices=min(ranks, devices),
        shard=_shards(recipe, ranks, devices),
        activations=dtype or torch.float32,
        checkpointing=recipe.activation_checkpointing,
        micro_batch_rows=recipe.micro_batch_rows,
        sampled_rows=recipe.sampled_rows,
        anchors_at_once=getattr(of_objective, "anchors_at_once", None),
        thoughts_at_once=getattr(of_objective, "thoughts_at_once", None),
        sampled_at_once=getattr(of_objective, "sampled_at_once", None),
        thought_tokens=thought_tokens,
        replica=recipe.rollout_weights == "replica",
        graphs=recipe.cuda_graphs,
        sync_each_backward=recipe.gradient_sync == "backward",
        idle_teachers=idle_teachers,
    )


def _shards(recipe: Recipe, ranks: int, devices: int) -> int:
    """Devices that hold one model together."""
    if recipe.strategy == "hsdp":
        return min(ranks, recipe.shard_size or devices)
    return 1 if recipe.strategy == "ddp" else ranks


def sizes_that_fit(recipe: Recipe, keys: Sequence[str]) -> dict[str, int | None]:
    """Values of these of planner.KEYS for this machine. Raises RecipeError if nothing fits."""
    hardware = machine()
    if not hardware.cuda:
        hardware = dataclasses.replace(hardware, memory=hardware.memory / recipe.devices)
    found: dict[str, int | None] = {}
    for stage, job in jobs_of(recipe, hardware).items():
        # The keys of this stage's objective, and those of all, which are as large as fits all.
        own = {key: key.replace(f"{stage}.", "objective.") for key in keys if key.startswith(f"{stage}.")}
        own |= {key: key for key in keys if "." not in key}
        best = fitting(job, hardware.memory, list(own.values()))
        if best is None:
            raise RecipeError(
                f"{', '.join(keys)}: auto: not even the smallest sizes fit into {hardware.memory / 1e9:.0f} GB of "
                f"{hardware.name}; set activation_checkpointing, shard over more devices, or give sizes of your own"
            )
        sizes = _sizes(best)
        for key, name in own.items():
            given = [size for size in (found.get(key), sizes[name]) if size is not None]
            found[key] = min(given, default=None)
    return found


def _sizes(job: Job, keys: Sequence[str] = planner.KEYS) -> dict[str, int | None]:
    return {key: getattr(job, key.removeprefix("objective.")) for key in keys}


# What is said


def plan(
    recipe: Recipe,
    name: str,
    gpus: int | None,
    memory: float | None,
    gpus_per_node: int,
    hardware: str,
    documents: float,
    thought_tokens: float | None,
    as_json: bool,
) -> None:
    """Prints the plan. memory: GB of a device, by default what the hardware has."""
    device = machine() if hardware == "this" else HARDWARE[hardware]
    if memory is not None:
        device = dataclasses.replace(device, memory=memory * 1e9)
    jobs = jobs_of(recipe, device, gpus, gpus_per_node, documents, thought_tokens)
    if as_json:
        trees = {key: _whole_tree(job, recipe, gpus_per_node) for key, job in jobs.items()}
        print(json.dumps({"stages": trees} if recipe.stages else trees["objective"], indent=1))
        return
    flops, seconds = zip(*((sum(job.flops.values()), job.step_seconds) for job in jobs.values()), strict=True)
    of_stages = recipe.steps_of_stages(flops, seconds)
    console = Console(highlight=False)
    for (key, job), steps in zip(jobs.items(), of_stages, strict=True):
        if recipe.stages:
            console.print(f"\n{key}: {steps} steps", soft_wrap=True)
        _print_plan(console, job, recipe, recipe.trained[key].name, name, gpus_per_node, documents, steps)
    if recipe.stages:
        hours = sum(n * each for n, each in zip(of_stages, seconds, strict=True)) / 3600
        spent = sum(n * each for n, each in zip(of_stages, flops, strict=True)) / 1e15
        console.print(f"\nall stages: {sum(of_stages)} steps, {spent:.3g} PFLOP, {hours:.1f} hours", soft_wrap=True)


def _whole_tree(job: Job, recipe: Recipe, gpus_per_node: int) -> dict[str, Any]:
    best = fitting(job, job.hardware.memory)
    scaled = [_as_tree(_scaled(job, recipe, ranks, gpus_per_node)) for ranks in SCALES]
    return _as_tree(job) | {"fitting": best and (_sizes(best) | _as_tree(best)), "scales": scaled}


def _print_plan(
    console: Console,
    job: Job,
    recipe: Recipe,
    objective: str,
    name: str,
    gpus_per_node: int,
    documents: float,
    steps: int,
) -> None:
    """Of a run, or a stage of one."""
    device = job.hardware
    best = fitting(job, device.memory)
    scaled = [_scaled(job, recipe, ranks, gpus_per_node) for ranks in SCALES]

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    usable = f"{planner.USABLE:.0%} of {device.memory / 1e9:.0f} GB"
    say(
        f"{name} on {job.ranks} × {device.name}, {math.ceil(job.ranks / job.devices)} nodes: {objective}, "
        f"{job.parameters.total / 1e9:.3g}B parameters, {job.rows} rows of {job.work.length} tokens a step"
    )
    console.print(_memory_table(job))
    say(f"{'It fits' if job.fits(device.memory) else 'It does NOT fit'}: {job.peak / 1e9:.1f} GB of {usable}.")
    if best is None:
        say("No sizes fit: checkpoint activations, shard over more devices, or take shorter rows.")
    else:
        sizes = ", ".join(f"{key} {'all' if size is None else size}" for key, size in _sizes(best).items())
        say(f"The largest that fit (auto): {sizes}; {best.peak / 1e9:.1f} GB, {best.step_seconds:.3g} s a step.")
    say(
        f"Host memory: snapshots are staged in {_gb(job.staged)} GB by each device that writes them, "
        f"{_gb(job.writers * job.staged)} GB a node."
    )
    console.print(_time_table(job))
    for line in _rates(job, steps):
        say(line)
    say("By number of GPUs, each with the largest sizes that fit (!: none do):")
    console.print(_scale_table([fitting(s, device.memory) or s for s in scaled], device.memory))
    for line in _assumptions(job, documents):
        say(line)


def _scaled(job: Job, recipe: Recipe, ranks: int, gpus_per_node: int) -> Job:
    """The same on so many devices, with a row for each at least."""
    devices = min(ranks, gpus_per_node)
    rows = max(job.rows, ranks)
    return dataclasses.replace(job, ranks=ranks, devices=devices, shard=_shards(recipe, ranks, devices), rows=rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _memory_table(job: Job) -> Table:
    phases = job.phases
    fullest = max(phases, key=lambda phase: sum(phases[phase].values()))
    table = Table("held by each device, GB", *phases)
    for what, size in job.states.items():
        table.add_row(what, *(_gb(size) for _ in phases))
    for what in dict.fromkeys(what for held in phases.values() for what in held):
        table.add_row(what, *(_gb(held[what]) if what in held else "" for held in phases.values()))
    states = sum(job.states.values())
    sums = (f"{'→ ' * (phase == fullest)}{_gb(states + sum(held.values()))}" for phase, held in phases.items())
    table.add_section()
    table.add_row("all", *sums)
    return table


def _time_table(job: Job) -> Table:
    table = Table("phase of a step", "seconds", "share")
    for phase, took in job.seconds.items():
        table.add_row(phase, f"{took:.2f}", f"{took / job.step_seconds:.0%}")
    table.add_section()
    table.add_row("all", f"{job.step_seconds:.2f}", "")
    return table


def _rates(job: Job, steps: int) -> list[str]:
    d = job.decoding
    lines = [
        f"{sum(job.flops.values()) / 1e15:.3g} PFLOP a step by the ledger, {job.tokens / job.step_seconds:,.0f} tokens "
        f"of text/s, {steps * job.step_seconds / 3600:.1f} hours for {steps} steps"
    ]
    if d["steps"]:
        lines.append(
            f"decoding: {d['steps']:,.0f} steps of {d['rows']:,.0f} thoughts, {1e3 * d['token_seconds']:.1f} ms each; "
            f"weights take {1e3 * d['weight_seconds']:.1f} ms to read, keys, values {1e3 * d['cache_seconds']:.1f} ms"
        )
    return lines


def _scale_table(jobs: Sequence[Job], memory: float) -> Table:
    names = ("GPUs", "rows", "at once", "GB", "step, s", "sampling", "links", "sent, GB", "tokens/s", "bound by")
    table = Table(*(Column(name, no_wrap=True) for name in names))
    for job in jobs:
        table.add_row(
            f"{job.ranks}",
            f"{job.rows}",
            f"{job.micro_rows}",
            f"{job.peak / 1e9:.1f}" + "!" * (not job.fits(memory)),
            f"{job.step_seconds:.3g}",
            f"{job.seconds['sample']:.3g}",
            f"{sum(job.transfers.values()):.2g}",
            f"{sum(job.moved.values()) / 1e9:.3g}",
            f"{job.tokens / job.step_seconds:,.0f}",
            job.bound,
        )
    return table


def _assumptions(job: Job, documents: float) -> list[str]:
    h, w = job.hardware, job.work
    lines = [
        f"assumed: {planner.ATTAINED:.0%} of {h.flops / 1e12:,.0f} TFLOP/s, {planner.STREAMED:.0%} of "
        f"{h.bandwidth / 1e12:.2f} TB/s of memory, {planner.TRANSFERRED:.0%} of {h.link / 1e9:.0f} GB/s within and "
        f"{h.network / 1e9:.0f} GB/s between nodes; {1 - planner.USABLE:.0%} of memory for contexts and fragmentation"
    ]
    if w.sampled:
        length = w.sampled if job.thought_tokens is None else job.thought_tokens
        launch = planner.REPLAYED if job.graphs else planner.LAUNCHED
        lines.append(
            f"assumed: {documents:g} documents a row; thoughts of {length:.0f} sampled tokens, decoding until the "
            f"longest, of {w.sampled:.0f}, has ended"
            + (f"; {planner.KERNELS} kernels a block and token, {1e6 * launch:.1f} µs each" if h.cuda else "")
        )
    return lines


def _as_tree(job: Job) -> dict[str, Any]:
    return {
        "gpus": job.ranks,
        "rows_per_step": job.rows,
        "parameters": job.parameters.total,
        "memory": {"states": job.states, "phases": job.phases, "peak": job.peak, "staged_on_host": job.staged},
        "staged_on_node": job.writers * job.staged,
        "flops": job.flops,
        "seconds": job.seconds,
        "decoding": job.decoding,
        "sent": job.moved,
        "tokens_per_second": job.tokens / job.step_seconds,
        "bound_by": job.bound,
    }
