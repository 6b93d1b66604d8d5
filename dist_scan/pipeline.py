"""Runs the stages in order: skips the finished, resumes the interrupted, runs the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dist_scan import preflight
from dist_scan.config import RunConfig, StageConfig
from dist_scan.engine.stop import StopFlag
from dist_scan.heads.products import release_buffers
from dist_scan.monitoring import memory
from dist_scan.monitoring.stage_timer import StageTimer
from dist_scan.stages.base import Context, stage_class
from dist_scan.stages.beton import BetonConfig
from dist_scan.storage.artifacts import STAGES, WORK, Artifact, ArtifactStore
from dist_scan.storage.atomic import write_atomic, write_json
from dist_scan.world.collectives import on_rank_0
from dist_scan.world.world import World

LOG_VERIFICATION_FROM = 2**30
"""Bytes of an input above which its verification is logged: it takes seconds."""


class Pipeline:
    """The stages of one run, on all ranks.

    Args:
        run: settings of the run.
        world: this rank.
        stop: stop request; checked between stages and by the stages themselves.
        log: prints and logs a line on rank 0.
    """

    def __init__(
        self, run: RunConfig, world: World, stop: StopFlag, log: Callable[[str], None]
    ) -> None:
        self.run_config = run
        self.world = world
        self.stop = stop
        self.log = log
        self.store = ArtifactStore(run.run_dir / "stages")
        cache_dir = run.runtime.cache_dir
        self.beton_store = ArtifactStore(Path(cache_dir)) if cache_dir else self.store
        self.finished: dict[str, Artifact] = {}
        self.unverified: set[str] = set()
        """Finished stages of an earlier start whose files have not been verified in this one."""

    def run(self) -> dict[str, Path]:
        """Run every stage; returns their folders by name.

        Raises StopRequested between or inside stages; a later call resumes there.
        """
        run = self.run_config
        fingerprints = on_rank_0(self._check_data)
        for text in preflight.data_warnings(run):
            self.log(f"warning: {text}")
        for name, config in preflight.all_stages(run).items():
            self.stop.raise_if_requested()
            artifact = self._find_or_run(name, config, fingerprints[name])
            self.finished[name] = artifact
            self._copy_results(config, artifact)
        if self.world.rank == 0:
            write_json(run.run_dir / STAGES, fingerprints)
        return {name: artifact.path for name, artifact in self.finished.items()}

    def _check_data(self) -> dict[str, str]:
        """Check the settings against the data. Returns the fingerprint of each stage."""
        data = preflight.inspect_data(self.run_config)
        preflight.check_sizes(self.run_config, data.num_images)
        return preflight.fingerprints(self.run_config, data.fingerprints)

    def _find_or_run(self, name: str, config: StageConfig, fingerprint: str) -> Artifact:
        """The artifact of a stage; runs the stage unless an earlier start has finished it."""
        store = self.beton_store if isinstance(config, BetonConfig) else self.store
        artifact, is_started = on_rank_0(
            lambda: (store.find(name, fingerprint), store.is_started(name, fingerprint))
        )
        if artifact is not None:
            self.log(f"{name}: already done ({fingerprint}), skipped")
            self.unverified.add(name)
            return artifact
        self.log(f"{name}: {'resumes' if is_started else 'starts'} ({fingerprint})")
        out = store.folder(name, fingerprint)
        if self.world.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            store.remove_temporary_files(name, fingerprint)
        on_rank_0(lambda: self._verify_inputs(config))
        inputs = {role: self.finished[target].path for role, target in config.inputs().items()}
        seconds = self._run_stage(name, config, out, inputs)
        metadata = {
            "kind": config.kind,
            "config": config.model_dump(mode="json"),
            "inputs": {role: os.path.relpath(path, out) for role, path in inputs.items()},
            "world_size": self.world.world_size,
            "seconds": round(seconds, 3),
            **memory.peak_memory(),
        }
        return on_rank_0(lambda: store.publish(name, fingerprint, metadata))

    def _run_stage(
        self, name: str, config: StageConfig, out: Path, inputs: dict[str, Path]
    ) -> float:
        """Run one stage in its folder. Returns the seconds that all attempts took."""
        context = Context(
            run=self.run_config,
            name=name,
            out=out,
            inputs=inputs,
            world=self.world,
            stop=self.stop,
            log=self.log,
            folders={other: artifact.path for other, artifact in self.finished.items()},
        )
        release_buffers()
        memory.reset_peak_memory()
        timer = StageTimer(out / WORK / "seconds", enabled=self.world.rank == 0)
        try:
            stage_class(config.kind)(config, context).run()
        finally:
            seconds = timer.stop()
        return seconds

    def _verify_inputs(self, config: StageConfig) -> None:
        """Verify the checksums of inputs that an earlier start made, each once. Rank 0 only."""
        for target in self.unverified.intersection(config.inputs().values()):
            artifact = self.finished[target]
            size = sum(entry["size"] for entry in artifact.manifest["files"].values())
            if size > LOG_VERIFICATION_FROM:
                self.log(f"{target}: verifying checksums ({size / 2**30:.0f} GiB)")
            self.store.verify(artifact)
            self.unverified.discard(target)

    def _copy_results(self, config: StageConfig, artifact: Artifact) -> None:
        """Copy the files of a stage that are meant for users to the top of the run folder."""
        if self.world.rank != 0:
            return
        for file in stage_class(config.kind).user_files:
            source = artifact.path / file
            if source.is_file():
                with open(source, "rb") as content:
                    copy = partial(shutil.copyfileobj, content)
                    write_atomic(self.run_config.run_dir / file, copy)
