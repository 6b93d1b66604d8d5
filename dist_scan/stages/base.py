"""A stage: a folder made from other folders. Its config names its inputs; the pipeline decides whether it must run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dist_scan import stages
from dist_scan.config import RunConfig, StageConfig
from dist_scan.config.kinds import Kind, kind_class
from dist_scan.engine.stop import StopFlag
from dist_scan.world.world import World


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


class Stage(Kind, ABC):
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


def stage_class(kind: str) -> type[Stage]:
    """The stage in dist_scan/stages/<kind>.py. Raises ConfigError if there is none."""
    cls = kind_class(stages, kind)
    assert issubclass(cls, Stage)
    return cls
