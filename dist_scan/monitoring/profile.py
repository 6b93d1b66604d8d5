"""Timing of one training: always a row of section times in metrics.jsonl, and timing.json.

With ``runtime.profile`` also a trace for Perfetto (ui.perfetto.dev), and what the training waits
for as a log line once that many steps are measured.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_scan.config import RunConfig
from dist_scan.monitoring.bottleneck import (
    Bottleneck,
    TrainingSetup,
    find_bottleneck,
    format_section,
    section_table,
)
from dist_scan.monitoring.log import StageLog
from dist_scan.monitoring.step_timer import SECTIONS, StepTimer, cuda_event_recorder, use_timer
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import all_rows, gather_objects
from dist_scan.world.world import World, cores_per_rank, current

ROW_EVERY = 50
"""Steps between two rows; each costs one small gather."""
TRACED_STEPS = 10
"""Steps in a trace; tracing slows them down, so they are not counted."""
MAX_TRACES = 8
"""Ranks that write a trace."""
TIMING_FILE = "timing.json"


def training_setup(
    run: RunConfig, world: World, global_batch: int, on_features: bool
) -> TrainingSetup:
    """The setup of a training in this run; ``on_features``: its views are cached features."""
    num_cores = cores_per_rank(world)
    setup = TrainingSetup(
        global_batch=global_batch,
        world_size=world.world_size,
        device=world.device.type,
        cores=num_cores,
        loader_threads=min(run.runtime.loader_threads or num_cores, num_cores),
    )
    if on_features:
        return setup
    data = run.data
    return dataclasses.replace(
        setup, stored=data.stored, resolution=data.resolution, size=data.size
    )


class TrainingProfile:
    """Measures a training: ``with TrainingProfile(...)`` around it, `step_done` after each step.

    Collective. The figures leave out the first step after a start (memory is allocated, kernels are
    selected) and traced steps.

    Args:
        metrics_log: receives the rows of section times.
        out: folder for timing.json.
        setup: what the advice depends on.
        num_profiled: number of steps to profile, 0 for none.
        log: prints a message on rank 0.
    """

    def __init__(
        self,
        metrics_log: StageLog,
        out: Path,
        setup: TrainingSetup,
        num_profiled: int,
        log: Callable[[str], None],
    ) -> None:
        self.metrics_log = metrics_log
        self.out = out
        self.setup = setup
        self.num_profiled = num_profiled
        self.log = log
        self.timer = StepTimer(cuda_event_recorder(current().device))
        self.steps = 0
        """Steps since this start."""
        self.last_step = 0
        self.window = 0
        """Measured steps since the last row."""
        self.counted = 0
        """Steps in `total`."""
        self.total = np.zeros((current().world_size, len(SECTIONS)))
        """Seconds by rank and section."""
        self.first_step_s = 0.0
        self.hooks: list[RemovableHandle] = []
        self.tracer: torch.profiler.profile | None = None
        self.bottleneck: Bottleneck | None = None

    def __enter__(self) -> TrainingProfile:
        # The name of the node as squeue prints it and --exclude accepts it.
        host = os.environ.get("NODE_NAME") or socket.gethostname()
        self.setup = dataclasses.replace(self.setup, hosts=tuple(gather_objects(host)))
        self.timer.reset()
        use_timer(self.timer)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        use_timer(None)
        for hook in self.hooks:
            hook.remove()
        if kind is None:
            self._finish()
        elif self.tracer is not None:
            self.tracer.stop()  # After an error the trace is discarded.

    def watch_gradients(self, module: nn.Module) -> None:
        """Record when the last gradient of a backward pass is ready.

        What follows in backward() is waiting for other ranks (DistributedDataParallel).
        """
        if current().world_size > 1:
            self.hooks = [
                parameter.register_post_accumulate_grad_hook(self.timer.gradient_ready)
                for parameter in module.parameters()
                if parameter.requires_grad
            ]

    def backward_done(self) -> None:
        """Call after backward(), inside its section: count the wait for other ranks."""
        self.timer.split_at_last_gradient("all_reduce")

    def step_done(self, step: int) -> None:
        """Call after optimizer step number ``step``."""
        self.timer.collect_events()
        self.steps += 1
        self.last_step = step
        if self.steps == 1:
            self.first_step_s = sum(self.timer.read().values())
            if self.num_profiled:
                self._start_trace()
        elif self.tracer is not None:
            if self.steps > TRACED_STEPS:
                self._write_trace(self.tracer)
                self.timer.reset()
        else:
            self.window += 1
            if self.window == ROW_EVERY or self.counted + self.window == self.num_profiled:
                self._gather_window()
                if self.counted == self.num_profiled:
                    self._report()

    def _gather_window(self) -> None:
        """Add this window's seconds of all ranks to the total, and log them as a row."""
        local = self.timer.read()
        seconds = all_rows(
            torch.tensor([[local[name] for name in SECTIONS]], dtype=torch.float64)
        ).numpy()
        sections = {
            row["section"]: {
                "mean_ms": round(row["mean_ms"], 4),
                "max_ms": round(row["max_ms"], 4),
                "max_rank": row["max_rank"],
            }
            for row in section_table(seconds, self.window)
        }
        self.metrics_log.write_timing(self.last_step, self.window, sections)
        self.total += seconds
        self.counted += self.window
        self.window = 0

    def _report(self) -> None:
        """Print the bottleneck and the time of each section."""
        self.bottleneck = find_bottleneck(self.total, self.counted, self.setup)
        rows = section_table(self.total, self.counted)
        stage = self.metrics_log.stage
        headline = f"{stage}: profile of {self.counted} steps: {self.bottleneck.text}"
        self.log("\n".join([headline, *map(format_section, rows)]))

    def _finish(self) -> None:
        if self.tracer is not None:
            self._write_trace(self.tracer)
        if self.window:
            self._gather_window()
        if self.num_profiled and self.bottleneck is None and self.counted:
            self._report()
        if current().rank == 0:
            write_json(self.out / TIMING_FILE, self.summary())

    def summary(self) -> dict[str, Any]:
        """The content of timing.json, about the steps since the last start of the stage."""
        summary: dict[str, Any] = {
            "steps": self.counted,
            "first_step_s": round(self.first_step_s, 3),
            "profiled": bool(self.num_profiled),
            "setup": dataclasses.asdict(self.setup),
        }
        if not self.counted:
            return summary
        found = self.bottleneck or find_bottleneck(self.total, self.counted, self.setup)
        images = self.setup.global_batch * self.counted
        return summary | {
            "images_per_s": round(images / float(self.total.sum(1).mean()), 1),
            "waits_for": found.waits_for,
            "bottleneck": found.text,
            "sections": section_table(self.total, self.counted),
            "seconds_by_rank": {
                name: np.round(self.total[:, i], 4).tolist() for i, name in enumerate(SECTIONS)
            },
        }

    def _start_trace(self) -> None:
        self.tracer = torch.profiler.profile(activities=torch.profiler.supported_activities())
        self.tracer.start()
        self.timer.trace_span = torch.profiler.record_function

    def _write_trace(self, tracer: torch.profiler.profile) -> None:
        """Stop tracing and write the trace; a killed run leaves no incomplete one."""
        self.tracer = None
        self.timer.trace_span = None
        tracer.stop()
        rank = current().rank
        if rank >= MAX_TRACES:
            return
        stage = self.metrics_log.stage
        path = self.metrics_log.run_dir / "logs" / f"{stage}.trace-rank{rank:05d}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        tracer.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        if rank == 0:
            steps = self.steps - 1
            self.log(f"{stage}: trace of {steps} steps in {path} (open in ui.perfetto.dev)")
