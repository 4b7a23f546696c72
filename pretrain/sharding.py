"""Fully sharded data parallelism (FSDP2) over all devices of a run, and full tensors out of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from models.decoder import RMSNorm
from models.thinking import ThinkingModel


def make_strategy(ranks: int) -> str | Strategy:
    """Lightning's strategy for this many devices."""
    if ranks == 1:
        return "auto"
    # Its own "auto" sizes count one node's devices only.
    return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)


def shard(model: ThinkingModel, mesh: DeviceMesh) -> None:
    """Shards a model in place, block by block; gradients are summed in fp32.

    A block's matrices are gathered in the compute dtype. Embedding and head, norms, mixing head and delimiters are
    gathered as the fp32 masters that they are.
    """
    masters = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    low = MixedPrecisionPolicy(param_dtype=model.decoder.compute_dtype, reduce_dtype=torch.float32)
    for block in model.decoder.layers:
        fully_shard([module for module in block.modules() if isinstance(module, RMSNorm)], mesh=mesh, mp_policy=masters)
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(model, mesh=mesh, mp_policy=masters)
    # Weights outside the blocks, the head above all, serve several losses in turn: they stay gathered until `reshard`.
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(False, recurse=False)
    # A sharded model gathers its weights in `forward` and in these methods.
    for method in ("read", "think", "continue_thoughts"):
        register_fsdp_forward_method(model, method)

    def all_agree(here: Tensor) -> bool:
        everywhere = here.to(torch.int32)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=mesh.get_group())
        return bool(everywhere)

    model.all_agree = all_agree


def reshard(model: ThinkingModel) -> None:
    """Frees weights that passes leave gathered: those outside the blocks, and those of passes without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: Tensor) -> Tensor:
    """The full tensor; a collective call if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
