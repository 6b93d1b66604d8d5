"""Fault injection: end, stop, corrupt or refuse work at a chosen place of a real process.

`dist_scan.run` calls `install` when the environment variable DIST_SCAN_TEST_HOOK names this module;
`environment` sets it. DIST_SCAN_FAULT then names a JSON file with a list of faults, for example
``[{"kind": "kill", "rank": 1, "step": 12}]``. Only the first fault of the list is armed. The rank
that it names removes it from the list just before it happens, so that each fault happens once,
however often the ranks are started again.
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

from dist_scan.config import StrictModel
from dist_scan.storage.atomic import write_text

VARIABLE = "DIST_SCAN_FAULT"
NON_FINITE = ("nan", "inf")


class Fault(StrictModel):
    """What happens, to which rank, and when."""

    kind: Literal["kill", "exception", "stop", "hang", "signal", "nan", "inf", "full", "read_only"]
    """kill: SIGKILL; stop: SIGSTOP; hang: an endless sleep; signal: `signal` sent to the process
    itself; full: a file-size limit set by the kernel during a save; read_only: EROFS in a save."""
    rank: int = 0
    step: int = 0
    """At step, loss, gradient and begin_epoch: the optimizer step. Elsewhere: how often this
    process has passed the place before."""
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
    """prepare, data, write, manifest, rename and prune: inside a save, just before each (read_only
    needs prepare, full needs write). loss and gradient: the tensor that nan and inf replace; with
    gradient the loss stays finite. batch: a loader thread. start: before the signal handlers are
    installed. stage: when work on a stage begins (skipped stages do not count; at most one fault
    per start). done: after the run has ended."""
    after_s: float = 0.0
    """kill, stop and signal: so many seconds after the place was reached."""
    signal: Literal["SIGUSR2", "SIGTERM"] = "SIGUSR2"
    times: int = 1
    """nan, inf: the number of consecutive steps."""


FAULTS = TypeAdapter(list[Fault])


class InjectedError(RuntimeError):
    """Raised by a fault of kind 'exception'."""


def environment(path: Path | str) -> dict[str, str]:
    """Environment variables that arm the faults of a file in every rank started with them."""
    return {"DIST_SCAN_TEST_HOOK": __name__, VARIABLE: str(path)}


def install(rank: int) -> None:
    """Arm the faults of the file that DIST_SCAN_FAULT names. Called by `dist_scan.run` at start."""
    faults = Faults(Path(os.environ[VARIABLE]), rank)
    faults.arm()
    faults.check("start")


class Faults:
    """The faults of a file, as one rank sees them; `arm` hooks every place a fault may name."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.fired_path = Path(f"{path}.fired")
        self.rank = rank
        self.times_passed: Counter[str] = Counter()
        self.fired_at_start = self._num_fired()
        self.non_finite_value = 0.0
        self.non_finite_steps = 0

    def claim(
        self, place: str, step: int | None = None, kinds: tuple[str, ...] = ()
    ) -> Fault | None:
        """The armed fault if it is due here, after removing it from the file; else None.

        step: the optimizer step; None counts how often this place was passed. kinds: the kinds of
        fault that this place can cause; empty means all.
        """
        self.times_passed[place] += 1
        try:
            first, *rest = FAULTS.validate_json(self.path.read_bytes())
        except OSError:
            return None
        now = self.times_passed[place] - 1 if step is None else step
        if (first.rank, first.at, first.step) != (self.rank, place, now):
            return None
        if kinds and first.kind not in kinds:
            return None
        # Ranks reach a stage together: without this check the next fault would strike in it too.
        if place == "stage" and self._num_fired() != self.fired_at_start:
            return None
        with open(self.fired_path, "a") as f:
            f.write(json.dumps(first.model_dump() | {"time": time.time()}) + "\n")
        if rest:
            write_text(self.path, FAULTS.dump_json(rest).decode())
        else:
            self.path.unlink()
        return first

    def _num_fired(self) -> int:
        """How many faults have happened so far, in all starts."""
        return len(self.fired_path.read_text().splitlines()) if self.fired_path.exists() else 0

    def check(self, place: str, step: int | None = None) -> None:
        """Cause the armed fault if it is due here."""
        fault = self.claim(place, step)
        if fault is None:
            return
        if fault.kind == "exception":
            raise InjectedError(f"injected fault at {place} {fault.step} of rank {self.rank}")
        if fault.kind == "hang":
            time.sleep(1e6)
        signals = {
            "kill": signal.SIGKILL,
            "stop": signal.SIGSTOP,
            "signal": signal.Signals[fault.signal],
        }
        if fault.kind not in signals:
            raise ValueError(f"fault '{fault.kind}' cannot happen at '{place}'")
        number = signals[fault.kind]
        if fault.after_s:
            threading.Timer(fault.after_s, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)

    def arm(self) -> None:
        """Hook all places. Call once, before any work."""
        from dist_scan.data.beton.loader import BetonLoader
        from dist_scan.data.feature_table import FeatureTable
        from dist_scan.data.neighbour_table import NeighbourTable
        from dist_scan.engine.training_loop import Trainer
        from dist_scan.monitoring import memory
        from dist_scan.search.kmeans import LloydRun
        from dist_scan.storage.run_markers import RunMarkers

        call_before(Trainer, "_step", lambda t, *_: self.check("step", t.state.step))
        call_before(Trainer, "_begin_epoch", lambda t: self.check("begin_epoch", t.state.step))
        wrap(Trainer, "_forward", self._make_non_finite)
        call_before(memory, "reset_peak_memory", lambda: self.check("stage"))
        call_before(BetonLoader, "_decode_part", lambda *_: self.check("batch"))
        for table in (FeatureTable, NeighbourTable):
            call_before(table, "write_shard", lambda *_: self.check("shard"))
        call_before(LloydRun, "_assign", lambda *_: self.check("iteration"))
        call_after(RunMarkers, "release", lambda *_: self.check("done"))
        self._arm_saves()

    def _arm_saves(self) -> None:
        from dist_scan.engine import checkpoint

        call_before(checkpoint.CheckpointStore, "_prepare", lambda *_: self._read_only())
        call_before(checkpoint, "save_file", lambda *_: self.check("data"))
        wrap(checkpoint, "save_file", self._full_disk)
        wrap(checkpoint, "write_json", self._manifest)
        # Called when the new checkpoint has its name and the oldest is not removed yet.
        call_before(checkpoint, "fsync_dir", lambda *_: self.check("prune"))

    def _manifest(self, write: Callable[..., None], *args: Any) -> None:
        self.check("manifest")
        write(*args)
        self.check("rename")

    def _make_non_finite(self, forward: Callable[..., Any], trainer: Any, batch: Any) -> Any:
        step = forward(trainer, batch)
        in_gradient = self.claim("gradient", trainer.state.step, NON_FINITE)
        if in_gradient is not None:
            step.loss.register_hook(lambda gradient: gradient * float(in_gradient.kind))
        if self.non_finite_steps == 0:
            in_loss = self.claim("loss", trainer.state.step, NON_FINITE)
            if in_loss is None:
                return step
            self.non_finite_value = float(in_loss.kind)
            self.non_finite_steps = in_loss.times
        self.non_finite_steps -= 1
        return step._replace(loss=step.loss * torch.tensor(self.non_finite_value))

    def _read_only(self) -> None:
        if self.claim("prepare", kinds=("read_only",)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _full_disk(self, save: Callable[..., Any], *args: Any) -> Any:
        """The kernel cuts the file off as on a full disk (with EFBIG instead of ENOSPC)."""
        if not self.claim("write", kinds=("full",)):
            return save(*args)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wrap(owner: Any, name: str, call: Callable[..., Any]) -> None:
    """Replace owner.name(*args) by call(original, *args)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: call(original, *args, **kwargs))


def call_before(owner: Any, name: str, hook: Callable[..., None]) -> None:
    """Make owner.name(*args) call hook(*args) first."""
    original = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)


def call_after(owner: Any, name: str, hook: Callable[..., None]) -> None:
    """Make owner.name(*args) call hook(*args) when it has returned."""
    original = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hook(*args, **kwargs)
        return result

    setattr(owner, name, both)
