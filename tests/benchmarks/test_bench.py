"""The benchmark's machinery: what is measured in which order, memory, growth, targets, files, and a whole dry run."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import bench, command, correctness, device, report
from benchmarks.correctness import CHECKED
from benchmarks.measure import (
    MAPPED_FROM_AT_MOST,
    MMAP_THRESHOLD,
    Growth,
    Measured,
    Spread,
    Unsupported,
    Variant,
    memory_limit,
    race,
)
from benchmarks.rows import ROWS, steps
from benchmarks.rows.rollouts import Together, _generate, deep_rollout
from benchmarks.rows.row import Row
from benchmarks.settings import SIZES
from benchmarks.targets import TARGETS, judge
from benchmarks.workloads import (
    TINY,
    ending_at_random,
    last_position,
    make_model,
    make_text,
    next_token,
    optimizer_step,
    training_step,
    transformers_model,
)
from models.philox import Rng
from models.rollout import EAGER, RolloutRequest
from models.rollout.eager import AllAtOnce, sample_thoughts
from models.rollout.native import InTurn, compiler
from pretrain import cli
from tests.helpers import relative_error

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ON_GPU = set(ROWS) - {"fit"}  # a question to the host


def gpu_script(out: Path, *arguments: str, fails: str = "nothing") -> tuple[int, str, list[list[str]]]:
    """Exit code, output and commands of gpu.sh with a Python that runs nothing; commands that contain `fails` fail."""
    python, commands = out / "python", out / "commands"
    python.write_text(
        f"""#!/bin/bash
        echo "$(printf '%s\\t' "$@")" >>{commands}
        [[ "$*" != *"{fails}"* ]]
        """
    )
    python.chmod(0o755)
    commands.unlink(missing_ok=True)
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", *arguments],
        cwd=ROOT,
        env=os.environ | {"FORETHOUGHT_DEVICE": "cpu", "OUT": str(out / "results"), "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert not run.stderr
    ran = [line.rstrip("\t").split("\t") for line in commands.read_text().splitlines()]
    return run.returncode, run.stdout, [command[1:] for command in ran if command[0] == "-m"]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[Path, list[str]]:
    """All that runs on a GPU machine, here in this process, on its CPU and at toy sizes; the directory of gpu.sh, and
    the modules that ran. Of the checks for correctness only the shortest: all are tests of their own."""
    out = tmp_path_factory.mktemp("out")
    code, _, commands = gpu_script(out, "--tiny")
    assert code == 0
    mains = {
        "benchmarks": command.main,
        "benchmarks.correctness": correctness.main,
        "benchmarks.device": device.main,
        "benchmarks.report": lambda argv: report.main(Path(*argv)),
    }
    checks = correctness.checks
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("FORETHOUGHT_DEVICE", "cpu")
        patch.setattr(
            correctness, "checks", lambda *call: {name: c for name, c in checks(*call).items() if name[:4] == "text"}
        )
        for module, *arguments in commands:
            if module == "pytest":
                assert all(Path(name).exists() for name in arguments if name.startswith("tests/"))
            else:
                assert not mains[module](arguments)
    return out, [module for module, *_ in commands]


def test_the_gpu_script_runs_everything(dry_run):
    out, modules = dry_run
    out, directory = out / "results", out
    assert modules[0] == "benchmarks.device"
    assert sorted(modules[1:6]) == [*["benchmarks.correctness"] * 4, "pytest"]  # concurrently
    assert modules[6:] == ["benchmarks", "benchmarks.device", *["benchmarks"] * len(ON_GPU), "benchmarks.report"]
    checked = [f"correctness-{backend}" for backend in CHECKED]
    files = {f"{name}.json" for name in checked} | {"cpu.json", "cpu.png", "gpu.log", "ceilings.json"}
    files |= {"profile-quiet_star.txt", "profile-next_token.txt"}
    assert {path.name for path in out.iterdir()} == files | {"gpu.tar.gz"}
    assert gpu_script(directory, "--tiny", "3")[0] == 0
    with tarfile.open(out / "gpu.tar.gz") as tar:
        assert set(tar.getnames()) == files
    ceilings = json.loads((out / "ceilings.json").read_text())
    assert min(ceilings[name]["median"] for name in ("product, FLOP/s", "copy, bytes/s")) > 0
    assert "aten::mm" in (out / "profile-next_token.txt").read_text()
    results = json.loads((out / "cpu.json").read_text())
    assert {row["part"] for row in results["rows"]} == ON_GPU
    assert not [row for row in results["rows"] if row.get("failed")]
    assert not [m for row in results["rows"] for m in row["measured"].values() if m.get("failed")]
    counts = {name: json.loads((out / f"{name}.json").read_text())["counts"] for name in checked}
    assert counts["correctness-aten"]["passed"] == 1
    assert not any(count["failed"] for count in counts.values())


def test_a_run_and_a_bare_loop_have_the_same_losses(tmp_path):
    """Or the rows fail."""
    assert bench.bench(["fit"], "tiny", None, 1, tmp_path) == 0
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["next_token", "rlp"]
    assert all(row["ratios"]["fit / bare, time of a step"]["median"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("part", "sections"),
    [
        ("1", ["ceilings", "smoke", *(f"correctness-{backend}" for backend in CHECKED), "tests"]),
        ("2", ["targets", "profile"]),
        ("3", ["attention", "steps", "memory", "rollouts", "curves", "data", "report"]),
    ],
)
def test_each_part_of_the_gpu_script_ends_within_nine_minutes_whatever_fails(tmp_path, part, sections):
    code, said, commands = gpu_script(tmp_path, part, fails=f"--out {tmp_path}/results")
    limits = dict(re.findall(r"== (.+?)(?:, concurrently)?, at most (\d+) s", said))
    together = {name: int(limit) for name, limit in limits.items() if f"{name}, concurrently" in said}
    one_by_one = [int(limit) + 5 for name, limit in limits.items() if name not in together]
    assert sorted(limits) == sorted(sections)
    assert sum(one_by_one) + max(together.values(), default=0) + 5 < 540
    # All that writes results fails here, and all runs nevertheless.
    assert len(commands) == len(sections)
    assert code == 1
    failed = [name for name in sections if name not in ("smoke", "tests", "report")]
    assert set(said.rpartition("failed: ")[2].replace(" (1)", "").split()) == set(failed)
    assert (tmp_path / "results" / "gpu.log").read_text() == said


def test_rows_with_a_target_are_measured_before_all_others(tmp_path):
    *_, commands = gpu_script(tmp_path, "2")
    only = commands[0][commands[0].index("--only") + 1]
    on_cuda = SIZES["full"](torch.device("cuda"), torch.bfloat16, None)
    assert [f"{part}:{name}" for part, name, _ in bench._chosen(command.parts(only), on_cuda)] == only.split(",")
    assert {f"{t.part}:{t.row}" for t in TARGETS if t.device == "cuda"} == set(only.split(","))


def test_the_large_step_is_raced_with_aten_and_with_the_optimizer(monkeypatch):
    raced = {}
    monkeypatch.setattr(steps, "race_row", lambda row, settings, variants: raced.update(variants))
    steps.large_step(SIZES["tiny"](CPU, torch.float32, None))
    assert raced.keys() == {"quiet_star", "quiet_star, aten", "next_token", "optimizer"}


def test_memory_is_measured_in_seconds_on_cuda():
    """Steps of the eager rollouts, a hundred kernels a layer each: some seconds, not minutes."""
    c = SIZES["full"](torch.device("cuda"), torch.bfloat16, None).memory
    assert c["N"] / c["at_once"] * c["L"] <= 128


def test_every_target_is_measured_by_a_row(dry_run):
    results = json.loads((dry_run[0] / "results" / "cpu.json").read_text())
    assert [t["ratio"] for t in results["targets"]] == [t.ratio for t in TARGETS if t.device != "cuda"]
    for target in results["targets"]:
        # Steps of this size may fit into pages that are resident anyway, and `fit` is no question to a GPU.
        unmeasured = target["ratio"].startswith("bytes, ") or target["part"] == "fit"
        assert target["value"] is not None or unmeasured, target
        assert target["reached"] is None  # not at this size
    full = judge(results["rows"], "cpu", "full")
    assert [t["reached"] in (True, False) for t in full] == [t["value"] is not None for t in full]
    curves = {row["name"]: row["ratios"].keys() for row in results["rows"] if row["part"] == "curves"}
    assert {name for name, ratios in curves.items() if ratios} == {"L", "K", "G", "T", "anchors"}


def test_runs_are_compared_with_bare_loops(tmp_path):
    command.main(["--tiny", "--only", "fit", "--repeats", "1", "--out", str(tmp_path)])
    targets = json.loads((tmp_path / "cpu.json").read_text())["targets"]
    assert [t["row"] for t in targets if t["part"] == "fit" and t["value"] is not None] == ["next_token", "rlp"]


def test_the_targets_of_a_gpu_name_ratios_that_are_taken(dry_run):
    """As far as a CPU has them: without those relative to a GPU's peak, and with aten in place of Triton."""
    rows = json.loads((dry_run[0] / "results" / "cpu.json").read_text())["rows"]
    rows = {(row["part"], row["name"]): row for row in rows}
    for target in (t for t in TARGETS if t.device == "cuda"):
        row = rows[target.part, target.row]
        if target.ratio.endswith(", MFU"):
            assert target.ratio.removesuffix(", MFU") in row["measured"]
        else:
            assert "triton" in row["measured"] and target.ratio.replace("triton", "aten") in row["ratios"]


def test_gradients_count_as_memory_of_a_step():
    config = replace(TINY, vocab_size=2**16)
    model, text = make_model(config, torch.float32, CPU), make_text(config, 1, 4, CPU)
    head = model.head_weight_VW
    assert added_bytes(partial(training_step, next_token(), model, text)) >= head.numel() * head.element_size()


def test_both_ways_of_scoring_give_the_same_log_probs(dry_run):
    rows = json.loads((dry_run[0] / "results" / "cpu.json").read_text())["rows"]
    scoring = next(row for row in rows if row["name"] == "scoring")
    assert 0 <= scoring["setting"]["largest_difference"] <= 1e-4


def test_keys_and_values_are_counted(dry_run):
    """Ours holds the text's once and each thought's own; `generate` holds both for every thought."""
    rows = json.loads((dry_run[0] / "results" / "cpu.json").read_text())["rows"]
    deep = next(row for row in rows if (row["part"], row["name"]) == ("rollouts", "deep"))
    P, G, T = (deep["setting"][name] for name in "PGT")
    token = 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 4
    assert deep["measured"]["rollout"]["kv_bytes"]["median"] == token * (P + G * (1 + T))
    if "rollout, compiled" in deep["measured"]:  # which holds the text a second time, and capacities of 16 tokens
        text, own = (-(-tokens // 16) * 16 for tokens in (P, 1 + T))
        assert deep["measured"]["rollout, compiled"]["kv_bytes"]["median"] == token * (P + text + G * own)
    assert deep["measured"]["generate, dynamic cache"]["kv_bytes"]["median"] == token * G * (P + T)


def test_ragged_thoughts_are_compared_with_equal_ones_and_with_those_that_stay(dry_run):
    rows = json.loads((dry_run[0] / "results" / "cpu.json").read_text())["rows"]
    ragged = next(row for row in rows if (row["part"], row["name"]) == ("rollouts", "ragged"))
    lengths, measured = ragged["setting"]["lengths"], ragged["measured"]
    assert len(lengths) == ragged["setting"]["B"] * ragged["setting"]["K"]
    assert min(lengths) < max(lengths) / 3
    engines = {name.partition(", ")[0] for name in measured}
    assert engines >= {"default", "recorded"}
    for name in engines:
        for kind in ("ragged", "together"):
            assert measured[f"{name}, {kind}"]["tokens"]["median"] == sum(lengths)
        equal = measured[f"{name}, equal"]
        if "unsupported" not in equal:  # by the recorded step, which takes more tokens
            assert equal["tokens"]["median"] == len(lengths) * round(sum(lengths) / len(lengths))
    differ = ragged["setting"]["thoughts that differ"]
    assert len(differ) == 2 * len(engines) and not any(differ.values())


@pytest.mark.parametrize("flight", [InTurn, AllAtOnce])
def test_thoughts_that_stay_together_are_computed_until_the_last_has_ended(flight):
    model, text = make_model(TINY, torch.float32, CPU), make_text(TINY, 2, 16, CPU)
    close = ending_at_random(model, 8)
    with torch.no_grad():
        state = model.read(text)
    rows = []

    class Counted(Together):
        def step(self, tokens_R):
            rows.append(len(tokens_R))
            return super().step(tokens_R)

    request = RolloutRequest(model, state, last_position(text), 4, 30, Rng(0, 0), prompt=(3,), close=close)
    if flight is InTurn and compiler() is None:
        pytest.skip("no C++ compiler")
    found = sample_thoughts(
        request, Counted(InTurn(request, 8) if flight is InTurn else flight(request, EAGER.steps(request)))
    )
    lengths = found.sampled_BKSM.sum(2)
    assert rows == [8] * int(lengths.max()) and lengths.min() < lengths.max() / 2


def test_an_engine_that_does_not_support_a_rollout_has_not_failed():
    settings = replace(SIZES["tiny"](CPU, torch.float32, None), deep=dict(P=16, G=2, T=4))
    row = deep_rollout(settings)
    assert row.measured["rollout, recorded"].unsupported.startswith("3 steps are too few")
    assert row.measured["rollout"].figures and not row.failures()


def test_a_decoding_step_counts_each_key_and_value_once(dry_run):
    """Those of text and thoughts, queries and output, in bf16."""
    rows = json.loads((dry_run[0] / "results" / "cpu.json").read_text())["rows"]
    decode = next(row for row in rows if row["name"] == "deep decode")
    B, N, K, S, H, G, D = (decode["setting"][name] for name in "BNKSHGD")
    counted = 2 * B * N * G * D + 2 * B * K * S * G * D + 2 * B * K * H * D
    assert decode["measured"]["aten"]["bytes"]["median"] == 2 * counted
    assert decode["ratios"].keys() >= {"default / copy, bytes/s", "reference / copy, bytes/s"}


def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    environment.pop("FORETHOUGHT_DEVICE", None)
    run = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout.startswith("no CUDA device")


# Measuring


def megabytes(n: int) -> torch.Tensor:
    """A block of n MiB, all of it resident."""
    return torch.ones(n * 2**20, dtype=torch.uint8)


def added_bytes(run: Variant) -> int:
    """Added by a call; skips the test if that cannot be measured."""
    measured = race({"run": run}, CPU, repeats=0)["run"]
    assert measured.failed is None
    if measured.added_bytes is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    return measured.added_bytes


def test_variants_take_turns_and_one_that_fails_loses_only_its_own_figures():
    order = []

    def variant(name, breaks_at=None):
        def run():
            order.append(name)
            if order.count(name) == breaks_at:
                raise RuntimeError("broke\nwith details")
            time.sleep(0.021)
            return {"flops": 42.0}

        return run

    def absent():
        raise Unsupported("no such kernel")

    runs = {"a": variant("a"), "b": variant("b", breaks_at=4), "c": absent, "d": variant("d", breaks_at=1)}
    measured = race(runs, CPU, repeats=3)
    assert "".join(order) == "aabbd" + "ab" * 2 + "a"
    assert len(measured["a"].figures["seconds"]) == len(measured["a"].figures["flops"]) == 3
    assert measured["b"].figures == {}
    assert measured["b"].failed == "RuntimeError: broke"
    assert measured["c"].unsupported == "no such kernel"
    assert measured["c"].failed is None
    assert measured["d"].failed


def test_collections_leave_out_what_was_there_before():
    """Else a whole program's objects are gone through twice for every figure of memory."""
    frozen = []
    race({"a": lambda: frozen.append(gc.get_freeze_count())}, CPU, repeats=1)
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


def test_a_budget_ends_the_rounds_but_not_the_first():
    measured = race({"a": lambda: None}, CPU, repeats=50, budget=0.0)
    assert len(measured["a"].figures["seconds"]) == 1


def test_short_calls_are_measured_many_at_a_time():
    calls = []
    race({"a": lambda: calls.append(0)}, CPU, repeats=2)
    assert len(calls) > 200


def test_model_flops_leave_out_what_is_recomputed_and_may_count_the_optimizers_time():
    step = Measured({"flops": [8e9], "recomputed_flops": [2e9], "seconds": [2.0]})
    row = Row("steps", "large", {}, {"next_token": step, "optimizer": Measured({"seconds": [1.0]})})
    assert row.rate("next_token") == [4e9]
    assert row.model_rate("next_token") == [3e9]
    assert row.model_rate("next_token", "optimizer") == [2e9]
    assert row.model_rate("quiet_star") == []


def test_the_optimizer_is_timed_alone_and_changes_no_weights():
    model = make_model(TINY, torch.float32, CPU)
    before = [p.detach().clone() for p in model.parameters()]
    started = time.perf_counter()
    took = optimizer_step(model)["seconds"]
    assert 0 < took < time.perf_counter() - started
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(model.parameters(), before, strict=True))


def test_ratios_are_taken_round_by_round():
    row = Row("part", "name", {})
    row.compare("ratio", [2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert row.ratios["ratio"] == Spread(3.0, 2.0, 4.0)
    row.compare("none", [], [1.0])
    assert "none" not in row.ratios


def test_peak_memory_is_what_was_allocated_at_once():
    def one_after_the_other():
        for _ in range(3):
            megabytes(64)

    def together():
        _ = [megabytes(64) for _ in range(3)]

    assert added_bytes(one_after_the_other) == pytest.approx(64 * 2**20, rel=0.1)
    assert added_bytes(together) == pytest.approx(3 * 64 * 2**20, rel=0.1)


def test_memory_that_a_call_keeps_does_not_count_as_added():
    kept = []

    def run():
        kept.append(megabytes(32))
        megabytes(64)

    assert added_bytes(run) == pytest.approx(64 * 2**20, rel=0.1)


def test_memory_does_not_depend_on_what_the_process_did_before():
    def small_ones_then_large_ones():
        blocks = [megabytes(1) for _ in range(64)]
        blocks = blocks[::8]
        blocks += [megabytes(16) for _ in range(6)]

    # As in a process that has long been freeing large blocks: these lie in the heap, and leave holes there.
    libc = ctypes.CDLL("libc.so.6")
    assert libc.mallopt(MMAP_THRESHOLD, MAPPED_FROM_AT_MOST)
    blocks = [megabytes(1) for _ in range(256)]
    del blocks[::2]
    assert added_bytes(small_ones_then_large_ones) == pytest.approx(104 * 2**20, rel=0.1)
    assert len(blocks) == 128


def test_memory_alone_needs_no_rounds():
    measured = race({"a": lambda: {"flops": 1.0}}, CPU, repeats=0)["a"]
    assert measured.figures == {}
    assert measured.to_json().keys() <= {"peak_bytes", "added_bytes"}


def test_asking_for_too_much_memory_raises():
    with memory_limit(CPU), pytest.raises(RuntimeError, match="memory"):
        torch.empty(2**42, dtype=torch.uint8)
    assert torch.ones(2**20).sum() == 2**20


def test_growth_of_laws_that_are_known():
    x = [1, 2, 4, 8]
    square = Growth.of(x, [3.0 * v**2 for v in x])
    line = Growth.of(x, [5.0 + 2.0 * v for v in x])
    assert square.exponent == pytest.approx(2.0)
    assert square.line_worst > 0.3
    assert line.exponent < 1
    assert line.line_worst == pytest.approx(0.0, abs=1e-12)
    assert Growth.of([1, 2], [1.0, 2.0]) is None
    assert Growth.of(x, [1.0, 0.0, 1.0, 1.0]) is None


def test_targets_are_reached_on_the_right_side():
    at_least, at_most = TARGETS[0], TARGETS[1]
    assert (at_least.sense, at_most.sense) == ("≥", "≤")
    assert at_least.reached(at_least.bound) and not at_least.reached(at_least.bound * 0.99)
    assert at_most.reached(at_most.bound) and not at_most.reached(at_most.bound * 1.01)
    for target in (at_least, at_most):
        for factor in (0.5, 2.0):
            assert target.reached(target.bound * factor) == (target.margin(target.bound * factor) > 1)
    assert at_most.margin(0.0) == pytest.approx(1000)


# The command


def test_parts_run_apart_join_in_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORETHOUGHT_DEVICE", "cpu")
    for part in ("memory", "attention"):
        assert cli.main(["bench", "--tiny", "--only", part, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["part"] for row in results["rows"]] == ["attention"] * 6 + ["memory"]
    assert {"commit", "torch", "device", "threads"} <= results["environment"].keys()
    assert "target" in capsys.readouterr().out
    # Of another commit nothing is kept.
    results["environment"]["commit"] = "another"
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    bench.bench(("memory",), "tiny", None, None, tmp_path)
    assert [row["part"] for row in json.loads((tmp_path / "cpu.json").read_text())["rows"]] == ["memory"]


def test_a_row_is_measured_alone_and_one_that_is_there_is_not_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORETHOUGHT_DEVICE", "cpu")
    measured = []

    def rows(settings):
        return [(name, lambda name=name: measured.append(name) or Row("memory", name, {})) for name in ("a", "b")]

    monkeypatch.setitem(ROWS, "memory", rows)
    arguments = ["--tiny", "--out", str(tmp_path), "--only"]
    command.main([*arguments, "memory:b"])
    command.main([*arguments, "memory", "--missing"])
    command.main([*arguments, "memory:b"])
    assert measured == ["b", "a", "b"]
    assert [r["name"] for r in json.loads((tmp_path / "cpu.json").read_text())["rows"]] == ["a", "b"]
    with pytest.raises(SystemExit, match="no row 'c' in memory; choose from a, b"):
        command.main([*arguments, "memory:c"])


def test_a_row_that_fails_is_reported_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORETHOUGHT_DEVICE", "cpu")

    def broken():
        raise RuntimeError("no luck")

    rows = ROWS["memory"]
    monkeypatch.setitem(ROWS, "memory", lambda settings: [("broken", broken), *rows(settings)])
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--tiny", "--only", "memory", "--out", str(tmp_path)])
    assert ended.value.code == 1
    first, second = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert first["failed"] == "RuntimeError: no luck"
    assert second["ratios"]
    assert "failed: memory, broken: RuntimeError: no luck" in capsys.readouterr().out


def test_neither_rich_nor_matplotlib_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORETHOUGHT_DEVICE", "cpu")
    for name in ("rich", "rich.console", "rich.table", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench.bench(("memory",), "tiny", None, None, tmp_path) == 0
    said = capsys.readouterr().out
    assert "quiet_star / next_token, memory" in said
    assert "no picture: matplotlib is not installed" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


def test_the_projects_optional_dependencies_are_not_needed(tmp_path):
    """As on a GPU machine that has torch and little else; --help needs not even that."""
    absent = (
        "lightning",
        "pydantic",
        "datasets",
        "wandb",
        "rich",
        "matplotlib",
        "tokenizers",
        "huggingface_hub",
        "yaml",
    )
    code = f"""import sys
sys.modules |= dict.fromkeys({absent})
from benchmarks.command import main
assert "torch" not in sys.modules
main(["--tiny", "--only", "memory", "--out", {str(tmp_path)!r}])"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"FORETHOUGHT_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "cpu.json").exists()


def test_a_command_that_is_not_installed_is_not_offered(monkeypatch, capsys):
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    with pytest.raises(SystemExit):
        cli.main(["bench"])
    assert "invalid choice: 'bench'" in capsys.readouterr().err


def test_a_part_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--only", "memory,speed"])
    assert "no part 'speed'; choose from attention, steps, rollouts, memory, curves" in capsys.readouterr().err
    assert tuple(ROWS) == command.PART_NAMES


def test_mistakes_are_named_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for asked, why in (("cuda", "there is no CUDA device"), ("tpu", "it must be cpu or cuda")):
        monkeypatch.setenv("FORETHOUGHT_DEVICE", asked)
        with pytest.raises(SystemExit, match=why):
            cli.main(["bench", "--tiny", "--out", str(tmp_path)])
    monkeypatch.setenv("FORETHOUGHT_DEVICE", "cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is a file; name a directory"):
        cli.main(["bench", "--tiny", "--out", str(tmp_path / "file")])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_sizes_fit_their_models(size, device):
    """No row asks for more positions than its model has; no device is needed to say so."""
    settings = SIZES[size](torch.device(device), torch.float32, None)
    assert settings.deep["P"] + settings.deep["T"] + 1 <= settings.model.max_positions
    for sizes, model in (
        (settings.quiet_star, settings.model),
        (settings.public, settings.public_model),
        (settings.memory, settings.model),
        *((curve.at(max(curve.values)), settings.curve_model) for curve in settings.curves),
    ):
        longest = sizes["N"] + sizes["L"] + sizes["A"] + 2 if "N" in sizes else sizes["P"] + sizes["T"] + 3
        assert longest <= model.max_positions
    assert {curve.name for curve in settings.curves} == {"N", "L", "K", "P", "G", "T", "anchors"}


def test_transformers_gets_the_same_model():
    pytest.importorskip("transformers")
    model, text = make_model(TINY, torch.float32, CPU), make_text(TINY, 2, 20, CPU)
    theirs = transformers_model(model, torch.float32)
    with torch.no_grad():
        ours = model.read(text).hidden_BNW @ model.head_weight_VW.t()
        assert relative_error(ours, theirs(text.tokens_BN).logits) <= 1e-5


def test_transformers_generates_to_the_end_whatever_it_samples():
    pytest.importorskip("transformers")
    theirs = transformers_model(make_model(TINY, torch.float32, CPU), torch.float32)
    prompt = torch.randint(3, TINY.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    # One draw in a hundred is the id by which models of this family end.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(8):
            _generate(theirs, prompt, 60, "dynamic", CPU)


def test_numbers_read_well():
    assert [report.number(x) for x in (None, 0.1, 1.25, 20.0, 12345.6)] == ["–", "0.100", "1.25", "20.0", "12,346"]
    assert math.isclose(Spread.of([3.0, 1.0, 2.0]).median, 2.0)
