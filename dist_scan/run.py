"""A process's life: signals, world, config, pipeline, exit. Launchers start it as `python -m dist_scan.run RUN_DIR`, once per rank.

Exit codes do not survive srun, so what a launcher must know is a file in RUN_DIR: DONE, STOPPED with the signal's number,
MISTAKE (the user's, a relaunch would not help), PORT_TAKEN. launch/recovery.py reads them; storage/run_markers.py
writes them, on a full disk too.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from dist_scan.config import ConfigError
from dist_scan.engine.stop import NonRetryableError, StopFlag
from dist_scan.monitoring.progress import print_line
from dist_scan.run_config import load_config
from dist_scan.storage.atomic import DISK_FULL_ERRNOS
from dist_scan.storage.run_markers import RunMarkers

USER_MISTAKE = 2
FIRST_WORD_S = 0.5  # a mistake that all ranks met is rank 0's to tell
SHORT = (
    1000  # characters of a text that must fit into a file kept aside (as JSON up to six bytes each)
)


def main(run_dir: str) -> int:
    """Run everything the folder's config.yaml asks for. Returns the exit code."""
    folder, rank = Path(run_dir), int(os.environ.get("RANK", 0))
    if hook := os.environ.get("DIST_SCAN_TEST_HOOK"):  # fault injection of tests and benchmarks
        importlib.import_module(hook).install(rank)
    markers = RunMarkers(folder, rank)
    stop = StopFlag()
    stop.install()
    if (folder / "config.yaml").is_file():
        markers.reserve()
    try:
        code = _work(folder, stop, markers)
        markers.release()
        return code
    except (ConfigError, NonRetryableError) as error:
        return _mistake(markers, str(error))
    except ValueError as error:
        if os.environ.get("DIST_SCAN_TRACEBACK"):
            traceback.print_exc()
        _remember(markers, error, aloud=False)
        return _mistake(markers, str(error))
    except BaseException as error:
        disk_is_full = isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS
        _remember(markers, error, aloud=not disk_is_full)
        print_line("", sys.stdout, end="")
        print_line("", end="")
        os._exit(
            1
        )  # at once: a rank that lingers in an orderly shutdown keeps its peers waiting in a collective


def _work(folder: Path, stop: StopFlag, markers: RunMarkers) -> int:
    from dist_scan.engine.precision import set_determinism
    from dist_scan.monitoring.log import JsonLinesFile
    from dist_scan.monitoring.progress import Progress, StopRequested
    from dist_scan.monitoring.watchdog import Watchdog
    from dist_scan.pipeline import Pipeline
    from dist_scan.world.collectives import gather_objects
    from dist_scan.world.world import close_world, open_world

    run = load_config(folder / "config.yaml")
    if run.runtime.run_dir is None:
        run = run.model_copy(
            update={"runtime": run.runtime.model_copy(update={"run_dir": str(folder)})}
        )
    set_determinism()
    try:
        world = open_world(run.runtime.device, run.runtime.timeout_s)
    except (RuntimeError, OSError) as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            markers.write_marker("PORT_TAKEN", str(error))
        raise
    Watchdog(
        folder / "logs",
        world.rank,
        run.runtime.step_limit_s,
        run.runtime.section_limit_s,
        lambda error: _remember(markers, error),
    ).start()
    if world.rank == 0:
        Progress.log_file = JsonLinesFile(folder / "logs" / "run.log")

    def say(text: str) -> None:
        if world.rank == 0:
            print_line(text, sys.stdout)
            Progress.write_log(text)

    try:
        Pipeline(run, world, stop, say).run()
    except StopRequested:
        signals = [
            s for s in gather_objects(stop.signal) if s is not None
        ]  # the notice may have reached one rank only
        number = signal.SIGUSR2 if signal.SIGUSR2 in signals else max(signals, default=None)
        say(f"stopped by signal {number}; everything is saved, the same command goes on")
        if world.rank == 0:
            markers.write_marker("STOPPED", json.dumps({"signal": number}) + "\n")
        close_world()  # or its threads abort the process at exit, which srun calls a fault
        return 0
    if world.rank == 0:
        markers.write_marker("DONE", time.strftime("%Y-%m-%dT%H:%M:%S\n"))
        if (folder / "summary.txt").is_file():
            say("\n" + (folder / "summary.txt").read_text())
        if (folder / "report.html").is_file():
            say(f"report: {folder / 'report.html'}")
    close_world()
    return 0


def _mistake(markers: RunMarkers, text: str) -> int:
    """Said once: by rank 0 when it met the mistake too, else by the launcher, which reads whose it is."""
    folder, rank = markers.run_dir, markers.rank
    marker = folder / "MISTAKE"
    if rank == 0 or not (folder / "config.yaml").is_file():
        print_line(f"error: {text}")
    elif folder.is_dir():
        time.sleep(FIRST_WORD_S)
        text = f"rank {rank}: {text}"
    if folder.is_dir() and (rank == 0 or not marker.exists()):
        try:
            markers.write_marker("MISTAKE", text + "\n", short=text[:SHORT] + "\n")
        except OSError as error:  # the exit code still says it
            print_line(
                f"error: {marker} cannot be written ({error.strerror}): the launcher may start again in vain; stop it, make room in {folder}"
            )
    markers.release()
    return USER_MISTAKE


def _remember(markers: RunMarkers, error: BaseException, aloud: bool = True) -> None:
    """Leave the error where the launcher finds it; the earliest of all ranks is the one it shows. A mistake's traceback stays in the file."""
    name, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    facts = {"time": time.time(), "rank": markers.rank, "error": name, "traceback": trace}
    try:
        markers.logs.mkdir(exist_ok=True)
        short = json.dumps(facts | {"error": name[:SHORT], "traceback": trace[-SHORT:]})
        markers.write_error(json.dumps(facts), short)
    except OSError:
        pass  # it is said below, or by the one whose error this is
    if aloud:
        print_line(trace)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dist_scan.run RUN_DIR")
    sys.exit(main(sys.argv[1]))
