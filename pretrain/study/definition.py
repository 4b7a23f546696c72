"""A study as people write it, and the recipe of each of its runs:

    base: quickstart                          # a recipe: shipped name or file
    changes: {steps: 85}                      # of it, for all arms: dotted key and value
    arms:
      rlp: {}
      next-token: {objective: next_token}
    matrix: {optimizer.lr: [1e-3, 3e-3]}      # every arm with every combination
    seeds: [0, 1, 2]
    match: flops                              # tokens, flops or seconds, which all runs spend alike:
    budget: rlp                               # so many, or those of an arm with the same seed
    controls: [next-token]                    # what the other arms are compared with
    pass_at: 16                               # thoughts that are sampled for pass@k
    shifts:                                   # further held-out documents, on which finished runs are scored:
      longer: {data: "lab:tasks=sum,chain=6", evaluation.objective.length: 16}
      prose: {data: texts.jsonl, evaluation.objective: next_token}

All mistakes come in one message, ahead of all runs.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from checkpoints.errors import CheckpointError
from data_pipelines import DataConfig, DataError, SourceConfig
from pretrain.assembly import assemble
from pretrain.recipe import UNITS, Part, Recipe, RecipeError
from pretrain.recipe_files import Sizes, Tree, load_recipe, read_yaml, with_overrides
from pretrain.run_directory import RunDirectory

# Shares of a budget in tokens that whole steps may miss it by.
CLOSE = 0.01
# Stands for FLOPs and seconds that an arm has not spent yet.
UNKNOWN = 1.0
NAME = re.compile(r"\w[\w.-]*")
Changes = dict[str, Any]
# A text names data.
Shift = Annotated[Changes, BeforeValidator(lambda value: {"data": value} if isinstance(value, str) else value)]


class Study(Part):
    """Arms of one base recipe, each with every seed."""

    base: str = Field(description="recipe that all arms change: a shipped name or a YAML file")
    changes: Changes = Field(default_factory=dict, description="of it, for all arms: dotted key and value")
    arms: dict[str, Changes | None] = Field(min_length=1, description="name and changes")
    matrix: dict[str, list[Any]] = Field(
        default_factory=dict, description="dotted key and values: every arm with every combination of them"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1, description="of every arm")
    match: Literal["tokens", "flops", "seconds"] | None = Field(
        default=None, description="what all runs spend alike; default: each as its recipe says"
    )
    budget: float | str | None = Field(
        default=None, description="how much: a number, or the arm whose runs' cost it is"
    )
    controls: list[str] = Field(default=[], description="arms that the others are compared with")
    held_out_rows: int | None = Field(
        default=None, ge=1, description="rows that finished runs are scored on; default: evaluation.rows"
    )
    shifts: dict[str, Shift] = Field(
        default_factory=dict,
        description="name and changes of data and evaluation: held-out documents that finished runs, and the model "
        "before, are scored on as well; a text names the data",
    )
    pass_at: int | None = Field(
        default=None,
        ge=1,
        description="n, thoughts that finished runs, and the model before, sample at each scored token for pass@k, "
        "k up to n; default: none",
    )

    def problems(self) -> list[str]:
        arms, unit, budget = ", ".join(self.arms), self.match, self.budget
        found = [f"controls: {name!r} is no arm; arms: {arms}" for name in self.controls if name not in self.arms]
        for kind, names, what in (("arm", self.arms, "a folder"), ("shift", self.shifts, "rows of tables")):
            wrong = [name for name in names if NAME.fullmatch(name) is None]
            found += [f"{kind} {name!r} names {what}; use letters, digits, ., _ and -" for name in wrong]
        empty = [key for key, values in self.matrix.items() if not values]
        found += [f"matrix.{key} has no values; give some, or leave it out" for key in empty]
        if len({*self.seeds}) < len(self.seeds):
            found.append(f"seeds {self.seeds} are not all different; give each once")
        if (unit is None) != (budget is None):
            found.append("match and budget go together: what all runs spend alike, and how much or as which arm")
        elif isinstance(budget, str) and budget not in self.arms:
            found.append(f"budget {budget!r} is neither a number nor an arm; arms: {arms}")
        elif isinstance(budget, (int, float)) and budget <= 0:
            found.append(f"budget must be above 0, got {budget}")
        of_arms = {f"arms.{name}": changes or {} for name, changes in self.arms.items()}
        for where, changes in {"changes": self.changes, "matrix": self.matrix, **of_arms}.items():
            for key in changes:
                first = key.partition(".")[0]
                if first in ("seed", "run_dir"):
                    found.append(f"{where} cannot set {key}, which is the study's own: see seeds and --run-dir")
                elif first in ("evaluation", "control") and where != "changes":
                    found.append(f"{where} cannot set {key}: all arms are scored alike; set it in changes")
            if unit is not None and where not in ("changes", f"arms.{budget}"):
                given = [key for key in changes if key in UNITS]
                found += [f"{where} cannot set {key}: match {unit} says how long; leave it out" for key in given]
        for name, changes in self.shifts.items():
            other = [key for key in changes if key.partition(".")[0] not in ("data", "evaluation")]
            found += [f"shifts.{name} cannot set {key}: a shift is of data and evaluation alone" for key in other]
        return found


@dataclass(frozen=True)
class Cell:
    """An arm with values of the matrix. name: of its folder."""

    arm: str
    values: tuple[tuple[str, Any], ...] = field(hash=False)  # which may hold lists

    @property
    def name(self) -> str:
        parts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.values]
        return ",".join([self.arm, *(re.sub(r"[^\w.=+-]+", "_", part) for part in parts)])


@dataclass(frozen=True)
class Run:
    """recipe: whole but for a budget that another arm has to spend first."""

    cell: Cell
    recipe: Recipe

    @property
    def directory(self) -> RunDirectory:
        assert self.recipe.run_dir is not None
        return RunDirectory(self.recipe.run_dir)

    @property
    def scores(self) -> Path:
        """The file of its final scores."""
        return self.directory.path.with_name(f"{self.directory.path.name}.scores.json")

    def at(self, directory: Path) -> Run:
        """The run in a study's directory."""
        run_dir, group = directory / self.cell.name / f"seed-{self.recipe.seed}", directory.resolve().name
        logging = self.recipe.logging.replaced(
            wandb_name=f"{group}/{run_dir.relative_to(directory)}",
            wandb_group=self.recipe.logging.wandb_group or group,
        )
        return Run(self.cell, self.recipe.replaced(run_dir=str(run_dir), logging=logging))


@dataclass(frozen=True)
class Planned:
    """A study with its runs, in their order: by seed, the arm whose cost is the budget first.

    base: the overrides of its recipe. scoring: that recipe, which says how all runs are scored. shifts: likewise, by
    name.
    """

    study: Study
    base: list[str]
    directory: Path
    scoring: Recipe
    runs: list[Run]
    shifts: Mapping[str, Recipe] = field(default_factory=dict)

    def recipe(self, run: Run) -> Recipe:
        """The recipe of a run, once the arm whose cost is its budget has come to its end."""
        of, unit = self.budget_of(run), self.study.match
        if of is None or unit is None:
            return run.recipe
        return run.recipe.replaced(**{unit: of.directory.read(of.directory.metrics)[-1][unit]})

    def budget_of(self, run: Run) -> Run | None:
        """The run whose cost is this one's budget; None where that is known ahead."""
        unit, budget = self.study.match, self.study.budget
        if unit in (None, "tokens") or not isinstance(budget, str) or run.cell.arm == budget:
            return None
        pair = (Cell(budget, run.cell.values), run.recipe.seed)
        return next(other for other in self.runs if (other.cell, other.recipe.seed) == pair)

    @property
    def before(self) -> Path:
        """The file of the scores of the model that training starts from."""
        return self.directory / "before.scores.json"

    def at(self, directory: Path) -> Planned:
        return replace(self, directory=directory, runs=[run.at(directory) for run in self.runs])

    @property
    def tree(self) -> Tree:
        """What study.yaml holds."""
        return self.study.model_dump(mode="json") | {"changes": self.base}

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(run.cell for run in self.runs))


def load_study(
    path: str, overrides: Sequence[str], run_dir: str | None, sizes: Sizes = lambda recipe, keys: {}
) -> Planned:
    """A study with all of its recipes, each of them assembled to see that it can be.

    overrides: changes of the base, as for `fit`. sizes: as `load_recipe` has it. Raises RecipeError with all mistakes.
    """
    study = _read(path)
    if found := study.problems():
        raise study_error(found)
    mistakes: dict[str, list[str]] = {}  # cells by what is wrong with them

    def attempted(cell: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (RecipeError, DataError, CheckpointError) as error:
            for line in str(error).removeprefix("the recipe cannot be run:\n").splitlines():
                mistakes.setdefault(line.removeprefix("  - "), []).append(cell)
            return None

    directory, cells = Path(run_dir or Path("runs") / Path(path).stem), _cells(study)
    base = [*_as_overrides(study.changes), *overrides]
    scoring = attempted("", lambda: _alike(load_recipe(study.base, base)))
    recipes: dict[Cell, Recipe] = {}
    for cell in cells if scoring is not None else []:
        changes = [*base, *_as_overrides({**(study.arms[cell.arm] or {}), **dict(cell.values)})]
        like = recipes.get(Cell(str(study.budget), cell.values))
        recipes[cell] = attempted(cell.name, partial(_assembled, study, scoring, cell, changes, like, sizes))
    scored = None if scoring is None else _with_rows(scoring, study)
    shifts = {
        name: attempted(f"shifts.{name}", partial(_shifted, scored, changes))
        for name, changes in study.shifts.items()
        if scored is not None
    }
    evaluator = None if scored is None else scored.evaluation.objective
    if study.pass_at is not None and evaluator is not None and evaluator.showing(None, 0.0, 1) is None:
        mistakes["pass_at: evaluation.objective samples no thoughts; name one that does, or leave it out"] = [""]
    if mistakes:
        every = {cell.name for cell in cells}
        alike = {line for line, of in mistakes.items() if "" in of or every <= {*of}}
        raise study_error(line if line in alike else f"{line} (in {', '.join(of)})" for line, of in mistakes.items())
    assert scored is not None
    runs = [Run(cell, recipe.replaced(seed=seed)) for seed in study.seeds for cell, recipe in recipes.items()]
    planned = Planned(study, base, directory, scored, runs, shifts).at(directory)
    if found := list(_occupied(planned)):
        raise study_error(found)
    return planned


def _read(path: str) -> Study:
    try:
        tree = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"no study {path!r} ({error.strerror}); give a YAML file, like studies/lab.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return Study.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        known = ", ".join(Study.model_fields)
        lines = [
            f"unknown key {'.'.join(map(str, e['loc']))!r}; known: {known}"
            if e["type"] == "extra_forbidden"
            else f"{'.'.join(map(str, e['loc'])) or path}: {e['msg'][0].lower()}{e['msg'][1:]}"
            for e in error.errors(include_url=False)
        ]
        raise study_error(lines) from None


def study_error(lines: Iterable[str]) -> RecipeError:
    """All that is wrong with a study."""
    return RecipeError("the study cannot be run:\n" + "\n".join(f"  - {line}" for line in lines))


def _as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """What a command line would say; JSON is YAML."""
    return [f"--{key}={json.dumps(value)}" for key, value in changes.items()]


def _cells(study: Study) -> list[Cell]:
    """The arm first whose cost is the budget."""
    arms = sorted(study.arms, key=lambda name: name != study.budget)
    every = itertools.product(*([(key, value) for value in values] for key, values in study.matrix.items()))
    return [Cell(arm, values) for values in every for arm in arms]


def _alike(recipe: Recipe) -> Recipe:
    """The base with the evaluation of all arms, that of the base's objective unless it names another. Raises
    RecipeError."""
    if recipe.data.held_out == 0:
        raise RecipeError("data.held_out is 0, which leaves nothing to score; raise it")
    evaluation = recipe.evaluation
    return recipe.replaced(
        control=None,
        data_changed="begin",  # an arm may have read something else
        evaluation=evaluation.replaced(objective=evaluation.objective or recipe.thinking),
    )


def _with_rows(scoring: Recipe, study: Study) -> Recipe:
    rows = study.held_out_rows or scoring.evaluation.rows
    return scoring.replaced(evaluation=scoring.evaluation.replaced(rows=rows))


def _shifted(scoring: Recipe, changes: Changes) -> Recipe:
    """How runs are scored elsewhere, once it has been assembled. Raises what that raises."""
    data = changes.get("data")
    if "data.reference" in changes or isinstance(data, str) or (isinstance(data, dict) and "reference" in data):
        # What the base says of its own source, of another one is wrong.
        fresh = {name: DataConfig.model_fields[name].default for name in (*SourceConfig.model_fields, "mixture")}
        scoring = scoring.replaced(data=scoring.data.model_copy(update=fresh))
    recipe = _alike(with_overrides(scoring, _as_overrides(changes)))
    assemble(recipe)
    return recipe


def _assembled(
    study: Study, scoring: Recipe, cell: Cell, overrides: Sequence[str], like: Recipe | None, sizes: Sizes
) -> Recipe:
    """The recipe of a cell, once it has been assembled. Raises what that raises."""
    recipe = load_recipe(study.base, overrides, sizes)
    recipe = recipe.replaced(control=None, evaluation=scoring.evaluation)
    if recipe.ranks > 1:
        raise RecipeError("a study's runs take one device each; set devices and nodes to 1")
    if cell.arm != study.budget:
        recipe = _matched(recipe, study, like)
    assemble(recipe)
    return recipe


def _matched(recipe: Recipe, study: Study, like: Recipe | None) -> Recipe:
    """The recipe with the study's budget. like: that of the arm whose cost it is. Raises RecipeError."""
    unit, amount = study.match, study.budget
    if unit is None:
        return recipe
    spent: dict[str, Any] = {"steps": None, "flops": None, "seconds": None}
    if unit != "tokens":
        spent[unit] = UNKNOWN if isinstance(amount, str) else amount
    else:
        if like is None and isinstance(amount, str):
            return recipe  # that arm is a mistake of its own
        tokens = recipe.rows_per_step * recipe.data.length
        if like is not None and like.budget.unit != "steps":
            raise RecipeError(
                f"arm {amount} ends by {like.budget.unit}, which does not say after how many tokens; give it steps"
            )
        if like is not None:
            amount = like.budget.steps * like.rows_per_step * like.data.length
        assert isinstance(amount, (int, float))
        spent["steps"] = max(1, round(amount / tokens))
        if abs(spent["steps"] * tokens - amount) > CLOSE * amount:
            raise RecipeError(
                f"{amount:,.0f} tokens are no whole number of steps of {tokens:,}; change the budget or rows_per_step"
            )
    matched = recipe.replaced(**spent)
    if problems := matched.problems():
        raise RecipeError("\n".join(problems))
    return matched


def _occupied(planned: Planned) -> Iterator[str]:
    """Why the directory cannot be the study's. It may have grown by arms, seeds and controls; what is scored
    may change."""
    path, new = planned.directory / "study.yaml", planned.tree
    if path.exists():
        old = read_yaml(path.read_text(encoding="utf-8"))
        both = [name for name in old["arms"] if name in new["arms"]]
        free = ("arms", "seeds", "controls", "shifts", "pass_at")
        differing = [key for key in new if key not in free and old.get(key) != new[key]]
        differing += [f"arms.{name}" for name in both if (old["arms"][name] or {}) != (new["arms"][name] or {})]
        if differing:
            yield (
                f"{planned.directory} belongs to another study ({', '.join(differing)} differ); choose another "
                "--run-dir, or repeat the command that made it"
            )
            return
    elif planned.directory.exists() and any(path.name != "lock" for path in planned.directory.iterdir()):
        yield f"{planned.directory} is not empty and no study's; choose another --run-dir"
        return
    for run in planned.runs:
        try:
            run.directory.check(run.directory.settle(run.recipe))
        except RecipeError as error:
            yield str(error)
