"""The command line: `forethought fit | export | sample`, the same as `python -m pretrain`, and what is installed beside
it: an entry point of the group COMMANDS is a pair of the function to run and what adds its arguments to a parser."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from pretrain.recipe import RecipeError
from pretrain.recipe_files import help_on_keys, load_recipe, objective_names, shipped

COMMANDS = "forethought.commands"


def fit(recipe: str, overrides: Sequence[str], dry_run: bool) -> None:
    """Train a recipe: a shipped name or a YAML file, changed by --key value.

    The same command on the same run directory continues an interrupted run.
    """
    from pretrain import run

    loaded = load_recipe(recipe, overrides)
    if dry_run:
        run.dry_run(loaded)
    else:
        run.fit(loaded)


def export(checkpoint: str, out: str) -> None:
    """Write a run's model as a Hugging Face directory.

    CHECKPOINT is a checkpoint, or a run directory for its newest valid one. The parts that only thinking uses lie
    beside the plain language model in files of their own.
    """
    from checkpoints.hugging_face import export as write
    from pretrain.opening import open_model

    opened = open_model(checkpoint)
    write(opened.model, Path(out), opened.tokenizer_directory)
    print(f"wrote {out}")


def sample(model: str, text: str, length: int | None, temperature: float, seed: int) -> None:
    """Show the thought a model has at each position of a text.

    Beside each thought: the probability of the true next token, without and with the thought.
    """
    from pretrain.opening import open_model
    from pretrain.samples import print_thoughts

    print_thoughts(open_model(model), text, length, temperature, seed)


def _help_on_recipes(arguments: Sequence[str]) -> str:
    """What `fit --help` says of recipes; with a recipe among the arguments, of the objectives that it names, too."""
    rest = [argument for argument in arguments if argument not in ("-h", "--help", "--dry-run")]
    named = objective_names(rest[0], rest[1:]) if rest else []
    return f"shipped recipes: {', '.join(shipped())}\n\nkeys:\n{textwrap.indent(help_on_keys(named), '  ')}"


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forethought", description="Language models that think while they read, and are rewarded for it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Callable[..., None], epilog: str = "") -> argparse.ArgumentParser:
        doc = inspect.getdoc(function) or ""
        added = commands.add_parser(
            function.__name__,
            help=doc.splitlines()[0],
            description=doc,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(function=function)
        return added

    fitting = command(fit, _help_on_recipes(argv[1:]) if argv[:1] == ["fit"] and {"-h", "--help"} & {*argv} else "")
    fitting.add_argument("recipe", metavar="RECIPE", help="shipped name or YAML file")
    fitting.add_argument("--dry-run", action="store_true", help="validate everything, run one pass, and stop")

    exporting = command(export)
    exporting.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory or checkpoint")
    exporting.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")

    sampling = command(sample)
    sampling.add_argument("model", metavar="MODEL", help="run directory, checkpoint, or exported thinking model")
    sampling.add_argument("--text", required=True, help="text to read")
    sampling.add_argument("--length", type=int, help="sampled tokens of a thought; default: as trained, else 8")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    sampling.add_argument("--seed", type=int, default=0)

    for entry in entry_points(group=COMMANDS):
        function, add_arguments = entry.load()
        add_arguments(command(function))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 after one line that names the mistake and the way out; 2 for a command that cannot be read."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Preparing a batch takes microseconds; and users cannot change how Lightning calls torch's pytrees.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # A run that only lacks its last evaluation has no more batches.
    warnings.filterwarnings("ignore", message="Total length of .* is zero.*")
    # So that an objective by import path may lie where the command is given, as with `python -m pretrain`.
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(argv)
    arguments, rest = parser.parse_known_args(argv)
    options = vars(arguments)
    function = options.pop("function")
    if options.pop("command") == "fit":
        options["overrides"] = rest
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    # Imported late so that --help is quick.
    from checkpoints.errors import CheckpointError
    from data_pipelines import DataError
    from pretrain.module import TrainingStopped

    try:
        function(**options)
    except (RecipeError, DataError, CheckpointError, TrainingStopped) as error:
        print(f"forethought: {error}", file=sys.stderr)
        return 1
    return 0
