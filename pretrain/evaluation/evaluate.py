"""`forethought evaluate`: lm-evaluation-harness's tasks, with thoughts or without.

    MODEL   → a Hugging Face directory → the model class of `lm`, or lm-eval's own for vLLM
    tasks   → files of ours (tasks/), of lm-eval, or the user's own, with data from the hub or --data-dir
      ↓
    K runs of each, as lm-eval does them and writes them down, each with a seed of its own
      ↓
    scores over all runs, with intervals over problems: a table, summary.json, a line in the run's records

Several samples are several runs, not lm-eval's `repeats`, whose filters keep one answer of each problem: so any task
can be sampled, whatever its filters, also where thoughts alone are sampled.

Shapes: D problems, K runs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import export, read_json
from checkpoints.references import resolve
from data_pipelines import DataConfig, Documents, Tokenizer
from pretrain.evaluation.errors import EvaluationError
from pretrain.evaluation.held_out import bootstrap
from pretrain.evaluation.metrics import Z, final_answer, mean_interval, sampled_metrics
from pretrain.opening import OpenedModel, check_vocabulary, open_model
from pretrain.report import write_report
from pretrain.run_directory import RunDirectory, is_run, writing

TASKS = Path(__file__).parent / "tasks"
TEXT, WINDOW = "text", 1024  # the task that --text is, and the tokens of it that are read at once
NO_FILTER = "none"  # as lm-eval calls it
Loaded = dict[str, Any]  # {"tasks": {name: Task}, "groups": {name: Group}} of lm-eval


@dataclass(frozen=True)
class Plan:
    """Tasks that are run together, how often, and at what temperature; 0 is greedy."""

    tasks: tuple[str, ...]
    samples: int
    temperature: float


@dataclass(frozen=True)
class Settings:
    """think: off, every-token or before-answer. thought_length: by default as trained. seed: of the first run. limit:
    of each task's problems. engine: hf or vllm."""

    think: str = "off"
    thought_length: int | None = None
    seed: int = 0
    limit: int | None = None
    engine: str = "hf"
    batch_size: int = 8


@dataclass(frozen=True)
class Score:
    """low, high: of the 95% interval over `documents` problems; None where lm-eval has none for such a metric."""

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    documents: int
    temperature: float


@dataclass(frozen=True)
class Run:
    """What a run found. value_D: by task, filter and metric, of each problem. answer_D: likewise by task and filter,
    where answers are texts. results: lm-eval's own, by task."""

    value_D: dict[tuple[str, str, str], list[Any]]
    answer_D: dict[tuple[str, str], list[str]]
    results: dict[str, dict[str, Any]]


def rlp_suite(temperature: float) -> list[Plan]:
    """The tasks of RLP's tables (2510.01265): mathematics as the mean of 8 samples, science greedy and as that of 4.

    The paper gives neither the temperature nor the variants of the tasks: 0.7 is that of its training, and the tasks
    are those of lm-eval that let a model write before it answers.
    """
    mathematics = ("aime25", "minerva_math500", "gsm8k", "amc23", "minerva272")
    science = ("mmlu_generative", "mmlu_pro", "gpqa_diamond_cot_zeroshot")
    return [Plan(mathematics, 8, temperature), Plan(science, 1, 0.0), Plan(science, 4, temperature)]


SUITES = {"rlp": (rlp_suite, 0.7)}  # and the temperature where none is given


def evaluate(
    model: str,
    tasks: Sequence[str],
    settings: Settings,
    suite: str | None = None,
    text: str | None = None,
    samples: int = 1,
    temperature: float | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
) -> list[Score]:
    """Scores of a run, checkpoint or model reference on tasks by name or file, on a suite, on a text's documents.

    out: a directory for lm-eval's results and samples and for summary.json; by default a run's own `downstream/`, else
    nothing is kept. Raises EvaluationError, CheckpointError or DataError.
    """
    plans = [Plan(tuple(tasks), samples, temperature or 0.0)] if tasks else []
    if suite is not None:
        planned, default = SUITES[suite]
        plans += planned(default if temperature is None else temperature)
    _check(plans, settings, text, samples, temperature)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about how it is called
    scores: list[Score] = []
    with _own_cache(data_dir):
        loaded = [(plan, _load(plan.tasks, data_dir)) for plan in plans]
        if text is not None:
            loaded.append((Plan((TEXT,), 1, 0.0), {"tasks": {TEXT: _text_task(text)}, "groups": {}}))
        opened = open_model(model) if is_run(model) else None
        out = out or _place_in_run(opened, settings)
        if out is not None:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
        with _directory(model, opened) as directory:
            lm = _language_model(directory, settings)
            for plan, found in loaded:
                scores += _evaluate_plan(lm, plan, found, settings, model, out)
    summary = {**asdict(settings), "scores": [asdict(score) for score in scores]}
    if out is not None:
        (out / "summary.json").write_text(json.dumps({"model": model, **summary}, indent=2), encoding="utf-8")
    if opened is not None and opened.state is not None:
        run = RunDirectory(opened.tokenizer_directory.parent)
        run.append(run.downstream, {"step": opened.state["step"], **summary})
        write_report(run, run.load_recipe())
    print_scores(scores, f"{model}, think {settings.think}")
    if out is not None:
        print(f"results and samples: {out}")
    return scores


def _check(
    plans: Sequence[Plan], settings: Settings, text: str | None, samples: int, temperature: float | None
) -> None:
    """Raises EvaluationError for settings that contradict each other."""
    if not plans and text is None:
        raise EvaluationError("there is nothing to evaluate; give --tasks, --suite or --text")
    if samples > 1 and not temperature:
        raise EvaluationError(f"{samples} greedy samples are one and the same; give --temperature, or no --samples")
    if text is not None and settings.think == "before-answer":
        raise EvaluationError("--text has no answer to think before; give it with --think off or every-token")
    if settings.engine == "vllm" and settings.think != "off":
        raise EvaluationError(f"vLLM does not think {settings.think}; leave --engine out, or give --think off")
    wanted = {"lm_eval": "'forethought[eval]'"} | ({"vllm": "vllm"} if settings.engine == "vllm" else {})
    for package, requirement in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise EvaluationError(f"{package} is not installed; pip install {requirement}")


# Tasks


@cache
def _manager(with_lm_eval: bool) -> Any:
    """lm-eval's TaskManager; without lm-eval's thousands of files, which take seconds, of ours alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=with_lm_eval)


@contextlib.contextmanager
def _own_cache(data_dir: Path | None) -> Iterator[None]:
    """datasets keeps what it made of a local directory by the directory's name alone, whatever has become of it."""
    import datasets

    kept = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() if data_dir is not None else contextlib.nullcontext(kept) as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = kept


def _load(tasks: Sequence[str], data_dir: Path | None) -> Loaded:
    """Tasks of names and task files, with their data.

    Raises EvaluationError for one that is unknown, or whose data cannot be read.
    """
    from datasets.exceptions import DatasetsError

    where = data_dir or Path.cwd()
    if not where.is_dir():
        raise EvaluationError(f"--data-dir {where} is no directory; give one with OWNER/NAME/ of each dataset below it")
    found: Loaded = {"tasks": {}, "groups": {}}
    for task in tasks:
        file = Path(task).absolute()
        is_file = file.suffix == ".yaml" and file.is_file()
        manager = _manager(not is_file and task not in _manager(False).all_tasks)
        if not is_file and task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists those of lm-eval"
            raise EvaluationError(f"no task {task!r}; {hint}")
        try:
            # datasets prefers what lies below the working directory by a dataset's name to the hub.
            with contextlib.chdir(where):
                opened = manager.load([str(file) if is_file else task])
        except ImportError as error:
            raise EvaluationError(f"task {task} needs more packages ({_first_line(error)}); install them") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, DatasetsError) as error:
            raise EvaluationError(
                f"task {task} cannot be opened ({type(error).__name__}: {_first_line(error)}); give its data as "
                "OWNER/NAME/ below --data-dir, or see to the network connection"
            ) from None
        for kind in found:
            found[kind] |= opened[kind]
    return found


def _text_task(reference: str) -> Any:
    """Bits per byte of the documents of a data reference. Raises DataError."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = [{"name": name, "text": words} for name, words in Documents(DataConfig(reference=reference))]
    if not rows:
        raise EvaluationError(f"{reference} has no text")
    return ConfigurableTask(
        config={
            "task": TEXT,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        }
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


# Models


@contextlib.contextmanager
def _directory(model: str, opened: OpenedModel | None) -> Iterator[Path]:
    """A Hugging Face directory of the model. Raises CheckpointError or DataError."""
    if opened is not None:
        with tempfile.TemporaryDirectory() as scratch:
            export(opened.model, Path(scratch) / "model", opened.tokenizer_directory, trained=opened.thinking)
            yield Path(scratch) / "model"
        return
    if model.startswith("random:"):
        raise CheckpointError(f"{model} has no weights; give a model that has")
    directory = resolve(model)
    config, tokenizer = read_json(directory / "config.json"), Tokenizer.from_directory(directory)
    check_vocabulary(model, tokenizer, (config.get("base_config") or config).get("vocab_size", tokenizer.size))
    yield directory


def _language_model(directory: Path, settings: Settings) -> Any:
    """lm-eval's model. Raises CheckpointError or EvaluationError."""
    try:
        if settings.engine == "vllm":
            from lm_eval.models.vllm_causallms import VLLM

            config = read_json(directory / "config.json")
            # By itself it rounds a model in fp32 to bf16.
            dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
            return VLLM(str(directory), batch_size="auto", seed=settings.seed, dtype=dtype)
        from pretrain.evaluation.lm import ForethoughtLM

        return ForethoughtLM(str(directory), settings.think, settings.thought_length, batch_size=settings.batch_size)
    except ImportError as error:  # also of vLLM for CPUs, whose package has another name than lm-eval asks for
        raise EvaluationError(f"lm-eval cannot use {settings.engine} here ({_first_line(error)})") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} cannot be loaded ({_first_line(error)}); fetch or export it again"
        ) from None


# Runs


def _sampled(found: Loaded, settings: Settings) -> Loaded:
    """Those of which runs can differ: without thoughts, log-likelihoods cannot."""
    if settings.think != "off":
        return found
    tasks = {name: task for name, task in found["tasks"].items() if task.OUTPUT_TYPE == "generate_until"}
    return {"tasks": tasks, "groups": {}}


def _evaluate_plan(lm: Any, plan: Plan, found: Loaded, settings: Settings, model: str, out: Path | None) -> list[Score]:
    if settings.engine == "hf":
        lm.thinking["thought_temperature"] = plan.temperature
    runs = []
    for k in range(plan.samples):
        part = found if k == 0 else _sampled(found, settings)
        if part["tasks"]:
            print(f"{', '.join(part['tasks'])}: run {k + 1} of {plan.samples}", file=sys.stderr)
            runs.append(_run(lm, plan, part, settings, k, model, out))
    return _scores(plan, found, runs)


def _run(lm: Any, plan: Plan, found: Loaded, settings: Settings, k: int, model: str, out: Path | None) -> Run:
    """Run number k of a plan, written down below `out`."""
    import transformers
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.loggers import EvaluationTracker

    for name, task in found["tasks"].items():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # whatever the run: its prompts are those of lm-eval
        if task.OUTPUT_TYPE != "generate_until":
            continue
        changes = {"do_sample": True, "temperature": plan.temperature} if plan.temperature else {}
        most = lm.max_length // 2
        if (task.config.generation_kwargs.get("max_gen_toks") or lm.max_gen_toks) > most:
            print(f"{name}: answers are cut off behind {most} tokens, half of the model's positions", file=sys.stderr)
            changes["max_gen_toks"] = most
        task.set_config("generation_kwargs", changes, update=True)
    seed = settings.seed + k
    transformers.set_seed(seed)
    rolling = lm.windows(WINDOW) if plan.tasks == (TEXT,) and settings.engine == "hf" else contextlib.nullcontext()
    with rolling:
        results = evaluate(lm, found, limit=settings.limit, bootstrap_iters=0 if plan.tasks == (TEXT,) else 1000)
    samples = results.pop("samples")
    run = Run({}, {}, results["results"])
    for name, documents in samples.items():
        for document in documents:
            filtered = document["filter"]
            for metric in document["metrics"]:
                run.value_D.setdefault((name, filtered, metric), []).append(document[metric])
            answer = document["filtered_resps"][0]
            if isinstance(answer, str):
                run.answer_D.setdefault((name, filtered), []).append(final_answer(answer))
    if out is not None:
        asked = {"model": model, **asdict(settings), "seed": seed, "temperature": plan.temperature}
        tracker = EvaluationTracker(output_path=str(out / "results.json"))
        tracker.save_results_aggregated(results=results | {"config": asked}, samples=samples)
        for name, documents in samples.items():
            tracker.save_results_samples(task_name=name, samples=documents)
    return run


def _place_in_run(opened: OpenedModel | None, settings: Settings) -> Path | None:
    if opened is None or opened.state is None:
        return None
    return opened.tokenizer_directory.parent / "downstream" / f"step-{opened.state['step']:08d}-{settings.think}"


# Scores


def _scores(plan: Plan, found: Loaded, runs: Sequence[Run]) -> list[Score]:
    """Of a task, or of all problems of a group together."""
    from lm_eval.api.metrics import mean

    groups = found["groups"]
    inner = {below.name for group in groups.values() for below in group.get_all_groups() if below.name != group.name}
    whole = {name: [t.task_name for t in group.get_all_tasks()] for name, group in groups.items() if name not in inner}
    grouped = {member for members in whole.values() for member in members}
    scores: list[Score] = []
    for name, members in (whole | {leaf: [leaf] for leaf in found["tasks"] if leaf not in grouped}).items():
        K = sum(members[0] in run.results for run in runs)
        aggregation = found["tasks"][members[0]].aggregation()
        for _, filtered, metric in [key for key in runs[0].value_D if key[0] == members[0]]:
            value_KD = [[v for member in members for v in run.value_D[member, filtered, metric]] for run in runs[:K]]
            D = len(value_KD[0])

            def add(label: str, value: float, interval: tuple[float | None, float | None]) -> None:
                label += "" if filtered == NO_FILTER else f",{filtered}"  # noqa: B023
                scores.append(Score(name, label, value, *interval, D, plan.temperature))  # noqa: B023

            if metric == "bits_per_byte":
                pairs_D2 = torch.tensor(value_KD[0], dtype=torch.float64)
                bits_D, bytes_D = -pairs_D2[:, 0] / math.log(2), pairs_D2[:, 1]
                add(metric, (bits_D.sum() / bytes_D.sum()).item(), bootstrap(bits_D, bytes_D))
            elif aggregation.get(metric) is mean:
                value_DK = torch.tensor(value_KD, dtype=torch.float64).T
                mean_D = value_DK.mean(dim=1)
                add(metric if K == 1 else f"{metric} mean@{K}", mean_D.mean().item(), mean_interval(mean_D))
                answer_KD = [
                    [a for member in members for a in run.answer_D.get((member, filtered), [])] for run in runs
                ]
                if K > 1 and len(answer_KD[0]) == D and ((value_DK == 0) | (value_DK == 1)).all():
                    for label, value_D in sampled_metrics(value_DK, [*zip(*answer_KD, strict=True)]).items():
                        add(f"{metric} {label}", value_D.mean().item(), mean_interval(value_D))
            elif f"{metric},{filtered}" in (own := runs[0].results[name]):
                error = own.get(f"{metric}_stderr,{filtered}")
                value, half = own[f"{metric},{filtered}"], Z * error if isinstance(error, float) else None
                add(metric, value, (None, None) if half is None else (value - half, value + half))
    return scores


def print_scores(scores: Sequence[Score], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("task", "metric", "temperature", "value and 95% interval", "problems"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")
    for score in scores:
        interval = "" if score.low is None else f" [{score.low:.4f}, {score.high:.4f}]"
        found = f"{score.value:.4f}{interval}"
        table.add_row(score.task, score.metric, f"{score.temperature:g}", found, str(score.documents))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
