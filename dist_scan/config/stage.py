"""Base of the settings of a stage: its inputs, what it publishes, its checks before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from dist_scan.config.data import DataConfig, Split
from dist_scan.config.kinds import KindConfig

# Metadata of the two types by which a field refers to another stage.
REF = "the name of an earlier stage"
IMAGES = "train or val of `data:`"
Ref = Annotated[str, REF]
Images = Annotated[Split, IMAGES]
BETON = "beton_"  # prefix of the stages that the pipeline adds, one for each split of `data:`
REQUIRED_ARTIFACT = {
    "features": "features",
    "held_out_features": "features",
    "neighbours": "neighbours",
    "held_out_neighbours": "neighbours",
    "backbone": "backbone",
    "model": "model",
    "subjects": "clusters",
    "evaluate": "evaluation",
}
"""Artifact type that each input role requires (`subjects.NAME` has the role `subjects`)."""


Stages: TypeAlias = "Mapping[str, StageConfig | None]"
"""Stages by name, in order; None for those that the pipeline adds for `data:`."""


def beton_stage(split: Split) -> str:
    """Name of the stage that the pipeline adds for a split of `data:`."""
    return BETON + split


class StageConfig(KindConfig):
    """Settings of a stage."""

    def inputs(self) -> dict[str, str]:
        """Role -> name of the stage it refers to: every field of type Ref or Images that is set."""
        found = {}
        for role, field in type(self).model_fields.items():
            value = getattr(self, role)
            if value is None:
                continue
            metadata = [*field.metadata, *_metadata(field.annotation)]
            if REF in metadata:
                found[role] = value
            elif IMAGES in metadata:
                found[role] = beton_stage(value)
        return found

    def publishes(self) -> tuple[str, ...]:
        """Types of the artifacts in this stage's folder.

        Any of: features, neighbours, backbone, model, clusters, evaluation.
        """
        return ()

    def check_inputs(self, name: str, earlier: Stages) -> None:
        """Raise ValueError if an input refers to a stage that publishes something else."""
        for role, target in self.inputs().items():
            required = REQUIRED_ARTIFACT.get(role.split(".")[0])
            stage = earlier[target]
            published = ("images",) if stage is None else stage.publishes()
            if required is None or required in published:
                continue
            kind = "" if stage is None else f" (kind {stage.kind})"
            fitting = [
                other
                for other, config in earlier.items()
                if config is not None and required in config.publishes()
            ]
            allowed = ", ".join(fitting) or f"none; put a stage that publishes {required} before it"
            raise ValueError(
                f"stages.{name}.{role}: '{target}'{kind} publishes no {required}; "
                f"allowed: {allowed}"
            )

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless the settings fit each other and the earlier stages."""

    def check_size(self, name: str, num_images: int) -> None:
        """Raise ValueError if there are too few images for these settings."""

    def check_ranks(self, name: str, world_size: int) -> None:
        """Raise ValueError if this stage cannot run on world_size ranks."""

    def warnings(self, data: DataConfig) -> list[str]:
        """Warnings about settings that are allowed but rarely intended for this data."""
        return []

    def images_split(self, stages: Stages) -> str | None:
        """The split (train or val) whose images are this stage's rows, found through its inputs."""
        inputs = self.inputs()
        if "images" in inputs:
            return inputs["images"].removeprefix(BETON)
        for target in inputs.values():
            stage = stages.get(target)
            split = stage.images_split(stages) if stage is not None else None
            if split is not None:
                return split
        return None


def _metadata(annotation: Any) -> list[Any]:
    """Metadata inside an annotation: in `Ref | None` it belongs to a member of the union."""
    found = list(getattr(annotation, "__metadata__", ()))
    for inner in getattr(annotation, "__args__", ()):
        found += _metadata(inner)
    return found
