"""Who starts the processes of a run: torchrun, srun, or Lightning, which starts the recipe's `devices` on this machine.

What torchrun or srun has started is what there is, so that the recipe's `devices` and `nodes` follow it: ranks change
nothing that a run computes. A step of srun with a single task leaves it to Lightning.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from pretrain.recipe import Recipe, RecipeError

# A store ends with its object; these last as long as the process.
_stores: list[dist.TCPStore] = []


@dataclass(frozen=True)
class Launch:
    """Processes that were started from outside: `devices` on each of `nodes`."""

    by: str
    devices: int
    nodes: int

    def __str__(self) -> str:
        return f"started by {self.by}: devices {self.devices}, nodes {self.nodes}"

    @property
    def overrides(self) -> list[str]:
        """Of a recipe, as the command line takes them."""
        return ["--devices", str(self.devices), "--nodes", str(self.nodes)]

    def check(self, recipe: Recipe) -> None:
        """Raises RecipeError for a recipe of other devices or nodes."""
        if (self.devices, self.nodes) != (recipe.devices, recipe.nodes):
            raise RecipeError(f"{self}, but the recipe has {recipe.devices} and {recipe.nodes}; make them the same")


def launched() -> Launch | None:
    """Raises RecipeError where nodes have different numbers of processes."""
    environ = os.environ
    if dist.is_torchelastic_launched():
        ranks, devices, nodes = (int(environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
        launch, even = Launch("torchrun", devices, nodes), ranks == devices * nodes
    # A batch script has its job's variables, too, but only what srun starts has a step's.
    elif (ranks := int(environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
        nodes = int(environ["SLURM_STEP_NUM_NODES"])
        launch, even = Launch("srun", ranks // nodes, nodes), "," not in environ["SLURM_STEP_TASKS_PER_NODE"]
    else:
        return None
    if not even:
        raise RecipeError(f"{launch.by} has started {ranks} processes on {nodes} nodes; start as many on each node")
    return launch


def cluster_environment() -> ClusterEnvironment:
    """By which Lightning finds the run's other processes."""
    launch = launched()
    if launch is None:
        return LightningEnvironment()
    if launch.by == "torchrun":
        _use_fresh_store()
        return TorchElasticEnvironment()
    # Lightning reads what the job has asked for. A step may have asked for less, and by other options.
    os.environ |= {
        "SLURM_NTASKS": str(launch.devices * launch.nodes),
        "SLURM_NTASKS_PER_NODE": str(launch.devices),
        "SLURM_NNODES": str(launch.nodes),
        "SLURM_NODELIST": os.environ["SLURM_STEP_NODELIST"],
    }
    # Signals and requeueing are ours.
    return SLURMEnvironment(auto_requeue=False)


def _use_fresh_store() -> None:
    """Has the processes meet in a store of rank 0's, not in torchrun's.

    torchrun (seen in torch 2.13) keeps its store when it starts them again, and in it the addresses of those that have
    died, by which the new ones look for each other: connections refused, and some hang.
    """
    environ = os.environ
    if _stores or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, key = environ["MASTER_ADDR"], f"forethought/{environ['TORCHELASTIC_RESTART_COUNT']}/port"
    torchruns = dist.TCPStore(host, int(environ["MASTER_PORT"]), is_master=False)
    _stores.append(torchruns)
    if environ["RANK"] == "0":
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        _stores.append(own)
        torchruns.set(key, str(own.port))
    environ["MASTER_PORT"] = torchruns.get(key).decode()
