"""The command line: `forethought fit | study | data | plan | evaluate | export | sample`, the same as `python -m
pretrain`, and what is installed beside it: an entry point of the group COMMANDS is a pair of the function to run and
what adds its arguments to a parser.

Ours is imported where it is needed: --help is quick, and signals are handled before anything large is imported.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pretrain.stopping import UNFINISHED, Stopped, StopSignals, TrainingStopped, is_main_process

COMMANDS = "forethought.commands"
GAVE_UP = 3


def fit(recipe: str, overrides: Sequence[str], dry_run: bool, restart: bool) -> None:
    """Train a recipe: a shipped name or a YAML file, changed by --key value.

    The same command on the same run directory continues an interrupted run. With --continue-from STEP it goes back to
    that checkpoint, where --optimizer.KEY VALUE may change; with --restart it begins anew. Under torchrun and srun,
    devices and nodes are those that were started.

    Exit codes: 0 finished; 1 a mistake, which one line names; 2 a command that cannot be read; 3 gave up, because loss,
    gradient or weights were not finite at the end; 75 unfinished, because SIGTERM, SIGUSR1 or SIGINT asked it to stop:
    it saved after its step, and the same command continues. SIGINT (Ctrl-C) after that ends it at once.
    """
    from pretrain import run
    from pretrain.launcher import launched
    from pretrain.plan import sizes_that_fit
    from pretrain.recipe_files import load_recipe

    launch = launched()
    loaded = load_recipe(recipe, [*overrides, *(launch.overrides if launch else ())], sizes_that_fit)
    if dry_run:
        run.dry_run(loaded)
    else:
        run.fit(loaded, restart)


def data(
    recipe: str,
    overrides: Sequence[str],
    steps: int,
    rows: int,
    digest: int | None,
    from_step: int,
    workers: int,
    ranks: int,
    tokenize: str | None,
) -> None:
    """Show what a recipe reads: packed rows, statistics, throughput, and where it would resume.

    --digest N prints a sha256 of each of N steps' rows as --ranks ranks with --workers workers read them: equal lines
    on two machines mean that both read the same. A run directory's newest checkpoint at or before --from-step saves
    reading a stream from its beginning. --tokenize OUT writes a tokenised copy for --data OUT, read by random access.
    """
    from pretrain import data as showing
    from pretrain.recipe_files import load_recipe

    loaded = load_recipe(recipe, overrides)
    if tokenize is not None:
        showing.tokenize(loaded, Path(tokenize))
    elif digest is not None:
        showing.print_digests(loaded, digest, from_step, workers, ranks)
    else:
        showing.print_data(loaded, steps, from_step, workers, rows)


def plan(recipe: str, overrides: Sequence[str], **rest: Any) -> None:
    """Say what a recipe takes on given hardware: memory of each GPU, seconds of a step, and the sizes that fit.

    Arithmetic alone: nothing is loaded and no GPU is needed. FLOPs are the ledger's, memory is what a step holds at its
    fullest moment, seconds are forecasts at stated shares of the hardware's rates. The sizes that fit are those that
    micro_batch_rows, sampled_rows, objective.anchors_at_once, objective.thoughts_at_once and objective.sampled_at_once
    take by `auto`.
    """
    from pretrain import plan as planning
    from pretrain.recipe_files import load_recipe

    planning.plan(load_recipe(recipe, overrides), recipe, **rest)


def study(
    study: str,
    overrides: Sequence[str],
    run_dir: str | None,
    dry_run: bool,
    **rest: Any,
) -> None:
    """Train the arms of a study with every seed, and compare them on the same held-out documents.

    STUDY is a YAML file: a base recipe, arms that change it, a matrix of further values, seeds, what all runs spend
    alike, and controls; --key value changes the base. Runs are ordinary run directories, <run-dir>/<arm>/seed-<n>, one
    after the other, or one on each GPU; the same command continues. Ends with a table, also as results.md and
    results.json, and with report.html; repeated, the command adds to that what `evaluate` has found in the runs since.

    A study may be run in several sittings and on several machines: --only, --seeds and --minutes train part of it, and
    the table says which runs are missing; --keep DIR takes the records of finished runs from DIR and adds those that
    finish here, without weights, so that DIR is small enough to be committed.

    Under SLURM, --launch 'sbatch --wait --nodes 1 --ntasks-per-node 1 --gpus-per-node 1 pretrain/launch/slurm.sbatch'
    makes each run a job of its own, on a file system that all machines share; its recipe is added to the command.
    """
    from pretrain.study.running import run_study

    run_study(study, overrides, run_dir, dry_run, **rest)


def export(checkpoint: str, out: str, thinking: bool) -> None:
    """Write a run's model as a Hugging Face directory.

    CHECKPOINT is a checkpoint, or a run directory for its newest valid one. Any engine loads the directory as a plain
    language model; the parts that only thinking uses are in its subfolder thinking/. With --thinking it brings the code
    by which transformers (trust_remote_code=True) thinks in generate().
    """
    from checkpoints.hugging_face import export as write
    from pretrain.model_card import model_card
    from pretrain.opening import open_model

    opened = open_model(checkpoint)
    write(
        opened.model,
        Path(out),
        opened.tokenizer_directory,
        trained=opened.thinking,
        card=model_card(opened, thinking),
        thinking=thinking,
    )
    print(f"wrote {out}")


def sample(
    model: str,
    text: str | None,
    file: str | None,
    augment: list[str] | None,
    html: str | None,
    length: int | None,
    temperature: float,
    seed: int,
    **places: Any,
) -> None:
    """Show the thought a model has at each position of a text.

    Beside each thought: the probability of the true next token without and with the thought, its gain in nats, and the
    likeliest next tokens. --html FILE writes all this as one page, for slides, phones and paper.

    --augment IN OUT writes the documents of IN (jsonl, text, parquet, lab:SETTINGS) with thoughts in them, between the
    model's tags, as jsonl to train on; a model that was not trained to think writes <think> … </think>. The tags are
    text there: no control token ever comes from them.
    """
    from checkpoints.errors import CheckpointError
    from pretrain.augmenting import write_augmented
    from pretrain.new_file import refuse_to_overwrite
    from pretrain.opening import open_model
    from pretrain.reading_page import write_page
    from pretrain.samples import print_reading, read_with_thoughts, text_of_file

    if augment is not None:
        source, out = augment
        refuse_to_overwrite(Path(out), "OUT")
        print(write_augmented(open_model(model), source, Path(out), length, temperature, seed, **places))
        return
    if any(value is not None for value in places.values()):
        raise CheckpointError("--thoughts, --marker and --documents are for --augment; leave them out")
    if html is not None:
        refuse_to_overwrite(Path(html), "--html")
    words = text_of_file(file) if file is not None else text or ""
    reading = read_with_thoughts(open_model(model), model, words, length, temperature, seed)
    if html is None:
        print_reading(reading)
    else:
        write_page(reading, Path(html))
        print(f"wrote {html}")


def evaluate(model: str, tasks: str, out: str | None, data_dir: str | None, **rest: Any) -> None:
    """Score a model on lm-evaluation-harness's tasks, with thoughts or without.

    TASKS are names, files, or ours: gsm8k_probability and commonsense_qa_probability (the expected probability of
    Quiet-STaR), amc23, minerva272, lab_sum, lab_arithmetic, lab_substitution, lab_boolean, lab_pointer. Data come from
    the hub, or from OWNER/NAME/ below --data-dir. Intervals are over problems: Wilson's for shares of problems, else a
    bootstrap's. With --samples K every task is run K times: mean@K, maj@K and, unbiased, pass@k.
    """
    from pretrain.evaluation.evaluate import Settings
    from pretrain.evaluation.evaluate import evaluate as score

    given: dict[str, Any] = {name: rest.pop(name) for name in ("suite", "text", "samples", "temperature")}
    given |= {"out": Path(out) if out else None, "data_dir": Path(data_dir) if data_dir else None}
    score(model, [task for task in tasks.split(",") if task], Settings(**rest), **given)


def _help_on_recipes(arguments: Sequence[str]) -> str:
    """What `fit --help` says of recipes; with a recipe among the arguments, of the objectives that it names, too."""
    from pretrain.recipe_files import help_on_keys, objective_names, shipped

    rest = [argument for argument in arguments if argument not in ("-h", "--help", "--dry-run", "--restart")]
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
            allow_abbrev=False,  # else a recipe's --seed would be a study's --seeds
        )
        added.set_defaults(function=function)
        return added

    fitting = command(fit, _help_on_recipes(argv[1:]) if argv[:1] == ["fit"] and {"-h", "--help"} & {*argv} else "")
    fitting.add_argument("recipe", metavar="RECIPE", help="shipped name or YAML file")
    fitting.add_argument("--dry-run", action="store_true", help="validate everything, run one pass, and stop")
    fitting.add_argument("--restart", action="store_true", help="remove what the run directory holds of a run")

    reading = command(data)
    reading.add_argument("recipe", metavar="RECIPE", help="shipped name or YAML file; --key value as for fit")
    reading.add_argument("--steps-shown", dest="steps", type=int, default=20, help="steps to read (default 20)")
    reading.add_argument("--rows", type=int, default=4, help="rows to print (default 4)")
    reading.add_argument("--digest", type=int, metavar="N", help="print a sha256 of each of N steps, and nothing else")
    reading.add_argument("--from-step", type=int, default=0, help="first step (default 0)")
    reading.add_argument("--workers", type=int, default=0, help="processes of each rank that prepare batches")
    reading.add_argument("--ranks", type=int, default=1, help="ranks among which rows are divided")
    reading.add_argument("--tokenize", metavar="OUT", help="write a tokenised copy into a new directory")

    planning = command(plan)
    planning.add_argument("recipe", metavar="RECIPE", help="shipped name or YAML file; --key value as for fit")
    planning.add_argument("--gpus", type=_positive, metavar="N", help="all of them; default: the recipe's")
    planning.add_argument("--memory", type=float, metavar="GB", help="of each; default: the hardware's")
    planning.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help="default: 8")
    planning.add_argument("--hardware", choices=["a100", "h100", "h200", "b200", "cpu", "this"], default="h100")
    planning.add_argument("--documents", type=float, default=1.0, metavar="N", help="of a row, mean (default: 1)")
    planning.add_argument(
        "--thought-tokens", type=float, metavar="N", help="sampled tokens of a thought, mean (default: the longest)"
    )
    planning.add_argument("--json", dest="as_json", action="store_true", help="print all figures as JSON instead")

    studying = command(study)
    studying.add_argument("study", metavar="STUDY", help="YAML file; --key value as for fit, for all runs")
    studying.add_argument("--run-dir", metavar="DIR", help="default: runs/<name of the study>")
    studying.add_argument("--dry-run", action="store_true", help="validate every recipe, and stop")
    studying.add_argument(
        "--at-once",
        type=_positive,
        metavar="N",
        help="runs at the same time; default: one on each GPU, or with --launch all",
    )
    studying.add_argument("--launch", metavar="COMMAND", help="what trains a recipe in place of `forethought fit`")
    studying.add_argument(
        "--keep", dest="kept", metavar="DIR", help="runs that are there are finished; adds those that finish here"
    )
    studying.add_argument(
        "--only", type=lambda names: names.split(","), metavar="ARM,…", help="train these arms; default: all"
    )
    studying.add_argument("--seeds", type=_numbers, metavar="N,…", help="train runs with these seeds; default: all")
    studying.add_argument("--minutes", type=float, metavar="N", help="after which no run is begun")

    exporting = command(export)
    exporting.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory or checkpoint")
    exporting.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    exporting.add_argument("--thinking", action="store_true", help="with the code by which transformers thinks")

    sampling = command(sample)
    sampling.add_argument("model", metavar="MODEL", help="run directory, checkpoint, or export of a model that thinks")
    read = sampling.add_mutually_exclusive_group(required=True)
    read.add_argument("--text", help="text to read")
    read.add_argument("--file", metavar="FILE", help="file to read it from; - is standard input")
    read.add_argument("--augment", nargs=2, metavar=("IN", "OUT"), help="documents to write thoughts into; OUT: jsonl")
    sampling.add_argument("--html", metavar="FILE", help="page to write; must not exist")
    sampling.add_argument("--length", type=int, help="sampled tokens of a thought; default: as trained, else 8")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--thoughts", type=_positive, metavar="N", help="of a document at most (default 1)")
    sampling.add_argument("--marker", metavar="TEXT", help="token behind which to think; default: as trained, else any")
    sampling.add_argument("--documents", type=_positive, metavar="N", help="the first N alone")

    evaluating = command(evaluate)
    evaluating.add_argument(
        "model", metavar="MODEL", help="run directory, checkpoint, export, hub id, smollm2-135m, lab"
    )
    evaluating.add_argument("--tasks", metavar="A,B", default="", help="names of tasks, or task files")
    evaluating.add_argument("--suite", choices=["rlp"], help="the tasks of a paper, with its samples of each")
    evaluating.add_argument("--text", metavar="FILE", help="bits per byte of its documents: text, jsonl or parquet")
    evaluating.add_argument("--think", choices=["off", "every-token", "before-answer"], default="off")
    evaluating.add_argument(
        "--length", dest="thought_length", type=_positive, help="tokens of a thought; default: as trained"
    )
    evaluating.add_argument("--samples", type=_positive, default=1, metavar="K", help="runs of each task (default 1)")
    evaluating.add_argument(
        "--temperature", type=_temperature, help="of thoughts and answers; default 0, greedy, in a suite 0.7"
    )
    evaluating.add_argument("--seed", type=int, default=0, help="of the first run, one more for each further one")
    evaluating.add_argument("--limit", type=_positive, metavar="N", help="the first N problems of each task")
    evaluating.add_argument("--data-dir", metavar="DIR", help="where the tasks' data lie, as OWNER/NAME/")
    evaluating.add_argument("--out", metavar="DIR", help="for lm-eval's results and samples; default: in the run")
    evaluating.add_argument("--engine", choices=["hf", "vllm"], default="hf", help="vllm: with --think off")
    evaluating.add_argument("--batch-size", type=_positive, default=8)

    for entry in entry_points(group=COMMANDS):
        function, add_arguments = entry.load()
        add_arguments(command(function))
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _temperature(text: str) -> float:
    # fp32 logits overflow where they are divided by much less.
    if (number := float(text)) != 0 and not 1e-6 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 (greedy) nor at least 1e-6")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, as `fit --help` lists them."""
    try:
        with StopSignals():
            return _main(sys.argv[1:] if argv is None else list(argv))
    except Stopped as stopped:
        return _end(stopped, UNFINISHED)


def _end(stopped: BaseException, code: int) -> int:
    """The exit code of a run that all its processes have ended; rank 0 says so, and is killed if another one fails."""
    if not is_main_process():
        return 0
    print(f"forethought: {stopped}", file=sys.stderr)
    return code


def _main(argv: Sequence[str]) -> int:
    if argv[:1] == ["evaluate"] and not sys.stderr.isatty():
        # Which tqdm reads when it is imported: in a log, lm-eval's bars are a line a minute.
        os.environ |= {"TQDM_MININTERVAL": "60", "TQDM_MAXINTERVAL": "60"}
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Preparing a batch takes microseconds; and users cannot change how Lightning calls torch's pytrees.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # A run that only lacks its last evaluation has no more batches.
    warnings.filterwarnings("ignore", message="Total length of .* is zero.*")
    # So that an objective by import path may lie where the command is given, as with `python -m pretrain`.
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())
    parser = _parser(argv)
    arguments, rest = parser.parse_known_args(argv)
    options = vars(arguments)
    function = options.pop("function")
    if options.pop("command") in ("fit", "data", "plan", "study"):
        options["overrides"] = rest
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    from checkpoints.errors import CheckpointError
    from data_pipelines import DataError
    from models.rollout import EngineError
    from pretrain.evaluation.errors import EvaluationError
    from pretrain.recipe import RecipeError
    from pretrain.run_directory import RunDirectoryError

    try:
        function(**options)
    except TrainingStopped as stopped:
        return _end(stopped, GAVE_UP)
    except (RecipeError, DataError, CheckpointError, RunDirectoryError, EvaluationError, EngineError) as error:
        print(f"forethought: {error}", file=sys.stderr)
        return 1
    return 0
