"""The Slurm job of a run folder: what job.json and squeue say about it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from launch import records

ENDED_STATES = (
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


class QueueError(RuntimeError):
    """squeue gave no answer, for example because slurmctld is down. The job is not affected."""


class QueuedJob(NamedTuple):
    """A job that has not ended, as squeue reports it."""

    job_id: str
    state: str
    nodes: int
    reason: str
    """Why it is pending, or where it runs."""


def queued_job(run_dir: Path) -> QueuedJob | None:
    """The run's job; None if it has ended or the run folder has none. Raises QueueError."""
    submitted = submitted_job(run_dir)
    if submitted is None or shutil.which("squeue") is None or original_run_dir(run_dir):
        return None
    job_id = submitted["job_id"]
    result = subprocess.run(
        ["squeue", "-h", "-j", job_id, "-o", "%T|%D|%R|%o"], capture_output=True, text=True
    )
    # A job id that Slurm has forgotten is an answer: the job has ended.
    if result.returncode and "invalid job id" not in result.stderr.lower():
        message = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise QueueError(f"squeue could not report on job {job_id}: {message}")
    if not result.stdout.strip():
        return None
    fields = result.stdout.strip().splitlines()[0].split("|", 3)
    state, nodes, reason, script = (fields + [""])[:4]
    # Slurm reuses job ids, and another cluster may have a job of the same id.
    is_other = script.startswith("/") and not script.startswith(f"{submitted['run_dir']}/slurm/")
    if state in ENDED_STATES or is_other:
        return None
    return QueuedJob(job_id, state, int(nodes) if nodes.isdigit() else 0, reason)


def original_run_dir(run_dir: Path) -> Path | None:
    """The run folder that this one is a copy of; None if it is an original, also if it was moved.

    A copy has the original's job.json, which names the original's path.
    """
    submitted = submitted_job(run_dir)
    if submitted is None:
        return None
    original = Path(submitted["run_dir"])
    try:
        if original.samefile(run_dir):
            return None
    except (OSError, ValueError):  # it no longer exists
        return None
    is_copy = (submitted_job(original) or {}).get("job_id") == submitted["job_id"]
    return original if is_copy else None


def submitted_job(run_dir: Path) -> dict[str, Any] | None:
    """RUN/slurm/job.json with its job_id as text; None if there is no valid one."""
    content = records.read_object(run_dir / "slurm" / "job.json") or {}
    job_id = str(content.get("job_id"))
    if not re.fullmatch("[0-9]{1,12}", job_id) or not isinstance(content.get("run_dir"), str):
        return None
    return {**content, "job_id": job_id}
