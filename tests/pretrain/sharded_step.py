"""One process of a step of Quiet-STaR and one of RLP on a sharded model in bf16, and of sampling from it:

    python -m tests.pretrain.sharded_step RANK RANKS STORE OUT

Rank 0 writes losses and whole gradients to OUT, and every rank its thoughts, and how many collective calls they took,
to OUT-RANK.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from models.philox import Rng
from models.rollout import EAGER
from models.thinking import ThinkingModel
from models.thoughts import Anchors
from objectives.driver import Step
from objectives.quiet_star import QuietStar, QuietStarConfig
from objectives.rlp import Rlp, RlpConfig
from objectives.template import Template
from pretrain.sampling import FromReplica, Gathered, replica_bytes
from pretrain.sharding import before_backward, finish_gradients, full, shard
from tests.helpers import packed_text, rollout, tiny_model
from tests.models.test_rollout import Watched

QUIET = QuietStarConfig(length=3, lookahead=2, thoughts=2, policy_weight=1.0, anchors_at_once=4)
RLP = RlpConfig(
    length=6, thoughts=4, anchors_per_document=3, next_token_weight=0.5, train_predictor=0.5, anchors_at_once=2
)
RNG = Rng(0, 0)


class CollectiveCalls(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        collective = func.namespace in ("c10d", "_c10d_functional")
        self.count += collective and "_tensor_autograd" not in func.name() and "wait_tensor" not in func.name()
        return func(*args, **(kwargs or {}))


def model_and_objectives() -> tuple[ThinkingModel, dict]:
    """The same on every rank; the mixing weights are small, as at the start of a run."""
    model = tiny_model(torch.float32, tie_embeddings=False)
    model.ban(61, (9,))
    model.decoder.compute_dtype = torch.bfloat16
    with torch.no_grad():
        model.mixing_head.out.weight.mul_(5e-4)
    return model, {"quiet_star": QuietStar(QUIET), "rlp": Rlp(RLP, Template((7, 8), (9,)))}


def results(ranks: int = 1, rank: int = 0) -> dict[str, torch.Tensor]:
    """Losses, mean mixing weight and gradients by objective, of parts of one row of which each rank takes its own."""
    model, objectives = model_and_objectives()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for other in (*objectives["rlp"].other_models(model), model):
            shard(other, mesh)
    text = packed_text([[12, 8], [20], [9, 11], [6, 14]], 20)
    parts = [text.rows(slice(row, row + 1)) for row in range(rank, 4, ranks)]
    found = {}
    for name, objective in objectives.items():
        model.zero_grad()
        step = Step(objective, model, parts, RNG, FromReplica(EAGER))
        counts = {key: summed(count, ranks) for key, count in step.counts.items()}
        loss, mixing = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for output in step.losses(counts):
            before_backward(model, sync=output.last)
            output.loss.backward()
            loss += output.loss.detach()
            if "mixing_weight" in output.metrics:
                mean = output.metrics["mixing_weight"]
                mixing += torch.stack([mean.sum, mean.count])
        finish_gradients(model)
        found[f"{name}/loss"] = summed(loss, ranks)
        if name == "quiet_star":
            total, count = summed(mixing, ranks)
            found[f"{name}/mixing_weight"] = total / count
        gradients = {key: full(p.grad) for key, p in model.named_parameters() if p.grad is not None}
        found |= {f"{name}/{key}": gradient.clone() for key, gradient in gradients.items()}
    return found


def sampled(ranks: int = 1, rank: int = 0) -> dict[str, torch.Tensor]:
    """Thoughts of one of four rows per rank: by length, before and after an update; collective calls of the first, the
    second (there is no update in between), and the third; how many are sampled at its beginning and at its end; bytes
    of the replica."""
    found = {}
    text = packed_text([[12, 8], [20], [9, 11], [6, 14]], 20)
    rows = text.rows(slice(rank * 4 // ranks, (rank + 1) * 4 // ranks))
    for name, make in {"replica": lambda: FromReplica(EAGER), "gathered": Gathered}.items():
        model, _ = model_and_objectives()
        model.ban(12, ())
        if ranks > 1:
            shard(model, init_device_mesh("cpu", (ranks,)))
        engine = make() if ranks > 1 else EAGER
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        anchors = Anchors(rows, torch.tensor([[2, 4, 15], [7, 11, -1], [8, -1, -1], [3, -1, -1]])[rows.sample_id_B - 7])
        for i, length in enumerate((24, 4, 24)):
            with torch.no_grad():
                state = model.read(rows)
            Watched.rows.clear()
            with CollectiveCalls() as calls:
                drawn = rollout(model, state, anchors, 2, length, Watched(1, 0), prompt=(7,), close=(9,), engine=engine)
            found[f"{name}/{i} rows"] = torch.tensor([Watched.rows[0], Watched.rows[-1]])
            found[f"{name}/{i}"] = drawn.thoughts.slots(25).tokens_BKSM.contiguous()
            found[f"{name}/{i} calls"] = torch.tensor(calls.count)
            if i == 1:  # the same to the bit on any number of ranks
                finish_gradients(model)
                for parameter in model.parameters():
                    parameter.grad = parameter.detach().clone()
                optimizer.step()
        if name == "replica" and ranks > 1:
            weights = engine.whole(model).state_dict().values()
            found["bytes"] = torch.tensor([sum(w.untyped_storage().nbytes() for w in weights), replica_bytes(model)])
    return found


def summed(value: torch.Tensor, ranks: int) -> torch.Tensor:
    value = value.clone()
    if ranks > 1:
        dist.all_reduce(value)
    return value


if __name__ == "__main__":
    rank, ranks, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = results(ranks, rank)
    if rank == 0:
        save_file(found, out)
    save_file(sampled(ranks, rank), f"{out}-{rank}")
    dist.destroy_process_group()
