"""The product with a fault armed: launch/local.py's own main in a process forked from one that has imported everything (a start
costs no 8 s of imports), its ranks real processes below it. A tiny run: 10 steps an epoch, 2 epochs, 240 digits."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dist_scan.monitoring.log import read_rows
from tests.support import faults
from tests.support.launches import enter
from tests.support.ranks import CONTEXT

PRETEXT = """
  pretext: {kind: train, images: train, network: {name: resnet_small, width: 4}, method: {kind: simclr, projection_dim: 8}, recipes: [digits, digits],
            optimizer: {kind: sgd, lr: 0.05}, epochs: 2, global_batch: 24}"""
LONG = """
  features: {kind: embed, backbone: pretext, num_shards: 6, batch: 16}
  kmeans: {kind: kmeans, features: features, num_clusters: 10, restarts: 2}
  neighbours: {kind: neighbours, features: features, num_neighbours: 5}"""
TINY = """
name: tiny
data: {{train: {{source: "sklearn:digits", limit: 240}}, size: 16, stored: raw, resolution: 16}}
stages:{stages}
runtime: {{run_dir: "{folder}", workers: 1, checkpoint_s: 0.3, log_every: 1, device: cpu, step_limit_s: 60, section_limit_s: 600}}
"""


@dataclass
class Ended:
    """A launcher that has ended: its exit code (minus the signal's number when killed), all it and rank 0 printed, its seconds."""

    code: int
    said: str
    took_s: float
    folder: Path

    def losses(self, stage: str = "pretext") -> dict[int, float]:
        """Loss by step, as a reader sees them."""
        return {
            r["step"]: r["loss"]
            for r in read_rows(self.folder / "logs" / f"{stage}.metrics.jsonl")
            if "loss" in r
        }

    def weights(self) -> dict[str, bytes]:
        """Every published file of weights of the pretext, byte for byte."""
        return {p.name: p.read_bytes() for p in self.folder.glob("stages/pretext/*/*.safetensors")}


class Run:
    """One run folder. `run(...)` starts the launcher and waits for its end."""

    def __init__(self, folder: Path, stages: str = PRETEXT, text: str = TINY) -> None:
        self.folder, self.fault_path = folder / "run", folder / "fault.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "tiny.yaml"
        self.config.write_text(text.format(stages=stages, folder=self.folder))
        self.starts = 0

    def fired(self) -> list[dict]:
        """The faults that have fired, each with its time."""
        path = Path(f"{self.fault_path}.fired")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(
        self,
        *overrides: str,
        processes: int = 2,
        moment: bool = False,
        taken_port: int | None = None,
    ):
        self.starts += 1
        out = self.config.parent / f"said{self.starts}.txt"
        arguments = [str(self.config), "--processes", str(processes), *overrides]
        launcher = CONTEXT.Process(
            target=_launcher, args=(arguments, out, str(self.fault_path), moment, taken_port)
        )
        launcher.start()
        return launcher, out

    def __call__(
        self, *overrides: str, faults: Sequence[dict] = (), timeout_s: float = 300, **more
    ) -> Ended:
        """Start the launcher with these faults armed, wait for its end. Fails when one of them has not fired."""
        if faults:
            self.fault_path.write_text(json.dumps(list(faults)))
        began = time.monotonic()
        launcher, out = self.start(*overrides, **more)
        launcher.join(timeout_s)
        if launcher.exitcode is None:
            launcher.kill()
            launcher.join()
            raise TimeoutError(f"the launcher did not end in {timeout_s} s:\n{out.read_text()}")
        assert not self.fault_path.exists(), (
            f"never fired: {self.fault_path.read_text()}\n{out.read_text()}"
        )
        return Ended(launcher.exitcode, out.read_text(), time.monotonic() - began, self.folder)


def _give_simclr_a_moment() -> None:
    """A whole-set moment before each epoch, whose outcome changes the weights a little."""
    from dist_scan.methods.simclr import SimCLRMethod

    def begin_epoch(self, epoch, embed):
        table = embed(self.backbone, num_shards=6)
        mean = float(table.rows(np.arange(table.num_rows), 0).astype(np.float64).mean())
        with torch.no_grad():
            self.backbone.bn1.bias.add_(0.1 * mean)
        return ()

    SimCLRMethod.begin_epoch = begin_epoch


def _launcher(
    arguments: list[str], out: Path, fault: str, moment: bool, taken_port: int | None
) -> None:
    enter(out, **faults.environment(fault))
    if moment:
        _give_simclr_a_moment()
    from launch import local, recovery

    if (
        taken_port is not None
    ):  # the first look for a free port finds one that somebody takes at that moment
        free, ports = recovery.free_port, [taken_port]
        recovery.free_port = lambda: ports.pop() if ports else free()
    sys.exit(local.main(arguments))
