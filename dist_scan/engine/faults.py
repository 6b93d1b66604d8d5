"""Faults on purpose, in real processes: what tests/faults and benchmarks/recovery.py arm. Nothing here is imported unless
DIST_SCAN_FAULT names a file; run.py looks once.

The file holds a list of faults, as JSON: [{"kind": "kill", "rank": 1, "step": 12}]. Only the first is armed; the rank it names takes
it off the list at the moment it fires, so that each fires once, whatever is started again afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from dist_scan.settings import StrictModel
from dist_scan.storage.artifacts import write_text

VARIABLE = "DIST_SCAN_FAULT"


class Fault(StrictModel):
    """What happens, to whom, when."""

    kind: Literal["kill", "exception", "stop", "hang", "signal", "nan", "inf", "full", "read_only"]
    """stop is SIGSTOP, hang a sleep without end, signal a notice to oneself, full a file-size limit set by the kernel during a save."""
    rank: int = 0
    step: int = 0
    """At step, loss, gradient and begin_epoch: the optimizer step; elsewhere how often this process has passed the place before."""
    at: Literal[
        "step",
        "batch",
        "loss",
        "gradient",
        "data",
        "manifest",
        "rename",
        "prune",
        "prepare",
        "write",
        "begin_epoch",
        "shard",
        "iteration",
        "start",
        "stage",
        "done",
    ] = "step"
    """prepare, data, write, manifest, rename and prune are inside a save, just before each (read_only: at prepare; full: at write);
    loss and gradient (its loss stays a number) are what nan and inf spoil; batch is in a thread of the loader, start before the
    handlers stand, stage as the work on one begins (those that were done before are not passed; one fault a start), done after the end."""
    after_s: float = 0.0
    """kill, stop and signal: so long after the place was reached, wherever the process then is."""
    signal: Literal["SIGUSR2", "SIGTERM"] = "SIGUSR2"
    times: int = 1
    """nan, inf: in so many steps in a row."""


FAULTS = TypeAdapter(list[Fault])


class InjectedError(RuntimeError):
    """What kind 'exception' raises."""


class Faults:
    """The armed faults, seen from this process. `arm()` puts a look at the file in front of every place a fault may name."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.fired, self.rank, self.passed, self.again = (
            path,
            Path(f"{path}.fired"),
            rank,
            Counter(),
            0,
        )
        self.fired_before = self._fired()

    def due(self, at: str, step: int | None = None, kinds: tuple[str, ...] = ()) -> Fault | None:
        """The fault if it is this rank's, here and now; then it is claimed. kinds: the only ones looked for."""
        self.passed[at] += 1
        try:
            first, *rest = FAULTS.validate_json(self.path.read_bytes())
        except OSError:
            return None
        now = self.passed[at] - 1 if step is None else step
        if (first.rank, first.at, first.step) != (self.rank, at, now) or (
            kinds and first.kind not in kinds
        ):
            return None
        if (
            at == "stage" and self._fired() != self.fired_before
        ):  # ranks reach a stage together: the next fault would strike in this one too
            return None
        with open(self.fired, "a") as f:
            f.write(json.dumps(first.model_dump() | {"time": time.time()}) + "\n")
        write_text(self.path, FAULTS.dump_json(rest).decode()) if rest else self.path.unlink()
        return first

    def _fired(self) -> int:
        """How many faults have struck so far, in all starts."""
        return len(self.fired.read_text().splitlines()) if self.fired.exists() else 0

    def look(self, at: str, step: int | None = None) -> None:
        """Fire what is due at this place."""
        fault = self.due(at, step)
        if fault is None:
            return
        if fault.kind == "exception":
            raise InjectedError(f"a fault on purpose at {at} {fault.step} of rank {self.rank}")
        if fault.kind == "hang":
            time.sleep(1e6)
        number = {
            "kill": signal.SIGKILL,
            "stop": signal.SIGSTOP,
            "signal": getattr(signal, fault.signal),
        }.get(fault.kind)
        if number is None:
            raise ValueError(f"fault '{fault.kind}' cannot happen at '{at}'")
        if fault.after_s:
            threading.Timer(fault.after_s, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)

    def arm(self) -> None:
        """Wrap the places. Done once, before any work."""
        from dist_scan.data.beton.loader import BetonLoader
        from dist_scan.data.feature_table import FeatureTable
        from dist_scan.data.neighbour_table import NeighbourTable
        from dist_scan.engine import checkpoint
        from dist_scan.engine import training_loop as loop
        from dist_scan.monitoring import peak_memory as memory
        from dist_scan.search.kmeans import Lloyd

        before(loop.Trainer, "_step", lambda trainer, *_: self.look("step", trainer.at.step))
        before(
            loop.Trainer, "_begin_epoch", lambda trainer: self.look("begin_epoch", trainer.at.step)
        )
        before(memory, "begin_stage", lambda: self.look("stage"))
        before(BetonLoader, "_cut", lambda *_: self.look("batch"))  # in a thread of the loader
        for table in (FeatureTable, NeighbourTable):
            before(table, "write_shard", lambda *_: self.look("shard"))
        before(Lloyd, "_assign", lambda *_: self.look("iteration"))
        around(loop.Trainer, "_forward", self._spoil)
        self._arm_saves(checkpoint)

    def _arm_saves(self, checkpoint: Any) -> None:
        def manifest(write: Callable[..., None], *given: Any) -> None:
            self.look("manifest")
            write(*given)
            self.look("rename")

        before(checkpoint.CheckpointStore, "_prepare", lambda *_: self._read_only())
        before(checkpoint, "_save_file", lambda *_: self.look("data"))
        around(checkpoint, "_save_file", self._full)
        around(checkpoint, "write_json", manifest)
        before(
            checkpoint, "fsync_dir", lambda *_: self.look("prune")
        )  # the new one is renamed in, the old one not yet gone

    def _spoil(self, forward: Callable[..., Any], trainer: Any, batch: Any) -> Any:
        step = forward(trainer, batch)
        spoilt = self.due("gradient", trainer.at.step, ("nan", "inf"))
        if spoilt is not None:
            step.loss.register_hook(lambda gradient: gradient * float(spoilt.kind))
        if self.again == 0:
            fault = self.due("loss", trainer.at.step, ("nan", "inf"))
            self.again, self.value = (fault.times, float(fault.kind)) if fault else (0, 0.0)
        if self.again == 0:
            return step
        self.again -= 1
        return step._replace(loss=step.loss * torch.tensor(self.value))

    def _read_only(self) -> None:
        if self.due("prepare", kinds=("read_only",)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _full(self, save: Callable[..., None], *given: Any) -> None:
        """The kernel itself cuts the file short, as it does on a full disk (the error is EFBIG instead of ENOSPC)."""
        if not self.due("write", kinds=("full",)):
            return save(*given)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most[1]))
        try:
            save(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)


def around(owner: Any, name: str, call: Callable[..., Any]) -> None:
    """owner.name(*args) becomes call(the real one, *args)."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **more: call(real, *args, **more))


def before(owner: Any, name: str, look: Callable[..., None]) -> None:
    """owner.name(*args) looks first."""
    real = getattr(owner, name)

    def both(*args: Any, **more: Any) -> Any:
        look(*args, **more)
        return real(*args, **more)

    setattr(owner, name, both)
