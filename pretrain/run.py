"""From a recipe to a trained model: `fit`, its `dry_run`, and opening what they leave behind."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import load_decoder, load_thinking_model
from checkpoints.references import resolve
from checkpoints.run import find_checkpoint, load_checkpoint, newest_checkpoint
from data_pipelines import PackedText, Tokenizer, open_data
from data_pipelines.data_module import TextDataModule
from models.flops import Ledger
from models.philox import Rng
from models.pointwise import compile_chains
from models.rollout import EAGER, Engine, Native, Preferred, Recorded
from models.rollout.native import library
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives import CounterfactualTest, Objective, Step
from objectives.template import encode_tag
from pretrain.callbacks import Checkpoints, HeldOutEvaluation, Records, is_rank_zero, say
from pretrain.module import PretrainModule
from pretrain.recipe import Recipe, RecipeError
from pretrain.report import print_report, write_report
from pretrain.run_directory import RunDirectory
from pretrain.sharding import make_strategy
from pretrain.state import Tensors, model_from_state, restore_after_setup, restore_before_setup

log = logging.getLogger(__name__)
# Lightning announces its hardware and products at every start.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def compute_dtype(setting: str) -> torch.dtype | None:
    """The dtype of activations: None leaves that of the masters. `auto` is bf16 where the hardware multiplies it."""
    if setting == "auto":
        if torch.cuda.is_available():
            bf16 = torch.cuda.is_bf16_supported()
        else:
            capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        return torch.bfloat16 if bf16 else None
    return torch.bfloat16 if setting == "bf16" else None


def load_reference(reference: str, dtype: torch.dtype | None, seed: int = 0) -> ThinkingModel:
    """The model of a reference, with the thinking parts it brings. Raises CheckpointError."""
    if reference.startswith("random:"):
        return ThinkingModel(load_decoder(reference, dtype, seed=seed))
    return load_thinking_model(resolve(reference), dtype)


def new_model(recipe: Recipe, objective: Objective, tokenizer: Tokenizer) -> ThinkingModel:
    """The recipe's model with the parts its objective uses; parts the model already brings are kept as they are."""
    source = load_reference(recipe.model, compute_dtype(recipe.compute_dtype), recipe.seed)
    needs = objective.needs
    model = ThinkingModel(source.decoder, needs.delimiters is not None, needs.mixing_head)
    if model.delimiters is not None:
        if source.delimiters is not None:
            model.delimiters = source.delimiters
        else:
            assert needs.delimiters is not None
            ids = [encode_tag(tokenizer, origin)[:1] for origin in needs.delimiters]
            if not all(ids):
                raise RecipeError("objective.start_from and end_from cannot be empty; name a text like ---")
            model.delimiters.init_from(*(source.decoder.embed_tokens.weight[id] for (id,) in ids))
    if model.mixing_head is not None:
        if source.mixing_head is not None:
            model.mixing_head = source.mixing_head
        else:
            model.mixing_head.init_weights(torch.Generator().manual_seed(recipe.seed))
    return model


@dataclass
class Assembled:
    """All that a run needs, checked to fit together."""

    recipe: Recipe
    objective: Objective
    evaluator: Objective
    test: CounterfactualTest | None
    engine: Engine
    tokenizer: Tokenizer
    tokenizer_directory: Path
    data: PackedText
    held_out: Text
    model: ThinkingModel
    checkpoint: tuple[Tensors, dict] | None


def prepare(recipe: Recipe, directory: RunDirectory | None) -> Assembled:
    """Reads tokenizer, data and model, the latter from the run's newest checkpoint if `directory` has one."""
    if recipe.compile and not torch.cuda.is_available():
        try:
            library()
        except RuntimeError as error:
            raise RecipeError(str(error)) from None
    if recipe.cuda_graphs and not torch.cuda.is_available():
        raise RecipeError("cuda_graphs takes a CUDA device and there is none; leave the key out")
    if recipe.cuda_graphs and recipe.ranks > 1:
        raise RecipeError("cuda_graphs cannot record a model that is sharded; leave the key out or train on one device")
    compile_chains(recipe.compile and torch.cuda.is_available())
    tokenizer_directory = resolve(recipe.model)
    tokenizer = Tokenizer.from_directory(tokenizer_directory)
    data = open_data(recipe.data, tokenizer, recipe.seed)
    objective = recipe.make_objective(tokenizer)
    evaluator = recipe.make_objective(tokenizer, evaluation=True)
    test = counterfactual_test(recipe, tokenizer, data)
    held_out = Text(**data.held_out_rows(recipe.evaluation.rows))
    _check_held_out(recipe, evaluator, held_out)
    _load_models(objective, recipe, tokenizer)
    newest = newest_checkpoint(directory.checkpoints) if directory is not None else None
    checkpoint = None
    if newest is None:
        model = new_model(recipe, objective, tokenizer)
    else:
        checkpoint = load_checkpoint(newest)
        if checkpoint[1]["data_fingerprint"] != data.fingerprint:
            raise RecipeError(
                f"the data is not what {newest} was trained on, so the run cannot be continued exactly; "
                "restore the data or choose another --run-dir"
            )
        model = model_from_state(*checkpoint, compute_dtype(recipe.compute_dtype))
    if tokenizer.size > model.decoder.config.vocab_size:
        raise RecipeError(
            f"the tokenizer of {recipe.model} has {tokenizer.size} tokens, its model only "
            f"{model.decoder.config.vocab_size} embeddings; choose another model"
        )
    model.ban(tokenizer.size, tokenizer.control_ids)
    model.decoder.activation_checkpointing = recipe.activation_checkpointing
    _check_lengths(recipe, max(objective.longest_thought, evaluator.longest_thought), model)
    return Assembled(
        recipe,
        objective,
        evaluator,
        test,
        make_engine(recipe),
        tokenizer,
        tokenizer_directory,
        data,
        held_out,
        model,
        checkpoint,
    )


def make_engine(recipe: Recipe) -> Engine:
    """What samples thoughts; what supports a request only in part is backed by the passes of training."""
    engines: list[Engine] = []
    if recipe.compile and recipe.ranks == 1 and not torch.cuda.is_available():
        engines.append(Native())
    if recipe.cuda_graphs:
        engines.append(Recorded())
    return Preferred(*engines, EAGER) if engines else EAGER


def counterfactual_test(recipe: Recipe, tokenizer: Tokenizer, data: PackedText) -> CounterfactualTest | None:
    """The counterfactual test of the recipe's evaluation. Raises RecipeError if the filler is no token."""
    config = recipe.evaluation
    if not config.counterfactuals:
        return None
    filler = encode_tag(tokenizer, config.filler)
    if not filler:
        raise RecipeError("evaluation.filler is empty; name a text whose first token fills a thought, like .")
    return CounterfactualTest(filler[0], data.solutions(config.rows))


def _load_models(objective: Objective, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """The further models that the objective's settings name; they must read the same tokens."""
    models = {}
    for setting, reference in objective.needs.models.items():
        if Tokenizer.from_directory(resolve(reference)).fingerprint != tokenizer.fingerprint:
            raise RecipeError(
                f"objective.{setting} {reference} has another tokenizer than {recipe.model}; "
                "choose one of the same family"
            )
        models[setting] = load_reference(reference, compute_dtype(recipe.compute_dtype)).requires_grad_(False)
    objective.use_models(models)


def _check_lengths(recipe: Recipe, thought: int, model: ThinkingModel) -> None:
    config = model.decoder.config
    limit = min(config.max_positions, config.sliding_window or config.max_positions)
    if recipe.data.length + thought > limit:
        raise RecipeError(
            f"data.length {recipe.data.length} and thoughts of {thought} tokens exceed the {limit} positions of "
            f"{recipe.model}; set data.length to at most {limit - thought}"
        )


def _check_held_out(recipe: Recipe, evaluator: Objective, held_out: Text) -> None:
    if evaluator.scored(held_out):
        return
    if not held_out.targets(1)[1].any():
        why = f"data.held_out {recipe.data.held_out} keeps no text to predict; raise it, or give more text"
    else:
        where = "objective" if recipe.evaluation.objective is None else "evaluation.objective"
        why = (
            f"no position of the {held_out.shape[0]} held-out rows fits {where}'s {evaluator.scoring_rule()}; "
            "change these, or raise evaluation.rows"
        )
    raise RecipeError(f"no held-out token can be scored: {why}")


def fit(recipe: Recipe) -> Path:
    """Runs a recipe to its end, and its control if it has one, continuing what its directory holds; returns that.

    Raises RecipeError, DataError or CheckpointError for what the user can mend, TrainingStopped if the run gave up.
    """
    started = time.perf_counter()
    directory = RunDirectory(recipe.run_dir or "runs/run")
    finished = _train(recipe, directory)
    if finished and recipe.control is not None:
        steps = equal_flops_steps(recipe, directory)
        say(f"control: {recipe.control.name} on the same data for the same FLOPs, {steps} steps")
        control = recipe.control_recipe(steps, str(directory.control))
        finished = _train(control, RunDirectory(directory.control))
    if finished and is_rank_zero():
        seconds = time.perf_counter() - started
        write_report(directory, recipe, seconds)
        print_report(directory, recipe, seconds)
    return directory.path


def equal_flops_steps(recipe: Recipe, directory: RunDirectory) -> int:
    """Steps of the control that cost what the run has cost, by the cost of its first."""
    assert recipe.control is not None
    control = prepare(recipe.control_recipe(1, str(directory.control)), None)
    text = Text(**control.data.rows(0, recipe.rows_per_step))
    with Ledger() as ledger:
        step = Step(control.objective, control.model, [text], Rng(recipe.seed, 0), control.engine)
        for _ in range(step.updates):
            for _ in step.losses():
                pass
    return max(1, round(directory.read(directory.metrics)[-1]["flops"] / ledger.total))


def _train(recipe: Recipe, directory: RunDirectory) -> bool:
    """One run; whether it came to its end."""
    directory.check(recipe)
    prepared = prepare(recipe, directory)
    module = PretrainModule(prepared.model, prepared.objective, recipe, prepared.engine)
    difficulty_E = None
    if prepared.checkpoint is not None:
        tensors, state = prepared.checkpoint
        restore_before_setup(module, tensors, state)
        module.on_optimizer = lambda module: restore_after_setup(module, tensors, state)
        difficulty_E = tensors.get("evaluation", {}).get("difficulty_E")
        say(f"continuing {directory.path} at step {module.step} of {recipe.steps}")
    if is_rank_zero():
        directory.create(recipe, prepared.tokenizer_directory)
        directory.rewind(module.step if prepared.checkpoint is not None else -1)
    if module.step >= recipe.steps:
        say(f"{directory.path} is already at step {module.step} of {recipe.steps}; raise --steps to go on")
        return True

    loggers = _loggers(recipe, directory)
    evaluation = HeldOutEvaluation(
        directory, prepared.evaluator, prepared.held_out, loggers, difficulty_E, prepared.test, prepared.engine
    )
    checkpointing = Checkpoints(directory, prepared.data, evaluation)
    records = Records(directory, prepared.tokenizer, prepared.data.counts, loggers)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy=make_strategy(recipe.ranks),
        max_epochs=1,
        logger=False,
        callbacks=[records, evaluation, checkpointing],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data_module = TextDataModule(
        prepared.data, recipe.steps, recipe.rows_per_step, start_step=module.step, num_workers=recipe.data_workers
    )
    trainer.fit(module, datamodule=data_module)
    for logger in loggers:
        logger.finalize("success")
    if module.step < recipe.steps:
        say(f"stopped at step {module.step} of {recipe.steps}; the same command continues")
        return False
    return True


def dry_run(recipe: Recipe) -> None:
    """Validates a recipe to the point of one forward and backward pass on its first micro-batch; writes nothing."""
    prepared = prepare(recipe, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = prepared.model.to(device)
    rows = recipe.micro_batch_rows or recipe.rows_per_step // recipe.ranks
    text = Text(**prepared.data.rows(0, rows)).to(device)
    started = time.perf_counter()
    with Ledger() as ledger:
        for output in Step(prepared.objective, model, [text], Rng(recipe.seed, 0), prepared.engine).losses():
            output.loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters())
    passes = recipe.rows_per_step // rows
    say(
        f"{recipe.model}: {parameters / 1e6:.1f}M parameters; weights, gradients and AdamW states take "
        f"{parameters * 16 / 2**30:.1f} GiB in fp32"
    )
    say(
        f"data: {prepared.data.tokens_per_epoch:,} tokens an epoch; {recipe.steps} steps of {recipe.rows_per_step} × "
        f"{recipe.data.length} tokens are {recipe.steps * recipe.rows_per_step * recipe.data.length:,}"
    )
    say(
        f"{recipe.objective_name}: one pass over {rows} rows took {seconds:.1f} s and {ledger.total / 1e12:.2f} TFLOP; "
        f"about {seconds * passes / recipe.ranks * recipe.steps / 60:.0f} minutes for the run"
    )
    say("the recipe can be run")


def _loggers(recipe: Recipe, directory: RunDirectory) -> list[Logger]:
    """Loggers that repeat metrics.jsonl elsewhere."""
    loggers: list[Logger] = []
    if recipe.logging.csv:
        loggers.append(CSVLogger(str(directory.path), name="csv"))
    mode = recipe.logging.wandb
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        log.info("wandb is not installed; metrics.jsonl has everything")
    elif mode != "disabled":
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        loggers.append(
            WandbLogger(
                project=recipe.logging.wandb_project,
                name=directory.path.name,
                save_dir=str(directory.path),
                mode=mode,
                resume="allow",
            )
        )
    return loggers


@dataclass
class OpenedModel:
    """A model for use after training, with its tokenizer and, from a run, its recipe."""

    model: ThinkingModel
    tokenizer: Tokenizer
    tokenizer_directory: Path
    recipe: Recipe | None


def open_model(reference: str, dtype: torch.dtype | None = None) -> OpenedModel:
    """A run directory, a checkpoint of one, or any model reference. Raises CheckpointError or DataError."""
    path = Path(reference)
    if (path / "recipe.yaml").exists() or (path / "state.json").exists():
        checkpoint = find_checkpoint(path)
        directory = RunDirectory(checkpoint.parent.parent)
        if not directory.recipe.exists():
            raise CheckpointError(f"{checkpoint} lies in no run directory (no {directory.recipe}); move it back")
        model = model_from_state(*load_checkpoint(checkpoint), dtype)
        tokenizer_directory, recipe = directory.tokenizer, directory.load_recipe()
    else:
        tokenizer_directory, recipe = resolve(reference), None
        model = load_reference(reference, dtype)
    tokenizer = Tokenizer.from_directory(tokenizer_directory)
    model.ban(tokenizer.size, tokenizer.control_ids)
    return OpenedModel(model, tokenizer, tokenizer_directory, recipe)
