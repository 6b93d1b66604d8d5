"""Before any work: the stages of a run, checks against its data, and fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dist_scan.config import ConfigError, RunConfig, StageConfig
from dist_scan.config.data import STORAGE_SETTINGS
from dist_scan.config.stage import beton_stage
from dist_scan.data.sources.open import open_source
from dist_scan.stages.base import stage_class
from dist_scan.stages.beton import BetonConfig
from dist_scan.storage.artifacts import fingerprint


class DataSummary(NamedTuple):
    """num_images: by split. fingerprints: of each split's images, by the name of its beton stage.

    Both have only the splits that a stage refers to.
    """

    num_images: dict[str, int]
    fingerprints: dict[str, str]


def all_stages(run: RunConfig) -> dict[str, StageConfig]:
    """The stages of a run in order; first those that build the .beton files it refers to."""
    referenced = {target for stage in run.stages.values() for target in stage.inputs().values()}
    betons = {
        beton_stage(split): BetonConfig(split=split, data=run.data) for split in run.data.splits()
    }
    return {name: stage for name, stage in betons.items() if name in referenced} | run.stages


def inspect_data(run: RunConfig) -> DataSummary:
    """Count and fingerprint the images of a run. Raises ConfigError if they cannot be listed."""
    data = DataSummary({}, {})
    for name, stage in all_stages(run).items():
        if isinstance(stage, BetonConfig):
            source = open_source(run.data.splits()[stage.split])
            data.fingerprints[name] = source.fingerprint()
            data.num_images[stage.split] = len(source)
    return data


def check_sizes(run: RunConfig, num_images: Mapping[str, int]) -> None:
    """Check the settings against the numbers of images. Raises ConfigError with all errors."""
    if not run.stages:
        raise ConfigError("stages: none; name at least one (the shipped configs are examples)")
    errors = []
    for name, stage in run.stages.items():
        split = stage.images_split(run.stages)
        if split is not None and split in num_images:
            try:
                stage.check_size(name, num_images[split])
            except ValueError as error:
                errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


def data_warnings(run: RunConfig) -> list[str]:
    """Warnings of all stages about this data.

    A warning that several stages give is listed once, under the first of them.
    """
    found: dict[str, str] = {}
    for name, stage in run.stages.items():
        for text in stage.warnings(run.data):
            found.setdefault(text, name)
    return [f"stages.{name}: {text}" for text, name in found.items()]


def fingerprints(run: RunConfig, data_fingerprints: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of each stage: a hash of everything that decides its results.

    Hashed are kind, version and settings of the stage, the seed, `size`, `mean` and `std` of the
    data, and the fingerprints of the stage's inputs; not `name`, `runtime` and `slurm`. For a
    beton stage: kind, version, how images are stored, `limit`, `max_bad_share` and the fingerprint
    of the images.
    """
    found: dict[str, str] = {}
    for name, stage in all_stages(run).items():
        if isinstance(stage, BetonConfig):
            settings, context = _storage_settings(stage), {}
        else:
            settings = stage.model_dump(mode="json")
            context = {"seed": run.seed, "input": [run.data.size, run.data.mean, run.data.std]}
        found[name] = fingerprint(
            stage.kind,
            stage_class(stage.kind).version,
            settings,
            {role: found[target] for role, target in stage.inputs().items()},
            context,
            data_fingerprints.get(name, ""),
        )
    return found


def _storage_settings(stage: BetonConfig) -> dict[str, Any]:
    """The settings that decide the bytes of a .beton; its images are in the data's fingerprint."""
    data = stage.data.model_dump(mode="json")
    settings = {key: data[key] for key in (*STORAGE_SETTINGS, "max_bad_share")}
    return settings | {"limit": data[stage.split]["limit"]}
