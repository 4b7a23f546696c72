"""A recipe: everything a run is made of, as dataclasses, YAML and command-line overrides.

All mistakes of a recipe are found at once and reported in one message, each with the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from data_pipelines import DataConfig, Tokenizer
from objectives import OBJECTIVES, Objective, ObjectiveConfig, SettingError, find_objective


def at_least(least: float, **values: float | None) -> list[str]:
    return [f"{n} must be at least {least}, got {v}" for n, v in values.items() if v is not None and v < least]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every mistake in it."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with fp32 masters and states."""

    lr: float = 1e-6
    warmup_steps: int = 20  # linear from 0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine falls to 0 at the last step
    weight_decay: float = 1e-3  # on matrices; not on norms, biases, embeddings or delimiters
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm
    max_skipped: int = 10  # steps in a row with a non-finite loss or gradient before the run stops

    def problems(self) -> list[str]:
        found = at_least(0, lr=self.lr, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        found += at_least(1, max_skipped=self.max_skipped)
        if self.clip <= 0 or self.eps <= 0:
            found.append("clip and eps must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas must lie in [0, 1), got {list(self.betas)}")
        return found


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation inside the run: at its start, at its end, and every so often."""

    every: int | None = None  # steps; none: only at start and end
    rows: int = 8  # held-out rows that are scored
    objective: ObjectiveConfig | None = None  # whose evaluation; none: that of the objective that is trained
    counterfactuals: bool = True  # also after other thoughts than the model's own: another's, shuffled, filler
    filler: str = "."  # whose first token fills the latter

    def problems(self) -> list[str]:
        return at_least(1, every=self.every, rows=self.rows)


@dataclass(frozen=True)
class CheckpointConfig:
    """The run's own checkpoints; one is always written at the end and at SIGTERM or SIGINT."""

    every: int | None = 100  # steps
    keep: int = 2  # newest ones kept

    def problems(self) -> list[str]:
        return at_least(1, every=self.every, keep=self.keep)


@dataclass(frozen=True)
class LoggingConfig:
    """metrics.jsonl is the truth and always written; the others mirror it."""

    every: int = 1  # steps
    samples: int = 4  # thoughts written to samples.jsonl at each logged step
    csv: bool = True
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if logged in, else offline
    wandb_project: str = "forethought"

    def problems(self) -> list[str]:
        return at_least(1, every=self.every) + at_least(0, samples=self.samples)


@dataclass(frozen=True)
class Recipe:
    """A run. `rows_per_step` rows of `data.length` tokens make a step, whatever the devices or micro-batches."""

    steps: int
    objective: ObjectiveConfig
    control: ObjectiveConfig | None = None  # trained afterwards into <run_dir>/control, at equal FLOPs
    model: str = "smollm2-135m"
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    run_dir: str | None = None  # default: runs/<name of the recipe>
    rows_per_step: int = 8
    micro_batch_rows: int | None = None  # rows that go through the model at once; default: all of a device's
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware multiplies it, else fp32
    compile: bool = False  # GPU: what lies between products and attention; a single CPU: sampling at few anchors
    activation_checkpointing: bool = False  # less memory, up to a third more compute: backward computes blocks again
    cuda_graphs: bool = False  # thoughts at a few anchors are sampled by replaying one recorded step; not when sharded
    devices: int = 1  # of each node; the model is sharded over all of them
    nodes: int = 1
    data_workers: int = 0  # processes that prepare batches ahead of time
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @property
    def objective_name(self) -> str:
        return self.objective.name

    def make_objective(self, tokenizer: Tokenizer, evaluation: bool = False) -> Objective:
        """The objective that is trained, or the one that evaluates.

        Raises RecipeError for settings that do not fit the tokenizer.
        """
        config, where = self.objective, "objective"
        if evaluation and self.evaluation.objective is not None:
            config, where = self.evaluation.objective, "evaluation.objective"
        try:
            return find_objective(config.name).build(config, tokenizer)
        except SettingError as error:
            raise RecipeError(f"{where}.{error} (model {self.model})") from None

    def control_recipe(self, steps: int, run_dir: str) -> Recipe:
        """The control run: all the same but the objective and its steps, evaluated as often and in the same way."""
        assert self.control is not None
        every = self.evaluation.every and max(1, round(self.evaluation.every * steps / self.steps))
        evaluation = replace(self.evaluation, every=every, objective=self.evaluation.objective or self.objective)
        return replace(self, objective=self.control, control=None, steps=steps, run_dir=run_dir, evaluation=evaluation)

    def problems(self) -> list[str]:
        found = at_least(1, steps=self.steps, rows_per_step=self.rows_per_step, devices=self.devices, nodes=self.nodes)
        found += at_least(0, data_workers=self.data_workers, seed=self.seed)
        found += at_least(1, micro_batch_rows=self.micro_batch_rows)
        if self.ranks >= 1 and self.rows_per_step % self.ranks:
            found.append(f"rows_per_step {self.rows_per_step} must be a multiple of the {self.ranks} devices")
        if self.data.length < self.objective.shortest_row:
            found.append(
                f"data.length {self.data.length} is too short for objective {self.objective.name}; "
                f"use at least {self.objective.shortest_row}"
            )
        return found


# Keys that name something and may also hold settings: `data: python-docs` is `data: {reference: python-docs}`.
SHORT_FORMS = {"data": "reference", "objective": "name", "control": "name", "evaluation.objective": "name"}


def shipped() -> list[str]:
    """Names of the recipes that come with the project."""
    folder = resources.files("pretrain") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by shipped name or YAML path, with overrides like `--steps 10 --objective.length=12`.

    Raises RecipeError with all mistakes.
    """
    if reference in shipped():
        text = (resources.files("pretrain") / "recipes" / f"{reference}.yaml").read_text()
    elif Path(reference).is_file():
        text = Path(reference).read_text()
    else:
        raise RecipeError(f"no recipe {reference!r}: give a YAML file or one of {', '.join(shipped())}")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{reference} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{reference} must be a mapping of keys to values")
    problems: list[str] = []
    for key, value in _parse_overrides(overrides, problems):
        _override(tree, key, value, problems)
    name = reference if reference in shipped() else Path(reference).stem
    tree.setdefault("run_dir", str(Path("runs") / name))
    return recipe_from_tree(tree, problems)


def recipe_from_tree(tree: dict[str, Any], problems: list[str] | None = None) -> Recipe:
    """A recipe from nested dicts. Raises RecipeError with all mistakes, after those already in `problems`."""
    problems = [] if problems is None else problems
    recipe = _build(Recipe, tree, "", problems)
    if problems:
        raise RecipeError("the recipe cannot be run:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return recipe


def recipe_to_tree(recipe: Recipe) -> dict[str, Any]:
    """Nested dicts of plain values, from which the same recipe can be built again."""
    tree = dataclasses.asdict(recipe)
    return _plain(tree)


def _plain(tree: Any) -> Any:
    """Tuples as the lists that YAML reads back."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return list(tree) if isinstance(tree, tuple) else tree


def recipe_to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe_to_tree(recipe), sort_keys=False)


def _long_form(key: str, value: Any) -> Any:
    return {SHORT_FORMS[key]: value} if key in SHORT_FORMS and isinstance(value, str) else value


def _parse_overrides(arguments: Sequence[str], problems: list[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            problems.append(f"{argument!r} is neither a key nor its value; write --key value")
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and not re.match(r"--?[\d.]", rest[0])):
                problems.append(f"--{key} needs a value")
                continue
            value = rest.pop(0)
        pairs.append((key.replace("-", "_"), _read_value(value)))
    return pairs


def _read_value(value: str) -> Any:
    """What YAML reads in it; what YAML cannot read, like `[` or `{`, is text, and checked as such."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _override(tree: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    *parents, last = key.split(".")
    where = ""
    for parent in parents:
        where = _path(where, parent)
        tree[parent] = _long_form(where, tree.get(parent, {}))
        tree = tree[parent]
        if not isinstance(tree, dict):
            problems.append(f"--{key}: {parent} is a value and has no keys")
            return
    value, old = _long_form(key, value), _long_form(key, tree.get(last))
    if key in SHORT_FORMS and isinstance(old, dict) and isinstance(value, dict):
        # Another objective has other settings; those of the recipe's own would be mistakes in it.
        another = SHORT_FORMS[key] == "name" and value.get("name", old.get("name")) != old.get("name")
        value = value if another else old | value
    tree[last] = value


def _build(kind: type, tree: Any, where: str, problems: list[str]) -> Any:
    """A dataclass from a mapping; what is wrong goes to `problems`, and the result is then not to be used."""
    if not isinstance(tree, dict):
        problems.append(f"{where or 'the recipe'} must be a mapping of keys to values, got {tree!r}")
        return None
    tree = dict(tree)
    if kind is ObjectiveConfig:
        try:
            kind = find_objective(str(tree.get("name"))).Config
        except ValueError as error:
            problems.append(f"{where} {error}")
            return None
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in tree.keys() - fields.keys():
        close = difflib.get_close_matches(str(key), fields, 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields) or 'none'}"
        problems.append(f"unknown key {_path(where, key)!r}{hint}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        before = len(problems)
        if name in tree:
            values[name] = _coerce(hints[name], tree[name], _path(where, name), problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{_path(where, name)} is missing")
        if len(problems) > before:
            # Something that can be built stands in, so that the other values are still checked.
            values.pop(name, None)
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                values[name] = ObjectiveConfig() if hints[name] is ObjectiveConfig else 1
    built = kind(**values)
    problems.extend(f"{where}: {problem}" if where else problem for problem in built.problems())
    return built


def help_on_keys() -> str:
    """Every key a recipe may have, its type and default, and the comment behind it in the source."""
    lines = _help(Recipe, "")
    for name, objective in OBJECTIVES.items():
        lines += [f"with --objective {name}:", *_help(objective.Config, "objective.")]
    return "\n".join(lines)


def _help(kind: type, prefix: str) -> list[str]:
    # Settings of a base class may be given another default without their comment being said again.
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base))
    lines = []
    hints = get_type_hints(kind)
    for spec in dataclasses.fields(kind):
        hint, name = hints[spec.name], prefix + spec.name
        if dataclasses.is_dataclass(hint) and hint is not ObjectiveConfig:
            if spec.name in SHORT_FORMS:
                lines.append(f"--{name} REF: short for --{name}.{SHORT_FORMS[spec.name]} REF")
            lines += _help(hint, f"{name}.")  # type: ignore[arg-type]
            continue
        comment = re.search(rf"^    {spec.name}: [^\n#]*#\s*(.*)$", source, re.MULTILINE)
        default = "" if spec.default is dataclasses.MISSING else f" (default {spec.default})"
        lines.append(f"--{name} {_name_of(hint)}{default}" + (f": {comment[1]}" if comment else ""))
    return lines


def _name_of(hint: Any) -> str:
    options = [o for o in get_args(hint) if o is not type(None)]
    if hint is ObjectiveConfig:
        return "|".join(OBJECTIVES)
    if get_origin(hint) is Literal:
        return "|".join(map(str, options))
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(_name_of, options))}]"
    return "|".join(map(_name_of, options)) if options else hint.__name__


def _path(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _coerce(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the type `hint`; YAML's `1e-6`, which it reads as a string, counts as a number."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            if type(None) not in options:
                problems.append(f"{where} needs a value")
            return None
        return _coerce(next(o for o in options if o is not type(None)), value, where, problems)
    if origin is Literal:
        if value not in options:
            problems.append(f"{where} must be one of {', '.join(map(str, options))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(options):
            problems.append(f"{where} must be a list of {len(options)} values, got {value!r}")
            return value
        pairs = enumerate(zip(options, value, strict=True))
        return tuple(_coerce(option, entry, f"{where}[{i}]", problems) for i, (option, entry) in pairs)
    if dataclasses.is_dataclass(hint):
        return _build(hint, _long_form(where, value), where, problems)  # type: ignore[arg-type]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        problems.append(f"{where} must be {names.get(hint, hint)}, got {value!r}")
    return value
