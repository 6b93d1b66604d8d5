"""The train loop. It knows methods, not which one: forward is the loss, the rest is saying, saving and stopping in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.data.feed import Feed
from dist_scan.engine.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    all_finite,
    build_optimizer,
    forget,
    learning_rate,
    set_learning_rate,
)
from dist_scan.engine.precision import Precision, autocast, in_precision, seed_step
from dist_scan.engine.stop import NonRetryableError, StopFlag
from dist_scan.engine.train_state import Checkpointer, TrainState
from dist_scan.methods.base import Embed, Method, Step
from dist_scan.models.batch_norm import sync_running_stats
from dist_scan.monitoring.log import StageLog
from dist_scan.monitoring.profile import TrainingProfile
from dist_scan.monitoring.progress import Progress, StopRequested
from dist_scan.monitoring.step_timer import section, time_data_wait
from dist_scan.monitoring.watchdog import watched
from dist_scan.world.collectives import all_sum, gather_objects
from dist_scan.world.world import current, wrap_ddp

MOST_REFUSED = 10  # non-finite updates in a row before the run ends


class DivergedError(NonRetryableError):
    """Losses or gradients stopped being numbers; told with the image rows of the last step."""


@dataclass(frozen=True)
class TrainSettings:
    """How a stage trains: the update rule, the schedule and the length."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    epochs: int
    seed: int
    precision: Precision = "fp32"
    log_every: int = 10


class Trainer:
    """One stage's training. `run()` goes on from the newest checkpoint and returns when the last epoch is done."""

    def __init__(
        self,
        method: Method,
        feed: Feed,
        schooling: TrainSettings,
        embed: Embed,
        saver: Checkpointer,
        stop: StopFlag,
        log: StageLog,
        timing: TrainingProfile,
        held_out: HeldOut | None = None,
        name: str = "train",
        say: Callable[[str], None] = print,
    ) -> None:
        self.method, self.feed, self.schooling, self.embed = method, feed, schooling, embed
        self.saver, self.stop, self.log, self.timing, self.held_out, self.name = (
            saver,
            stop,
            log,
            timing,
            held_out,
            name,
        )
        self.say = say
        self.optimizer = build_optimizer(schooling.optimizer, method.parameter_groups())
        self.at, self.network, self.settled, self.rows = TrainState(), method, False, None

    def run(self) -> TrainState:
        """Train to the end. Raises Stopped (everything saved), Diverged, or CheckpointError."""
        self.at = self.saver.load(self.method, self.optimizer) or TrainState()
        self.network = self.method if self.method.sharded_state else wrap_ddp(self.method)
        total = self.schooling.epochs * self.feed.steps_per_epoch
        with (
            self.timing,
            Progress(
                self.name, total, "steps", done=self.at.step, enabled=current().rank == 0
            ) as progress,
        ):
            self.timing.watch_gradients(self.method)
            while self.at.epoch < self.schooling.epochs and not self.at.finished:
                with section("epoch"):
                    self._begin_epoch()
                for batch in time_data_wait(self._batches(self.at.step_in_epoch)):
                    values = self._step(batch)
                    self._after_step(values, progress)
                with section("epoch"):
                    self._end_epoch()
        return self.at

    def _batches(self, first_step: int = 0) -> Iterator[Batch]:
        return self.feed.batches(
            self.at.epoch, first_step, self.method.epoch_views(self.at.epoch), self.rows
        )

    @watched("begin_epoch")
    def _begin_epoch(self) -> None:
        """The method's whole-set moment, once per epoch: a run resumed inside the epoch does not repeat it."""
        seed_step(self.schooling.seed, self.at.epoch, 1)
        if not self.at.begun:
            try:
                fresh = tuple(self.method.begin_epoch(self.at.epoch, self.embed))
            except (
                StopRequested
            ):  # nothing has changed yet: what was trained since the last save is kept
                self.saver.save(self.method, self.optimizer, self.at)
                raise
            forget(self.optimizer, fresh)
            self.at.begun = True
            if fresh:
                self.saver.save(self.method, self.optimizer, self.at)
        self.rows = self.method.epoch_rows(self.at.epoch, self.feed.rows)
        self.method.train()
        if self.network is not self.method and not self.settled:
            self._settle()

    def _settle(self) -> None:
        """DDP rebuilds its buckets after the first backward pass, and sums in another order from then on: two throw-away passes
        now, with everything put back, make a resumed run equal to an undisturbed one, bit for bit (RELIABILITY.md 6)."""
        self.settled = True
        before, batch = (
            {k: v.clone() for k, v in self.method.state_dict().items()},
            next(self._batches()),
        )
        for _ in range(2):
            self._forward(batch).loss.backward()
        self.method.load_state_dict(before)
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, batch: Batch) -> dict[str, float]:
        """One update, agreed by all ranks: the loss, its gradient, the refusal of what is no number, the method's afterthought."""
        lr = learning_rate(
            self.schooling.optimizer.lr,
            self.schooling.schedule,
            self.at.step,
            self.feed.steps_per_epoch,
            self.schooling.epochs,
        )
        set_learning_rate(self.optimizer, lr)
        seed_step(self.schooling.seed, batch.epoch, 2, batch.step, current().rank)
        with section("forward"):
            step = self._forward(batch)
        if not step.skip:
            with section("backward"):
                step.loss.backward()
                self.timing.backward_done()
        values, finite = self._agree(step)
        if step.skip:
            self.at.skipped += 1
        elif not finite:
            self._refuse(batch, step)
        else:
            self.at.refused_in_a_row = 0
            with section("optimizer"):
                self.optimizer.step()
            with section("end_step"):
                self.method.end_step(batch, step)
        sync_running_stats(
            self.method
        )  # also when the update was skipped: the forward pass has moved them
        self.optimizer.zero_grad(set_to_none=True)
        return {**values, "lr": lr}

    def _forward(self, batch: Batch) -> Step:
        with autocast(self.schooling.precision, current().device):
            return self.network(
                replace(batch, views=in_precision(self.schooling.precision, batch.views))
            )

    def _agree(self, step: Step) -> tuple[dict[str, float], bool]:
        """Means over ranks of the loss and the method's metrics; in the same message: is all finite, was anyone asked to stop,
        is a save due on rank 0. One all-reduce a step, so all ranks do the same at the same step."""
        names = ["loss", *step.metrics]
        parts = [step.loss.detach(), *(torch.as_tensor(v).detach() for v in step.metrics.values())]
        gradients = (
            [] if step.skip else [p.grad for p in self.method.parameters() if p.grad is not None]
        )
        finite = torch.isfinite(step.loss.detach()) & all_finite(gradients).to(step.loss.device)
        parts += [
            finite,
            torch.tensor(float(self.stop.requested)),
            torch.tensor(float(current().rank == 0 and self.saver.due())),
        ]
        message = all_sum(
            torch.stack([p.double().reshape(()).to(step.loss.device) for p in parts])
        ).tolist()
        *means, finite_ranks, asked, due = message
        self.at.asked, self.at.save_due = asked > 0, due > 0
        values = {name: value / current().world_size for name, value in zip(names, means)}
        return values, finite_ranks == current().world_size

    def _refuse(self, batch: Batch, step: Step) -> None:
        self.at.refused += 1
        self.at.refused_in_a_row += 1
        if self.at.refused_in_a_row >= MOST_REFUSED:
            rows = gather_objects(
                (bool(torch.isfinite(step.loss.detach())), batch.index[:32].tolist())
            )
            blamed = [r for r, (finite, _) in enumerate(rows) if not finite] or list(
                range(len(rows))
            )  # a gradient is every rank's
            raise DivergedError(
                f"{self.name}: {MOST_REFUSED} updates in a row had a loss or gradient that is no number (step {batch.step}); "
                f"image rows {', '.join(f'of rank {r}: {rows[r][1]}' for r in blamed[:8])}. "
                "Lower the learning rate, or look at these images"
            )

    def _after_step(self, values: dict[str, float], progress: Progress) -> None:
        self.at.step += 1
        self.at.step_in_epoch += 1
        if self.at.step % self.schooling.log_every == 0 or self.at.step <= 20:
            self.log.write_row(
                self.at.step, {**values, "skipped": self.at.skipped, "refused": self.at.refused}
            )
        progress.advance(
            1, f"epoch {self.at.epoch + 1}/{self.schooling.epochs} loss {values['loss']:.4f}"
        )
        if self.at.asked or self.at.save_due:
            with section("save"):
                self.saver.save(self.method, self.optimizer, self.at)
        if self.at.asked:
            raise StopRequested()
        self.timing.step_done(self.at.step)

    @watched("end of an epoch")
    def _end_epoch(self) -> None:
        self.method.eval()
        began = time.monotonic()
        values = self.method.end_epoch(self.at.epoch, self.held_out)
        if values:
            self.log.write_row(self.at.step, {**values, "choosing_s": time.monotonic() - began})
        if warning := self.method.warning():
            self.at.warnings = [*self.at.warnings, warning]
            self.say(f"warning: {self.name}: {warning}")
        if reason := self.method.early_stop_reason():
            self.say(
                f"{self.name}: ended after epoch {self.at.epoch + 1} of {self.schooling.epochs}: {reason}"
            )
        self.at.next_epoch(bool(reason))
