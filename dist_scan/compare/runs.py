"""The runs of a comparison: their settings, whether they use the same data, which are finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dist_scan.compare.config import ComparisonConfig, split_result
from dist_scan.config import ConfigError, RunConfig, dump
from dist_scan.config.stage import BETON
from dist_scan.preflight import check_sizes, fingerprints, inspect_data
from dist_scan.run_config import load_config
from dist_scan.stages.evaluate import EvaluateConfig
from dist_scan.storage.artifacts import MANIFEST, ArtifactStore

Runs = Mapping[tuple[str, int], RunConfig]
"""(member, seed) -> settings of its run, all members of the first seed first."""


def plan_runs(comparison: ComparisonConfig, configs: Path, out: Path) -> Runs:
    """The validated settings of every run.

    configs: folder of the members' YAML files. Raises ConfigError, also for rows whose subject no
    evaluate stage of the member has.
    """
    runs = {}
    for seed in comparison.seeds:
        for name, member in comparison.members.items():
            overrides = [
                *member.overrides,
                f"seed={seed}",
                f"runtime.run_dir={out / f'{name}-seed{seed}'}",
                f"runtime.cache_dir={out / 'data'}",
            ]
            runs[name, seed] = load_config(configs / member.config, overrides)
    for row, result in comparison.rows.items():
        name, subject = split_result(result)
        subjects = _subjects(runs[name, comparison.seeds[0]])
        if subject not in subjects:
            allowed = ", ".join(f"{name}.{known}" for known in subjects)
            raise ConfigError(
                f"rows.{row}: '{subject}' is not a subject of {name}; allowed: {allowed}"
            )
    return runs


def _subjects(run: RunConfig) -> list[str]:
    """The subjects of all evaluate stages."""
    stages = [stage for stage in run.stages.values() if isinstance(stage, EvaluateConfig)]
    return [subject for stage in stages for subject in stage.subjects]


def shared_data(runs: Runs) -> dict[str, str]:
    """The fingerprints of the beton stages, which all runs share.

    Raises ConfigError unless all runs cluster the same images.
    """
    by_member: dict[str, dict[str, str]] = {}
    for (name, _), run in runs.items():
        if name not in by_member:
            summary = inspect_data(run)
            check_sizes(run, summary.num_images)
            all_stages = fingerprints(run, summary.fingerprints)
            by_member[name] = {
                stage: value for stage, value in all_stages.items() if stage.startswith(BETON)
            }
    first, data = next(iter(by_member.items()))
    for name, other in by_member.items():
        if other != data:
            raise ConfigError(
                f"members.{name} and members.{first} do not cluster the same images; give both "
                "the same `data:` (source, limit, stored, resolution), with overrides where needed"
            )
    return data


def data_manifests(data: Mapping[str, str], cache_dir: Path) -> list[Path]:
    """Files in cache_dir that exist once the data is built. data: from `shared_data`."""
    store = ArtifactStore(cache_dir)
    return [store.folder(stage, value) / MANIFEST for stage, value in data.items()]


def is_finished(run: RunConfig) -> bool:
    """Whether a run with exactly these settings is finished."""
    settings = run.run_dir / "config.yaml"
    is_done = (run.run_dir / "DONE").is_file() and settings.is_file()
    return is_done and settings.read_text() == dump(run)
