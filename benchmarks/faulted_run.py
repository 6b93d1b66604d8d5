"""A run through launch/local.py, observed from outside while faults happen to it.

Records when each step was logged and when each rank ended, and derives what the faults cost.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from launch import records

Goals = Mapping[str, tuple[str, Any]]
"""By field of a row: (comparison, value), for example ("<", 30.0)."""
POLL_S = 0.05
SAVE_EVERY_S = 2.0
RANKS = 2
# The launcher is forked from a process that has imported what launch/local.py has imported when it
# forks its ranks, and nothing else. This saves the first start of a run the imports (about 8 s); a
# relaunch takes as long as for a user.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "launch.local",
        "dist_scan.run",
        "dist_scan.methods.simclr",
        "dist_scan.stages.train",
        "dist_scan.stages.embed",
    ]
)
CONFIG = """
name: recovery
data:
  train: {{source: "sklearn:digits", limit: 480}}
  size: 16
  stored: raw
  resolution: 16
stages:
  pretext:
    kind: train
    images: train
    network: {{name: resnet_small, width: 4}}
    method: {{kind: simclr, projection_dim: 8}}
    recipes: [digits, digits]
    optimizer: {{kind: sgd, lr: 0.05}}
    epochs: {epochs}
    global_batch: 48
  features: {{kind: embed, backbone: pretext, num_shards: 12, batch: 20}}
runtime:
  workers: 1
  checkpoint_s: {every_s}
  log_every: 1
  device: cpu
  step_limit_s: 60
  relaunches: 1000
"""


class LoggedStep(NamedTuple):
    """A row of metrics.jsonl."""

    time: float
    """When it was seen, in seconds since 1970; up to POLL_S late."""
    step: int
    loss: float


class RankExit(NamedTuple):
    """The end of a rank."""

    time: float
    num_logged: int
    """Rows that had been logged by then."""


@dataclass
class MetricsReader:
    """Reads a growing metrics.jsonl."""

    path: Path
    steps: list[LoggedStep] = field(default_factory=list)
    """Every row of a step in the order of writing; a step may be done more than once."""
    position: int = 0

    def read_new(self) -> None:
        """Add the rows written since the last call; an incomplete last line waits."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.position)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self.position += len(complete)
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # incomplete after a kill
                continue
            if "loss" in row:
                self.steps.append(LoggedStep(time.time(), row["step"], row["loss"]))


def repeated_steps(steps: Sequence[LoggedStep]) -> int:
    """How often a step was done that had been done before."""
    return len(steps) - len({step.step for step in steps})


def differing_steps(steps: Sequence[LoggedStep]) -> int:
    """How many repeated steps gave another loss."""
    first: dict[int, float] = {}
    return sum(first.setdefault(step.step, step.loss) != step.loss for step in steps)


def interval_steps(steps: Sequence[LoggedStep], seconds: float) -> int:
    """The most steps that a fault may cost if saves are `seconds` apart.

    The most that were logged within this time, and the one in work.
    """
    most = first = 0
    for last, step in enumerate(steps):
        while step.time - steps[first].time > seconds:
            first += 1
        most = max(most, last - first + 1)
    return most + 1


def seconds_to_new_step(
    steps: Sequence[LoggedStep], exits: Sequence[RankExit], fault_time: float
) -> float | None:
    """From the fault to the first step that had not been done before it.

    None if no rank ended, or no such step came.
    """
    rank_exit = next((e for e in exits if e.time >= fault_time), None)
    if rank_exit is None:
        return None
    before, after = steps[: rank_exit.num_logged], steps[rank_exit.num_logged :]
    furthest = max((step.step for step in before), default=0)
    return next((step.time - fault_time for step in after if step.step > furthest), None)


def training_seconds(steps: Sequence[LoggedStep], exits: Sequence[RankExit]) -> float:
    """Seconds of training that counted: for each step, since the step before it, where done last.

    The first step after a start has none, because a start is not training.
    """
    starts = {0, *(e.num_logged for e in exits)}
    seconds = {}
    for number, step in enumerate(steps):
        seconds[step.step] = 0.0 if number in starts else step.time - steps[number - 1].time
    return sum(seconds.values())


class RandomKills:
    """Kills random ranks for `length_s` seconds, at exponential intervals of mean `mean_s`."""

    def __init__(
        self, mean_s: float, length_s: float, seed: int, now: Callable[[], float] = time.time
    ) -> None:
        self.random = random.Random(seed)
        self.mean_s = mean_s
        self.now = now
        self.end = now() + length_s
        self.next_time = now() + self._interval()
        self.count = 0
        self.early_count = 0
        """Kills before the first step of a start."""

    def kill_if_due(self, ranks: Sequence[int], has_stepped: bool) -> None:
        """Kill one of these processes if it is time.

        has_stepped: whether their start has logged a step; else the kill counts as early.
        """
        now = self.now()
        if ranks and self.next_time <= now < self.end:
            os.kill(self.random.choice(ranks), signal.SIGKILL)
            self.next_time = now + self._interval()
            self.count += 1
            if not has_stepped:
                self.early_count += 1

    def _interval(self) -> float:
        return self.random.expovariate(1 / self.mean_s)


class FaultedRun:
    """One run folder, started through launch/local.py with two ranks, and observed."""

    def __init__(self, folder: Path, epochs: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.epochs = epochs
        self.run_dir = folder / "run"
        self.fault_path = folder / "fault.json"
        self.config = folder / "recovery.yaml"
        self.config.write_text(CONFIG.format(epochs=epochs, every_s=SAVE_EVERY_S))
        self.metrics = MetricsReader(self.run_dir / "logs" / "pretext.metrics.jsonl")
        self.exits: list[RankExit] = []
        self.shards: set[tuple[str, int]] = set()
        """(name, modification time in ns) of every finished shard that was seen."""

    def start(self, *overrides: str, armed_faults: Sequence[Mapping[str, Any]] = ()) -> BaseProcess:
        """Start the launcher; its output goes to output.txt."""
        if armed_faults:
            self.fault_path.write_text(json.dumps(armed_faults))
        words = [str(self.config), "--processes", str(RANKS), f"runtime.run_dir={self.run_dir}"]
        args = ([*words, *overrides], self.folder / "output.txt", self.fault_path)
        launcher = CONTEXT.Process(target=_launch, args=args)
        launcher.start()
        return launcher

    def watch(self, launcher: BaseProcess, kills: RandomKills | None = None) -> int:
        """Observe until the launcher ends; returns its exit code (-n if signal n ended it)."""
        alive: set[int] = set()
        while launcher.exitcode is None:
            now_alive = {pid for pid in children(launcher.pid) if not has_ended(pid)}
            self._observe(num_ended=len(alive - now_alive))
            alive = now_alive
            if kills is not None:
                logged_before = self.exits[-1].num_logged if self.exits else 0
                has_stepped = len(self.metrics.steps) > logged_before
                kills.kill_if_due(sorted(alive), has_stepped)
            time.sleep(POLL_S)
        self._observe(num_ended=len(alive))
        return launcher.exitcode

    def _observe(self, num_ended: int) -> None:
        """Read new rows and shards; `num_ended` ranks have ended since the last call."""
        self.metrics.read_new()
        for path in self.run_dir.glob("stages/features/*/*-[0-9]*.npy"):
            try:
                self.shards.add((path.name, path.stat().st_mtime_ns))
            except OSError:  # renamed at this moment
                continue
        self.exits += [RankExit(time.time(), len(self.metrics.steps))] * num_ended

    def repeated_shards(self) -> int:
        """Finished shards that were computed again."""
        return len(self.shards) - len({name for name, _ in self.shards})

    def results(self) -> dict[str, bytes]:
        """Published weights and features, byte for byte."""
        paths = [
            *self.run_dir.glob("stages/pretext/*/*"),
            *self.run_dir.glob("stages/features/*/*"),
        ]
        return {p.name: p.read_bytes() for p in paths if p.suffix in (".safetensors", ".npy")}

    def losses(self) -> dict[int, float]:
        """Loss by step."""
        return {step.step: step.loss for step in self.metrics.steps}

    def equals(self, other: FaultedRun) -> bool:
        """Complete, and with the other's losses, weights and features bit for bit.

        Steps that were repeated count too: each must have given the same loss again.
        """
        results = self.results()
        is_complete = (self.run_dir / "DONE").exists() and bool(self.metrics.steps)
        has_both = {Path(name).suffix for name in results} == {".safetensors", ".npy"}
        return (
            is_complete
            and has_both
            and results == other.results()
            and self.losses() == other.losses()
            and differing_steps(self.metrics.steps) == 0
        )

    def logged_faults(self) -> list[dict[str, Any]]:
        """What the launcher logged of each fault: {time, start, fault, advanced, ...}."""
        return records.read_objects(self.run_dir / "logs" / "faults.jsonl")

    def fault_time(self) -> float:
        """When the last armed fault happened. Raises FileNotFoundError if none did."""
        lines = Path(f"{self.fault_path}.fired").read_text().splitlines()
        return json.loads(lines[-1])["time"]

    def output(self) -> str:
        """All that the launcher and rank 0 printed."""
        return (self.folder / "output.txt").read_text()


def _launch(words: list[str], output: Path, fault_path: Path) -> None:
    """Run launch/local.py's main in a process of its own, its output in a file."""
    from tests.support.faults import environment  # imports torch

    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ |= environment(fault_path) | {"CUDA_VISIBLE_DEVICES": ""}
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  until the process ends
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    from launch import local

    sys.exit(local.main(words))


def children(pid: int | None) -> list[int]:
    """The processes that this one started (Linux)."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
