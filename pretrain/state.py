"""A run's whole state, as tensors and plain values, and back: what a checkpoint holds.

Batches and sampled thoughts are functions of (seed, step), so the step number is all the state they have; the states of
the random generators are kept all the same, for objectives or hooks that use them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.errors import CheckpointError
from models.decoder import Decoder, DecoderConfig
from models.thinking import ThinkingModel
from pretrain import __version__
from pretrain.module import PretrainModule
from pretrain.sharding import full, placed_like

Tensors = dict[str, dict[str, Tensor]]
COUNTERS = ("step", "tokens", "flops", "seconds", "skipped")


def run_state(
    module: PretrainModule, constants: Mapping[str, Any], difficulty_E: Tensor | None
) -> tuple[Tensors, dict[str, Any]]:
    """(groups of whole tensors, JSON-able state) of a run between two steps; all ranks must call it.

    constants: JSON-able values of the whole run.
    """
    assert module.optimizer is not None
    # First, because it makes a sharded model expose its shards, the parameters that the optimizer knows.
    weights = {name: full(tensor) for name, tensor in module.model.state_dict().items()}
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    optimizer = {
        f"{names[id(parameter)]}/{key}": full(value)
        for parameter, states in module.optimizer.state.items()
        for key, value in states.items()
    }
    numpy_state = np.random.get_state(legacy=False)
    random_states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    tensors = {"model": weights, "optimizer": optimizer, "random": random_states}
    if objective_state := module.objective.state():
        tensors["objective"] = {name: full(tensor) for name, tensor in objective_state.items()}
    if difficulty_E is not None:
        tensors["evaluation"] = {"difficulty_E": difficulty_E}
    model = module.model
    state = {name: getattr(module, name) for name in COUNTERS} | {
        "decoder": dataclasses.asdict(model.decoder.config),
        "delimiters": model.delimiters is not None,
        "mixing_head": model.mixing_head is not None,
        "numpy_position": [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
        "python_random": list(random.getstate()),
        "version": __version__,
        "spikes": module.guard and module.guard.state(),
        **constants,
    }
    return tensors, state


def non_finite(tensors: Tensors) -> str | None:
    """The name of a weight, optimizer moment or tensor of the objective's that is not finite, if there is one."""
    for group in ("model", "optimizer", "objective"):
        for name, tensor in tensors.get(group, {}).items():
            if not tensor.isfinite().all():
                return name
    return None


def model_from_state(tensors: Tensors, state: Mapping[str, Any], compute_dtype: torch.dtype | None) -> ThinkingModel:
    """The model of a checkpoint, from the checkpoint alone, which it takes its tensors from without a copy.

    Raises CheckpointError where they do not fit.
    """
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**state["decoder"]), compute_dtype)
    decoder.init_rotary()
    model = ThinkingModel(decoder, delimiters=state["delimiters"], mixing_head=state["mixing_head"])
    _check_fit("model", tensors, model.state_dict(), state)
    model.load_state_dict(tensors["model"], assign=True)
    return model


def _check_fit(group: str, tensors: Tensors, wanted: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Raises CheckpointError, in one line, for tensors of other names, shapes or dtypes than those wanted."""
    found = tensors.get(group, {})
    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        is_a, not_a = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (found[name], wanted[name]))
        problems += [f"{name} is {is_a}, not {not_a}"] if is_a != not_a else []
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"checkpoint step-{state['step']:08d} cannot be used: {group}.safetensors does not fit its state.json "
            f"({'; '.join(sorted(problems)[:3])}{more}); restore it, or remove it to use an older one"
        )


def restore_before_setup(module: PretrainModule, tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Restores counters and the objective's state before anything is sharded; the model is already loaded.

    Raises CheckpointError where the optimizer's tensors do not fit.
    """
    for name in COUNTERS:
        setattr(module, name, state[name])
    if module.guard is not None and (spikes := state.get("spikes")) is not None:
        module.guard.load_state(spikes)
    stepped = {name.rpartition("/")[0] for name in tensors["optimizer"]}
    wanted: dict[str, Tensor] = {}
    for name, parameter in module.model.named_parameters():
        if name in stepped:
            moments = {f"{name}/exp_avg": parameter, f"{name}/exp_avg_sq": parameter}
            wanted |= {**moments, f"{name}/step": torch.zeros(())}
    _check_fit("optimizer", tensors, wanted, state)
    module.objective.load_state(module.model, tensors.get("objective", {}))


def restore_after_setup(module: PretrainModule, tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Restores optimizer and random generators, once the optimizer exists."""
    assert module.optimizer is not None
    parameters = dict(module.model.named_parameters())
    for key, value in tensors["optimizer"].items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        # Adam's step count is a scalar; its other states are shaped like the parameter.
        placed = placed_like(value, parameter) if value.dim() else value.to(parameter.device)
        module.optimizer.state[parameter][entry] = placed
    torch.set_rng_state(tensors["random"]["torch"])
    if "cuda" in tensors["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random"]["cuda"])
    position, has_gauss, gauss = state["numpy_position"]
    words = tensors["random"]["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, gauss))
    version_number, internal, gauss_next = state["python_random"]
    random.setstate((version_number, tuple(internal), gauss_next))
