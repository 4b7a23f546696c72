"""Data parallelism over all devices of a run: the model whole on each of them (DDP), in shards over all (FSDP2), or in
shards over groups of neighbours, each of which holds a whole model (HSDP); and full tensors out of shards.

Gradients are summed in fp32, and not averaged: losses are divided by the counts of the whole batch already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from models.decoder import RMSNorm
from models.thinking import ThinkingModel

# Elements of gradients that whole models sum in one call.
BUCKET = 2**26


class DataParallel(ModelParallelStrategy):
    """Lightning's that leaves the model to us, on a mesh [replicas, shards]; every rank has rows of its own."""

    def __init__(self, ranks: int, shards: int):
        super().__init__(data_parallel_size=ranks // shards, tensor_parallel_size=shards)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}


def make_strategy(ranks: int, shards: int) -> str | Strategy:
    """For this many devices, of which `shards` neighbours hold one model together."""
    return "auto" if ranks == 1 else DataParallel(ranks, shards)


def mesh_to_shard_over(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """What `shard` takes of a mesh [replicas, shards], of which a single device has none; None if models stay whole."""
    if mesh is None or mesh.shape[1] == 1:
        return None
    return mesh if mesh.shape[0] > 1 else mesh["tensor_parallel"]


def shard(model: ThinkingModel, mesh: DeviceMesh) -> None:
    """Shards a model in place, block by block, over a mesh [shards] or [replicas, shards].

    A block's matrices are gathered in the compute dtype. Embedding and head, norms, mixing head and delimiters are
    gathered as the fp32 masters that they are.
    """
    # In fp64 only where all of the model is.
    reduce_dtype = torch.promote_types(model.head_weight_VW.dtype, torch.float32)
    masters = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    low = MixedPrecisionPolicy(param_dtype=model.decoder.compute_dtype, reduce_dtype=reduce_dtype)
    for block in model.decoder.layers:
        fully_shard([module for module in block.modules() if isinstance(module, RMSNorm)], mesh=mesh, mp_policy=masters)
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(model, mesh=mesh, mp_policy=masters)
    # Weights outside the blocks, the head above all, serve several losses in turn: they stay gathered until `reshard`.
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(False, recurse=False)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # A sharded model gathers its weights in `forward` and in these methods.
    for method in ("read", "think", "continue_thoughts"):
        register_fsdp_forward_method(model, method)

    def all_agree(here: Tensor) -> bool:
        everywhere = here.to(torch.int32)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere)

    model.all_agree = all_agree


def sharded_modules(model: torch.nn.Module) -> list[FSDPModule]:
    """Those that gather and free weights by themselves."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def before_backward(model: ThinkingModel, sync: bool) -> None:
    """sync: whether ranks with shards sum gradients in the next backward, with those of the ones before; otherwise
    they keep them, whole and in fp32."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def finish_gradients(model: ThinkingModel) -> None:
    """To be called by all ranks behind the last backward of an update: then gradients are sums over all ranks."""
    if isinstance(model, FSDPModule):
        reshard(model)
    elif dist.is_initialized() and dist.get_world_size() > 1:
        _sum_whole_gradients([p for p in model.parameters() if p.requires_grad])


@torch.no_grad()
def _sum_whole_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Once per update: what wraps a model to reduce within its backwards would do it once for each of them."""
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)  # one that no rank has stays None, as on a single device
    gradients: list[Tensor] = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    while gradients:
        bucket = [gradients.pop()]
        while gradients and sum(g.numel() for g in bucket) + gradients[-1].numel() <= BUCKET:
            bucket.append(gradients.pop())
        summed = parameters_to_vector(bucket)
        dist.all_reduce(summed)
        vector_to_parameters(summed, bucket)


def reshard(model: ThinkingModel) -> None:
    """Frees weights that passes leave gathered: those outside the blocks, and those of passes without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: Tensor) -> Tensor:
    """The full tensor; a collective call if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
