"""A recipe: everything a run is made of, as pydantic models.

Fields check themselves; `problems` finds what no field shows. `recipe_files` reads and writes recipes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, PydanticUserError, TypeAdapter
from pydantic_core import PydanticCustomError, PydanticUndefined

from data_pipelines import DataConfig, SourceConfig
from objectives import OBJECTIVES, ObjectiveConfig, find_objective

# Marks keys that may differ between a run and its continuation: none that changes what a step computes.
FREE: dict[str, Any] = {"free": True}

# Integers of this size do not fit into int64, and squares of such floats not into fp32.
TOO_LARGE = 2**63
# Evaluation samples by the key of step 2**32 - 1.
MOST_STEPS = 2**32 - 2
# What a run may end by.
UNITS = ("steps", "flops", "seconds")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every mistake in it."""


def read_objective(value: Any) -> ObjectiveConfig:
    """An objective's settings from a mapping whose `name` says of which; validated by that objective's Config."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)  # type: ignore[arg-type]
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise PydanticCustomError("mapping", "not a mapping")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise PydanticCustomError("objective", "{reason}", {"reason": f"needs a name; give {' | '.join(ACCEPTED)}"})
    try:
        kind = find_objective(name).Config
    except ValueError as error:
        raise PydanticCustomError("objective", "{reason}", {"reason": str(error)}) from None
    try:
        reader = TypeAdapter(kind)
    except PydanticUserError as error:
        why = f"{name!r}: its Config cannot be read from a recipe ({str(error).splitlines()[0]}); use numbers and text"
        raise PydanticCustomError("objective", "{reason}", {"reason": why}) from None
    # As JSON, so that strict validation takes lists for tuples.
    return reader.validate_json(json.dumps(value))


ACCEPTED = (*OBJECTIVES, "package.module:Class")
AnyObjective = Annotated[ObjectiveConfig, PlainValidator(read_objective), PlainSerializer(dataclasses.asdict)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """Base of a recipe and its parts: frozen, no unknown keys, no guessing of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def problems(self) -> list[str]:
        """What no single key shows, one line each, naming the way out."""
        return []

    def replaced(self, **changes: Any) -> Self:
        """A copy with changed fields, validated again. Raises pydantic.ValidationError."""
        return self.model_validate(dict(self) | changes)


class OptimizerConfig(Part):
    """AdamW with fp32 masters and states."""

    lr: float = Field(default=1e-6, ge=0, description="peak learning rate")
    warmup_steps: int = Field(default=20, ge=0, description="linear from 0")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="after the warm-up; cosine falls to 0 at the end of the schedule"
    )
    schedule_steps: int | None = Field(
        default=None, ge=1, description="length of the schedule; default: what steps was when the run began"
    )
    schedule_flops: float | None = Field(
        default=None, gt=0, description="the same for a run that ends by flops; default: what flops was when it began"
    )
    schedule_seconds: float | None = Field(
        default=None, gt=0, description="the same for one that ends by seconds; default: what seconds was when it began"
    )
    weight_decay: float = Field(
        default=1e-3, ge=0, description="on matrices; not on norms, biases, embeddings or delimiters"
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="decay of Adam's first and second moments")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of Adam's second moment")
    clip: float = Field(default=1.0, gt=0, description="largest global gradient norm")
    max_skipped: int = Field(
        default=10, ge=1, description="steps in a row with a non-finite loss or gradient before the run stops"
    )
    spike_threshold: float | None = Field(
        default=None,
        gt=0,
        description="skip updates whose loss or gradient norm is so many robust standard deviations above the median "
        "of the steps before, like 10; default: none",
    )
    spike_window: int = Field(default=128, ge=4, description="steps before that a spike is measured by")
    on_spike: Literal["skip", "rollback"] = Field(
        default="skip",
        description="rollback: also goes back to weights and moments of the last checkpoint of checkpoint.every, and "
        "on with the next texts, so that those since then are left out",
    )
    max_rollbacks: int = Field(default=5, ge=0, description="of a run; further spikes are skipped")

    def schedule_length(self, unit: str) -> float | None:
        """Of a run that ends by steps, flops or seconds; None: not said."""
        return getattr(self, f"schedule_{unit}")


class EvaluationConfig(Part):
    """Held-out evaluation inside the run: at its start, at its end, and every so often."""

    every: int | None = Field(default=None, ge=1, description="steps; default: only at start and end")
    every_flops: float | None = Field(default=None, gt=0, description="also whenever so many FLOPs have been spent")
    rows: int = Field(default=8, ge=1, description="held-out rows that are scored")
    objective: AnyObjective | None = Field(
        default=None, description="whose evaluation; default: that of the objective that is trained"
    )
    counterfactuals: bool = Field(
        default=True, description="also score after thoughts other than its own: another's, shuffled, filler, right"
    )
    filler: str = Field(default=".", description="text whose first token makes up a filler thought")


class CheckpointConfig(Part):
    """The run's own checkpoints; one is always written at the end and when a signal stops the run."""

    every: int | None = Field(default=100, ge=1, description="steps; null: only at the end")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")
    keep_every: int | None = Field(default=None, ge=1, description="also those of every so many steps, for good")
    keep_best: int = Field(default=0, ge=0, description="also those with the lowest held-out NLL, so many")


class LoggingConfig(Part):
    """metrics.jsonl is the truth and always written; loggers repeat it elsewhere."""

    every: int = Field(default=1, ge=1, description="steps")
    samples: int = Field(default=4, ge=0, description="thoughts written to samples.jsonl at each logged step")
    csv: bool = Field(default=True, description="also write csv/")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="auto: online if logged in, else offline"
    )
    wandb_project: str = Field(default="forethought", description="name of the project at wandb")
    wandb_group: str | None = Field(default=None, description="of runs at wandb; in a study its name")
    wandb_name: str | None = Field(default=None, description="of the run at wandb; default: its directory's")


class RolloutConfig(Part):
    """What samples thoughts."""

    engine: Literal["auto", "vllm"] = Field(
        default="auto",
        description="auto: this project's own; vllm: vLLM in the same process, which is handed the weights after each "
        "optimizer step, for rlp and rpt",
    )
    cache_gib: float = Field(
        default=4.0,
        gt=0,
        description="for vllm: its cache of keys and values on each device, in GiB",
        json_schema_extra=FREE,
    )


class Stage(Part):
    """A later part of a run, trained by another objective, or by other settings of it."""

    after: float = Field(
        gt=0, description="it begins after so many steps or, below 1, after so large a share of what the run may spend"
    )
    objective: AnyObjective = Field(description="what is trained from there on")


@dataclass(frozen=True)
class Budget:
    """When a run ends: once it has spent `amount` of `unit`, and at step `steps` at the latest."""

    steps: int
    unit: Literal["steps", "flops", "seconds"]
    amount: float

    def last_step(self, step: int, flops: float, seconds: float) -> int:
        """The step that ends a run which has come to `step` and spent so much: that at which it will have spent nearest
        to the amount, by what steps have cost so far."""
        spent = {"steps": step, "flops": flops, "seconds": seconds}[self.unit]
        return min(self.steps, max(step, round(step * self.amount / spent))) if spent else self.steps


class Recipe(Part):
    """A run. `rows_per_step` rows of `data.length` tokens make a step, whatever the devices or micro-batches."""

    steps: int | None = Field(
        default=None,
        ge=1,
        le=MOST_STEPS,
        description="of rows_per_step rows each; where flops or seconds end the run, at most: default there no limit",
        json_schema_extra=FREE,
    )
    flops: float | None = Field(
        default=None,
        gt=0,
        description="what the run may spend: it ends at the step that brings all devices' FLOPs nearest to this",
        json_schema_extra=FREE,
    )
    seconds: float | None = Field(
        default=None,
        gt=0,
        description="the same in seconds of training, evaluation apart; no two such runs are the same",
        json_schema_extra=FREE,
    )
    objective: AnyObjective = Field(description="what is trained")
    stages: dict[str, Stage] = Field(
        default={},
        description="what is trained later on instead, by a name for each, in their order, while model, optimizer and "
        "data go on; shares are of the schedule's length, so of what the run may spend when it begins",
    )
    control: AnyObjective | None = Field(
        default=None, description="trained afterwards into <run_dir>/control, at equal FLOPs", json_schema_extra=FREE
    )
    model: str = Field(default="smollm2-135m", description="reference of the model that training starts from")
    data: DataConfig = Field(default_factory=DataConfig, description="what is read")
    seed: int = Field(default=0, ge=0, description="of data order, sampling and fresh weights")
    run_dir: str | None = Field(default=None, description="default: runs/<name of the recipe>", json_schema_extra=FREE)
    continue_from: int | None = Field(
        default=None,
        ge=1,
        description="step of a checkpoint of the run to go on from, once, without what came after it; optimizer.* may "
        "change there",
        json_schema_extra=FREE,
    )
    rows_per_step: int = Field(default=8, ge=1, description="rows of a step, over all devices")
    micro_batch_rows: int | None = Field(
        default=None,
        ge=1,
        description="rows that go through the model at once; default: all of a device's; auto: as many as fit",
        json_schema_extra=FREE,
    )
    sampled_rows: int | None = Field(
        default=None,
        ge=1,
        description="rows whose thoughts are sampled at once, in whole micro-batches; default: micro_batch_rows; "
        "auto: as many as fit",
        json_schema_extra=FREE,
    )
    compute_dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="auto: bf16 where the hardware multiplies it, else fp32"
    )
    compile: bool = Field(
        default=False,
        description="on CPU: sample at a few anchors by a compiled kernel; not needed on CUDA",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="less memory, up to a third more compute: backward computes blocks again",
        json_schema_extra=FREE,
    )
    cuda_graphs: bool = Field(
        default=False, description="on CUDA: sample at a few anchors by replaying one recorded step"
    )
    devices: int = Field(default=1, ge=1, description="of each node", json_schema_extra=FREE)
    nodes: int = Field(default=1, ge=1, description="machines", json_schema_extra=FREE)
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        default="auto",
        description="of several devices: the model whole on each (ddp), in shards over all (fsdp, which auto takes), "
        "or in shards over each group of shard_size (hsdp)",
        json_schema_extra=FREE,
    )
    shard_size: int | None = Field(
        default=None,
        ge=2,
        description="for hsdp, neighbouring devices that hold one model together; default: those of a node",
        json_schema_extra=FREE,
    )
    gradient_sync: Literal["update", "backward"] = Field(
        default="update",
        description="when devices sum the gradients of a sharded model: once per update, for which each holds all of "
        "them in fp32, or in every backward pass",
        json_schema_extra=FREE,
    )
    rollout_weights: Literal["replica", "gathered"] = Field(
        default="replica",
        description="what devices sample from while the model is sharded: a copy of it in the compute dtype, or, where "
        "that does not fit, blocks that are gathered whenever thoughts are sampled",
        json_schema_extra=FREE,
    )
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="what samples thoughts")
    data_changed: Literal["refuse", "begin"] = Field(
        default="refuse",
        description="what a continued run does if its data is not what it began with: begin reads the new data, of a "
        "hub dataset the revision as it is now, from its beginning",
        json_schema_extra=FREE,
    )
    data_workers: int = Field(
        default=0, ge=0, description="processes that prepare batches ahead of time", json_schema_extra=FREE
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="of held-out text", json_schema_extra=FREE
    )
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="to continue from", json_schema_extra=FREE
    )
    logging: LoggingConfig = Field(default=LoggingConfig(), description="what is recorded", json_schema_extra=FREE)

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @property
    def shards(self) -> int:
        """Devices that hold one model together."""
        if self.strategy == "hsdp":
            return self.shard_size or self.devices
        return 1 if self.strategy == "ddp" else self.ranks

    @property
    def budget(self) -> Budget:
        steps = self.steps or MOST_STEPS
        if self.flops is not None:
            return Budget(steps, "flops", self.flops)
        return Budget(steps, "steps", steps) if self.seconds is None else Budget(steps, "seconds", self.seconds)

    @property
    def trained(self) -> dict[str, ObjectiveConfig]:
        """What is trained, by key, one stage after the other."""
        later = {f"stages.{name}.objective": stage.objective for name, stage in self.stages.items()}
        return {"objective": self.objective, **later}

    @property
    def objectives(self) -> dict[str, ObjectiveConfig]:
        """All that it names, by key."""
        others = {"control": self.control, "evaluation.objective": self.evaluation.objective}
        return self.trained | {key: config for key, config in others.items() if config is not None}

    @property
    def thinking_key(self) -> str:
        """Where the objective stands by which the model thinks once it is trained, and held-out text is scored unless
        the recipe says otherwise: the last stage's that has thoughts, or the last one's if none has."""
        *_, last = self.trained
        return ([key for key, config in self.trained.items() if config.thought_length is not None] or [last])[-1]

    @property
    def thinking(self) -> ObjectiveConfig:
        """The objective at `thinking_key`."""
        return self.trained[self.thinking_key]

    @property
    def trained_with(self) -> str:
        """The names of what is trained, in order."""
        names = [config.name for config in self.trained.values()]
        return ", then ".join(name for name, _ in itertools.groupby(names))

    def steps_of_stages(self, flops: Sequence[float], seconds: Sequence[float]) -> list[int]:
        """How many steps each stage takes, if each of its steps costs so much."""
        unit, whole = self.budget.unit, self.optimizer.schedule_length(self.budget.unit) or self.budget.amount
        costs = {"steps": [1.0] * len(flops), "flops": flops, "seconds": seconds}[unit]
        found: list[int] = []
        spent = 0.0
        for cost, after in zip(costs, [*(stage.after for stage in self.stages.values()), None], strict=True):
            if after is None:
                steps = min((self.budget.amount - spent) / cost, self.budget.steps - sum(found))
            else:
                steps = after - sum(found) if after >= 1 else (after * whole - spent) / cost
            found.append(max(0 if after or found else 1, round(steps)))
            spent += found[-1] * cost
        return found

    def control_recipe(self, steps: int, flops: float, run_dir: str) -> Recipe:
        """The control of a run that took so many steps and FLOPs: all the same but the objective, for the same FLOPs,
        evaluated as often and in the same way."""
        assert self.control is not None
        every = self.evaluation.every and self.evaluation.every * flops / steps
        evaluation = self.evaluation.replaced(
            every=None,
            every_flops=every or self.evaluation.every_flops,
            objective=self.evaluation.objective or self.thinking,
        )
        length = self.optimizer.schedule_length(self.budget.unit)
        schedule = {"schedule_steps": None, "schedule_seconds": None}
        optimizer = self.optimizer.replaced(**schedule, schedule_flops=length and flops * length / self.budget.amount)
        return self.replaced(
            objective=self.control,
            stages={},
            control=None,
            steps=None,
            flops=flops,
            seconds=None,
            run_dir=run_dir,
            continue_from=None,
            optimizer=optimizer,
            evaluation=evaluation,
        )

    def problems(self) -> list[str]:
        found = [
            f"{path} must be within ±2**63, got {value}"
            for path, value in _leaves(self.model_dump(mode="json"))
            if isinstance(value, (int, float)) and abs(value) >= TOO_LARGE and not path.endswith("flops")
        ]
        if self.flops is not None and self.seconds is not None:
            found.append("flops and seconds are two ways of ending a run; give one of them, with steps or without")
        unit = self.budget.unit
        found += [
            f"optimizer.schedule_{other} is of runs that end by {other}, and this one ends by {unit}; give "
            f"optimizer.schedule_{unit}, or leave it out for the whole run"
            for other in UNITS
            if other != unit and self.optimizer.schedule_length(other) is not None
        ]
        if self.rows_per_step % self.ranks:
            found.append(
                f"rows_per_step {self.rows_per_step} must be a multiple of the {self.ranks} devices; "
                f"use {-(-self.rows_per_step // self.ranks) * self.ranks}"
            )
        if self.optimizer.on_spike == "rollback":
            if self.optimizer.spike_threshold is None:
                found.append(
                    "optimizer.on_spike rollback takes a spike_threshold, which says what a spike is; 10 is usual"
                )
            if self.checkpoint.every is None:
                found.append("optimizer.on_spike rollback goes back to checkpoints; set checkpoint.every")
        found += [*self._stage_problems(), *self._sharding_problems()]
        if self.rollout.engine == "vllm":
            found += [
                f"{key} is for rollout.engine auto; leave it out"
                for key in ("compile", "cuda_graphs")
                if getattr(self, key)
            ]
        rows, sampled = self.micro_batch_rows, self.sampled_rows
        if sampled is not None and (rows is None or sampled < rows):
            found.append(
                f"sampled_rows {sampled} is less than the {rows or 'rows'} of a micro-batch, which are sampled at once "
                "anyway; lower micro_batch_rows, or objective.sampled_at_once for fewer anchors of each"
            )
        for key, config in self.objectives.items():
            found += [f"{key}: {problem}" for problem in config.problems()]
            if self.data.length < config.shortest_row:
                found.append(
                    f"data.length {self.data.length} is too short for {key} {config.name} with these settings; "
                    f"use at least {config.shortest_row}"
                )
        return found

    def _stage_problems(self) -> Iterator[str]:
        before, first = 0.0, "the run"
        unit = self.budget.unit
        steps = (self.optimizer.schedule_steps or self.steps) if unit == "steps" else None
        for name, stage in self.stages.items():
            key, after = f"stages.{name}.after", stage.after
            if "." in name:
                yield f"stages: the name {name!r} has a dot, which separates keys; leave it out"
            if after > 1 and not after.is_integer():
                yield f"{key} {after:g} is neither a whole number of steps nor a share below 1"
            elif before and (after < 1) != (before < 1):
                yield f"{key} {after:g} and the {before:g} of {first} are a share and a number of steps; give all alike"
            elif after <= before:
                yield f"{key} {after:g} must be above the {before:g} of {first}, which stands before it; reorder them"
            elif steps is not None and after >= max(steps, 1):
                yield (
                    f"{key} {after:g} is never reached in {steps} steps; lower it, give a share below 1, or set "
                    "optimizer.schedule_steps to what the run will have in the end"
                )
            before, first = after, f"stages.{name}"

    def _sharding_problems(self) -> list[str]:
        if self.strategy != "hsdp":
            return ["shard_size is for strategy hsdp; leave it out"] if self.shard_size is not None else []
        ranks, shards = self.ranks, self.shards
        if ranks == 1:
            return ["strategy hsdp takes several devices and there is one; leave it out"]
        if ranks % shards:
            return [f"shard_size {shards} does not divide the {ranks} devices; use one that does"]
        if shards in (1, ranks):
            wanted = [size for size in range(2, ranks) if ranks % size == 0]
            way = f"set shard_size to one of {', '.join(map(str, wanted))}, or use" if wanted else "use"
            same = "ddp" if shards == 1 else "fsdp"
            return [f"strategy hsdp with groups of {shards} of {ranks} devices is {same}; {way} strategy {same}"]
        return []


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, by dotted key."""
    if isinstance(tree, dict):
        for key, below in tree.items():
            yield from _leaves(below, f"{path}.{key}" if path else key)
    elif isinstance(tree, list):
        for place, below in enumerate(tree):
            yield from _leaves(below, f"{path}[{place}]")
    else:
        yield path, tree


# What models and dataclasses say about their fields


@dataclass(frozen=True)
class Key:
    """A field. default: MISSING if there is none. kind: its own model or dataclass, for one with keys below it."""

    name: str
    hint: Any
    default: Any
    description: str
    free: bool

    @property
    def options(self) -> list[Any]:
        """The types that it may have, without None."""
        hints = get_args(self.hint) if get_origin(self.hint) in (Union, types.UnionType) else (self.hint,)
        return [bare(hint) for hint in hints if hint is not type(None)]

    @property
    def is_objective(self) -> bool:
        """Whether its keys are those of whichever objective is named."""
        return self.options == [ObjectiveConfig]

    @property
    def of_each(self) -> type | None:
        """The model of its values, if it maps names of the user's choice to models."""
        (hint, *_) = self.options
        return get_args(hint)[1] if get_origin(hint) is dict else None

    @property
    def kind(self) -> type | None:
        """The model or dataclass of its keys, if it has keys of its own."""
        (kind, *others) = self.options
        has_keys = isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))
        return kind if has_keys and not others and not self.is_objective else None


def bare(hint: Any) -> Any:
    """A type without what annotates it."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def keys(kind: type) -> dict[str, Key]:
    """The fields of a pydantic model or a dataclass, by name."""
    return {key.name: key for key in _keys(kind)}


def _keys(kind: type) -> Iterator[Key]:
    if issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            default = info.get_default(call_default_factory=True, validated_data={})
            default = MISSING if default is PydanticUndefined else default
            yield Key(name, info.annotation, default, info.description or "", _is_free(info.json_schema_extra))
        return
    hints = get_type_hints(kind)
    for spec in dataclasses.fields(kind):  # type: ignore[arg-type]
        default = spec.default if spec.default_factory is MISSING else spec.default_factory()
        about = spec.metadata
        free = _is_free(about.get("json_schema_extra"))
        yield Key(spec.name, hints[spec.name], default, about.get("description", ""), free)


def _is_free(extra: Any) -> bool:
    return isinstance(extra, Mapping) and bool(extra.get("free"))


def free_keys(recipe: Recipe) -> set[str]:
    """Dotted keys that may differ between a run and its continuation."""
    found = set(_free(Recipe, "", recipe.objectives))
    # What a source refers to is known by what it contains.
    of_sources = [key.name for key in keys(SourceConfig).values() if key.free]
    found |= {f"data.mixture.{name}.{key}" for name in recipe.data.mixture for key in of_sources}
    stages = [(f"stages.{name}.objective", type(stage.objective)) for name, stage in recipe.stages.items()]
    return found | {f"{path}.{key.name}" for path, kind in stages for key in keys(kind).values() if key.free}


def _free(kind: type, prefix: str, objectives: Mapping[str, ObjectiveConfig]) -> Iterator[str]:
    for key in keys(kind).values():
        path = prefix + key.name
        below = type(objectives[path]) if key.is_objective and path in objectives else key.kind
        if key.free:
            yield path
        elif below is not None:
            yield from _free(below, f"{path}.", objectives)
