"""Watch a submitted run: status, follow, cancel.

Reads the run folder and squeue; job states need no accounting.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from dist_scan.config import ConfigError
from launch import records
from launch.job import QueuedJob, QueueError, original_run_dir, queued_job, submitted_job
from launch.run_lock import local_holder

COMMANDS = ("status", "follow", "cancel")
BENCHMARK = "benchmark.json"
"""In the folder of a scaling benchmark, which holds one run folder per number of nodes."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main(argv: list[str]) -> int:
    """Run `status|follow|cancel RUN`; RUN may be the folder of a benchmark. Raises ConfigError."""
    command = argv[0]
    usage = f"usage: launch/slurm.py {command} runs/NAME"
    if len(argv) != 2:
        raise ConfigError(f"{command}: expected one run folder; {usage}")
    folders = run_dirs(Path(argv[1]))
    if not folders:
        raise ConfigError(
            f"{command}: '{argv[1]}' is not a run folder (it has no config.yaml); {usage}"
        )
    if command == "status":
        print("\n\n".join(status(run_dir) for run_dir in folders))
        return 0
    if command == "follow":
        return follow_all(folders)
    # The last job first: it is waiting for the end of the one before it.
    return min([cancel(run_dir) for run_dir in reversed(folders)])


def run_dirs(folder: Path) -> list[Path]:
    """[folder] if it is a run folder; the run folders of a benchmark, fewest nodes first."""
    if not (folder / BENCHMARK).is_file():
        return [folder] if (folder / "config.yaml").is_file() else []
    by_nodes = {}
    for config in folder.glob("nodes-*/config.yaml"):
        if match := re.fullmatch("nodes-([0-9]{1,9})", config.parent.name):
            by_nodes[int(match[1])] = config.parent
    return [by_nodes[nodes] for nodes in sorted(by_nodes)]


def status(run_dir: Path) -> str:
    """A few lines: job, state, progress, restarts, last fault."""
    job = None
    queue_error = ""
    try:
        job = queued_job(run_dir)
    except QueueError as error:
        queue_error = str(error)
    submitted = submitted_job(run_dir)
    job_id = submitted["job_id"] if submitted else ""

    lines = [f"run      {run_dir}"]
    if submitted:
        lines.append(f"job      {_job_line(run_dir, submitted, job, queue_error)}")
    lines.append(f"state    {'not known' if queue_error else _state(run_dir, job)}")
    run_log = records.read_text(run_dir / "logs" / "run.log").splitlines()
    progress = [line for line in run_log if _is_progress(line)]
    if progress:
        clock, text = progress[-1][:8], progress[-1][9:]
        lines.append(f"progress {text} (at {clock})")
    starts = records.read_text(run_dir / "slurm" / f"{job_id}.out").count(": start ")
    faults = records.read_objects(run_dir / "logs" / "faults.jsonl")
    lines.append(f"restarts {max(starts - 1, 0)}, faults {len(faults)}")
    if faults:
        when = faults[-1].get("time", "unknown time")
        lines.append(f"last     {when} {faults[-1].get('fault', 'unknown fault')}")
    return "\n".join(lines)


def _job_line(
    run_dir: Path, submitted: dict[str, str], job: QueuedJob | None, queue_error: str
) -> str:
    job_id = submitted["job_id"]
    original = original_run_dir(run_dir)
    if original:
        return f"none: this folder is a copy of {original}, and job {job_id} belongs to that"
    if queue_error:
        return f"{job_id}: {queue_error}"
    if job:
        return f"{job_id} {job.state.lower()}, {job.nodes} nodes ({job.reason})"
    when = f" (submitted {submitted['submitted']})" if "submitted" in submitted else ""
    return f"{job_id} has left the queue{when}"


def _state(run_dir: Path, job: QueuedJob | None) -> str:
    is_pending = job is not None and job.state == "PENDING"
    if (run_dir / "DONE").is_file() and not is_pending:
        text = f"done at {records.read_text(run_dir / 'DONE')}"
        report = run_dir / "report.html"
        return f"{text}; report: {report}" if report.exists() else text
    if job is not None:
        names = {"PENDING": "waiting in the queue", "RUNNING": "running"}
        return names.get(job.state, job.state.lower())
    if holder := local_holder(run_dir):
        return f"running on this machine: {holder}"
    if (run_dir / "FATAL_ERROR").is_file():
        return "ended by a fatal error, named in FATAL_ERROR and in the log"
    if (run_dir / "STOPPED").is_file():
        return "stopped; the same command resumes the run"
    return "not running; the same command resumes the run from the last checkpoint"


def _is_progress(line: str) -> bool:
    """Whether a line of run.log contains a rate, or the start of a stage."""
    return any(text in line for text in ("/s, ", ": starts", ": resumes"))


def follow(run_dir: Path) -> int:
    """Print run.log as it grows until the job leaves the queue.

    Returns 0 if the run is complete. Ctrl-C ends only the printing.
    """
    log = run_dir / "logs" / "run.log"
    position = 0
    last_report = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            position = _print_from(log, position)
            try:
                job = queued_job(run_dir)
            except QueueError as error:
                report, text, wait_s = "no answer", f"{error}; trying again", 5
            else:
                if job is None:
                    break
                report, wait_s = job.state, 2
                text = f"job {job.job_id}: {job.state.lower()} ({job.reason})"
            if report != last_report:
                print(text, flush=True)
                last_report = report
            time.sleep(wait_s)
    except KeyboardInterrupt:
        folder = shlex.quote(str(run_dir))
        print(f"\nthe job continues; watch it again with: launch/slurm.py follow {folder}")
        return INTERRUPTED
    _print_from(log, position)
    print(status(run_dir))
    return 0 if (run_dir / "DONE").is_file() else 1


def follow_all(folders: list[Path]) -> int:
    """Follow one run after another. Returns the first code that is not 0.

    Ctrl-C ends the following.
    """
    first_error = 0
    for run_dir in folders:
        code = follow(run_dir)
        if code == INTERRUPTED:
            return code
        first_error = first_error or code
    return first_error


def _print_from(log: Path, position: int) -> int:
    """Print a file from a position on; returns the position of its end."""
    try:
        with open(log, errors="replace") as file:
            file.seek(position)
            sys.stdout.write(file.read())
            sys.stdout.flush()
            return file.tell()
    except OSError:
        return position


def cancel(run_dir: Path) -> int:
    """scancel: the ranks save and stop, and the job does not return. Raises ConfigError."""
    try:
        job = queued_job(run_dir)
    except QueueError as error:
        raise ConfigError(f"{error}; nothing was cancelled, try again") from None
    if job is None:
        print(_why_no_job(run_dir))
        return 1
    result = subprocess.run(["scancel", job.job_id], capture_output=True, text=True)
    if result.returncode:
        message = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ConfigError(f"scancel could not cancel job {job.job_id}: {message}; try again")
    print(f"cancelled job {job.job_id}; saved work is kept, the same command resumes the run")
    return 0


def _why_no_job(run_dir: Path) -> str:
    if original := original_run_dir(run_dir):
        return f"{run_dir} is a copy of {original}, and its job belongs to that; nothing cancelled"
    if holder := local_holder(run_dir):
        return f"{run_dir} has no job: {holder} runs it; Ctrl-C there, or `kill PID`, stops it"
    return f"no job of {run_dir} is in the queue"
