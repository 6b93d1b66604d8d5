"""Method-agnostic training loop: logging, checkpoints, graceful stop.

`Trainer.run` has the loop over epochs and steps, `Trainer._step` is one optimizer step from top to
bottom. launch/recovery.py describes what happens when a rank dies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Never

import numpy as np
import torch
from pydantic import Field
from torch import nn

from dist_scan.config import RuntimeConfig, StrictModel
from dist_scan.data.batch import Batch, HeldOut
from dist_scan.data.feed import Feed
from dist_scan.engine.checkpoint import CheckpointStore
from dist_scan.engine.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    all_finite,
    build_optimizer,
    learning_rate,
    reset_optimizer_state,
    set_learning_rate,
)
from dist_scan.engine.precision import Precision, autocast, in_precision, seed_step
from dist_scan.engine.stop import NonRetryableError, StopFlag
from dist_scan.engine.train_state import Checkpointer, TrainState
from dist_scan.methods.base import Embed, Method, StepResult
from dist_scan.models.batch_norm import sync_running_stats
from dist_scan.monitoring.bottleneck import TrainingSetup
from dist_scan.monitoring.log import StageLog
from dist_scan.monitoring.profile import TrainingProfile
from dist_scan.monitoring.progress import Progress, StopRequested
from dist_scan.monitoring.step_timer import time_data_wait, timed
from dist_scan.monitoring.watchdog import watched
from dist_scan.storage.artifacts import WORK
from dist_scan.world.collectives import all_sum, gather_objects
from dist_scan.world.world import current, wrap_ddp

MAX_NON_FINITE_IN_A_ROW = 10
"""Consecutive updates that may be skipped as not finite before the training ends."""
ALWAYS_LOGGED_STEPS = 20
"""The first steps are logged whatever `log_every` is."""
EPOCH_STREAM, STEP_STREAM = 1, 2
"""Random streams of `seed_step` (0 is that of the initial weights)."""


class DivergedError(NonRetryableError):
    """Losses or gradients were not finite in too many steps in a row."""


class TrainingLoopConfig(StrictModel):
    """Update rule, schedule and length of a training."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    epochs: int = Field(ge=1)
    precision: Precision = "fp32"


def no_embedding(network: nn.Module, recipe: str | int = "center") -> Never:
    """The `embed` of a training without images."""
    raise ValueError("this training has no images that could be embedded")


@dataclass(frozen=True)
class TrainJob:
    """The arguments of `train`."""

    method: Method
    feed: Feed
    settings: TrainingLoopConfig
    run_dir: Path
    """Folder of the run; metrics go to logs/NAME.metrics.jsonl and tensorboard/NAME/."""
    out: Path
    """Folder of the stage; has timing.json and, while it trains, work/checkpoints/."""
    setup: TrainingSetup
    """What the advice about bottlenecks depends on."""
    name: str = "train"
    """Name of the stage, in file names and log lines."""
    seed: int = 0
    runtime: RuntimeConfig = RuntimeConfig()
    """Settings of checkpoints, log and profile."""
    stop: StopFlag = field(default_factory=StopFlag)
    log: Callable[[str], None] = print
    """Receives lines for the user."""
    embed: Embed = no_embedding
    """Embeds all images, for methods whose `begin_epoch` needs their features."""
    held_out: HeldOut | None = None
    """Rows for the selection of heads."""


def train(job: TrainJob) -> TrainState:
    """Train to the last epoch, from the newest checkpoint if there is one. Collective.

    Returns the final state. Raises StopRequested after a stop request (everything is saved),
    DivergedError, or CheckpointError.
    """
    return Trainer(job).run()


class AgreedStep(NamedTuple):
    """What all ranks know about a step after its all-reduce."""

    metrics: dict[str, float]
    """Means over ranks of the loss and the method's metrics."""
    is_finite: bool
    """Loss and gradients are finite on all ranks."""
    stop_requested: bool
    """Any rank has received a stop signal."""
    save_due: bool


class Trainer:
    """Optimizer, checkpoints and position of one training; loads the newest checkpoint."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.method = job.method
        self.optimizer = build_optimizer(job.settings.optimizer, job.method.parameter_groups())
        store = CheckpointStore(
            job.out / WORK / "checkpoints", job.runtime.keep_checkpoints, job.log
        )
        self.checkpointer = Checkpointer(store, job.runtime.checkpoint_s)
        self.metrics_log = StageLog(job.run_dir, job.name)
        self.profile = TrainingProfile(
            self.metrics_log, job.out, job.setup, job.runtime.profile, job.log
        )
        self.state = self.checkpointer.load(self.method, self.optimizer) or TrainState()
        # With sharded heads each rank has the whole batch: there are no gradients to average.
        self.network = self.method if self.method.sharded_state else wrap_ddp(self.method)
        self.is_ddp_warm = self.network is self.method
        self.epoch_rows: np.ndarray | None = None

    def run(self) -> TrainState:
        """See `train`."""
        state, feed, epochs = self.state, self.job.feed, self.job.settings.epochs
        progress = Progress(
            self.job.name,
            epochs * feed.steps_per_epoch,
            "steps",
            done=state.step,
            enabled=current().rank == 0,
            is_training=True,
        )
        with closing(self.metrics_log), self.profile, progress:
            self.profile.watch_gradients(self.method)
            while state.epoch < epochs and not state.finished:
                with timed("epoch"):
                    self._begin_epoch()
                for batch in time_data_wait(self._batches(state.step_in_epoch)):
                    agreed = self._step(batch)
                    loss = agreed.metrics["loss"]
                    progress.advance(1, f"epoch {state.epoch + 1}/{epochs} loss {loss:.4f}")
                    self._save_or_stop(agreed)
                with timed("epoch"):
                    self._end_epoch()
        return state

    def _batches(self, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of the current epoch, from step `first_step` of the epoch on."""
        epoch = self.state.epoch
        views = self.method.epoch_views(epoch)
        return self.job.feed.batches(epoch, first_step, views, self.epoch_rows)

    @watched("begin_epoch")
    def _begin_epoch(self) -> None:
        """The method's work before an epoch; a run resumed inside the epoch does not repeat it."""
        state = self.state
        seed_step(self.job.seed, state.epoch, EPOCH_STREAM)
        if not state.epoch_begun:
            try:
                reinitialised = tuple(self.method.begin_epoch(state.epoch, self.job.embed))
            except StopRequested:
                # The method has changed nothing yet, so this saves the end of the previous epoch.
                self._save()
                raise
            reset_optimizer_state(self.optimizer, reinitialised)
            state.epoch_begun = True
            if reinitialised:
                self._save()
        self.method.load_targets()
        self.epoch_rows = self.method.epoch_rows(state.epoch, self.job.feed.rows)
        self.method.train()
        if not self.is_ddp_warm:
            self._warm_up_ddp()

    def _warm_up_ddp(self) -> None:
        """Run two passes whose effects are undone.

        DDP rebuilds its gradient buckets after the first backward pass, and adds up in another
        order from then on. If a run that is resumed met that order one step later than a run that
        was never stopped, the two would differ in the last bits.
        """
        self.is_ddp_warm = True
        state_dict = {name: value.clone() for name, value in self.method.state_dict().items()}
        batch = next(self._batches())
        for _ in range(2):
            self._forward(batch).loss.backward()
        self.method.load_state_dict(state_dict)
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, batch: Batch) -> AgreedStep:
        """One optimizer step. Collective."""
        state, settings = self.state, self.job.settings

        # 1. Learning rate and random generators are functions of the step.
        lr = learning_rate(
            settings.optimizer.lr,
            settings.schedule,
            state.step,
            self.job.feed.steps_per_epoch,
            settings.epochs,
        )
        set_learning_rate(self.optimizer, lr)
        seed_step(self.job.seed, batch.epoch, STEP_STREAM, batch.step, current().rank)

        # 2. Forward: the method's loss on this rank's part of the global batch.
        with timed("forward"):
            step = self._forward(batch)

        # 3. Backward: DDP averages the gradients over ranks.
        if not step.skip:
            with timed("backward"):
                step.loss.backward()
                self.profile.backward_done()

        # 4. One all-reduce: metrics, and whether to skip the update, to save, to stop.
        agreed = self._all_reduce(step)

        # 5. Update the parameters, then the method's targets (EMA, queue, memory bank).
        #    Skip the update if the method says so, or if the loss or a gradient is not finite.
        if step.skip:
            state.skipped += 1
        elif agreed.is_finite:
            state.non_finite_in_a_row = 0
            with timed("optimizer"):
                self.optimizer.step()
            with timed("end_step"), torch.no_grad():
                self.method.end_step(batch, step)
        else:
            self._count_non_finite(batch, step)

        # 6. Make batch norm's running statistics equal on all ranks: the forward pass has changed
        #    them, also if the update was skipped.
        sync_running_stats(self.method)
        self.optimizer.zero_grad(set_to_none=True)

        # 7. Log.
        state.step += 1
        state.step_in_epoch += 1
        if state.step % self.job.runtime.log_every == 0 or state.step <= ALWAYS_LOGGED_STEPS:
            counts = {"skipped": state.skipped, "non_finite": state.non_finite}
            self.metrics_log.write_row(state.step, {**agreed.metrics, "lr": lr, **counts})
        return agreed

    def _forward(self, batch: Batch) -> StepResult:
        precision = self.job.settings.precision
        with autocast(precision, current().device):
            return self.network(replace(batch, views=in_precision(precision, batch.views)))

    def _all_reduce(self, step: StepResult) -> AgreedStep:
        """Combine the ranks' results in one message, so that all ranks do the same at each step."""
        loss = step.loss.detach()
        gradients = []
        if not step.skip:
            gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        is_finite = torch.isfinite(loss) & all_finite(gradients).to(loss.device)
        save_due = current().rank == 0 and self.checkpointer.is_due()
        flags = (is_finite, self.job.stop.requested, save_due)
        metrics = {"loss": loss, **step.metrics}
        parts = [torch.as_tensor(value).detach() for value in (*metrics.values(), *flags)]
        message = torch.stack([part.double().reshape(()).to(loss.device) for part in parts])
        *sums, finite_ranks, stopping_ranks, due_ranks = all_sum(message).tolist()
        return AgreedStep(
            metrics={name: total / current().world_size for name, total in zip(metrics, sums)},
            is_finite=finite_ranks == current().world_size,
            stop_requested=stopping_ranks > 0,
            save_due=due_ranks > 0,
        )

    def _count_non_finite(self, batch: Batch, step: StepResult) -> None:
        """Count a skipped update. Raises DivergedError after too many in a row. Collective then."""
        self.state.non_finite += 1
        self.state.non_finite_in_a_row += 1
        if self.state.non_finite_in_a_row < MAX_NON_FINITE_IN_A_ROW:
            return
        is_finite = bool(torch.isfinite(step.loss.detach()))
        ranks = gather_objects((is_finite, batch.index[:32].tolist()))
        # If all losses are finite, a gradient was not. Gradients are summed over ranks, so any rank
        # may be the cause.
        suspects = [rank for rank, (finite, _) in enumerate(ranks) if not finite]
        suspects = suspects or list(range(len(ranks)))
        rows = ", ".join(f"of rank {rank}: {ranks[rank][1]}" for rank in suspects[:8])
        raise DivergedError(
            f"{self.job.name}: the loss or a gradient was not finite in {MAX_NON_FINITE_IN_A_ROW} "
            f"updates in a row (step {batch.step}); image rows {rows}. "
            "Lower the learning rate, or look at these images"
        )

    def _save_or_stop(self, agreed: AgreedStep) -> None:
        """Save a checkpoint if one is due; on a stop request save and raise StopRequested."""
        if agreed.save_due or agreed.stop_requested:
            with timed("save"):
                self._save()
        if agreed.stop_requested:
            raise StopRequested()
        self.profile.step_done(self.state.step)

    def _save(self) -> None:
        self.checkpointer.save(self.method, self.optimizer, self.state)

    @watched("end of an epoch")
    def _end_epoch(self) -> None:
        """The method's work after an epoch (selection on held-out rows), warnings, early stop."""
        state, name = self.state, self.job.name
        self.method.eval()
        started = time.monotonic()
        with torch.no_grad():
            metrics = self.method.end_epoch(state.epoch, self.job.held_out)
        if metrics:
            metrics = {**metrics, "selection_s": time.monotonic() - started}
            self.metrics_log.write_row(state.step, metrics)
        warning = self.method.warning()
        if warning:
            state.warnings.append(warning)
            self.job.log(f"warning: {name}: {warning}")
        reason = self.method.early_stop_reason()
        if reason:
            epochs = self.job.settings.epochs
            self.job.log(f"{name}: ended after epoch {state.epoch + 1} of {epochs}: {reason}")
            state.finished = True
        state.epoch += 1
        state.step_in_epoch = 0
        state.epoch_begun = False
