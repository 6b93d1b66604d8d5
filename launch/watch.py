"""Looking at a submitted run: status, follow, cancel. Reads the run folder and squeue (job states need no accounting)."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch import records

COMMANDS = ("status", "follow", "cancel")
BENCHMARK = "benchmark.json"  # in the folder of a benchmark, which holds a run folder for each number of nodes


def main(argv: list[str]) -> int:
    """status|follow|cancel RUN, or the folder of a benchmark. Raises ConfigError when there is no such run."""
    from dist_scan.config import ConfigError

    found = run_dirs(Path(argv[1])) if len(argv) == 2 else []
    if not found:
        what = (
            f"'{argv[1]}' is no run folder (no config.yaml)"
            if len(argv) == 2
            else "expected one run folder"
        )
        raise ConfigError(f"{argv[0]}: {what}; usage: launch/slurm.py {argv[0]} runs/NAME")
    if argv[0] == "status":
        print("\n\n".join(status(run_dir) for run_dir in found))
        return 0
    if argv[0] == "follow":
        return follow_all(found)
    return min(
        [cancel(run_dir) for run_dir in reversed(found)]
    )  # the last first: the end of one is what the next waits for


def run_dirs(folder: Path) -> list[Path]:
    """The folder itself when it is a run's; those of a benchmark, fewest nodes first."""
    if (folder / BENCHMARK).is_file():
        return sorted(
            (
                p.parent
                for p in folder.glob("nodes-*/config.yaml")
                if re.fullmatch("nodes-[0-9]{1,9}", p.parent.name)
            ),
            key=lambda p: int(p.name.removeprefix("nodes-")),
        )
    return [folder] if (folder / "config.yaml").is_file() else []


class NoAnswer(RuntimeError):
    """squeue said nothing about the job: slurmctld may be away. The job itself does not mind."""


ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
)


def live_job(run_dir: Path) -> dict[str, Any] | None:
    """The run's own job as squeue knows it: {job_id, state, nodes, reason}; None when it has left the queue. Raises NoAnswer."""
    facts = _job(run_dir)
    if facts is None or shutil.which("squeue") is None or original(run_dir):
        return None
    done = subprocess.run(
        ["squeue", "-h", "-j", facts["job_id"], "-o", "%T|%D|%R|%o"], capture_output=True, text=True
    )
    if (
        done.returncode and "invalid job id" not in done.stderr.lower()
    ):  # an id that Slurm has forgotten is an answer
        raise NoAnswer(
            f"squeue could not say how job {facts['job_id']} stands: {' '.join(done.stderr.split()) or done.returncode}"
        )
    if not done.stdout.strip():
        return None
    state, nodes, reason, script = (done.stdout.strip().splitlines()[0].split("|", 3) + [""])[:4]
    if state in ENDED or _of_another(script, facts.get("run_dir")):
        return None
    return {
        **facts,
        "state": state,
        "nodes": int(nodes) if nodes.isdigit() else 0,
        "reason": reason,
    }


def _of_another(script: str, run_dir: object) -> bool:
    """Whether a job that runs `script` is not the one submitted from `run_dir`: ids are used again, and other clusters have the same."""
    return (
        isinstance(run_dir, str)
        and script.startswith("/")
        and not script.startswith(f"{run_dir}/slurm/")
    )


def original(run_dir: Path) -> Path | None:
    """The run folder that this one is a copy of, by its job.json, which the copy took along; None for a run folder of its own, moved or not."""
    facts = _job(run_dir) or {}
    if not isinstance(facts.get("run_dir"), str):  # of before run_dir was kept
        return None
    first = Path(facts["run_dir"])
    try:
        same = first.samefile(run_dir)
    except (OSError, ValueError):  # it is no longer there
        return None
    return None if same or (_job(first) or {}).get("job_id") != facts["job_id"] else first


def _job(run_dir: Path) -> dict[str, Any] | None:
    """RUN/slurm/job.json with its job_id as text; None where there is none that can be read."""
    facts = records.record(run_dir / "slurm" / "job.json") or {}
    job_id = str(facts.get("job_id"))
    return {**facts, "job_id": job_id} if re.fullmatch("[0-9]{1,12}", job_id) else None


def status(run_dir: Path) -> str:
    """Where the run stands, in a few lines: job, stage, step, rate, time left, restarts, last fault."""
    facts, job, silence = _job(run_dir), None, ""
    try:
        job = live_job(run_dir)
    except NoAnswer as error:
        silence = str(error)
    lines, first = [f"run      {run_dir}"], original(run_dir)
    if first:
        lines.append(
            f"job      none of its own: this folder is a copy of {first}, and job {facts['job_id']} belongs to that"
        )
    elif silence:
        lines.append(f"job      {facts['job_id']}: {silence}")
    elif job:
        lines.append(
            f"job      {job['job_id']} {job['state'].lower()}, {job['nodes']} nodes ({job['reason']})"
        )
    elif facts:
        lines.append(
            f"job      {facts['job_id']} has left the queue"
            + (f" (submitted {facts['submitted']})" if "submitted" in facts else "")
        )
    lines.append(f"state    {'not known' if silence else _state(run_dir, job)}")
    last = [
        line
        for line in _lines(run_dir / "logs" / "run.log")
        if "/s, " in line or ": starts" in line or ": resumes" in line
    ][-1:]
    lines += [f"progress {line[9:]} (at {line[:8]})" for line in last]
    starts = [
        line
        for line in _lines(run_dir / "slurm" / f"{(facts or {}).get('job_id')}.out")
        if ": start " in line
    ]
    faults = records.entries(run_dir / "logs" / "faults.jsonl")
    lines.append(f"restarts {max(len(starts) - 1, 0)}, faults {len(faults)}")
    if faults:
        lines.append(
            f"last     {faults[-1].get('time', 'when is not known')} {faults[-1].get('fault', 'what is not known')}"
        )
    return "\n".join(lines)


def _state(run_dir: Path, job: dict | None) -> str:
    if (run_dir / "DONE").is_file() and (job is None or job["state"] != "PENDING"):
        report = run_dir / "report.html"
        return f"done at {records.text(run_dir / 'DONE')}" + (
            f"; report: {report}" if report.exists() else ""
        )
    if job:
        return {"PENDING": "waits in the queue", "RUNNING": "runs"}.get(
            job["state"], job["state"].lower()
        )
    if holder := held_here(run_dir):
        return f"runs here: {holder}"
    for marker, text in (
        ("MISTAKE", "ended by a mistake in its settings"),
        ("STOPPED", "stopped; the same command goes on"),
    ):
        if (run_dir / marker).is_file():
            return text
    return "not running; the same command goes on from the last checkpoint"


def held_here(run_dir: Path) -> str:
    """Which process of this machine holds the run folder's lock (`process PID on HOST`); '' when none does. Only looked at: a lock that was tried
    for would refuse a run that starts at this moment (Linux)."""
    try:
        inode, holder = (run_dir / "lock").stat().st_ino, records.text(run_dir / "lock")
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return ""
    # an inode's number is known to its own disk alone: the process must be the one that has signed
    held = any(
        len(words) > 5
        and words[1] == "FLOCK"
        and words[5].endswith(f":{inode}")
        and holder.startswith(f"process {words[4]} on ")
        for words in locks
    )
    return holder if held else ""


def _lines(path: Path) -> list[str]:
    return records.text(path).splitlines()


def follow(run_dir: Path) -> int:
    """Show run.log as it grows until the job leaves the queue. Returns 0 when the run is done. Ctrl-C leaves the job alone."""
    log, at = run_dir / "logs" / "run.log", 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = None
    try:
        while True:
            at = _copy(log, at)
            try:
                job = live_job(run_dir)
            except NoAnswer as error:
                if said != "no answer":
                    said = "no answer"
                    print(f"{error}; asked again until it does", flush=True)
                time.sleep(5)
                continue
            if job and job["state"] != said:
                said = job["state"]
                print(f"job {job['job_id']}: {said.lower()} ({job['reason']})", flush=True)
            if job is None:
                break
            time.sleep(2)
    except KeyboardInterrupt:
        print(
            "\nthe job goes on; look again with: launch/slurm.py follow "
            + shlex.quote(str(run_dir))
        )
        return 130
    _copy(log, at)
    print(status(run_dir))
    return 0 if (run_dir / "DONE").is_file() else 1


def follow_all(run_dirs: list[Path]) -> int:
    """One after another. Returns the first code that is not 0; Ctrl-C ends it all."""
    codes = []
    for run_dir in run_dirs:
        codes.append(follow(run_dir))
        if codes[-1] == 130:
            return 130
    return next((code for code in codes if code), 0)


def _copy(log: Path, at: int) -> int:
    try:
        with open(log, errors="replace") as f:
            f.seek(at)
            sys.stdout.write(f.read())
            sys.stdout.flush()
            return f.tell()
    except OSError:
        return at


def cancel(run_dir: Path) -> int:
    """scancel: the ranks save and leave, and the job does not come back."""
    from dist_scan.config import ConfigError

    try:
        job = live_job(run_dir)
    except NoAnswer as error:
        raise ConfigError(f"{error}; nothing was cancelled, try again") from None
    if job is None:
        first = original(run_dir)
        holder = held_here(run_dir)
        print(
            f"{run_dir} is a copy of {first}, and its job belongs to that; nothing was cancelled"
            if first
            else f"{run_dir} has no job: {holder} runs it; Ctrl-C there, or `kill PID`, saves and ends it"
            if holder
            else f"no job of {run_dir} is in the queue"
        )
        return 1
    done = subprocess.run(["scancel", job["job_id"]], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"scancel could not cancel job {job['job_id']}: {' '.join(done.stderr.split()) or done.returncode}; try again"
        )
    print(f"cancelled job {job['job_id']}; everything saved stays, the same command goes on")
    return 0
