"""The training step: an objective on Lightning, one optimizer step per global batch.

Optimisation is manual so that a step owns its whole global batch: counts are summed over ranks and micro-batches before
the first backward, and the update does not depend on how the batch was cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from checkpoints.loading import UnloadedModel
from models.flops import Ledger
from models.philox import Rng
from models.rollout import Engine
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives import Objective, Step, ThoughtRecord
from pretrain.recipe import UNITS, Budget, OptimizerConfig
from pretrain.sharding import before_backward, finish_gradients, full, mesh_to_shard_over, reshard, shard
from pretrain.spikes import Spike, SpikeGuard


@dataclass
class StepReport:
    """What one step did. tokens, flops, seconds: of training up to and with this step.

    loss, grad_norm and metrics are means over the step's updates; a metric that had nothing to count is left out.
    stage: of the run, from 0. objective: its name.
    sampled_by: the engine, and the step whose weights it sampled from; empty without thoughts.
    back_at: the step whose weights it went back to, because of a spike.
    """

    step: int
    stage: int
    objective: str
    tokens: int
    flops: int
    seconds: float
    loss: float
    lr: float
    grad_norm: float
    skipped: int
    metrics: dict[str, float]
    record: ThoughtRecord | None
    spike: Spike | None
    sampled_by: Mapping[str, str | int]
    back_at: int | None


def learning_rate(config: OptimizerConfig, step: int, steps: int, progress: float | None = None) -> float:
    """The rate of the update that completes step `step` (from 1) of `steps`, which the schedule takes unless it has a
    length of its own. progress: the share of the schedule that is spent, in a run that ends by something else."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if progress is None:
        steps = config.schedule_steps or steps
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(model: ThinkingModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on the matrices of linear layers only."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in linear], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in linear], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def micro_batches(text: Text, rows_at_once: int | None) -> list[Text]:
    """Parts of so many rows; None: the whole."""
    rows = rows_at_once or text.shape[0]
    return [text.rows(slice(start, start + rows)) for start in range(0, text.shape[0], rows)]


class PretrainModule(lightning.LightningModule):
    """`step`, `tokens`, `flops`, `seconds`, `skipped` count from the start of the run and survive a resume.

    After `max_skipped` skipped steps in a row it asks the trainer to stop, and `gave_up` is true.

    objectives: of the run's stages, which share model and optimizer; after: when each but the first begins, as `Stage`
    of a recipe has it. `stage` and `objective` are those of the step to come.

    unloaded: the model, and the further models of its objectives, which get their weights once they are sharded.
    rows_at_once: rows that go through the model at once; None: all of the rank's. sync_each_backward: whether ranks of
    a sharded model sum gradients in each backward, and not once per update. sampled_rows: as `Step` has it.
    """

    def __init__(
        self,
        model: ThinkingModel,
        objectives: Sequence[Objective],
        engine: Engine,
        config: OptimizerConfig,
        budget: Budget,
        seed: int,
        unloaded: Sequence[UnloadedModel],
        rows_at_once: int | None = None,
        sync_each_backward: bool = False,
        sampled_rows: int | None = None,
        after: Sequence[float] = (),
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.objectives, self.after = objectives, after
        self.engine = engine
        self.config, self.budget, self.seed, self.rows_at_once = config, budget, seed, rows_at_once
        self.sync_each_backward, self.sampled_rows = sync_each_backward, sampled_rows
        self.optimizer: torch.optim.AdamW | None = None
        # Called once the optimizer exists, to restore it from a checkpoint.
        self.on_optimizer: Callable[[PretrainModule], None] | None = None
        # Called by all ranks where an update spiked, to take back the updates since a checkpoint; gives that one's
        # step, None if there is none.
        self.roll_back: Callable[[PretrainModule], int | None] | None = None
        self.step = self.tokens = self.flops = self.skipped = 0
        self.seconds = 0.0
        self.report: StepReport | None = None
        self.skipped_in_a_row = 0
        self.guard: SpikeGuard | None = None
        if config.spike_threshold is not None:
            self.guard = SpikeGuard(config.spike_threshold, config.spike_window)
        self._unloaded = unloaded

    def configure_model(self) -> None:
        # Lightning calls it again for each of its stages.
        unloaded, self._unloaded = self._unloaded, ()
        mesh = mesh_to_shard_over(self.device_mesh)
        if unloaded and mesh is not None:
            # Copies first: a sharded model cannot be copied.
            for other in (*self._other_models(), self.model):
                shard(other, mesh)
        for model in unloaded:
            model.load(self.trainer.strategy.root_device)
        self._other_models()

    def _other_models(self) -> list[ThinkingModel]:
        """Those that any stage keeps beside the model."""
        return [other for objective in self.objectives for other in objective.other_models(self.model)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(self.model, self.config)
        if self.on_optimizer is not None:
            self.on_optimizer(self)
        return self.optimizer

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        started = time.perf_counter()
        config, text = self.config, Text(**batch)
        stage, objective = self.stage, self.objective
        rng = Rng(self.seed, self.step)
        progress = None if self.budget.unit == "steps" else self.progress
        lr = learning_rate(config, self.step + 1, self.budget.steps, progress)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = micro_batches(text, self.rows_at_once)
        losses, norms, finite = [], [], True
        spike: Spike | None = None
        record: ThoughtRecord | None = None
        metrics: dict[str, Tensor] = {}
        with Ledger() as ledger:
            step = Step(objective, self.model, parts, rng, self.engine, self.sampled_rows)
            counts = {name: self._sum(count) for name, count in step.counts.items()}
            for update in range(step.updates):
                optimizer.zero_grad()
                loss = torch.zeros((), dtype=torch.float64, device=self.device)
                for output in step.losses(counts):
                    before_backward(self.model, sync=output.last or self.sync_each_backward)
                    self.manual_backward(output.loss)
                    loss = loss + output.loss.detach().double()
                    record = record or output.record
                    for name, mean in output.metrics.items():
                        pair = torch.stack([mean.sum, mean.count])
                        metrics[name] = metrics[name] + pair if name in metrics else pair
                finish_gradients(self.model)
                losses.append(self._sum(loss).item())
                norms.append(full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)).item())
                # Both are sums over ranks, and so all ranks skip alike.
                finite = math.isfinite(losses[-1]) and math.isfinite(norms[-1])
                if finite and self.guard is not None:
                    spike = self.guard.judge(update, losses[-1], norms[-1])
                if not finite or spike is not None:
                    break
                optimizer.step()
                for other in objective.other_models(self.model):
                    reshard(other)
                objective.after_step(self.model)

        back_at = None
        if spike is not None and self.guard is not None and self.roll_back is not None:
            if self.guard.rollbacks < config.max_rollbacks:
                back_at = self.roll_back(self)
            self.guard.rollbacks += back_at is not None

        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.step += 1
        self.tokens += int(self._sum((text.document_BN >= 0).sum()))
        self.flops += int(self._sum(torch.tensor(ledger.total, device=self.device)))
        # The mean over ranks, which must agree on the last step.
        seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=self.device)
        self.seconds += self._sum(seconds).item() / self.trainer.world_size
        sums = {name: self._sum(pair).tolist() for name, pair in metrics.items()}
        means = {name: total / count for name, (total, count) in sums.items() if count}
        sampled_by: dict[str, str | int] = {}
        if record is not None:
            sampled_by = {"engine": self.engine.name, "weights_step": self.step - 1 - self.engine.lag}
        self.report = StepReport(
            self.step,
            stage,
            objective.config.name,
            self.tokens,
            self.flops,
            self.seconds,
            sum(losses) / len(losses),
            lr,
            sum(norms) / len(norms),
            self.skipped,
            means,
            record,
            spike,
            sampled_by,
            back_at,
        )
        if self.stage != stage:
            self.objective.begin(self.model)
            if self.guard is not None:
                self.guard.forget()
        self.trainer.should_stop = self.trainer.should_stop or self.gave_up or self.finished

    @property
    def stage(self) -> int:
        return sum((self.step if after >= 1 else self.progress) >= after for after in self.after)

    @property
    def objective(self) -> Objective:
        return self.objectives[self.stage]

    @property
    def spent(self) -> tuple[int, int, float]:
        """Steps, FLOPs and seconds."""
        return self.step, self.flops, self.seconds

    @property
    def last_step(self) -> int:
        """The step that ends the run, by what it has spent so far."""
        return self.budget.last_step(*self.spent)

    @property
    def finished(self) -> bool:
        return self.step >= self.last_step

    @property
    def gave_up(self) -> bool:
        return self.skipped_in_a_row >= self.config.max_skipped

    @property
    def progress(self) -> float:
        """The share of the schedule that is spent, from the run's first step."""
        spent = dict(zip(UNITS, self.spent, strict=True))[self.budget.unit]
        return spent / (self.config.schedule_length(self.budget.unit) or self.budget.amount)

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over ranks."""
        # The collective works in place, and one count may be a view of another.
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum")
