"""Runs a recipe: `fit` and its `dry_run`."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import secrets
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from checkpoints.errors import CheckpointUnreachable
from checkpoints.references import resolve
from checkpoints.snapshots import newest_checkpoint, remove_after
from data_pipelines import StreamText
from data_pipelines.config import DataUnreachable
from data_pipelines.corpus import is_corpus
from data_pipelines.data_module import TextDataModule
from data_pipelines.finding import PYTHON_DOCS, find
from models.flops import Ledger
from models.philox import Rng
from models.thoughts import Text
from objectives import Step
from pretrain.assembly import assemble, lane_states
from pretrain.callbacks import Checkpoints, HeldOutEvaluation, Records, is_rank_zero, say, scalars
from pretrain.diagnostics import Diagnostics, at_start
from pretrain.launcher import cluster_environment, launched
from pretrain.module import PretrainModule
from pretrain.recipe import MOST_STEPS, LoggingConfig, Recipe, RecipeError
from pretrain.recipe_files import recipe_to_tree
from pretrain.report import print_report, write_report
from pretrain.run_directory import RunDirectory, write_durably, writing
from pretrain.sharding import make_strategy
from pretrain.state import restore_after_setup, restore_before_setup
from pretrain.stopping import Stopped, StopSignals, TrainingStopped
from pretrain.watchdog import Watchdog

log = logging.getLogger(__name__)
DRY_RUN_PATIENCE = 10.0  # seconds that a dry run waits for a hub at most
# Lightning announces its hardware and products at every start.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# But where a process that it has started ends before the watchdog watches, only this says so.
logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)


def fit(recipe: Recipe, restart: bool = False, report: bool = True) -> Path:
    """Runs a recipe to its end, then its control if it has one, continuing what its directory holds; returns that.

    restart: begins anew, and removes what the directory holds of a run. report: also print what report.html has.
    Raises RecipeError, DataError, CheckpointError or RunDirectoryError for what the user can fix, TrainingStopped if it
    gave up, and Stopped if a signal asked it to stop: then the same call continues.
    """
    started = time.perf_counter()
    if (launch := launched()) is not None:
        launch.check(recipe)
        say(str(launch))
    directory = RunDirectory(recipe.run_dir or "runs/run")
    with StopSignals(announce=is_rank_zero()) as signals, _locked(directory):
        try:
            _train(recipe, directory, signals, restart)
        except TrainingStopped as stopped:
            newest = newest_checkpoint(directory.checkpoints)
            how = "--restart" if newest is None else f"--continue-from {int(newest.name[-8:])}"
            raise TrainingStopped(
                f"{stopped}; look at the data, or repeat the command with a lower learning rate, like "
                f"{how} --optimizer.lr {recipe.optimizer.lr / 10:g}"
            ) from None
        if recipe.control is not None:
            if signals.asked:
                raise Stopped(f"{directory.path} is finished, its control not begun; the same command goes on")
            last = directory.read(directory.metrics)[-1]
            say(f"control: {recipe.control.name} on the same data for the same {last['flops']:.4g} FLOPs")
            control = RunDirectory(directory.control)
            try:
                with _locked(control):
                    its_recipe = recipe.control_recipe(last["step"], last["flops"], str(directory.control))
                    _train(its_recipe, control, signals)
            except TrainingStopped as stopped:
                raise TrainingStopped(
                    f"the control: {stopped}; look at the data, or begin another --run-dir with a lower optimizer.lr"
                ) from None
        if is_rank_zero():
            seconds = time.perf_counter() - started
            with writing(directory.path):
                write_report(directory, recipe, seconds)
            if report:
                print_report(directory, recipe, seconds)
    return directory.path


def _locked(directory: RunDirectory) -> contextlib.AbstractContextManager[None]:
    """The lock, which rank 0 holds for all ranks."""
    return directory.locked() if is_rank_zero() else contextlib.nullcontext()


def _train(recipe: Recipe, directory: RunDirectory, signals: StopSignals, restart: bool = False) -> None:
    """One run, to its last step. Raises Stopped or TrainingStopped."""
    recipe = directory.settle(recipe, restart)
    if not restart:
        directory.check(recipe)
    run = assemble(recipe, None if restart else directory.checkpoint(recipe))
    module = PretrainModule(
        run.model,
        run.objectives,
        run.engine,
        recipe.optimizer,
        recipe.budget,
        recipe.seed,
        run.unloaded,
        rows_at_once=recipe.micro_batch_rows,
        sync_each_backward=recipe.gradient_sync == "backward",
        sampled_rows=recipe.sampled_rows,
        after=[stage.after for stage in recipe.stages.values()],
    )
    difficulty_E = None
    if run.checkpoint is not None:
        checkpoint = run.checkpoint
        restore_before_setup(module, checkpoint)
        module.on_optimizer = lambda module: restore_after_setup(module, checkpoint)
        difficulty = checkpoint.tensors.get("evaluation", {}).get("difficulty_E")
        if difficulty is not None and checkpoint.state.get("held_out_fingerprint") == run.held_out.fingerprint:
            difficulty_E = difficulty.whole()
        elif difficulty is not None:
            say("other tokens are evaluated than before, or in another way: their difficulty is measured anew")
    evaluated = not run.held_out.text.shape[0] or directory.is_evaluated(module.step)
    if module.step > module.last_step or (module.finished and evaluated):
        say(f"{directory.path} is already at {_place(module)}; raise --{recipe.budget.unit} to go on")
        return
    if run.checkpoint is not None:
        changes = directory.changes(recipe)
        say(f"continuing {directory.path} at {_place(module)}" + (f"; it changes {changes}" if changes else ""))
    unit, amount = recipe.budget.unit, recipe.budget.amount
    length = recipe.optimizer.schedule_length(unit)
    if recipe.optimizer.schedule != "constant" and length is not None and length < amount:
        at = f"step {length}" if unit == "steps" else f"{length:.4g} {unit}"
        say(
            f"the schedule ends at {at} (optimizer.schedule_{unit}), and the learning rate is 0 after it; to "
            f"stretch it from a checkpoint on: --continue-from STEP --optimizer.schedule_{unit} {amount}"
        )
    if is_rank_zero():
        if restart:
            directory.clear()
        # In this order: a kill in between leaves a run that the same command continues.
        remove_after(directory.checkpoints, module.step)
        directory.create(recipe, run.tokenizer_directory)
        directory.rewind(module.step if run.checkpoint is not None else -1)

    if recipe.rollout.engine == "vllm" and not torch.cuda.is_available():
        say("vLLM cannot sleep on this device: its weights and its cache stay in memory while the model trains")
    if recipe.data.held_out == 0:
        say("data.held_out is 0: nothing is evaluated")
    loggers = _loggers(recipe.logging, directory)
    evaluation = HeldOutEvaluation(
        directory,
        recipe.evaluation,
        run.evaluator,
        run.held_out,
        recipe.micro_batch_rows or recipe.rows_per_step // recipe.ranks,
        loggers,
        difficulty_E,
        run.test,
        run.engine,
        signals,
    )
    constants = {"recipe": recipe_to_tree(recipe), "data_fingerprint": run.data.fingerprint}
    constants["held_out_fingerprint"] = run.held_out.fingerprint
    if isinstance(run.data, StreamText):
        constants["data_contents"] = run.data.contents
    data_module = TextDataModule(
        run.data,
        module.step if module.finished else recipe.budget.steps,
        recipe.rows_per_step,
        start_step=module.step,
        num_workers=recipe.data_workers,
        states=lane_states(run, module.step * recipe.rows_per_step),
    )
    # What the run continues from has been read in full.
    known = set() if run.checkpoint is None else {run.checkpoint.path.name}
    checkpoints = Checkpoints(directory, recipe.checkpoint, constants, evaluation, signals, data_module, known)
    if recipe.optimizer.on_spike == "rollback":
        module.roll_back = checkpoints.roll_back
    diagnostics = Diagnostics(chance=math.log(run.model.decoder.config.vocab_size), lab=recipe.data.is_lab)
    warnings = at_start(recipe.model, recipe.trained.values())
    records = Records(directory, recipe.logging, run.tokenizer, data_module, loggers, diagnostics, warnings)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy=make_strategy(recipe.ranks, recipe.shards),
        plugins=[cluster_environment()],
        max_epochs=1,
        logger=False,
        # Checkpoints first: an evaluation that fails then costs no training.
        callbacks=[Watchdog(), records, checkpoints, evaluation],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, datamodule=data_module)
    except Stopped:
        # Perhaps only this process got the signal, and the others of its node wait for it.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise
    for logger in loggers:
        logger.finalize("success")
    if not module.finished and not module.gave_up:
        raise Stopped(f"stopped at {_place(module)}; the same command continues")
    if evaluation.interrupted:
        raise Stopped(f"stopped at the last step, {module.step}, before its evaluation; the same command continues")
    if checkpoints.refused is not None:
        raise TrainingStopped(checkpoints.refused)
    if unit != "steps" and replace(recipe.budget, steps=MOST_STEPS).last_step(*module.spent) > module.step:
        share = getattr(module, unit) / amount
        say(f"the run ends at --steps {recipe.steps} with {share:.0%} of its {unit} spent; raise --steps for the rest")


def _place(module: PretrainModule) -> str:
    """Where a run is, and of how many steps, as far as that is known."""
    last = module.last_step
    if last == MOST_STEPS:
        return f"step {module.step}"
    return f"step {module.step} of {'' if module.finished or module.budget.unit == 'steps' else 'about '}{last}"


def dry_run(recipe: Recipe) -> None:
    """Validates a recipe down to one forward and backward pass on its first micro-batch; writes nothing.

    Raises what `fit` does, and RecipeError that lists all of its data and models that cannot be reached.
    """
    _reach(recipe)
    run = assemble(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run.load(device)
    model = run.model
    rows = recipe.micro_batch_rows or recipe.rows_per_step // recipe.ranks
    text = Text(**run.data.rows(0, rows)).to(device)
    costs = []
    for objective in run.objectives:
        started = time.perf_counter()
        with Ledger() as ledger:
            for output in Step(objective, model, [text], Rng(recipe.seed, 0), run.engine).losses():
                output.loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        costs.append((ledger.total, time.perf_counter() - started))
    parameters = sum(p.numel() for p in model.parameters())
    passes = recipe.rows_per_step // rows
    flops, seconds = zip(*((flops * passes, seconds * passes / recipe.ranks) for flops, seconds in costs), strict=True)
    of_stages = recipe.steps_of_stages(flops, seconds)
    steps = sum(of_stages)
    say(
        f"{recipe.model}: {parameters / 1e6:.1f}M parameters; weights, gradients and AdamW states take "
        f"{parameters * 16 / 2**30:.1f} GiB in fp32"
    )
    say(
        f"data: {run.data.about()}; {steps} steps of {recipe.rows_per_step} × "
        f"{recipe.data.length} tokens are {steps * recipe.rows_per_step * recipe.data.length:,}"
    )
    for (key, config), (total, took) in zip(recipe.trained.items(), costs, strict=True):
        name = f"{key} {config.name}" if recipe.stages else config.name
        say(f"{name}: one pass over {rows} rows took {took:.1f} s and {total / 1e12:.2f} TFLOP")
    minutes = sum(n * each for n, each in zip(of_stages, seconds, strict=True)) / 60
    shown = f", {' + '.join(map(str, of_stages))} steps" if recipe.stages else ""
    say(f"about {minutes:.0f} minutes for the run{shown}")
    for warning in at_start(recipe.model, recipe.trained.values()):
        say(f"warning, {warning.name}: {warning.message}")
    say("the recipe can be run")


def _reach(recipe: Recipe) -> None:
    unreachable: list[str] = []
    for source in recipe.data.sources.values():
        if source.is_lab or source.reference == PYTHON_DOCS or is_corpus(source.reference):
            continue
        try:
            find(source, patience=min(recipe.data.patience, DRY_RUN_PATIENCE))
        except DataUnreachable as error:
            unreachable.append(str(error))
    try:
        resolve(recipe.model)
    except CheckpointUnreachable as error:
        unreachable.append(str(error))
    if unreachable:
        raise RecipeError(
            "\n".join([*unreachable, "otherwise, as far as can be told without these, the recipe is valid"])
        )


class _Csv(CSVLogger):
    """csv/metrics.csv: one file, made again from the records that a continued run has, with every row as it comes."""

    def __init__(self, directory: RunDirectory):
        super().__init__(directory.path, name="", version="csv", flush_logs_every_n_steps=1)
        if is_rank_zero():
            shutil.rmtree(directory.path / "csv", ignore_errors=True)  # Lightning warns of what is there
            for step, record in _logged(directory):
                self.experiment.log_metrics(record, step)
            self.save()

    def save(self) -> None:
        with writing(Path(self.log_dir)):
            super().save()


def _logged(directory: RunDirectory) -> list[tuple[int, dict[str, Any]]]:
    """What loggers have been given of a run that is continued, by step."""
    records = [(r["step"], r) for r in directory.read(directory.metrics)]
    records += [(r["step"], scalars(r)) for r in directory.read(directory.evaluations)]
    return sorted(records, key=lambda pair: pair[0])


class _Wandb(WandbLogger):
    """A run at wandb that a continuation goes on with. What is written offline is one file that has each step once:
    made again, as a process that is killed leaves steps in it that its continuation takes once more."""

    def __init__(self, config: LoggingConfig, directory: RunDirectory, mode: Literal["online", "offline"]):
        identity = directory.path / "wandb" / "id"
        super().__init__(
            project=config.wandb_project,
            name=config.wandb_name or directory.path.name,
            group=config.wandb_group,
            save_dir=str(directory.path),
            id=identity.read_text() if identity.exists() else secrets.token_hex(4),
            mode=mode,
            resume="allow",
        )
        if not is_rank_zero():
            return
        if mode == "offline":
            for old in identity.parent.glob("offline-run-*"):
                shutil.rmtree(old)
        with writing(identity.parent):
            identity.parent.mkdir(exist_ok=True)
        write_durably(identity, str(self._id))
        if mode == "offline":
            for step, record in _logged(directory):
                self.log_metrics(record, step)

    def finalize(self, status: str) -> None:
        """Also ends the run, with which Lightning would go on in the next run of the process, as a control is."""
        super().finalize(status)
        if is_rank_zero():
            self.experiment.finish()


def _loggers(config: LoggingConfig, directory: RunDirectory) -> list[Logger]:
    """Loggers that repeat metrics.jsonl elsewhere."""
    loggers: list[Logger] = []
    if config.csv:
        loggers.append(_Csv(directory))
    mode = config.wandb
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        log.info("wandb is not installed; metrics.jsonl has everything")
    elif mode != "disabled":
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        loggers.append(_Wandb(config, directory, mode))
    return loggers
