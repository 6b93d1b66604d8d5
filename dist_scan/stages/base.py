"""A stage: a folder made from other folders. Its config names its inputs; the pipeline decides whether it must run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from dist_scan.config import RunConfig, StrictModel
from dist_scan.engine.stop import StopFlag
from dist_scan.world.world import World

REF, IMAGES = "the name of an earlier stage", "train or val of `data:`"
Ref = Annotated[str, REF]
Images = Annotated[Literal["train", "val"], IMAGES]


TAKES = {
    "features": "features",
    "held_out_features": "features",
    "neighbours": "neighbours",
    "held_out_neighbours": "neighbours",
    "backbone": "backbone",
    "model": "model",
    "subjects": "clusters",
    "evaluate": "evaluation",
}
"""What must lie in the folder that a role refers to (subjects.mine is of the role subjects)."""


def beton_stage(split: str) -> str:
    """The name of the stage that the pipeline puts first for a split of `data:`."""
    return f"beton_{split}"


class StageConfig(StrictModel):
    """Settings of a stage; `kind` is the name of its file."""

    kind: str

    def inputs(self) -> dict[str, str]:
        """Role -> name of the stage it refers to: every field typed Ref, and beton_<split> for one typed Images."""
        found = {}
        for role, field in type(self).model_fields.items():
            value = getattr(self, role)
            marks = [*field.metadata, *_inner_marks(field.annotation)]
            if value is not None and REF in marks:
                found[role] = value
            elif value is not None and IMAGES in marks:
                found[role] = beton_stage(value)
        return found

    def publishes(self) -> tuple[str, ...]:
        """What later stages may take from this one's folder: features, neighbours, backbone, model, clusters, evaluation."""
        return ()

    def check_inputs(self, name: str, earlier: Mapping[str, Any]) -> None:
        """Raise ValueError when a reference names a stage that publishes something else (before any work)."""
        for role, target in self.inputs().items():
            wanted, stage = TAKES.get(role.split(".")[0]), earlier[target]
            if wanted and wanted not in (stage.publishes() if stage is not None else ("images",)):
                fitting = [
                    other
                    for other, s in earlier.items()
                    if s is not None and wanted in s.publishes()
                ]
                raise ValueError(
                    f"stages.{name}.{role}: '{target}'{f' (kind {stage.kind})' if stage is not None else ''} publishes no {wanted}; "
                    f"allowed: {', '.join(fitting) or f'none; put a stage that publishes {wanted} before it'}"
                )

    def check(self, name: str, run: RunConfig, earlier: Mapping[str, Any]) -> None:
        """Raise ValueError when this stage does not fit the stages it refers to (before any work)."""

    def check_size(self, name: str, num_images: int, earlier: Mapping[str, Any]) -> None:
        """Raise ValueError when the data is too small for these settings (before any work)."""

    def check_ranks(self, name: str, world_size: int) -> None:
        """Raise ValueError when this stage cannot run on so many ranks (before any work; a launcher asks)."""

    def recipes_seen(self) -> tuple[Any, ...]:
        """The recipes by which this stage looks at images (RecipeConfig)."""
        found = (getattr(self, "recipe", None),) if getattr(self, "images", None) else ()
        return tuple(recipe for recipe in found if recipe is not None)

    def images_split(self, earlier: Mapping[str, Any]) -> str | None:
        """train or val: which images this stage's rows are, found through what it refers to."""
        own = getattr(self, "images", None)
        if own is not None:
            return own
        for target in self.inputs().values():
            stage = earlier.get(target)
            split = stage.images_split(earlier) if stage is not None else None
            if split:
                return split
        return None


def _inner_marks(annotation: Any) -> list[Any]:
    """Marks of `Ref | None`: they sit on the union's members."""
    marks = list(getattr(annotation, "__metadata__", ()))
    for inner in getattr(annotation, "__args__", ()):
        marks += _inner_marks(inner)
    return marks


@dataclass(frozen=True)
class Context:
    """What the pipeline hands a stage: where it writes, the folders of its inputs by role, and the process around it."""

    run: RunConfig
    name: str
    out: Path
    inputs: Mapping[str, Path]
    world: World
    stop: StopFlag
    say: Callable[[str], None]
    folders: Mapping[str, Path]
    """Folders of all finished stages by name (the report reads every one's logs and manifests)."""


class Stage(ABC):
    """One file per kind. `run` is collective, resumable, and writes only into `context.out`."""

    Config: ClassVar[type[StageConfig]]
    version: ClassVar[int] = 1
    """Raised when the stage's meaning changes, so that old artefacts are not reused."""

    for_people: ClassVar[tuple[str, ...]] = ()
    """Files of this stage that are copied to the top of the run's folder."""

    def __init__(self, config: StageConfig, context: Context) -> None:
        self.config, self.context = config, context

    @abstractmethod
    def run(self) -> None:
        """Make the artefact. Raises Stopped when asked to leave; the next start goes on."""
