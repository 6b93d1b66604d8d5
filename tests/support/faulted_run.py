"""A tiny run (2 epochs of 10 steps on 240 digits) with injected faults.

The launcher is a `RunningLauncher`; its ranks are real processes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_scan.monitoring.log import read_rows
from tests.support import faults as fault_injection
from tests.support.launches import LOCAL, RunningLauncher

PRETEXT = """
  pretext: {kind: train, images: train, network: {name: resnet_small, width: 4},
            method: {kind: simclr, projection_dim: 8}, recipes: [digits, digits],
            optimizer: {kind: sgd, lr: 0.05}, epochs: 2, global_batch: 24}"""
LONG = """
  features: {kind: embed, backbone: pretext, num_shards: 6, batch: 16}
  kmeans: {kind: kmeans, features: features, num_clusters: 10, restarts: 2}
  neighbours: {kind: neighbours, features: features, num_neighbours: 5}"""
"""Stages after the pretext training."""
TINY = """
name: tiny
data: {{train: {{source: "sklearn:digits", limit: 240}}, size: 16, stored: raw, resolution: 16}}
stages:{stages}
runtime: {{run_dir: "{folder}", loader_threads: 1, checkpoint_s: 0.3, log_every: 1, device: cpu,
           step_limit_s: 60, section_limit_s: 600}}
"""


@dataclass
class LaunchResult:
    """A launcher that has ended."""

    code: int
    """Exit code; -n if signal n killed it."""
    output: str
    """Everything printed by the launcher and by rank 0."""
    folder: Path
    """The run folder."""

    def losses(self, stage: str = "pretext") -> dict[int, float]:
        """Loss by step, from metrics.jsonl."""
        rows = read_rows(self.folder / "logs" / f"{stage}.metrics.jsonl")
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def weights(self) -> dict[str, bytes]:
        """Content of the weight files that the pretext stage has published."""
        return {p.name: p.read_bytes() for p in self.folder.glob("stages/pretext/*/*.safetensors")}


class TinyRun:
    """One run folder; calling it starts the launcher and waits for its end."""

    def __init__(self, folder: Path, stages: str = PRETEXT, text: str = TINY) -> None:
        self.folder = folder / "run"
        self.fault_path = folder / "fault.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "tiny.yaml"
        self.config.write_text(text.format(stages=stages, folder=self.folder))

    def fired(self) -> list[dict[str, Any]]:
        """The faults that have happened, each with its time."""
        path = Path(f"{self.fault_path}.fired")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(
        self,
        *overrides: str,
        processes: int = 2,
        refreshes: bool = False,
        taken_port: int | None = None,
    ) -> RunningLauncher:
        """Start the launcher.

        ``refreshes``: SimCLR embeds all images before each epoch. ``taken_port``: a port in use,
        which the launcher chooses first.
        """
        command = [*LOCAL, str(self.config), "--processes", str(processes), *overrides]
        return RunningLauncher(
            command,
            self.config.parent,
            partial(_prepare, refreshes, taken_port),
            **fault_injection.environment(self.fault_path),
        )

    def __call__(
        self,
        *overrides: str,
        faults: Sequence[dict[str, Any]] = (),
        timeout_s: float = 300,
        **options: Any,
    ) -> LaunchResult:
        """Start the launcher with these faults armed and wait for its end.

        ``options`` are those of `start`. Fails if one of the faults has not happened.
        """
        if faults:
            self.fault_path.write_text(json.dumps(list(faults)))
        done = self.start(*overrides, **options).wait(timeout_s)
        assert not self.fault_path.exists(), (
            f"did not happen: {self.fault_path.read_text()}\n{done.stdout}"
        )
        return LaunchResult(done.returncode, done.stdout, self.folder)


def _refresh_in_simclr() -> None:
    """Embed all images before each epoch, and change the weights a little by the result."""
    from dist_scan.methods.simclr import SimCLRMethod

    def begin_epoch(self: SimCLRMethod, epoch: int, embed: Any) -> tuple[()]:
        table = embed(self.backbone)
        mean = float(table.rows(np.arange(table.num_rows), 0).astype(np.float64).mean())
        with torch.no_grad():
            self.backbone.bn1.bias.add_(0.1 * mean)
        return ()

    SimCLRMethod.begin_epoch = begin_epoch


def _prepare(refreshes: bool, taken_port: int | None) -> None:
    """Change the process of the launcher before it starts; see `TinyRun.start`."""
    if refreshes:
        _refresh_in_simclr()
    if taken_port is not None:
        from launch import recovery

        ports = [taken_port]
        free_port = recovery.free_port
        recovery.free_port = lambda: ports.pop() if ports else free_port()
