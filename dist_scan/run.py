"""A process's life: signals, world, config, pipeline, exit. Launchers start it as `python -m dist_scan.run RUN_DIR`, once per rank.

Exit codes do not survive srun, so what a launcher must know is a file in RUN_DIR: DONE, STOPPED with the signal's number,
MISTAKE (the user's, a relaunch would not help), PORT_TAKEN. launch/recovery.py reads them.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from dist_scan.artefacts import FULL, write_json, write_text
from dist_scan.config import ConfigError, load
from dist_scan.engine.stop import Hopeless, Stop

USER_MISTAKE = 2
FIRST_WORD_S = 0.5  # a mistake that all ranks met is rank 0's to tell


def main(run_dir: str) -> int:
    """Run everything the folder's config.yaml asks for. Returns the exit code."""
    folder, rank = Path(run_dir), int(os.environ.get("RANK", 0))
    faults = _faults(rank)
    stop = Stop()
    stop.install()
    try:
        code = _work(folder, stop)
        if faults is not None:
            faults.look("done")
        return code
    except (ConfigError, Hopeless) as error:
        return _mistake(folder, rank, str(error))
    except ValueError as error:
        if os.environ.get("DIST_SCAN_TRACEBACK"):
            traceback.print_exc()
        _remember(folder, rank, error, aloud=False)
        return _mistake(folder, rank, str(error))
    except BaseException as error:
        _remember(folder, rank, error, aloud=not (isinstance(error, OSError) and error.errno in FULL))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: a rank that lingers in an orderly shutdown keeps its peers waiting in a collective


def _faults(rank: int):
    """What a test has armed (engine/faults.py); None in every other life."""
    path = os.environ.get("DIST_SCAN_FAULT")
    if path is None:
        return None
    from dist_scan.engine.faults import Faults

    faults = Faults(Path(path), rank)
    faults.arm()
    faults.look("start")
    return faults


def _work(folder: Path, stop: Stop) -> int:
    from dist_scan.engine.precision import set_determinism
    from dist_scan.engine.watchdog import Watchdog
    from dist_scan.pipeline import Pipeline
    from dist_scan.progress import Progress, Stopped
    from dist_scan.world.collectives import gather_objects
    from dist_scan.world.world import close_world, open_world

    run = load(folder / "config.yaml")
    if run.runtime.run_dir is None:
        run = run.model_copy(update={"runtime": run.runtime.model_copy(update={"run_dir": str(folder)})})
    set_determinism()
    try:
        world = open_world(run.runtime.device, run.runtime.timeout_s)
    except (RuntimeError, OSError) as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            write_text(folder / "PORT_TAKEN", str(error))
        raise
    (folder / "logs").mkdir(exist_ok=True)
    Watchdog(folder / "logs", world.rank, run.runtime.step_limit_s, run.runtime.section_limit_s, lambda error: _remember(folder, world.rank, error)).start()
    if world.rank == 0:
        Progress.copy_to = open(folder / "logs" / "run.log", "a", buffering=1)

    def say(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)
            Progress.copy_to.write(time.strftime("%H:%M:%S ") + text + "\n")

    try:
        Pipeline(run, world, stop, say).run()
    except Stopped:
        signals = [s for s in gather_objects(stop.signal) if s is not None]  # the notice may have reached one rank only
        number = signal.SIGUSR2 if signal.SIGUSR2 in signals else max(signals, default=None)
        say(f"stopped by signal {number}; everything is saved, the same command goes on")
        if world.rank == 0:
            write_json(folder / "STOPPED", {"signal": number})
        close_world()  # or its threads abort the process at exit, which srun calls a fault
        return 0
    if world.rank == 0:
        write_text(folder / "DONE", time.strftime("%Y-%m-%dT%H:%M:%S\n"))
        if (folder / "summary.txt").is_file():
            say("\n" + (folder / "summary.txt").read_text())
        if (folder / "report.html").is_file():
            say(f"report: {folder / 'report.html'}")
    close_world()
    return 0


def _mistake(folder: Path, rank: int, text: str) -> int:
    """Said once: by rank 0 when it met the mistake too, else by the launcher, which reads whose it is."""
    marker = folder / "MISTAKE"
    if rank == 0 or not (folder / "config.yaml").is_file():
        print(f"error: {text}", file=sys.stderr, flush=True)
    elif folder.is_dir():
        time.sleep(FIRST_WORD_S)
        text = f"rank {rank}: {text}"
    if folder.is_dir() and (rank == 0 or not marker.exists()):
        write_text(marker, text + "\n")
    return USER_MISTAKE


def _remember(folder: Path, rank: int, error: BaseException, aloud: bool = True) -> None:
    """Leave the error where the launcher finds it; the earliest of all ranks is the one it shows. A mistake's traceback stays in the file."""
    text = "".join(traceback.format_exception(error))
    try:
        (folder / "logs").mkdir(exist_ok=True)
        with open(folder / "logs" / f"error-rank{rank:05d}.json", "w") as f:
            json.dump({"time": time.time(), "rank": rank, "error": f"{type(error).__name__}: {error}", "traceback": text}, f)
    except OSError:
        pass
    if aloud:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dist_scan.run RUN_DIR")
    sys.exit(main(sys.argv[1]))
