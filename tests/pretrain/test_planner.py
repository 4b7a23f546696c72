"""Plans against what steps really hold, and the sizes that fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from checkpoints.snapshots import SnapshotWriter
from models import logprobs
from models.philox import Rng
from objectives import PauseConfig, QuietStarConfig, RlpConfig, RptConfig, Step
from pretrain.cli import main
from pretrain.module import make_optimizer, micro_batches
from pretrain.planner import HARDWARE, KEYS, Job, Parameters, fitting
from pretrain.recipe import OptimizerConfig
from pretrain.recipe_files import load_recipe
from tests.helpers import LiveBytes, packed_text, tiny_model
from tests.objectives.test_memory import make
from tests.pretrain.test_fit import OBJECTIVES, RLP

FP32, BF16 = torch.float32, torch.bfloat16
LARGER = dict(width=64, ffn_width=128, layers=6, head_dim=16, max_positions=1024, tie_embeddings=True)
QUIET = QuietStarConfig(length=6, lookahead=3, thoughts=2, policy_weight=10.0)
DEEP = RlpConfig(length=16, thoughts=8)
CHOSEN = RptConfig(length=12, thoughts=8, template="forced", answer_length=3, positions="random")
CASES = {
    "next_token": (None, BF16, dict(length=256, rows=4, micro_batch_rows=2)),
    "next_token, checkpointing": (None, FP32, dict(length=256, rows=4, checkpointing=True)),
    "quiet_star": (QUIET, FP32, dict(length=64, rows=2)),
    "quiet_star, in parts": (replace(QUIET, anchors_at_once=24), BF16, dict(length=48, rows=2, micro_batch_rows=1)),
    "rlp": (DEEP, BF16, dict(length=128, rows=4)),
    "rlp, in parts": (replace(DEEP, anchors_at_once=1), FP32, dict(length=128, rows=2, micro_batch_rows=1)),
    "rlp, thoughts in parts": (replace(DEEP, anchors_at_once=1, thoughts_at_once=2), FP32, dict(length=64, rows=1)),
    "rlp, checkpointing": (DEEP, FP32, dict(length=128, rows=4, checkpointing=True)),
    "pause": (PauseConfig(length=24, anchors_per_document=4), FP32, dict(length=128, rows=4)),
    "rpt": (CHOSEN, BF16, dict(length=128, rows=4, micro_batch_rows=2)),
}


def planned(config, model, length: int, rows: int, **sizes) -> Job:
    objective = make(config)
    at_once = {name: getattr(config, name, None) for name in ("anchors_at_once", "thoughts_at_once", "sampled_at_once")}
    decoder, work = model.decoder, objective.workload(length, 1)
    parameters = Parameters.of(decoder.config, objective.needs)
    activations = decoder.compute_dtype or torch.float32
    return Job(decoder.config, parameters, work, HARDWARE["cpu"], rows, activations=activations, **at_once, **sizes)


def held(config, dtype: torch.dtype, length: int, rows: int, micro_batch_rows=None, checkpointing=False):
    """Bytes that a run's second step holds at most, and the plan of it."""
    objective, vocabulary = make(config), 61 if isinstance(config, RptConfig) else 2000
    with LiveBytes() as live:
        model = tiny_model(torch.float32, vocab_size=vocabulary, **LARGER)
        model.decoder.compute_dtype = None if dtype == torch.float32 else dtype
        model.decoder.activation_checkpointing = checkpointing
        model.mixing_head = model.mixing_head if objective.needs.mixing_head else None
        model.delimiters = model.delimiters if objective.needs.delimiters else None
        model.ban(vocabulary, (9, 12))
        optimizer = make_optimizer(model, OptimizerConfig())
        parts = micro_batches(packed_text([[length]] * rows, length), micro_batch_rows)
        for number in range(2):
            live.peak = live.now
            optimizer.zero_grad()
            for output in Step(objective, model, parts, Rng(0, number)).losses():
                output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            objective.after_step(model)
            del output
    sizes = dict(micro_batch_rows=micro_batch_rows, checkpointing=checkpointing)
    return live.peak, planned(config, model, length, rows, **sizes)


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_what_is_planned(case, monkeypatch):
    # Logits in several chunks, as those of a real vocabulary.
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2**17)
    config, dtype, sizes = CASES[case]
    peak, job = held(config, dtype, **sizes)
    # Weights packed by oneDNN have no size that could be counted.
    plan = job.peak - job.states.get("copies of weights for sampling", 0)
    assert plan == pytest.approx(peak, rel=0.1), (job.states, job.phases)


def test_a_snapshot_is_staged_in_what_is_planned(tmp_path):
    model, objective = tiny_model(torch.float32, vocab_size=2000, **LARGER), make(DEEP)
    model.mixing_head = model.delimiters = None
    optimizer = make_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    objective.other_models(model)
    states = enumerate(optimizer.state.values())
    moments = {f"{n}/{name}": tensor for n, state in states for name, tensor in state.items()}
    writer = SnapshotWriter(tmp_path)
    writer.save(1, {"model": model.state_dict(), "optimizer": moments, "objective": objective.state()}, {})
    assert writer.error() is None
    job = planned(DEEP, model, length=64, rows=8)
    staged = sum(buffer.untyped_storage().nbytes() for buffer in writer._buffers.values())
    assert job.staged == pytest.approx(staged, rel=0.01)
    # Of whole copies one rank writes, of shards each, of several copies in shards those that hold the first.
    nodes = {1: 1, 4: 4, 16: 8, 32: 8}
    assert {n: replace(job, ranks=32, devices=8, shard=n).writers for n in nodes} == nodes


def test_sizes_that_fit_are_the_largest():
    model = tiny_model(torch.float32, vocab_size=2000, **LARGER)
    job = planned(replace(QUIET, thoughts=4), model, length=96, rows=12)
    for memory in (5e7, 1e8, 2e8, 4e8, 1e9):
        best = fitting(job, memory)
        assert best.fits(memory)
        others = [
            replace(job, micro_batch_rows=rows, anchors_at_once=anchors, sampled_at_once=1)
            for rows in range(1, 13)
            for anchors in (None, *range(1, 97))
        ]
        assert best.losses == min(other.losses for other in others if other.fits(memory))
        together = range(best.micro_rows, 12 + best.micro_rows, best.micro_rows)
        ways = [replace(best, sampled_rows=rows, sampled_at_once=n) for rows in together for n in range(1, 97)]
        assert best.decoding["seconds"] <= 1.01 * min(way.decoding["seconds"] for way in ways if way.fits(memory))
    assert fitting(job, 4e9).losses == 1
    assert fitting(job, 1e6) is None
    # What is not to be chosen stays.
    some = fitting(replace(job, micro_batch_rows=3), 1e8, ["objective.anchors_at_once"])
    assert (some.micro_batch_rows, some.sampled_at_once) == (3, None)


def test_shards_and_copies():
    """Of 8 devices: states in shards, what is sent, and that a rank of DDP holds everything."""
    model = tiny_model(torch.float32, vocab_size=2000, **LARGER)
    job = replace(planned(DEEP, model, length=64, rows=8), ranks=8, devices=4, activations=torch.bfloat16)
    total = job.parameters.total
    ddp, hsdp, fsdp = (replace(job, shard=shard) for shard in (1, 4, 8))
    for one in (ddp, hsdp, fsdp):
        assert sum(one.states[name] for name in ("weights", "optimizer", "teacher")) == 16 * total / one.shard
    replica = 2 * job.parameters.blocks + 4 * job.parameters.rest
    assert fsdp.states["sampling replica"] == replica and "sampling replica" not in ddp.states
    assert ddp.moved == {"passes": 0, "update": pytest.approx(2 * 7 / 8 * 4 * total)}
    # A row is read by model and teacher, its thoughts are scored, one backward; embedding, head and norms once.
    passes = 7 / 8 * (4 * 2 * job.parameters.blocks + 4 * job.parameters.rest + 4 * total)
    assert fsdp.moved == {"passes": pytest.approx(passes), "update": pytest.approx(7 / 8 * replica)}
    assert hsdp.moved["update"] == pytest.approx(3 / 4 * replica + 2 * 1 / 2 * 4 * total / 4)
    assert hsdp.transfers["passes"] < fsdp.transfers["passes"] / 5  # within a node


def test_thoughts_that_end_early_cost_less():
    model = tiny_model(torch.float32, vocab_size=2000, **LARGER)
    job = planned(DEEP, model, length=64, rows=8)
    short = replace(job, thought_tokens=4)
    assert short.flops["rollout"] < job.flops["rollout"] / 3 and short.flops["text"] == job.flops["text"]
    assert short.peak == job.peak  # whose thoughts may be long
    assert short.decoding["steps"] == job.decoding["steps"]  # until the longest has ended


@pytest.mark.parametrize("objective", [*OBJECTIVES, "pause"])
def test_plan_says_what_fits(objective, tiny_run, capsys):
    arguments = ["plan", "smollm2-quiet-star", *tiny_run, *OBJECTIVES.get(objective, ["--objective", objective])]
    assert main([*arguments, "--gpus", "4", "--memory", "10"]) == 0
    said = capsys.readouterr().out
    assert "4 × H100 SXM" in said and "It fits" in said and "micro_batch_rows 1" in said
    assert "Host memory: snapshots are staged in" in said
    assert main([*arguments, "--gpus", "2", "--memory", "0.0001", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["fitting"] is None and tree["gpus"] == 2
    assert [scale["gpus"] for scale in tree["scales"]][-1] == 1024


def test_plan_refuses_what_nobody_knows(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "unknown.py").write_text(
        "from objectives import NextToken\n\nclass Unknown(NextToken):\n    def workload(self, *row): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "smollm2-quiet-star", *tiny_run, "--objective", "unknown:Unknown"]) == 1
    assert "objective unknown:Unknown has no workload" in capsys.readouterr().err


def test_auto_takes_the_sizes_that_fit(tiny_run, run_directory, monkeypatch, capsys):
    """And says so where nothing fits; the run's recipe has the numbers."""
    keys = KEYS
    automatic = [f"--{key}=auto" for key in keys]
    arguments = ["fit", "smollm2-quiet-star", *tiny_run, *RLP, "--steps", "1", *automatic]
    small, smaller = (replace(HARDWARE["cpu"], memory=memory) for memory in (1.1e6, 1e5))
    monkeypatch.setattr("pretrain.plan.machine", lambda: smaller)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert f"{', '.join(keys)}: auto: not even the smallest sizes fit" in said
    monkeypatch.setattr("pretrain.plan.machine", lambda: small)
    assert main(arguments) == 0
    recipe = load_recipe(str(run_directory / "recipe.yaml"))
    assert 1 <= recipe.micro_batch_rows < 4 and recipe.objective.sampled_at_once is not None
    monkeypatch.undo()
    assert load_recipe("smollm2-rlp", ["--micro-batch-rows", "auto"]).micro_batch_rows is None
