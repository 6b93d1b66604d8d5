"""The settings of stages that train, and their call of the training loop."""

from __future__ import annotations

from pydantic import Field

from dist_scan.config.stage import StageConfig
from dist_scan.data.batch import HeldOut
from dist_scan.data.feed import FeatureFeed, ImageFeed
from dist_scan.data.order import check_divisible
from dist_scan.engine.train_state import TrainState
from dist_scan.engine.training_loop import TrainingLoopConfig, TrainJob, no_embedding, train
from dist_scan.methods.base import Embed, Method
from dist_scan.monitoring.profile import training_setup
from dist_scan.stages.base import Context


class TrainingStageConfig(TrainingLoopConfig, StageConfig):
    """Settings of a stage that trains."""

    global_batch: int = Field(ge=1)
    """Images per step over all ranks; the batch per rank is derived from it."""
    steps_per_epoch: int | None = Field(default=None, ge=1)
    """End an epoch after this many steps, for a trial run (default: after all images)."""

    def check_ranks(self, name: str, world_size: int) -> None:
        """Raise ValueError unless the global batch is divisible by the number of ranks."""
        try:
            check_divisible(self.global_batch, world_size)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None


def train_in_stage(
    context: Context,
    config: TrainingStageConfig,
    method: Method,
    feed: ImageFeed | FeatureFeed,
    embed: Embed = no_embedding,
    held_out: HeldOut | None = None,
) -> TrainState:
    """Train a method with the settings and in the folder of a stage. Collective; see `train`."""
    run = context.run
    on_features = isinstance(feed, FeatureFeed)
    return train(
        TrainJob(
            method=method,
            feed=feed,
            settings=config,
            run_dir=run.run_dir,
            out=context.out,
            setup=training_setup(run, context.world, config.global_batch, on_features),
            name=context.name,
            seed=run.seed,
            runtime=run.runtime,
            stop=context.stop,
            log=context.log,
            embed=embed,
            held_out=held_out,
        )
    )
