"""The times of one training, always: a row of section times in metrics.jsonl, timing.json in the stage's folder. With
`runtime.profile` also a trace for Perfetto (ui.perfetto.dev) and a verdict in words as soon as that many steps are over.
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

from dist_scan.config import RunConfig
from dist_scan.engine.precision import device_mark
from dist_scan.methods.base import Method
from dist_scan.monitoring.bottleneck import Bottleneck, TrainingSetup, judge, summary_lines, table
from dist_scan.monitoring.log import StageLog
from dist_scan.monitoring.step_timer import NAMES, StepTimer, use_clock
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import all_rows, gather_objects
from dist_scan.world.world import World, cores, current

EVERY = 50  # steps between two rows; each costs one small gather
TRACED = 10  # steps in a trace; tracing slows what it looks at, so they are left out of the figures
MOST_TRACES = 8  # ranks that write one
FILE = "timing.json"


def setting_of(run: RunConfig, world: World, global_batch: int, on_features: bool) -> TrainingSetup:
    """What the verdict on a training of this run needs to know."""
    most = cores(world)
    data = ("", 0, 0) if on_features else (run.data.stored, run.data.resolution, run.data.size)
    return TrainingSetup(
        global_batch,
        world.world_size,
        world.device.type,
        most,
        min(run.runtime.workers or most, most),
        *data,
    )


class TrainingProfile:
    """`with Timing(...) as timing:` around a training, `step_done` after each step; all of it is collective.

    profile: steps to look at closely, 0 for none. The first step of a start (memory is touched, kernels are chosen) and the
    traced ones are not in the figures.
    """

    def __init__(
        self,
        log: StageLog,
        out: Path,
        setting: TrainingSetup,
        profile: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.log, self.out, self.setting, self.profile, self.say = (
            log,
            Path(out),
            setting,
            profile,
            say,
        )
        self.clock = StepTimer(device_mark(current().device))
        self.steps, self.at, self.window, self.counted, self.first_step_s = 0, 0, 0, 0, 0.0
        self.total = np.zeros((current().world_size, len(NAMES)))
        self.hooks: list[Any] = []
        self.tracer: torch.profiler.profile | None = None
        self.verdict: Bottleneck | None = None

    def __enter__(self) -> TrainingProfile:
        self.setting = dataclasses.replace(
            self.setting,
            hosts=tuple(gather_objects(os.environ.get("NODE_NAME") or socket.gethostname())),
        )  # as squeue and --exclude name it
        self.clock.reset()
        use_clock(self.clock)
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        use_clock(None)
        for hook in self.hooks:
            hook.remove()
        if kind is None:
            self._finish()
        elif self.tracer is not None:  # half a trace is worth less than leaving at once
            self.tracer.stop()

    def watch(self, method: Method) -> None:
        """See when the last gradient of a backward pass is ready: what follows is waiting for the other ranks (DDP)."""
        if current().world_size > 1:
            self.hooks = [
                p.register_post_accumulate_grad_hook(self.clock.gradient_ready)
                for p in method.parameters()
                if p.requires_grad
            ]

    def gradients_done(self) -> None:
        """After backward(), inside its section."""
        self.clock.only_waiting_since_ready("all_reduce")

    def step_done(self, step: int) -> None:
        """Step number `step` is over."""
        self.clock.settle()
        self.steps, self.at = self.steps + 1, step
        if self.steps == 1:
            self.first_step_s = sum(self.clock.read().values())
            if self.profile:
                self._begin_trace()
        elif self.tracer is not None:
            if self.steps > TRACED:
                self._end_trace()
                self.clock.reset()
        else:
            self.window += 1
            if self.window == EVERY or self.counted + self.window == self.profile:
                self._gather()
                if self.counted == self.profile:
                    self._tell()

    def _gather(self) -> None:
        """This window of all ranks: into the total, and as a row for people."""
        mine = self.clock.read()
        seconds = all_rows(
            torch.tensor([[mine[name] for name in NAMES]], dtype=torch.float64)
        ).numpy()
        rows = {
            r["section"]: {k: round(r[k], 4) for k in ("mean_ms", "max_ms", "max_rank")}
            for r in table(seconds, self.window)
        }
        self.log.timing(self.at, {"steps": self.window, "sections": rows})
        self.total += seconds
        self.counted, self.window = self.counted + self.window, 0

    def _tell(self) -> None:
        """The verdict, to the terminal."""
        self.verdict = judge(self.total, self.counted, self.setting)
        self.say(
            "\n".join(
                [
                    f"{self.log.stage}: profile of {self.counted} steps: {self.verdict.text}",
                    *summary_lines(table(self.total, self.counted)),
                ]
            )
        )

    def _finish(self) -> None:
        if self.tracer is not None:
            self._end_trace()
        if self.window:
            self._gather()
        if self.profile and self.verdict is None and self.counted:
            self._tell()
        if current().rank == 0:
            write_json(self.out / FILE, self.facts())

    def facts(self) -> dict[str, Any]:
        """What timing.json holds; all of it since the last start of the stage."""
        facts: dict[str, Any] = {
            "steps": self.counted,
            "first_step_s": round(self.first_step_s, 3),
            "profiled": bool(self.profile),
            "setting": dataclasses.asdict(self.setting),
        }
        if self.counted:
            whole = judge(self.total, self.counted, self.setting)
            facts |= {
                "images_per_s": round(
                    self.setting.global_batch * self.counted / float(self.total.sum(1).mean()), 1
                ),
                "waits_for": (self.verdict or whole).waits_for,
                "verdict": (self.verdict or whole).text,
                "sections": table(self.total, self.counted),
                "seconds_by_rank": {
                    name: np.round(self.total[:, i], 4).tolist() for i, name in enumerate(NAMES)
                },
            }
        return facts

    def _begin_trace(self) -> None:
        self.tracer = torch.profiler.profile(activities=torch.profiler.supported_activities())
        self.tracer.start()
        self.clock.span = torch.profiler.record_function

    def _end_trace(self) -> None:
        """Write the trace aside and rename it in: a killed run leaves no half of one."""
        tracer, self.tracer, self.clock.span = self.tracer, None, None
        tracer.stop()
        rank = current().rank
        if rank < MOST_TRACES:
            path = self.log.run_dir / "logs" / f"{self.log.stage}.trace-rank{rank:05d}.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".tmp-{path.name}")
            tracer.export_chrome_trace(str(aside))
            os.replace(aside, path)
            if rank == 0:
                self.say(
                    f"{self.log.stage}: trace of {self.steps - 1} steps in {path} (open it in ui.perfetto.dev)"
                )
