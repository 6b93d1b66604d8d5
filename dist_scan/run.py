"""One rank of a run, from start to exit code: `python -m dist_scan.run RUN_DIR`.

A launcher starts it once per rank. Exit codes do not survive srun, so what the launcher must know
is a file in RUN_DIR: DONE, STOPPED with the signal's number, FATAL_ERROR (such as invalid settings;
a relaunch cannot help) or PORT_TAKEN. storage/run_markers.py writes them, launch/recovery.py reads
them.

A ValueError is taken for an error in settings or data and printed without a traceback; its
traceback is in RUN_DIR/logs, and is printed too if DIST_SCAN_TRACEBACK is set.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dist_scan.config import FATAL_ERROR, ConfigError, RunConfig
from dist_scan.engine.precision import set_determinism
from dist_scan.engine.stop import NonRetryableError, StopFlag
from dist_scan.monitoring.log import AppendOnlyFile
from dist_scan.monitoring.progress import Progress, StopRequested, print_line
from dist_scan.monitoring.watchdog import Watchdog
from dist_scan.pipeline import Pipeline
from dist_scan.run_config import load_config
from dist_scan.storage.atomic import DISK_FULL_ERRNOS
from dist_scan.storage.run_markers import RunMarkers
from dist_scan.world.collectives import gather_objects
from dist_scan.world.world import World, close_world, open_world

RANK_0_FIRST_S = 0.5
"""Other ranks report a fatal error this much later: rank 0 usually has it too."""
MAX_TEXT_ON_FULL_DISK = 1000
"""Characters of a text that fits into a reserved file (in JSON up to six bytes each)."""


def main(run_dir: str) -> int:
    """Run the stages of RUN_DIR/config.yaml in this rank. Returns the exit code."""
    folder, rank = Path(run_dir), int(os.environ.get("RANK", 0))
    hook = os.environ.get("DIST_SCAN_TEST_HOOK")
    if hook:  # fault injection of tests and benchmarks
        importlib.import_module(hook).install(rank)
    markers = RunMarkers(folder, rank)
    stop = StopFlag()
    stop.install()
    if (folder / "config.yaml").is_file():
        markers.reserve()
    try:
        _run(folder, stop, markers)
        markers.release()
        return 0
    except (ConfigError, NonRetryableError) as error:
        return _report_fatal_error(markers, str(error))
    except ValueError as error:
        if os.environ.get("DIST_SCAN_TRACEBACK"):
            traceback.print_exc()
        _record_error(markers, error, to_stderr=False)
        return _report_fatal_error(markers, str(error))
    except BaseException as error:
        is_disk_full = isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS
        _record_error(markers, error, to_stderr=not is_disk_full)
        # Flush both streams; os._exit does not.
        print_line("", sys.stdout, end="")
        print_line("", end="")
        # At once: in an orderly shutdown this rank would keep its peers waiting in a collective.
        os._exit(1)


def _run(folder: Path, stop: StopFlag, markers: RunMarkers) -> None:
    """Join the other ranks, run the pipeline, and write the marker DONE or STOPPED."""
    run = load_config(folder / "config.yaml")
    if run.runtime.run_dir is None:
        runtime = run.runtime.model_copy(update={"run_dir": str(folder)})
        run = run.model_copy(update={"runtime": runtime})
    set_determinism()
    world = _open_world(run, markers)
    Watchdog(
        markers.logs,
        world.rank,
        run.runtime.step_limit_s,
        run.runtime.section_limit_s,
        on_timeout=lambda error: _record_error(markers, error),
    ).start()
    if world.rank == 0:
        Progress.log_file = AppendOnlyFile(markers.logs / "run.log")

    def log(text: str) -> None:
        if world.rank == 0:
            print_line(text, sys.stdout)
            Progress.write_log(text)

    try:
        Pipeline(run, world, stop, log).run()
    except StopRequested:
        number = _stop_signal(stop)
        log(f"stopped by signal {number}; everything is saved, the same command resumes the run")
        name, text = "STOPPED", json.dumps({"signal": number}) + "\n"
    else:
        name, text = "DONE", time.strftime("%Y-%m-%dT%H:%M:%S\n")
    if world.rank == 0:
        markers.write_marker(name, text)
    if name == "DONE":
        _log_results(folder, log)
    # Without this the threads of the collectives abort the process at exit, a fault for srun.
    close_world()


def _log_results(folder: Path, log: Callable[[str], None]) -> None:
    """The summary of the run and where its report is."""
    if (folder / "summary.txt").is_file():
        log("\n" + (folder / "summary.txt").read_text())
    if (folder / "report.html").is_file():
        log(f"report: {folder / 'report.html'}")


def _open_world(run: RunConfig, markers: RunMarkers) -> World:
    """Join the other ranks; writes PORT_TAKEN if the port is in use, so the launcher changes it."""
    try:
        return open_world(run.runtime.device, run.runtime.timeout_s)
    except (RuntimeError, OSError) as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            markers.write_marker("PORT_TAKEN", str(error))
        raise


def _stop_signal(stop: StopFlag) -> int | None:
    """The signal that stopped the run, which may have reached one rank only. Collective.

    SIGUSR2 has precedence: it means that the job is to be requeued.
    """
    signals = [number for number in gather_objects(stop.signal) if number is not None]
    if signal.SIGUSR2 in signals:
        return signal.SIGUSR2
    return max(signals, default=None)


def _report_fatal_error(markers: RunMarkers, text: str) -> int:
    """Report an error that a relaunch would meet again. Returns the exit code.

    Writes the marker FATAL_ERROR. Rank 0 prints the error; the launcher prints one that only
    another rank has.
    """
    folder, rank = markers.run_dir, markers.rank
    marker = folder / "FATAL_ERROR"
    if rank == 0 or not (folder / "config.yaml").is_file():
        print_line(f"error: {text}")
    elif folder.is_dir():
        time.sleep(RANK_0_FIRST_S)
        text = f"rank {rank}: {text}"
    if folder.is_dir() and (rank == 0 or not marker.exists()):
        try:
            markers.write_marker(
                "FATAL_ERROR", text + "\n", short=text[:MAX_TEXT_ON_FULL_DISK] + "\n"
            )
        except OSError as error:  # The exit code still tells the launcher, unless it is srun's.
            print_line(
                f"error: {marker} cannot be written ({error.strerror}), so the launcher may "
                f"restart the run, which cannot help; stop it and free some space in {folder}"
            )
    markers.release()
    return FATAL_ERROR


def _record_error(markers: RunMarkers, error: BaseException, to_stderr: bool = True) -> None:
    """Record the error and its traceback; the launcher shows the earliest of all ranks."""
    name = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    entry = {"time": time.time(), "rank": markers.rank, "error": name, "traceback": trace}
    short = entry | {
        "error": name[:MAX_TEXT_ON_FULL_DISK],
        "traceback": trace[-MAX_TEXT_ON_FULL_DISK:],
    }
    try:
        markers.logs.mkdir(exist_ok=True)
        markers.write_error(json.dumps(entry), json.dumps(short))
    except OSError:
        pass  # It is printed, or recorded by the rank that caused it.
    if to_stderr:
        print_line(trace)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dist_scan.run RUN_DIR")
    sys.exit(main(sys.argv[1]))
