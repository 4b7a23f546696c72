"""A run's whole state, as tensors and plain values, and back: what a snapshot holds.

Batches and sampled thoughts are functions of (seed, step), so the step number is all the state they have; the states of
the random generators are kept all the same, each rank's own, for objectives or hooks that use them.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.loading import UnloadedModel, empty_model
from checkpoints.snapshots import Snapshot
from checkpoints.tensors import StoredTensor, fill_parameters, local_part
from models.decoder import DecoderConfig
from models.precision import weights_changed
from pretrain import __version__
from pretrain.module import PretrainModule
from pretrain.sharding import reshard

Tensors = dict[str, dict[str, Tensor]]
COUNTERS = ("step", "tokens", "flops", "seconds", "skipped")


def run_state(
    module: PretrainModule, constants: Mapping[str, Any], difficulty_E: Tensor | None
) -> tuple[Tensors, dict[str, Any]]:
    """(groups of tensors, JSON-able state) of a run between two steps; tensors of sharded models are shards.

    constants: JSON-able values of the whole run.
    """
    assert module.optimizer is not None
    # First, because it makes a sharded model expose its shards, the parameters that the optimizer knows.
    weights = module.model.state_dict()
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    optimizer = {
        f"{names[id(parameter)]}/{key}": value
        for parameter, states in module.optimizer.state.items()
        for key, value in states.items()
    }
    tensors = {"model": weights, "optimizer": optimizer, "random": _random_states(module.global_rank)}
    if objective_state := module.objective.state():
        tensors["objective"] = objective_state
    if difficulty_E is not None:
        tensors["evaluation"] = {"difficulty_E": difficulty_E}
    model = module.model
    state = {name: getattr(module, name) for name in COUNTERS} | {
        "decoder": dataclasses.asdict(model.decoder.config),
        "delimiters": model.delimiters is not None,
        "mixing_head": model.mixing_head is not None,
        "version": __version__,
        "stage": module.stage,
        "spikes": module.guard and module.guard.state(),
        **constants,
    }
    return tensors, state


def _random_states(rank: int) -> dict[str, Tensor]:
    numpy_state = np.random.get_state(legacy=False)
    words, gauss = numpy_state["state"], numpy_state["gauss"] if numpy_state["has_gauss"] else math.nan
    _, internal, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*words["key"].tolist(), words["pos"]]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor(internal),
        "python_gauss": torch.tensor(math.nan if python_gauss is None else python_gauss, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"{rank}/{name}": state for name, state in states.items()}


def _restore_random_states(stored: Mapping[str, StoredTensor], rank: int) -> None:
    """This rank's; where there were fewer ranks, those of the first one. Snapshots of format 1 have none by rank."""
    rank = rank if f"{rank}/torch" in stored else 0
    prefix = f"{rank}/"
    states = {name.removeprefix(prefix): s.whole() for name, s in stored.items() if name.startswith(prefix)}
    if not states:
        return
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    *key, position = states["numpy"].tolist()
    gauss, python_gauss = states["numpy_gauss"].item(), states["python_gauss"].item()
    has_gauss = not math.isnan(gauss)
    words = np.array(key, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, int(has_gauss), gauss if has_gauss else 0.0))
    internal = tuple(states["python"].tolist())
    random.setstate((3, internal, None if math.isnan(python_gauss) else python_gauss))


def non_finite(tensors: Tensors) -> str | None:
    """The name of a weight, optimizer moment or tensor of the objective's that is not finite here, if there is one."""
    for group in ("model", "optimizer", "objective"):
        for name, tensor in tensors.get(group, {}).items():
            if not local_part(tensor)[0].isfinite().all():
                return name
    return None


def gathered(value: Any) -> list[Any]:
    """What all ranks have, which all must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def model_of(snapshot: Snapshot, compute_dtype: torch.dtype | None) -> UnloadedModel:
    """The model of a snapshot, from the snapshot alone. Raises CheckpointError where its tensors do not fit."""
    state = snapshot.state
    config = DecoderConfig(**state["decoder"])
    model = empty_model(config, compute_dtype, delimiters=state["delimiters"], mixing_head=state["mixing_head"])
    _check_fit("model", snapshot, model.state_dict())
    return UnloadedModel(model, snapshot.tensors["model"])


def _check_fit(group: str, snapshot: Snapshot, wanted: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, in one line, for tensors of other names, shapes or dtypes than those wanted."""
    found = snapshot.tensors.get(group, {})
    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        is_a, not_a = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (found[name], wanted[name]))
        problems += [f"{name} is {is_a}, not {not_a}"] if is_a != not_a else []
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"checkpoint {snapshot.path.name} cannot be used: {group}.safetensors does not fit its state.json "
            f"({'; '.join(sorted(problems)[:3])}{more}); restore it, or remove it to use an older one"
        )


def restore_before_setup(module: PretrainModule, snapshot: Snapshot) -> None:
    """Restores the counters; raises CheckpointError where the optimizer's tensors do not fit."""
    for name in COUNTERS:
        setattr(module, name, snapshot.state[name])
    if module.guard is not None and (spikes := snapshot.state.get("spikes")) is not None:
        module.guard.load_state(spikes)
    stepped = {name.rpartition("/")[0] for name in snapshot.tensors["optimizer"]}
    wanted: dict[str, Tensor] = {}
    for name, parameter in module.model.named_parameters():
        if name in stepped:
            moments = {f"{name}/exp_avg": parameter, f"{name}/exp_avg_sq": parameter}
            wanted |= {**moments, f"{name}/step": torch.zeros(())}
    _check_fit("optimizer", snapshot, wanted)


class _Placed(Mapping[str, Tensor]):
    """Stored tensors, each read when it is asked for, and sharded as the tensor of its name in `like` is."""

    def __init__(self, stored: Mapping[str, StoredTensor], like: Mapping[str, Tensor]):
        self.stored, self.like = stored, like

    def __getitem__(self, name: str) -> Tensor:
        stored, like = self.stored[name], self.like.get(name)
        return stored.whole() if like is None or like.shape != stored.shape else stored.placed_like(like)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def restore_trained(module: PretrainModule, snapshot: Snapshot) -> None:
    """Takes weights, optimizer, the objective's state and random generators back to a snapshot of the run; the counters
    go on, and so the texts, schedule and draws of the steps to come."""
    assert module.optimizer is not None
    reshard(module.model)  # what passes have gathered would hide the shards
    fill_parameters(module.model, snapshot.tensors["model"])
    module.optimizer.state.clear()
    restore_after_setup(module, snapshot)
    weights_changed()


def restore_after_setup(module: PretrainModule, snapshot: Snapshot) -> None:
    """Restores optimizer, the objective's state and random generators, once models are sharded and it exists.

    Of what is sharded, this rank reads its shards."""
    assert module.optimizer is not None
    parameters = dict(module.model.named_parameters())
    for key, stored in snapshot.tensors["optimizer"].items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        # Adam's step count is a scalar; its other states are shaped like the parameter.
        placed = stored.placed_like(parameter) if stored.shape else stored.whole().to(parameter.device)
        module.optimizer.state[parameter][entry] = placed
    stored_state = snapshot.tensors.get("objective", {})
    if snapshot.state.get("stage", 0) == module.stage:
        module.objective.load_state(module.model, _Placed(stored_state, module.objective.state()))
    else:
        # Back from a stage to weights of an earlier one.
        module.objective.begin(module.model)
    _restore_random_states(snapshot.tensors["random"], module.global_rank)
