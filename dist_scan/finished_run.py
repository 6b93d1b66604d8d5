"""A run that is done, read from its folder alone: no source of images, no checkpoint of others need still be there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_scan.config import ConfigError, RunConfig, read_yaml, validate_settings
from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.storage.artifacts import MANIFEST, STAGES, Artifact


@dataclass(frozen=True)
class FinishedRun:
    """`run` holds name, seed and data; `stages` every finished artefact by its stage's name, in order."""

    folder: Path
    run: RunConfig
    stages: Mapping[str, Artifact]

    def inputs(self, name: str) -> dict[str, str]:
        """Role -> the stage that a stage refers to."""
        return {
            role: Path(path).parent.name
            for role, path in self.stages[name].manifest["inputs"].items()
        }

    def of_kind(self, kind: str) -> list[str]:
        """Names of the stages of a kind, in order."""
        return [name for name, stage in self.stages.items() if stage.manifest["kind"] == kind]

    def config(self, name: str) -> dict[str, Any]:
        """A stage's settings as it ran with them."""
        return self.stages[name].manifest["config"]

    def cluster_models(self) -> list[str]:
        """Names of the stages that published a cluster model that takes images."""
        files = {name: stage.path / "cluster.json" for name, stage in self.stages.items()}
        return [
            name
            for name, file in files.items()
            if file.is_file() and json.loads(file.read_text())["backbone"]
        ]

    def chosen(self, wanted: str | None = None) -> tuple[str, str | None]:
        """(the stage whose cluster model is meant, the assign stage that used it or None): the wanted one, or the model behind the
        report's best subject. Raises ConfigError with the names there are."""
        models, assigns = (
            self.cluster_models(),
            {name: self.inputs(name)["model"] for name in self.of_kind("assign")},
        )
        if wanted is None:
            wanted = self._best()
        if wanted in assigns:
            wanted = assigns[wanted]
        if not models:
            raise ConfigError(
                f"{self.folder}: no stage of this run published a cluster model that takes images; train scan or selflabel, with `backbone:`"
            )
        if wanted is None:
            wanted = models[-1]
        if wanted not in models:
            raise ConfigError(
                f"{self.folder}: stage '{wanted}' has no cluster model that takes images; allowed: --stage {', '.join(models)}"
            )
        return wanted, next((name for name, model in assigns.items() if model == wanted), None)

    def _best(self) -> str | None:
        """The stage behind what the report calls best; None without a report."""
        for name in self.of_kind("report"):
            config = self.config(name)
            return self.config(config["evaluate"])["subjects"][config["best"]]
        return None


def open_finished(run_dir: str | Path) -> FinishedRun:
    """Read RUN. Raises ConfigError when it is no run, or not done."""
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"'{folder}' is no run's folder (no config.yaml); give RUN as runs/NAME")
    if not (folder / "DONE").is_file():
        raise ConfigError(
            f"the run in '{folder}' is not finished (no DONE); start it again with the command that began it, it goes on from where it was"
        )
    return FinishedRun(folder, _settings(folder), _artefacts(folder))


def _settings(folder: Path) -> RunConfig:
    """Name, seed and data; the stages are in their manifests, as they ran."""
    tree = read_yaml(
        (folder / "config.yaml").read_text(encoding="utf-8"), str(folder / "config.yaml")
    )
    parts = {key: tree.get(key) for key in ("name", "seed", "data")}
    return validate_settings(RunConfig, parts | {"stages": {}}, str(folder / "config.yaml"))


def _artefacts(folder: Path) -> dict[str, Artifact]:
    """Every stage's artefact: by stages.json; of a run from before there was one, the newest manifest."""
    listed = folder / STAGES
    if listed.is_file():
        paths = {
            name: folder / "stages" / name / mark
            for name, mark in json.loads(listed.read_text()).items()
        }
    else:
        newest = sorted(
            (folder / "stages").glob(f"*/*/{MANIFEST}"), key=lambda file: file.stat().st_mtime
        )
        paths = {file.parent.parent.name: file.parent for file in newest}
    found = {name: path for name, path in paths.items() if (path / MANIFEST).is_file()}
    lost = [
        name for name in paths if name not in found and not name.startswith("beton_")
    ]  # .beton files may lie in a cache, or be removed
    if lost or not found:
        raise ConfigError(
            f"{folder}: the results of {', '.join(lost) or 'every stage'} are missing under stages/; start the run again, it makes them"
        )
    return {
        name: Artifact(path, json.loads((path / MANIFEST).read_text()))
        for name, path in found.items()
    }


def recipe_of(done: FinishedRun, assign: str | None) -> RecipeConfig:
    """The recipe by which an assign stage read its images; centre crops without one."""
    if assign is None:
        return RecipeConfig(name="center")
    settings = done.config(assign)["recipe"]
    return validate_settings(RecipeConfig, settings, f"stages.{assign}.recipe")
