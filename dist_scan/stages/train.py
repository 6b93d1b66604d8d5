"""Trains any method: on images or features, with a network, neighbours and held-out rows."""

from __future__ import annotations

from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.data.images import input_description
from dist_scan.engine.precision import seed_step
from dist_scan.engine.train_state import TrainState
from dist_scan.methods.base import Method
from dist_scan.models.cluster_model import add_metadata
from dist_scan.stages._train_config import TrainConfig
from dist_scan.stages._train_inputs import TrainInputs
from dist_scan.stages._training import train_in_stage
from dist_scan.stages.base import Stage
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import barrier


class TrainStage(Stage[TrainConfig]):
    """Writes what the method publishes: a backbone, a cluster model, heads, assignments."""

    Config = TrainConfig

    def run(self) -> None:
        """Train, from the newest checkpoint if there is one, and publish. Collective."""
        context, config = self.context, self.config
        seed_step(context.run.seed, 0, 0)
        inputs = TrainInputs(context, config)
        feed = inputs.build_feed()
        method = inputs.build_method()
        held_out = inputs.build_held_out()
        state = train_in_stage(context, config, method, feed, inputs.embed, held_out)
        if state.skipped or state.refused:
            context.log(
                f"{context.name}: {state.skipped} steps skipped (no image was confident), "
                f"{state.refused} updates skipped (not finite)"
            )
        self._publish(method, state)

    def _publish(self, method: Method, state: TrainState) -> None:
        context = self.context
        method.prepare_publish()
        if context.world.rank == 0:
            method.publish(context.out)
            if state.warnings:
                write_json(context.out / "warnings.json", [_summary(state.warnings)])
            add_metadata(
                context.out,
                input=input_description(RecipeConfig(name="center"), context.run),
                provenance={
                    "run": context.run.name,
                    "seed": context.run.seed,
                    "stage": context.name,
                    "fingerprint": context.out.name,
                    "method": self.config.method.kind,
                },
            )
        barrier()


def _summary(warnings: list[str]) -> str:
    """One line for the warnings of all epochs."""
    if len(warnings) == 1:
        return warnings[0]
    return f"in {len(warnings)} epochs; the last: {warnings[-1]}"
