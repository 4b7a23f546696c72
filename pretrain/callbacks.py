"""Callbacks around a step: records, progress, held-out evaluation, checkpoints, a stop when a signal asks for it."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.snapshots import SnapshotWriter, all_checkpoints, name_of, newest_snapshot, prune
from data_pipelines import Tokenizer
from data_pipelines.data_module import TextDataModule
from data_pipelines.sources import COUNTS
from models.philox import Rng
from models.rollout import Engine
from objectives import CounterfactualTest, Objective
from pretrain.diagnostics import WINDOW, Diagnostics, RunWarning, length_trend
from pretrain.evaluation.held_out import ENOUGH_DOCUMENTS, HeldOut, score_held_out, summarise
from pretrain.module import PretrainModule, StepReport
from pretrain.recipe import MOST_STEPS, CheckpointConfig, EvaluationConfig, LoggingConfig
from pretrain.run_directory import RunDirectory
from pretrain.samples import describe_thought
from pretrain.sampling import FromReplica
from pretrain.state import gathered, non_finite, restore_trained, run_state
from pretrain.stopping import StopSignals

# Seconds that a run which fails waits for the snapshot that is being written.
PATIENCE = 15.0
# Least seconds of training between two lines of progress, where stderr is no terminal.
SECONDS_PER_LINE = 2.0

console = Console(stderr=True, highlight=False)


def is_rank_zero() -> bool:
    """Also before the process group exists: from the launcher's environment."""
    return getattr(rank_zero_only, "rank", 0) == 0


def say(message: str) -> None:
    """One line to the terminal or log of rank 0, never wrapped."""
    if is_rank_zero():
        console.print(message, soft_wrap=True, markup=False)


def scalars(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """What loggers get of an evaluation."""
    return {f"held_out/{name}": value for name, value in evaluation.items() if isinstance(value, float)}


class Records(lightning.Callback):
    """Writes metrics.jsonl, samples.jsonl and warnings.jsonl, hands the metrics to the loggers, and shows progress.

    A bar with loss and tokens per second on a terminal, plain lines elsewhere.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: LoggingConfig,
        tokenizer: Tokenizer,
        data: TextDataModule,
        loggers: list[Logger],
        diagnostics: Diagnostics,
        warnings: Sequence[RunWarning] = (),
    ):
        """warnings: those at the start, which a continued run has issued already."""
        self.directory = directory
        self.config = config
        self.tokenizer = tokenizer
        self.warnings = warnings
        self.data = data
        self.counts: dict[str, int] = {}
        self.loggers = loggers
        self.progress: Progress | None = None
        self.diagnostics = diagnostics
        self._said = -SECONDS_PER_LINE
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._last = (0, 0.0)

    def on_train_start(self, trainer: lightning.Trainer, module: PretrainModule) -> None:  # type: ignore[override]
        self._last = (module.tokens, module.seconds)
        for record in self.directory.read(self.directory.metrics):
            # A continued run has issued these warnings already.
            self.diagnostics.update(record)
            self._recent.append(record)
        if trainer.is_global_zero:
            issued = {warning["name"] for warning in self.directory.read(self.directory.warnings)}
            self._warn([warning for warning in self.warnings if warning.name not in issued])
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console)
            self.progress.start()
            total = None if module.last_step == MOST_STEPS else module.last_step
            self._task = self.progress.add_task("step", total=total, completed=module.step, status="")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        report: StepReport = module.report
        steps = module.last_step
        logged = report.step % self.config.every == 0 or report.step == steps
        if logged:
            self.counts = {f"data/{name}": count for name, count in self.data.counts().items()}
        if not trainer.is_global_zero:
            return
        tokens, seconds = self._last
        rate = (report.tokens - tokens) / max(report.seconds - seconds, 1e-9)
        self._last = (report.tokens, report.seconds)
        status = f"loss {report.loss:.3f}  {rate:,.0f} tokens/s"
        if self.progress is not None:
            self.progress.update(self._task, completed=report.step, total=steps, status=status)
        if report.spike is not None:
            done = "its update was skipped"
            if report.back_at is not None:
                done = f"weights are again those of step {report.back_at}, and what was learned since then is left out"
            why = f"{report.spike}; {done}"
            self._warn([RunWarning(report.step, "spike", why, report.spike.metric)])
        if not logged:
            return
        if self.progress is None and (report.seconds >= self._said + SECONDS_PER_LINE or report.step == steps):
            self._said = report.seconds
            nll = "".join(f"  {name} {report.metrics[name]:.3f}" for name in report.metrics if name.startswith("nll"))
            say(f"step {report.step}/{steps}  {status}{nll}")
        record = {
            "step": report.step,
            "tokens": report.tokens,
            "flops": report.flops,
            "loss": report.loss,
            "lr": report.lr,
            "seconds": report.seconds,
            "grad_norm": report.grad_norm,
            "skipped": report.skipped,
            "tokens_per_second": rate,
            **({} if module.guard is None else module.guard.counts()),
            **report.metrics,
            **self.counts,
            **report.sampled_by,
        }
        if len(module.objectives) > 1:
            record |= {"stage": report.stage, "objective": report.objective}
        self._recent.append(record)
        if (trend := length_trend(list(self._recent))) is not None:
            record["thought_length_trend"] = trend
        self.directory.append(self.directory.metrics, record)
        self._warn(self.diagnostics.update(record))
        for logger in self.loggers:
            logger.log_metrics(record, step=report.step)
        self._write_samples(report, module)

    def _warn(self, warnings: Sequence[RunWarning]) -> None:
        for warning in warnings:
            self.directory.append(self.directory.warnings, dataclasses.asdict(warning))
            say(f"warning, {warning.name}: {warning.message}")

    def on_train_end(self, trainer, module) -> None:
        self._stop_progress()
        if module.skipped:
            say(f"{module.skipped} of {module.step} steps were skipped: non-finite loss or gradient")
        if module.guard is not None and module.guard.count:
            times = module.guard.rollbacks
            back = f"; for {times} of them the run went back to a checkpoint" if times else ""
            say(f"{module.guard.count} of {module.step} steps were skipped: spikes of loss or gradient{back}")
        counts = [
            f"{count:,} {name[5:].replace('_', ' ')}"
            for name, count in self.counts.items()
            if count and name.rpartition("/")[2] in COUNTS
        ]
        if counts[1:]:
            say(f"data: {', '.join(counts)}")

    def on_exception(self, trainer, module, exception) -> None:
        self._stop_progress()

    def _stop_progress(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _write_samples(self, report: StepReport, module: PretrainModule) -> None:
        """A few of the step's thoughts, sampled uniformly: not the best ones."""
        if report.record is None or not self.config.samples:
            return
        anchors = report.record.thoughts.anchors
        places = anchors.predicting_BM.nonzero().tolist()
        sampler = random.Random(report.step)
        for row, anchor in sampler.sample(places, min(self.config.samples, len(places))):
            k = sampler.randrange(report.record.reward_BKM.shape[1])
            self.directory.append(
                self.directory.samples,
                {"step": report.step}
                | dict(report.sampled_by)
                | describe_thought(report.record.thoughts, row, k, anchor, self.tokenizer)
                | {
                    "reward": report.record.reward_BKM[row, k, anchor].item(),
                    "advantage": report.record.advantage_BKM[row, k, anchor].item(),
                },
            )


def _asked_of_any(trainer: lightning.Trainer, signals: StopSignals) -> bool:
    """Whether any rank is to stop, and so all are; all ranks must call it."""
    return trainer.strategy.reduce_boolean_decision(signals.asked, all=False)


class _Interrupted(Exception):
    """A signal interrupted the evaluation."""


class HeldOutEvaluation(lightning.Callback):
    """Scores held-out text at the start of the run, every so often, and at its end; writes evaluations.jsonl.

    Does nothing where no text is held out. When a signal asks the run to stop, it gives up, and is `interrupted`: the
    run saves and ends, and its continuation evaluates first.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: EvaluationConfig,
        objective: Objective,
        held_out: HeldOut,
        rows_at_once: int,
        loggers: list[Logger],
        difficulty_E: Tensor | None,
        test: CounterfactualTest | None,
        engine: Engine,
        signals: StopSignals,
    ):
        self.signals = signals
        self.interrupted = False
        self.directory = directory
        self.config = config
        self._evaluated_at = 0  # FLOPs
        self.objective = objective
        self.held_out = held_out
        self.rows_at_once = rows_at_once
        self.loggers = loggers
        self.difficulty_E = difficulty_E
        self.test = test
        self.engine = engine

    def on_fit_start(self, trainer, module) -> None:
        if records := self.directory.read(self.directory.evaluations):
            self._evaluated_at = records[-1]["flops"]
        # A run that ended between a step's checkpoint and its evaluation continues with the evaluation.
        if self.difficulty_E is None or (self._is_due(module) and not self.directory.is_evaluated(module.step)):
            self._evaluate(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self._is_due(module):
            self._evaluate(trainer, module)

    def _is_due(self, module: PretrainModule) -> bool:
        every, flops = self.config.every, self.config.every_flops
        due = module.finished or (every is not None and module.step % every == 0)
        return due or (flops is not None and module.flops // flops > self._evaluated_at // flops)

    def _evaluate(self, trainer: lightning.Trainer, module: PretrainModule) -> None:
        if not self.held_out.text.shape[0]:
            return
        model = module.model
        # Every rank scores all rows: passes of a sharded model are collective. Where there is a copy of it to sample
        # from, by that.
        if isinstance(self.engine, FromReplica) and self.objective.longest_thought > 0:
            model = self.engine.whole(model)
        held_out = self.held_out.to(module.device)
        # Evaluation samples with a key of its own: the same at every step, and none of training's.
        rng = Rng(module.seed, 2**32 - 1)

        def stop_if_asked() -> None:
            if _asked_of_any(trainer, self.signals):
                raise _Interrupted

        try:
            scores = score_held_out(
                *(self.objective, model, held_out, rng, self.rows_at_once, self.test, self.engine, stop_if_asked)
            )
        except _Interrupted:
            self.interrupted = trainer.should_stop = True
            return
        if self.difficulty_E is None:
            self.difficulty_E = scores.text_nll_E
        self._evaluated_at = module.flops
        summary = summarise(scores, self.difficulty_E)
        if trainer.is_global_zero:
            at = {"step": module.step, "tokens": module.tokens, "flops": module.flops}
            record = {**at, "held_out": held_out.fingerprint, **summary}
            self.directory.append(self.directory.evaluations, record)
            flat = scalars(summary)
            for logger in self.loggers:
                logger.log_metrics(flat, step=module.step)
            said = "  ".join(f"{name[9:]} {value:.4f}" for name, value in flat.items() if "nll" in name)
            few = summary["documents_scored"] < ENOUGH_DOCUMENTS
            note = f"  (of {summary['documents_scored']:.0f} documents, too few for intervals)" if few else ""
            say(f"held-out at step {module.step}: {said}{note}")


class Checkpoints(lightning.Callback):
    """Saves every so often, at the end, and when a signal asks the run to stop, which it then does after the step.

    Snapshots are written while training goes on; one that could not be written ends the run at the next step. The next
    save, the end of the run and errors wait for the one before.

    Only what is worth continuing from: after a step that was skipped, or with weights that are not finite, nothing is
    saved until that has passed, so that what was saved before is not rotated away; `refused` says why.
    constants: see `run_state`. known: names of snapshots that this process has read in full.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: CheckpointConfig,
        constants: Mapping[str, Any],
        evaluation: HeldOutEvaluation,
        signals: StopSignals,
        data: TextDataModule,
        known: set[str],
    ):
        self.data = data
        self.known = known
        self.writer = SnapshotWriter(directory.checkpoints)
        self.directory = directory
        self.config = config
        self.constants = constants
        self.evaluation = evaluation
        self.signals = signals
        self.refused: str | None = None
        self._saved_at = 0

    def on_train_start(self, trainer, module) -> None:
        self._saved_at = module.step
        self.writer = SnapshotWriter(
            self.directory.checkpoints, trainer.global_rank, trainer.world_size, self._committed
        )
        # Lightning has just put its own handler of SIGTERM there, which makes a collective call at any moment.
        self.signals.install()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.signals.deferred = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        config, last = self.config, module.finished
        # One decision for both, to be told apart only where it is to stop.
        stop = trainer.strategy.reduce_boolean_decision(self.signals.asked or self.writer.failed, all=False)
        if stop:
            self._settle()
        due = last or stop or module.gave_up or (config.every is not None and module.step % config.every == 0)
        if due or self.refused is not None:
            self._save(trainer, module)
        trainer.should_stop = trainer.should_stop or stop

    def on_train_end(self, trainer, module) -> None:
        if self._saved_at != module.step:  # the step's evaluation was interrupted
            self._save(trainer, module)
        self._settle()

    def roll_back(self, module: PretrainModule) -> int | None:
        """Takes what is trained back to the newest snapshot, and gives its step; None if there is none. All ranks.

        To one of every so many steps: one that a signal asked for is not there in a run that nobody stopped.
        """
        self._settle()
        snapshot = newest_snapshot(self.directory.checkpoints, every=self.config.every or 1)
        names = gathered(snapshot and snapshot.path.name)
        if len({*names}) > 1:
            seen = ", ".join(map(str, names))
            raise CheckpointError(
                f"ranks see different checkpoints in {self.directory.checkpoints} ({seen}); let all see the same ones"
            )
        if snapshot is None:
            return None
        restore_trained(module, snapshot)
        return int(snapshot.state["step"])

    def on_exception(self, trainer, module, exception) -> None:
        # Other ranks may be gone, and their files not come any more.
        self.writer.abandon(PATIENCE)

    def _settle(self) -> None:
        """Waits until the snapshot that is being written is durable. Raises, on all ranks, what prevented it."""
        for wait in (self.writer.own_error, self.writer.error):
            error = wait()
            errors = [said for said in gathered(error and str(error)) if said]
            if errors:
                raise error or CheckpointError(errors[0])

    def _committed(self, path: Path) -> None:
        self.known.add(path.name)
        config = self.config
        prune(self.directory.checkpoints, config.keep, config.keep_every, self._best(), self.known)

    def _best(self) -> list[int]:
        """The steps of the evaluations with the lowest NLL."""
        evaluations = self.directory.read(self.directory.evaluations)
        there = {path.name for path in all_checkpoints(self.directory.checkpoints)}
        nlls = {
            e["step"]: e.get("nll_thought", e["nll_text"])
            for e in evaluations
            if e["held_out"] == evaluations[-1]["held_out"] and name_of(e["step"]) in there
        }
        ranked = sorted((step for step in nlls if math.isfinite(nlls[step])), key=nlls.__getitem__)
        return ranked[: self.config.keep_best]

    def _save(self, trainer: lightning.Trainer, module: PretrainModule) -> None:
        self._saved_at = module.step
        self._settle()
        before = self.refused
        constants = {**self.constants, "lanes": self.data.state()}
        tensors, state = run_state(module, constants, self.evaluation.difficulty_E)
        if (count := module.skipped_in_a_row) > 0:
            steps = "step" if count == 1 else f"{count} steps in a row, up to step"
            self.refused = f"{steps} {module.step}{',' * (count > 1)} had a non-finite loss or gradient"
        elif (name := next(filter(None, gathered(non_finite(tensors))), None)) is not None:
            self.refused = f"step {module.step} left a model that is not finite ({name})"
        else:
            self.refused = None
            self.writer.save(module.step, tensors, state)
        if before is None and self.refused is not None:
            say(f"no checkpoint at step {module.step}: {self.refused}; the earlier ones are kept")

    def teardown(self, trainer, module, stage) -> None:
        self.signals.deferred = False
