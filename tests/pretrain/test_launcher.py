"""Processes that torchrun or srun has started become one run without a word in recipe or command."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.launcher import Launch, cluster_environment, launched
from pretrain.recipe import RecipeError
from pretrain.recipe_files import load_recipe
from pretrain.run import fit
from pretrain.stopping import UNFINISHED
from tests.pretrain.test_fit import OBJECTIVES, lines

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "pretrain" / "launch"
# As srun sets them for two tasks on this machine. The job has asked for more, and not by --ntasks-per-node.
STEP = {
    **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"},
    **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"},
    **{"SLURM_CPUS_PER_TASK": "1"},
    **{"SLURM_NODELIST": "host[5-6]", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"},
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "2"}


SRUN = """#!/bin/bash
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "${@:2}" &
    tasks+=("$!")
done
for task in "${tasks[@]}"; do
    wait "$task" || code=$?
done
exit "${code:-0}"
"""


def run(file: str, programs: Path, environment: dict[str, str], arguments: list[str]) -> subprocess.CompletedProcess:
    """A launching file, which finds `programs` before all others."""
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path} | environment
    command = ["bash", str(LAUNCH / file), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_processes_that_were_started_are_the_runs(by, tiny_run, tmp_path):
    arguments = ["smollm2-quiet-star", *tiny_run, *OBJECTIVES["next_token"], "--steps", "2", "--devices", "4"]
    program(tmp_path / "programs" / "srun", SRUN)
    with socket.socket() as free:
        free.bind(("", 0))
        environment = {"torchrun": {"PROCESSES": "2"}, "srun": STEP | {"MASTER_PORT": str(free.getsockname()[1])}}[by]
    file = {"torchrun": "torchrun.sh", "srun": "slurm.sbatch"}[by]
    done = run(file, tmp_path / "programs", environment, arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"started by {by}: devices 2, nodes 1") == 1
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert (recipe.devices, recipe.nodes) == (2, 1)
    together = lines(tmp_path / "run" / "metrics.jsonl")
    assert main(["fit", *arguments, "--devices", "1", "--run-dir", str(tmp_path / "alone")]) == 0
    alone = lines(tmp_path / "alone" / "metrics.jsonl")
    assert [m["step"] for m in together] == [1, 2]
    assert [m["loss"] for m in together] == pytest.approx([m["loss"] for m in alone], rel=1e-5)


@pytest.mark.parametrize(("code", "requeued"), [(0, ""), (1, ""), (UNFINISHED, "requeue 4711\n")])
def test_an_unfinished_job_is_requeued(code, requeued, tmp_path):
    program(tmp_path / "programs" / "srun", f"#!/bin/bash\nexit {code}\n")
    program(tmp_path / "programs" / "scontrol", '#!/bin/bash\necho "$@"\n')
    done = run("slurm.sbatch", tmp_path / "programs", STEP, ["smollm2-next-token"])
    assert (done.returncode, done.stdout) == (code, requeued), done.stderr


def test_launching_files_are_clean_and_shipped():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    assert len(scripts) == 3
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    for script in scripts:
        subprocess.run([*checker, str(script)], check=True)
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pretrain"]
    assert {*LAUNCH.iterdir()} <= {path for pattern in shipped for path in (ROOT / "pretrain").glob(pattern)}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", 3, 2)),
        (TORCHRUN | STEP, Launch("torchrun", 3, 2)),  # one task of srun a node, and there torchrun
        (STEP | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
         Launch("srun", 8, 2)),
        ({name: STEP[name] for name in STEP if "STEP" not in name}, None),  # a batch script without srun
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
    ],
)  # fmt: skip
def test_who_has_started_them(environment, launch, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what Lightning is told is gone after the test
    assert launched() == launch
    if launch is not None and launch.by == "srun":
        environ = cluster_environment()
        environ.validate_settings(8, 2)
        assert (environ.world_size(), environ.auto_requeue) == (16, False)


@pytest.mark.parametrize(
    "environment",
    [
        TORCHRUN | {"WORLD_SIZE": "5"},
        STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "3,1"},
    ],
)
def test_nodes_with_different_numbers_of_processes_are_refused(environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", "smollm2-next-token"]) == 1
    assert capsys.readouterr().err.endswith("processes on 2 nodes; start as many on each node\n")


def test_rows_that_do_not_divide_are_refused(monkeypatch, capsys):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", "smollm2-next-token", "--rows-per-step", "8"]) == 1
    assert "rows_per_step 8 must be a multiple of the 6 devices; use 12" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="started by torchrun: devices 3, nodes 2, but the recipe has 1 and 1"):
        fit(load_recipe("smollm2-next-token"))
