"""A finished run, read from its folder alone: its images and checkpoints may be gone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dist_scan.config import ConfigError, RunConfig, read_yaml, validate_settings
from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.storage.artifacts import MANIFEST, STAGES, Artifact


class ModelChoice(NamedTuple):
    """A stage that published a cluster model, and the assign stage that used it, if any."""

    stage: str
    assign: str | None


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; read-only.

    Args:
        folder: the run folder.
        config: name, seed and data of the run. It has no stages: their settings are in the
            manifests of their artifacts.
        artifacts: the artifact of every stage by name, in order.
    """

    folder: Path
    config: RunConfig
    artifacts: Mapping[str, Artifact]

    def stages_of_kind(self, kind: str) -> list[str]:
        """Names of the stages of a kind, in order."""
        return [name for name, stage in self.artifacts.items() if stage.manifest["kind"] == kind]

    def settings(self, stage: str) -> dict[str, Any]:
        """The settings that a stage ran with."""
        return self.artifacts[stage].manifest["config"]

    def inputs(self, stage: str) -> dict[str, str]:
        """Role -> name of the stage that a stage refers to."""
        paths = self.artifacts[stage].manifest["inputs"]
        return {role: Path(path).parent.name for role, path in paths.items()}

    def recipe(self, assign: str | None) -> RecipeConfig:
        """The recipe with which an assign stage read its images; centre crops without one."""
        if assign is None:
            return RecipeConfig(name="center")
        settings = self.settings(assign)["recipe"]
        return validate_settings(RecipeConfig, settings, f"stages.{assign}.recipe")

    def provenance(self, stage: str) -> dict[str, Any]:
        """Run, seed, stage and fingerprint, by which its artifact can be identified."""
        return {
            "run": self.config.name,
            "seed": self.config.seed,
            "stage": stage,
            "fingerprint": self.artifacts[stage].manifest["fingerprint"],
        }

    def image_model_stages(self) -> list[str]:
        """Names of the stages that published a cluster model with a backbone, in order."""
        found = []
        for name, artifact in self.artifacts.items():
            file = artifact.path / "cluster.json"
            if file.is_file() and json.loads(file.read_text())["backbone"]:
                found.append(name)
        return found

    def choose_model(self, wanted: str | None = None) -> ModelChoice:
        """The cluster model of the wanted stage; of an assign stage, the one that it used.

        Without a wanted stage, the model behind `best` of the report stage, else the last one.
        Raises ConfigError with the names that are allowed.
        """
        models = self.image_model_stages()
        if not models:
            raise ConfigError(
                f"{self.folder}: no stage of this run published a cluster model that takes images; "
                "add `backbone:` to the stage that trains heads, or add a selflabel stage"
            )
        used_by = {name: self.inputs(name)["model"] for name in self.stages_of_kind("assign")}
        stage = wanted or self._shown_stage() or models[-1]
        stage = used_by.get(stage, stage)
        if stage not in models:
            raise ConfigError(
                f"{self.folder}: stage '{stage}' has no cluster model that takes images; "
                f"allowed: --stage {', '.join(models)}"
            )
        assign = next((name for name, model in used_by.items() if model == stage), None)
        return ModelChoice(stage, assign)

    def _shown_stage(self) -> str | None:
        """The stage whose clusters the report shows (`best` in its settings); None without one."""
        for name in self.stages_of_kind("report"):
            report = self.settings(name)
            return self.settings(report["evaluate"])["subjects"][report["best"]]
        return None


def open_finished_run(run_dir: str | Path) -> FinishedRun:
    """Open a run folder. Raises ConfigError if it is not one, or the run is not finished."""
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"'{folder}' is not a run folder (no config.yaml); give one, such as runs/NAME"
        )
    if not (folder / "DONE").is_file():
        raise ConfigError(
            f"the run in '{folder}' is not finished (no DONE); "
            "the command that started it resumes it"
        )
    return FinishedRun(folder, _read_config(folder / "config.yaml"), _read_artifacts(folder))


def _read_config(file: Path) -> RunConfig:
    """Name, seed and data."""
    tree = read_yaml(file.read_text(encoding="utf-8"), str(file))
    settings = {key: tree.get(key) for key in ("name", "seed", "data")}
    return validate_settings(RunConfig, settings | {"stages": {}}, str(file))


def _read_artifacts(folder: Path) -> dict[str, Artifact]:
    """The artifacts that stages.json lists.

    .beton files may be missing: they lie in a cache, or were removed.
    """
    fingerprints = json.loads((folder / STAGES).read_text())
    paths = {name: folder / "stages" / name / fp for name, fp in fingerprints.items()}
    found = {
        name: Artifact(path, json.loads((path / MANIFEST).read_text()))
        for name, path in paths.items()
        if (path / MANIFEST).is_file()
    }
    missing = [name for name in paths if name not in found and not name.startswith("beton_")]
    if missing or not found:
        raise ConfigError(
            f"{folder}: the results of {', '.join(missing) or 'every stage'} are missing under "
            "stages/; start the run again to make them"
        )
    return found
