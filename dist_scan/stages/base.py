"""Base class of stages. A stage reads the folders of other stages and writes its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from dist_scan import stages
from dist_scan.config import RunConfig, StageConfig
from dist_scan.config.kinds import Kind, kind_class
from dist_scan.data.augment.recipes import Recipe, RecipeConfig
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.images import open_images
from dist_scan.engine.stop import StopFlag
from dist_scan.world.world import World

BETON = "images.beton"
"""File of a beton stage."""
C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Context:
    """What a stage needs to run, besides its settings."""

    run: RunConfig
    name: str
    """Name of the stage in the run."""
    out: Path
    """Folder that the stage writes to."""
    inputs: Mapping[str, Path]
    """Folders of the stages that the settings refer to, by role."""
    world: World
    stop: StopFlag
    log: Callable[[str], None]
    """Prints and logs a line on rank 0."""
    folders: Mapping[str, Path]
    """Folders of all finished stages by name (for the report)."""

    def beton(self, role: str = "images") -> Path:
        """The .beton of an input that refers to a split of `data:`."""
        return self.inputs[role] / BETON

    def open_images(
        self, recipes: tuple[RecipeConfig, ...], batch: int, role: str = "images"
    ) -> tuple[BetonLoader, tuple[Recipe, ...]]:
        """Loader of the images of an input, and the recipes for its crops; see data.images."""
        return open_images(self.beton(role), recipes, batch, self.run, self.world)


class Stage(Kind, ABC, Generic[C]):
    """One stage of the pipeline; each kind has a file with a Stage and its settings."""

    Config: ClassVar[type[StageConfig]]
    version: ClassVar[int] = 1
    """Part of the fingerprint: raise it when equal settings give other results than before."""

    user_files: ClassVar[tuple[str, ...]] = ()
    """Files that are copied to the top of the run folder."""

    def __init__(self, config: C, context: Context) -> None:
        self.config = config
        self.context = context

    @abstractmethod
    def run(self) -> None:
        """Write the stage's files into `context.out`. Collective.

        Resumes an interrupted call. Raises StopRequested after a stop request.
        """


def stage_class(kind: str) -> type[Stage]:
    """The stage in dist_scan/stages/<kind>.py. Raises ConfigError if there is none."""
    cls = kind_class(stages, kind)
    assert issubclass(cls, Stage)
    return cls
