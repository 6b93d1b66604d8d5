"""Walk the stages: skip what is done, resume what was begun, run the rest; say which and why, once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_scan.config import ConfigError, RunConfig
from dist_scan.config.stage import StageConfig, beton_stage
from dist_scan.data.sources.open import open_source
from dist_scan.engine.stop import StopFlag
from dist_scan.heads.products import release_buffers
from dist_scan.monitoring import memory
from dist_scan.stages.base import Context, stage_class
from dist_scan.stages.beton import BetonConfig
from dist_scan.storage.artifacts import WORK, Artifact, ArtifactStore, fingerprint
from dist_scan.storage.atomic import write_atomic, write_json, write_text
from dist_scan.world.collectives import broadcast_object
from dist_scan.world.world import World

STAGES = "stages.json"
SAID_FROM = 2**30  # bytes of an earlier result whose reading is said: it takes seconds
Say = Callable[[str], None]


def all_stages(run: RunConfig) -> dict[str, StageConfig]:
    """The run's stages with the building of its .beton files put first."""
    betons = {beton_stage(s): BetonConfig(split=s, data=run.data) for s in run.data.splits()}
    wanted = {target for stage in run.stages.values() for target in stage.inputs().values()}
    return {name: stage for name, stage in betons.items() if name in wanted} | run.stages


def preflight(run: RunConfig) -> dict[str, str]:
    """Look at the data before any work: count it, hold the settings against it. Returns {beton stage: the data's fingerprint}.

    Raises ConfigError with every mistake.
    """
    if not run.stages:
        raise ConfigError(
            "stages: there is none; name what is to be done (the shipped configs are examples)"
        )
    marks, sizes, problems = {}, {}, []
    for name in all_stages(run):
        if name.startswith("beton_"):
            split = name.removeprefix("beton_")
            source = open_source(run.data.splits()[split])
            marks[name], sizes[split] = source.fingerprint(), len(source)
    for name, stage in run.stages.items():
        split = stage.images_split(run.stages)
        if split in sizes:
            try:
                stage.check_size(name, sizes[split], run.stages)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return marks


def notes(run: RunConfig) -> list[str]:
    """Warnings of all stages about this data, each once."""
    found: dict[str, str] = {}
    for name, stage in run.stages.items():
        for text in stage.warnings(run.data):
            found.setdefault(text, name)
    return [f"stages.{name}: {text}" for text, name in found.items()]


def fingerprints(run: RunConfig, data_marks: Mapping[str, str]) -> dict[str, str]:
    """Each stage's meaning: its kind, version and settings, the seed, and what its inputs mean. `runtime:` is no part of it."""
    marks: dict[str, str] = {}
    for name, stage in all_stages(run).items():
        cls = stage_class(stage.kind)
        inputs = {role: marks[target] for role, target in stage.inputs().items()}
        own = (
            _data_settings(stage)
            if isinstance(stage, BetonConfig)
            else stage.model_dump(mode="json")
        )
        context = (
            {}
            if isinstance(stage, BetonConfig)
            else {"seed": run.seed, "input": [run.data.size, run.data.mean, run.data.std]}
        )
        marks[name] = fingerprint(
            stage.kind, cls.version, own, inputs, context, data_marks.get(name, "")
        )
    return marks


def _data_settings(stage: BetonConfig) -> dict[str, Any]:
    """What decides the bytes of a .beton: not its path, but how images are stored (the images are in the data's fingerprint)."""
    data = stage.data.model_dump(mode="json")
    split = data[stage.split]
    return {
        k: data[k] for k in ("stored", "resolution", "max_side", "quality", "max_bad_share")
    } | {"limit": split["limit"]}


class Pipeline:
    """The walk. `run()` returns the folders of all stages by name."""

    def __init__(self, run: RunConfig, world: World, stop: StopFlag, say: Say) -> None:
        self.run_config, self.world, self.stop, self.say = run, world, stop, say
        self.store = ArtifactStore(run.run_dir / "stages")
        self.cache = (
            ArtifactStore(Path(run.runtime.cache_dir)) if run.runtime.cache_dir else self.store
        )
        self.done: dict[str, Artifact] = {}
        self.unread: set[str] = set()
        """Stages done by an earlier start whose files nobody has read in this one."""

    def run(self) -> dict[str, Path]:
        """Every stage, in order. Raises Stopped between or inside stages; the same call goes on."""
        marks = self._told(lambda: fingerprints(self.run_config, preflight(self.run_config)))
        stages = all_stages(self.run_config)
        for text in notes(self.run_config):
            self.say(f"warning: {text}")
        for name, config in stages.items():
            self.stop.raise_if_requested()
            self.done[name] = self._stage(name, config, marks[name])
            self._hand_out(config, self.done[name])
        if (
            self.world.rank == 0
        ):  # which of the folders under stages/ are the current settings': for who reads the run later
            write_json(self.run_config.run_dir / STAGES, {name: marks[name] for name in self.done})
        return {name: artefact.path for name, artefact in self.done.items()}

    def _told(self, look: Callable[[], Any]) -> Any:
        """Rank 0 looks (it alone touches the file system here); all hear the answer, or its mistake."""
        answer, problem = None, None
        if self.world.rank == 0:
            try:
                answer = look()
            except ValueError as error:
                problem = str(error)
        answer, problem = broadcast_object((answer, problem))
        if problem:
            raise ConfigError(problem)
        return answer

    def _stage(self, name: str, config: StageConfig, mark: str) -> Artifact:
        store = self.cache if isinstance(config, BetonConfig) else self.store
        found, begun = self._told(lambda: (store.find(name, mark), store.is_started(name, mark)))
        if found is not None:
            self.say(f"{name}: done before ({mark}), skipped")
            self.unread.add(name)
            return found
        self.say(f"{name}: {'goes on' if begun else 'starts'} ({mark})")
        out = store.folder(name, mark)
        if self.world.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            store.remove_temporary_files(name, mark)
        inputs = {role: self.done[target].path for role, target in config.inputs().items()}
        self._told(lambda: self._verify(config))
        context = Context(
            self.run_config,
            name,
            out,
            inputs,
            self.world,
            self.stop,
            self.say,
            {n: a.path for n, a in self.done.items()},
        )
        release_buffers()
        memory.reset_peak_memory()
        clock = StageTimer(out / WORK / "seconds", self.world.rank == 0)
        try:
            stage_class(config.kind)(config, context).run()
        finally:
            seconds = clock.stop()
        facts = {
            "kind": config.kind,
            "config": config.model_dump(mode="json"),
            "inputs": {r: os.path.relpath(p, out) for r, p in inputs.items()},
            "world_size": self.world.world_size,
            "seconds": round(seconds, 3),
            **memory.peak_memory(),
        }
        return self._told(lambda: store.publish(name, mark, facts))

    def _verify(self, config: StageConfig) -> None:
        """What an earlier start made is read against its sums before it is used, once."""
        for target in set(config.inputs().values()) & self.unread:
            size = sum(facts["size"] for facts in self.done[target].manifest["files"].values())
            if size > SAID_FROM:
                self.say(
                    f"{target}: {size / 2**30:.0f} GiB of an earlier start are read against their sums"
                )
            self.store.verify(self.done[target])
            self.unread.discard(target)

    def _hand_out(self, config: StageConfig, artefact: Artifact) -> None:
        """Copy what a stage makes for people (the report) to the top of the run's folder."""
        for file in stage_class(config.kind).for_people:
            if self.world.rank == 0 and (artefact.path / file).is_file():
                data = (artefact.path / file).read_bytes()
                write_atomic(self.run_config.run_dir / file, lambda f: f.write(data))


class StageTimer:
    """Seconds of work on a stage over all its attempts; a killed attempt counts up to its last tick."""

    TICK_S = 5.0

    def __init__(self, path: Path, enabled: bool) -> None:
        self.path, self.began, self.ended = path, time.monotonic(), threading.Event()
        self.before = _read_seconds(path)
        self.ticking = threading.Thread(target=self._tick, daemon=True) if enabled else None
        if self.ticking is not None:
            self.ticking.start()

    def _tick(self) -> None:
        while not self.ended.wait(self.TICK_S):
            self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, f"{self.before + time.monotonic() - self.began:.3f}")
        except OSError:  # a full disk must not end training for the sake of a clock
            pass

    def stop(self) -> float:
        """Seconds so far, this attempt included. Nothing is written any more: the folder is about to be removed (a slow disk once met that)."""
        self.ended.set()
        if self.ticking is not None:
            self.ticking.join()
        return self.before + time.monotonic() - self.began


def _read_seconds(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return 0.0
