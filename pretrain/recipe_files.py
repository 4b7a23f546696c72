"""Recipes as people write them: YAML files, `--dotted.key value`, short forms; and what is wrong with them.

All mistakes of a recipe are found at once and reported in one message, each with the way out.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from objectives import OBJECTIVES, find_objective
from pretrain.recipe import ACCEPTED, UNITS, Key, Recipe, RecipeError, bare, keys

log = logging.getLogger(__name__)
Tree = dict[str, Any]

# Keys that name something and may also hold settings: `data: python-docs` is `data: {reference: python-docs}`.
SHORT_FORMS = {"data": "reference", "objective": "name", "control": "name", "evaluation.objective": "name"}
OF_STAGE = re.compile(r"stages\.[^.]+\.objective")
# Old names of keys, which recipes of older runs have.
RENAMED = {
    "evaluation.causal": "counterfactuals",
    "objective.drop_flat_from": "drop_zero_variance_from",
    "control.drop_flat_from": "drop_zero_variance_from",
    "evaluation.objective.drop_flat_from": "drop_zero_variance_from",
}
# Keys whose value may be `auto`: as large as fits.
AUTOMATIC = (
    "micro_batch_rows",
    "sampled_rows",
    "objective.anchors_at_once",
    "objective.thoughts_at_once",
    "objective.sampled_at_once",
)
# Given a recipe and some of AUTOMATIC, their values.
Sizes = Callable[[Recipe, Sequence[str]], Mapping[str, int | None]]
# Stand in for required keys that are wrong or missing, so that everything else is still checked.
STAND_INS: Tree = {"objective": {"name": "next_token"}}
# Characters of a wrong value that a message repeats.
SHOWN = 80


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2: there `1e-6` is a number, and `1e3` the whole number 1000.

    A key that a mapping has twice is an error; PyYAML would keep the last.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"key {key.value!r} is on line {lines[key.value]} and again on {line}; keep one")
            lines[key.value] = line
        return node


def _exponential(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    value = float(node.value)
    return int(value) if "." not in node.value and value.is_integer() else value


_Loader.add_implicit_resolver(
    "!exponential", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+"), list("-+.0123456789")
)
_Loader.add_constructor("!exponential", _exponential)
# YAML 1.1 reserves `=`; here it is text.
_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: str(node.value))


def read_yaml(text: str) -> Any:
    """Plain values, none of them shared. Raises yaml.YAMLError."""
    try:
        # Copied, so that a change of what an alias stands for leaves its twin alone.
        return _plain(yaml.load(text, _Loader))
    except RecursionError:
        raise yaml.YAMLError("it contains itself; write out what its alias stands for") from None
    except ValueError as error:  # PyYAML's own, of a date or number that cannot be
        raise yaml.YAMLError(str(error)) from None


def shipped() -> list[str]:
    """Names of the recipes that come with the project."""
    folder = resources.files("pretrain") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(reference: str, overrides: Sequence[str] = (), sizes: Sizes = lambda recipe, keys: {}) -> Recipe:
    """A recipe by shipped name or YAML path, with overrides like `--steps 10 --objective.length=12`.

    sizes: given the recipe without them, what those of AUTOMATIC become that are `auto`; by default their defaults.
    Raises RecipeError with all mistakes.
    """
    problems: list[str] = []
    tree = _read_tree(reference, overrides, problems)
    name = reference if reference in shipped() else Path(reference).stem
    tree.setdefault("run_dir", str(Path("runs") / name))
    of_stages = (f"{stage}.{key.partition('.')[2]}" for stage in _stages(tree) for key in AUTOMATIC if "." in key)
    automatic = [key for key in (*AUTOMATIC, *of_stages) if _get(tree, key) == "auto"]
    for key in automatic:
        parent, last = _parent(tree, key)
        assert parent is not None
        del parent[last]
    recipe = recipe_from_tree(tree, problems)
    found = sizes(recipe, automatic) if automatic else {}
    for key, value in found.items():
        _override(tree, key, value, problems)
    return recipe_from_tree(tree, problems) if found else recipe


def _read_tree(reference: str, overrides: Sequence[str], problems: list[str]) -> Tree:
    if reference in shipped():
        text = (resources.files("pretrain") / "recipes" / f"{reference}.yaml").read_text(encoding="utf-8")
    elif Path(reference).is_file():
        try:
            text = Path(reference).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{reference} is not UTF-8 (at byte {error.start}); save it as UTF-8") from None
    else:
        raise RecipeError(f"no recipe {reference!r}: give a YAML file or one of {', '.join(shipped())}")
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{reference} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{reference} must be a mapping of keys to values")
    old = [*_rename(tree), *_override_all(tree, overrides, problems)]
    if old:
        log.warning("keys have new names: %s", ", ".join(f"{key} is now {_renamed(key)}" for key in dict.fromkeys(old)))
    return tree


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A whole recipe with overrides as `load_recipe` takes them. Raises RecipeError with all mistakes."""
    problems: list[str] = []
    tree = recipe_to_tree(recipe)
    _override_all(tree, overrides, problems)
    return recipe_from_tree(tree, problems)


def recipe_from_tree(tree: Tree, problems: Sequence[str] = ()) -> Recipe:
    """A recipe from nested dicts. Raises RecipeError with all mistakes, after those already in `problems`."""
    found = list(problems)
    tree = _plain(tree)
    if not isinstance(tree, dict):
        raise RecipeError(f"the recipe must be a mapping of keys to values, got {tree!r}")
    _rename(tree)
    for key in (*SHORT_FORMS, *_stages(tree)):
        parent, last = _parent(tree, key)
        if parent is not None and last in parent:
            parent[last] = _long_form(key, parent[last])
    if all(tree.get(unit) is None for unit in UNITS):
        found.append(
            "steps is missing; write it into the recipe or give --steps, or what a run may spend: --flops or --seconds"
        )
    recipe = None
    try:
        recipe = Recipe.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        details = error.errors(include_url=False)
        found += _messages(details, tree)
        _take_out(details, tree)
        # Still invalid where an objective of one's own requires a setting, for which there is no stand-in.
        with contextlib.suppress(ValidationError):
            recipe = Recipe.model_validate_json(json.dumps(STAND_INS | tree))
    if recipe is not None:
        found += recipe.problems()
    if recipe is None or found:
        raise RecipeError("the recipe cannot be run:\n" + "\n".join(f"  - {problem}" for problem in found))
    return recipe


def recipe_to_tree(recipe: Recipe) -> Tree:
    """Nested dicts of plain values, from which the same recipe can be built again."""
    return recipe.model_dump(mode="json")


def recipe_to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe_to_tree(recipe), sort_keys=False)


def _plain(tree: Any) -> Any:
    """What JSON can hold: keys as text, dates and the like as text."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(value) for value in tree]
    return tree if tree is None or isinstance(tree, (bool, int, float, str)) else str(tree)


def _parent(tree: Tree, key: str) -> tuple[Tree | None, str]:
    """The mapping that holds a dotted key, None where there is none, and the key's last part."""
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.get(parent)  # type: ignore[assignment]
        if not isinstance(tree, dict):
            return None, last
    return tree, last


def _stages(tree: Tree) -> list[str]:
    """The keys of the stages' objectives."""
    stages = tree.get("stages")
    return [f"stages.{name}.objective" for name in stages] if isinstance(stages, dict) else []


def _short_form(key: str) -> str | None:
    """The key that is meant by a text in place of a mapping."""
    return "name" if OF_STAGE.fullmatch(key) else SHORT_FORMS.get(key)


def _renamed(old: str) -> str:
    return f"{old.rpartition('.')[0]}.{RENAMED[old]}"


def _rename(tree: Tree) -> list[str]:
    """Gives keys their new names; the old ones that were there. One that is there under both stays an unknown key."""
    found = []
    for old, new in RENAMED.items():
        parent, last = _parent(tree, old)
        if parent is not None and last in parent and new not in parent:
            parent[new] = parent.pop(last)
            found.append(old)
    for key in ("objective", "control", "evaluation.objective"):
        parent, last = _parent(tree, f"{key}.shuffle_rewards")
        if parent is not None and isinstance(parent.get(last), bool):
            parent["rewards"] = "shuffled" if parent.pop(last) else "earned"
    return found


# Overrides


def _long_form(key: str, value: Any) -> Any:
    name = _short_form(key)
    return {name: value} if name is not None and isinstance(value, str) else value


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
        return read_yaml(value)
    except yaml.YAMLError:
        return value


def _override_all(tree: Tree, overrides: Sequence[str], problems: list[str]) -> list[str]:
    """Puts overrides into a tree; the old names of keys among them."""
    old = []
    for key, value in _parse_overrides(overrides, problems):
        if key in RENAMED:
            old.append(key)
            key = _renamed(key)
        _override(tree, key, value, problems)
    return old


def _override(tree: Tree, key: str, value: Any, problems: list[str]) -> None:
    *parents, last = key.split(".")
    where = ""
    for parent in parents:
        where = f"{where}.{parent}" if where else parent
        tree[parent] = _long_form(where, tree.get(parent, {}))
        tree = tree[parent]
        if not isinstance(tree, dict):
            problems.append(f"--{key}: {parent} is a value and has no keys")
            return
    value, old = _long_form(key, value), _long_form(key, tree.get(last))
    name = _short_form(key)
    if name is not None and isinstance(old, dict) and isinstance(value, dict):
        # Another objective would not know the settings of the recipe's own.
        another = name == "name" and value.get("name", old.get("name")) != old.get("name")
        value = value if another else old | value
    tree[last] = value


# What is wrong


def _bound(words: str, name: str) -> Callable[[ErrorDetails, Key | None], str]:
    def message(error: ErrorDetails, key: Key | None) -> str:
        bound = error["ctx"][name]
        bound = int(bound) if float(bound).is_integer() else bound
        return f"must be {words} {bound}, got {_shown(error)}{_about(key)}"

    return message


def _must_be(what: str) -> Callable[[ErrorDetails, Key | None], str]:
    return lambda error, key: "needs a value" if error["input"] is None else f"must be {what}, got {_shown(error)}"


def _text(error: ErrorDetails, key: Key | None) -> str:
    number = isinstance(error["input"], (bool, int, float))
    return _must_be("text")(error, key) + ("; put it in quotes" if number else "")


def _too_short(error: ErrorDetails, key: Key | None) -> str:
    least = error["ctx"]["min_length"]
    return ("must not be empty" if least == 1 else f"must have at least {least} characters") + _about(key)


def _tuple(error: ErrorDetails, key: Key | None) -> str:
    values = f"{len(get_args(key.options[0]))} values" if key is not None else "values"
    return f"must be a list of {values}, got {_shown(error)}"


def _literal(error: ErrorDetails, key: Key | None) -> str:
    options = ", ".join(map(str, get_args(key.options[0]))) if key is not None else error["ctx"]["expected"]
    return f"must be one of {options}, got {_shown(error)}"


def _mapping(error: ErrorDetails, key: Key | None) -> str:
    return f"must be a mapping of keys to values, got {_shown(error)}"


# By pydantic's name of the mistake.
MESSAGES: dict[str, Callable[[ErrorDetails, Key | None], str]] = {
    "int_type": _must_be("a whole number"),
    "float_type": _must_be("a number"),
    "bool_type": _must_be("true or false"),
    "string_type": _text,
    "finite_number": _must_be("a finite number"),
    "literal_error": _literal,
    "greater_than": _bound("above", "gt"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than": _bound("below", "lt"),
    "less_than_equal": _bound("at most", "le"),
    "string_too_short": _too_short,
    "tuple_type": _tuple,
    "list_type": _must_be("a list"),
    "dict_type": _mapping,
    "model_type": _mapping,
    "model_attributes_type": _mapping,
    "dataclass_type": _mapping,
    "mapping": _mapping,
    "objective": lambda error, key: error["ctx"]["reason"],
}


def _messages(errors: Sequence[ErrorDetails], tree: Tree) -> Iterator[str]:
    wrong_length = {error["loc"][: _depth(error)] for error in errors if _is_wrong_length(error)}
    for where in dict.fromkeys(error["loc"][: _depth(error)] for error in errors):
        here = [error for error in errors if error["loc"][: _depth(error)] == where]
        if where in wrong_length:
            here = [error for error in here if _is_wrong_length(error)][:1]
        for error in here:
            yield _message(error, tree)


def _depth(error: ErrorDetails) -> int:
    """How much of where it is names a key: places within a list follow."""
    return next((i for i, part in enumerate(error["loc"]) if isinstance(part, int)), len(error["loc"]))


def _is_wrong_length(error: ErrorDetails) -> bool:
    return error["type"] == "too_long" or (error["type"] == "missing" and _depth(error) < len(error["loc"]))


def _message(error: ErrorDetails, tree: Tree) -> str:
    """One line that says where, what, and the way out."""
    named = tuple(map(str, error["loc"][: _depth(error)]))
    where = ".".join(named) + "".join(f"[{place}]" for place in error["loc"][len(named) :])
    known = _keys_below(named[:-1], tree)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        elsewhere = [path for path in _paths(Recipe, tree) if path.endswith(f".{named[-1]}")]
        meant = elsewhere[:3] or difflib.get_close_matches(named[-1], known, 1)
        hint = f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"known: {', '.join(known) or 'none'}"
        return f"unknown key {where!r}; {hint}"
    key = known.get(named[-1]) if named else None
    if _is_wrong_length(error):
        return f"{'.'.join(named)} {_tuple(error, key)}"
    if error["type"] == "missing":
        return f"{where} is missing; write it into the recipe or give --{where}{_about(key)}"
    if error["type"] in MESSAGES:
        return f"{where} {MESSAGES[error['type']](error, key)}"
    said = error["ctx"]["error"] if error["type"] == "value_error" else f"{error['msg']}, got {_shown(error)}"
    return f"{where}: {said}"


def _paths(kind: type, tree: Tree, prefix: str = "") -> Iterator[str]:
    """All dotted keys that a recipe knows, with those of the objectives that `tree` names."""
    for key in keys(kind).values():
        path = prefix + key.name
        yield path
        below = key.kind
        if key.is_objective:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                below = find_objective(_get(tree, path)["name"]).Config
        if below is not None:
            yield from _paths(below, tree, f"{path}.")


def _keys_below(parents: Sequence[str], tree: Tree) -> dict[str, Key]:
    """The keys that a recipe knows below some of its keys; which those of an objective are, `tree` says."""
    known = keys(Recipe)
    for parent in parents:
        key, tree = known.get(parent), tree.get(parent, {})
        if key is not None and key.is_objective:
            known = keys(find_objective(tree["name"]).Config)
        elif key is not None and key.of_each is not None:
            known = {name: Key(name, key.of_each, MISSING, "", False) for name in tree}
        else:
            known = keys(key.kind) if key is not None and key.kind is not None else {}
    return known


def _shown(error: ErrorDetails) -> str:
    said = repr(error["input"])
    return said if len(said) <= SHOWN else f"{said[:SHOWN]} …"


def _about(key: Key | None) -> str:
    return f" ({key.description})" if key is not None and key.description else ""


def _take_out(errors: Sequence[ErrorDetails], tree: Tree) -> None:
    for error in errors:
        named = list(map(str, error["loc"][: _depth(error)]))
        # A stage is nothing without all of its keys.
        named = named[:2] if named[:1] == ["stages"] else named
        parent, last = _parent(tree, ".".join(named)) if named else (None, "")
        if parent is not None:
            parent.pop(last, None)


# Help


def objective_names(reference: str, overrides: Sequence[str] = ()) -> list[str]:
    """The objectives that a recipe names, as far as it can be read."""
    try:
        tree = _plain(_read_tree(reference, overrides, []))
    except (RecipeError, OSError, ValueError):
        return []
    found = (key for key in (*SHORT_FORMS, *_stages(tree)) if _short_form(key) == "name")
    named = (_long_form(key, _get(tree, key)) for key in found)
    return [value["name"] for value in named if isinstance(value, dict) and isinstance(value.get("name"), str)]


def _get(tree: Tree, key: str) -> Any:
    parent, last = _parent(tree, key)
    return None if parent is None else parent.get(last)


def help_on_keys(named: Sequence[str] = ()) -> str:
    """Every key that a recipe may have, its type, default and meaning, with those of our and the `named` objectives."""
    lines = _help(Recipe, "")
    for name in dict.fromkeys((*OBJECTIVES, *named)):
        try:
            config = find_objective(name).Config
        except ValueError as error:
            lines.append(f"with --objective {name}: {error}")
            continue
        lines += [f"with --objective {name}:", *(_help(config, "objective.") or ["  no settings"])]
    return "\n".join(lines)


def _help(kind: type, prefix: str) -> list[str]:
    lines = []
    for key in keys(kind).values():
        path = prefix + key.name
        if path == "objective.name":
            continue
        if key.kind is not None:
            if key.name in SHORT_FORMS:
                lines.append(f"--{path} REF: short for --{path}.{SHORT_FORMS[key.name]} REF")
            lines += _help(key.kind, f"{path}.")
            continue
        if key.of_each is not None:
            lines.append(f"--{path} or --{path}.NAME.KEY: {key.description}; KEY: {', '.join(keys(key.of_each))}")
            continue
        default = "" if key.default is MISSING else f" (default {_written(key.default)})"
        lines.append(f"--{path} {_type_name(key)}{default}" + (f": {key.description}" if key.description else ""))
    return lines


def _written(default: Any) -> str:
    """As YAML reads it; text that can be seen without quotes."""
    return default if isinstance(default, str) and default.strip() else json.dumps(default)


def _type_name(key: Key) -> str:
    if key.is_objective:
        return "|".join(ACCEPTED)
    return "|".join(map(_name_of, key.options))


def _name_of(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"[{', '.join(_name_of(bare(option)) for option in get_args(hint))}]"
    return getattr(hint, "__name__", str(hint))
