"""A run of the product that is looked at from outside while faults strike it: when which step was written, when which rank ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

LOOK_S = 0.05
SAVE_EVERY_S = 2.0
RANKS = 2
# The launcher is forked from a process that has imported what launch/local.py has when it forks its ranks, and no more: the first start of a
# run so costs no imports here (about 8 s), a relaunch costs what it costs a user.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
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
data: {{train: {{source: "sklearn:digits", limit: 480}}, size: 16, stored: raw, resolution: 16}}
stages:
  pretext: {{kind: train, images: train, network: {{name: resnet_small, width: 4}}, method: {{kind: simclr, projection_dim: 8}}, recipes: [digits, digits],
            optimizer: {{kind: sgd, lr: 0.05}}, epochs: {epochs}, global_batch: 48}}
  features: {{kind: embed, backbone: pretext, num_shards: 12, batch: 20}}
runtime: {{workers: 1, checkpoint_s: {every_s}, log_every: 1, device: cpu, step_limit_s: 60, relaunches: 1000}}
"""


class Row(NamedTuple):
    """A step as it was written: when it was seen (seconds since 1970, up to LOOK_S late), its number, its loss."""

    at: float
    step: int
    loss: float


class Exit(NamedTuple):
    """A rank's end: when it was seen, and how many rows had been written by then."""

    at: float
    rows: int


@dataclass
class MetricsReader:
    """A metrics.jsonl that grows. `seen` is every row of a step in the order of writing, done again or not."""

    path: Path
    seen: list[Row] = field(default_factory=list)
    read: int = 0

    def look(self) -> None:
        """Add what was written since the last look; half a line waits, a torn one is left out."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as f:
            f.seek(self.read)
            new = f.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "loss" in row:
                self.seen.append(Row(time.time(), row["step"], row["loss"]))


def steps_lost(seen: Sequence[Row]) -> int:
    """Steps that were done more than once."""
    return len(seen) - len({row.step for row in seen})


def differing(seen: Sequence[Row]) -> int:
    """Steps that were done again and gave another loss."""
    first: dict[int, float] = {}
    return sum(first.setdefault(row.step, row.loss) != row.loss for row in seen)


def interval_steps(seen: Sequence[Row], seconds: float) -> int:
    """The most steps that were written within so many seconds: what a fault may cost when saves are that far apart, and the one in work."""
    most, first = 0, 0
    for last, row in enumerate(seen):
        while row.at - seen[first].at > seconds:
            first += 1
        most = max(most, last - first + 1)
    return most + 1


def new_step_s(seen: Sequence[Row], exits: Sequence[Exit], fault: float) -> float | None:
    """Seconds from the fault to the first step that had not been done before it; None when no rank ended, or none came."""
    ended = next((e for e in exits if e.at >= fault), None)
    if ended is None:
        return None
    before = max((row.step for row in seen[: ended.rows]), default=0)
    return next((row.at - fault for row in seen[ended.rows :] if row.step > before), None)


def good_s(seen: Sequence[Row], exits: Sequence[Exit]) -> float:
    """Seconds of training that counted: for each step, the time since the step before it, where it was done last. The first step after
    a start has none: what a start costs is not good."""
    starts = {0, *(e.rows for e in exits)}
    took = {row.step: 0.0 if i in starts else row.at - seen[i - 1].at for i, row in enumerate(seen)}
    return sum(took.values())


class Kills:
    """Random kills of random ranks: the time between two is exponential with this mean, for so long."""

    def __init__(
        self, mean_s: float, length_s: float, seed: int, now: Callable[[], float] = time.time
    ) -> None:
        self.random, self.mean_s, self.now = random.Random(seed), mean_s, now
        self.end = now() + length_s
        self.next = now() + self.random.expovariate(1 / mean_s)
        self.count = self.early = 0

    def strike(self, ranks: Sequence[int], stepped: bool) -> None:
        """Kill one of these processes when it is time. stepped: whether their start has written a step; else the kill is an early one."""
        now = self.now()
        if ranks and self.next <= now < self.end:
            os.kill(self.random.choice(ranks), signal.SIGKILL)
            self.next = now + self.random.expovariate(1 / self.mean_s)
            self.count += 1
            self.early += not stepped


class Run:
    """One run folder, started through launch/local.py with two ranks, and watched."""

    def __init__(self, folder: Path, epochs: int) -> None:
        folder.mkdir()
        self.folder, self.run_dir, self.fault_path, self.epochs = (
            folder,
            folder / "run",
            folder / "fault.json",
            epochs,
        )
        (folder / "recovery.yaml").write_text(CONFIG.format(epochs=epochs, every_s=SAVE_EVERY_S))
        self.rows, self.exits, self.shards = (
            MetricsReader(self.run_dir / "logs" / "pretext.metrics.jsonl"),
            [],
            set(),
        )

    def start(self, *overrides: str, faults: Sequence[dict] = ()) -> BaseProcess:
        """Start the launcher; what it says goes to said.txt."""
        if faults:
            self.fault_path.write_text(json.dumps(list(faults)))
        line = [
            str(self.folder / "recovery.yaml"),
            "--processes",
            str(RANKS),
            f"runtime.run_dir={self.run_dir}",
            *overrides,
        ]
        launcher = FORKS.Process(
            target=_launch, args=(line, self.folder / "said.txt", str(self.fault_path))
        )
        launcher.start()
        return launcher

    def watch(self, launcher: BaseProcess, kills: Kills | None = None) -> int:
        """Until the launcher ends; returns its code (minus the signal's number when it was killed)."""
        alive: set[int] = set()
        while launcher.exitcode is None:
            now = {pid for pid in children(launcher.pid) if not ended(pid)}
            self._look()
            self.exits += [Exit(time.time(), len(self.rows.seen))] * len(alive - now)
            alive = now
            if kills is not None:
                kills.strike(
                    sorted(now),
                    stepped=len(self.rows.seen) > (self.exits[-1].rows if self.exits else 0),
                )
            time.sleep(LOOK_S)
        self._look()
        self.exits += [Exit(time.time(), len(self.rows.seen))] * len(alive)
        return launcher.exitcode

    def _look(self) -> None:
        self.rows.look()
        for path in self.run_dir.glob("stages/features/*/*-[0-9]*.npy"):
            try:
                self.shards.add((path.name, path.stat().st_mtime_ns))
            except OSError:  # moved at this moment
                continue

    def shards_twice(self) -> int:
        """Finished shards that were made again."""
        return len(self.shards) - len({name for name, _ in self.shards})

    def results(self) -> dict[str, bytes]:
        """Published weights and features, byte for byte."""
        return {
            p.name: p.read_bytes()
            for stage in ("pretext", "features")
            for p in self.run_dir.glob(f"stages/{stage}/*/*")
            if p.suffix in (".safetensors", ".npy")
        }

    def equals(self, whole: Run) -> bool:
        """Done, with the other's losses (all that were written, also of steps done again), weights and features, bit for bit."""
        results, losses = self.results(), {row.step: row.loss for row in self.rows.seen}
        done = (
            (self.run_dir / "DONE").exists()
            and bool(losses)
            and len({Path(name).suffix for name in results}) == 2
        )
        return (
            done
            and results == whole.results()
            and losses == {row.step: row.loss for row in whole.rows.seen}
            and not differing(self.rows.seen)
        )

    def faults(self) -> list[dict]:
        """What the launcher remembers of each fault: {time, start, fault, advanced}."""
        path = self.run_dir / "logs" / "faults.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def fired(self) -> float:
        """When the last armed fault struck. Raises FileNotFoundError when none did."""
        return json.loads(Path(f"{self.fault_path}.fired").read_text().splitlines()[-1])["time"]

    def said(self) -> str:
        """All that the launcher and rank 0 printed."""
        return (self.folder / "said.txt").read_text()


def _launch(line: list[str], out: Path, faults: str) -> None:
    """launch/local.py's main, as a process of its own with all that it prints in a file."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    from tests.support.faults import environment  # here: it imports torch

    os.environ |= environment(faults) | {"CUDA_VISIBLE_DEVICES": ""}
    to = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.stdout, sys.stderr = (
        open(1, "w", buffering=1, closefd=False),
        open(2, "w", buffering=1, closefd=False),
    )
    from launch import local

    sys.exit(local.main(line))


def children(pid: int) -> list[int]:
    """The processes that this one started (Linux)."""
    try:
        return [int(k) for k in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ended(pid: int) -> bool:
    """Gone, or waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
