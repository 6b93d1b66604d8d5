"""What happens when a rank dies, and the decision that follows: requeue, relaunch or give up.

The whole way, from the fault to the next step of the training:

1. **A rank fails.** An exception reaches `dist_scan.run.main`, which writes
   `RUN/logs/error-rank*.json` and ends the process with code 1. A rank without progress is ended
   by `dist_scan.monitoring.watchdog.Watchdog`, which writes the same file and the stacks of all
   threads. A rank that is killed (`kill -9`, out of memory, a dead node) leaves nothing.
2. **The other ranks end.** They wait for it in a collective, which fails when the connection to
   the dead rank closes, or their own watchdog ends them. What remains is ended by
   `srun --kill-on-bad-exit` or by `dist_scan.world.processes.wait_for_ranks`.
3. **Run markers say how the start ended.** Exit codes do not survive srun, so the ranks leave a
   file in RUN: DONE; STOPPED with the number of the signal that stopped them; FATAL_ERROR for an
   error that a relaunch cannot help (invalid settings, a diverged training); PORT_TAKEN if the
   rendezvous port was in use. No marker means a fault.
   `dist_scan.storage.run_markers.RunMarkers` writes them, on a full disk too.
4. **The launcher decides.** The batch script (`launch.sbatch_script.build_script`) and
   `launch.local.run_until_done` both call `decide`, which returns a `LaunchDecision`.
5. **Relaunch in place, or requeue.** To relaunch, the launcher calls `prepare_start`, which
   removes the old markers, and starts all ranks again in the same job. To requeue, the batch
   script calls `scontrol requeue`, and Slurm later starts the script from its first line. If the
   ranks do not end after a notice (time limit, preemption), the batch script requeues the job;
   after a node failure Slurm does.
6. **The new start resumes.** `dist_scan.pipeline.Pipeline` skips finished stages.
   `dist_scan.engine.checkpoint.CheckpointStore.load` verifies the newest checkpoint against its
   sha256, sets a damaged one aside and takes the one before it. At most the steps since that
   checkpoint are repeated. Random draws, the order of images and the learning rate are functions of
   (seed, epoch, step), so the result equals that of an undisturbed run bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Literal, NamedTuple

# The batch script runs this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_scan.storage.artifacts import fingerprint  # noqa: E402  needs the path above
from dist_scan.world.processes import free_port  # noqa: E402
from launch import records  # noqa: E402

MARKERS = ("DONE", "STOPPED", "FATAL_ERROR", "PORT_TAKEN")
PORT_RETRIES = 5
FRUITLESS_REQUEUE_LIMIT = 10
"""Requeues in a row without progress after which the run is given up."""
FRUITLESS_START_LIMIT = 3
"""Faulty starts in a row without progress after which the run is given up: two kills in quick
succession may be bad luck, three have a cause."""
FINISHED_FILES = ("*/*/manifest.json", "*/*/work/**/manifest.json", "*/*/**/*.npy")
"""Below RUN/stages: manifests of stages, manifests of checkpoints, shards."""

Action = Literal["done", "stopped", "requeue", "fatal_error", "relaunch", "give_up"]


class LaunchDecision(NamedTuple):
    """What the launcher does next.

    reason: one line for the log. fruitless_starts: faulty starts in a row without progress, with
    this one; passed to the next `decide`, because the log may not be writable.
    """

    action: Action
    reason: str
    fruitless_starts: int = 0


def prepare_start(run_dir: Path) -> str:
    """Remove the markers and errors of the last start; returns `progress_digest`.

    A folder in the place of a marker is renamed to bad-*. Raises OSError.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    markers = [run_dir / name for name in MARKERS]
    for stale in [*markers, *run_dir.glob("logs/error-rank*.json")]:
        if stale.is_dir() and not stale.is_symlink():
            stale.rename(stale.with_name(f"bad-{stale.name}-{uuid.uuid4().hex[:8]}"))
        else:
            stale.unlink(missing_ok=True)
    return progress_digest(run_dir)


def progress_digest(run_dir: Path) -> str:
    """Digest of the names of all finished stages, checkpoints and shards.

    It changes when one more is finished.
    """
    stages = run_dir / "stages"
    names = set()
    for pattern in FINISHED_FILES:
        for path in stages.glob(pattern):
            name = path.relative_to(stages)
            if not any(part.startswith((".tmp", "bad-")) for part in name.parts):
                names.add(str(name))
    return fingerprint(sorted(names))


def decide(
    run_dir: Path, digest_before: str, start: int, relaunches: int, fruitless_starts: int = 0
) -> LaunchDecision:
    """What to do after a start of the ranks has ended, from the files that it left.

    digest_before: what `prepare_start` returned for this start. start: its number, from 0.
    relaunches: how many are allowed in one job. fruitless_starts: from the last `LaunchDecision`.
    """
    made_progress = progress_digest(run_dir) != digest_before

    # The run is complete.
    if (run_dir / "DONE").is_file():
        return LaunchDecision("done", "the run is complete")

    # A signal stopped the ranks, which saved their state.
    signal_number = stop_signal(run_dir)
    if signal_number is not None:
        return _decide_after_signal(run_dir, signal_number, made_progress)

    # A relaunch cannot help.
    if (run_dir / "FATAL_ERROR").is_file():
        text = records.read_text(run_dir / "FATAL_ERROR")
        return LaunchDecision("fatal_error", text or "cause unknown (FATAL_ERROR is empty)")

    # Another program took the port between its choice and the start.
    if (run_dir / "PORT_TAKEN").is_file() and start < PORT_RETRIES:
        return LaunchDecision(
            "relaunch", "the rendezvous port was taken; trying another", fruitless_starts
        )

    # A fault: an exception, a hang or a kill.
    return _decide_after_fault(run_dir, made_progress, start, relaunches, fruitless_starts)


def stop_signal(run_dir: Path) -> int | None:
    """Signal that stopped the ranks, from STOPPED (0: unknown); None if none did."""
    marker = records.read_object(run_dir / "STOPPED") or {}
    if "signal" not in marker:
        return None
    return records.as_integer(marker["signal"]) or 0


def _decide_after_signal(run_dir: Path, number: int, made_progress: bool) -> LaunchDecision:
    """Requeue after USR2 (time limit or preemption is near); any other signal ends the run."""
    name = _signal_name(number)
    if number != signal.SIGUSR2:
        reason = f"{name}: everything is saved; the same command resumes the run"
        return LaunchDecision("stopped", reason)
    if _count_fruitless_requeue(run_dir, made_progress) >= FRUITLESS_REQUEUE_LIMIT:
        return LaunchDecision(
            "give_up",
            f"{FRUITLESS_REQUEUE_LIMIT} starts in a row had to stop before a checkpoint, shard or "
            "stage was finished; raise slurm.time or lower slurm.notice_s",
        )
    return LaunchDecision("requeue", f"{name}: everything is saved; the job is requeued")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}" if number else "unknown signal"


def _count_fruitless_requeue(run_dir: Path, made_progress: bool) -> int:
    """Requeues in a row without progress, this one included; kept in logs/idle_requeues."""
    path = run_dir / "logs" / "idle_requeues"
    count = 0
    if not made_progress:
        before = records.read_text(path)
        is_count = before.isascii() and before.isdigit() and len(before) < 9
        count = 1 + (int(before) if is_count else 0)
    try:
        path.write_text(str(count))
    except OSError:
        return 0  # a full disk must not prevent the requeue
    return count


def _decide_after_fault(
    run_dir: Path, made_progress: bool, start: int, relaunches: int, fruitless_starts: int
) -> LaunchDecision:
    """Relaunch in place, unless no relaunch is left or the last starts made no progress."""
    error = first_error(run_dir)
    fault = "a process ended without an error message (killed?)"
    if error is not None:
        fault = f"rank {error['rank']}: {error['error']}"
    _log_fault(run_dir, start, fault, made_progress)

    fruitless_starts = (
        0 if made_progress else max(fruitless_starts + 1, logged_fruitless_starts(run_dir))
    )
    if start >= relaunches:
        limit = f"after {relaunches} relaunches; raise runtime.relaunches, or fix the cause"
        return LaunchDecision("give_up", f"{fault} ({limit})", fruitless_starts)
    if fruitless_starts >= FRUITLESS_START_LIMIT:
        limit = f"{FRUITLESS_START_LIMIT} starts in a row finished no checkpoint, shard or stage"
        return LaunchDecision("give_up", f"{fault} ({limit})", fruitless_starts)
    return LaunchDecision("relaunch", fault, fruitless_starts)


def first_error(run_dir: Path) -> dict[str, Any] | None:
    """Earliest readable error of all ranks: {rank, error, time, traceback}; or None."""
    errors = []
    for path in run_dir.glob("logs/error-rank*.json"):
        error = records.read_object(path) or {}
        has_time = isinstance(error.get("time"), (int, float))
        if has_time and {"rank", "error"} <= error.keys():
            errors.append(error)
    return min(errors, key=lambda error: error["time"], default=None)


def logged_fruitless_starts(run_dir: Path) -> int:
    """Faulty starts in a row without progress at the end of logs/faults.jsonl, of this job only."""
    count = 0
    for fault in reversed(records.read_objects(run_dir / "logs" / "faults.jsonl")):
        if records.as_integer(fault.get("start")) is None:  # not written by `_log_fault`
            continue
        if fault.get("advanced", True) or fault.get("job") != _job_start():
            break
        count += 1
        if fault["start"] == 0:
            break
    return count


def _job_start() -> str | None:
    """Slurm job and its number of restarts; None outside Slurm.

    A requeued job may run on other nodes, so its fruitless starts are counted from zero.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def _log_fault(run_dir: Path, start: int, fault: str, made_progress: bool) -> None:
    """Append to logs/faults.jsonl; a full disk must not prevent a relaunch."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "job": _job_start(),
        "start": start,
        "fault": fault,
        "advanced": made_progress,
    }
    with contextlib.suppress(OSError):
        records.append_object(run_dir / "logs" / "faults.jsonl", entry)


def main(argv: list[str]) -> int:
    """Command line for the batch script; returns the exit code.

    prepare RUN       prints the progress digest
    port              prints a free port
    decide RUN DIGEST START RELAUNCHES FRUITLESS_STARTS
                      prints "ACTION FRUITLESS_STARTS", then the reason

    Returns, after one line on stderr, 1 if the run folder cannot be written and 2 for an unknown
    command.
    """
    command = argv[0]
    if command == "port":
        print(free_port(""))
        return 0
    if command == "prepare":
        return _print_prepare(Path(argv[1]))
    if command != "decide":
        print(
            f"recovery.py: unknown command '{command}'; allowed: prepare, port, decide. The batch "
            "script is of another version: cancel the job and submit it again",
            file=sys.stderr,
        )
        return 2
    decision = decide(Path(argv[1]), argv[2], *map(int, argv[3:]))
    return _print_decision(decision)


def _print_prepare(run_dir: Path) -> int:
    try:
        print(prepare_start(run_dir))
    except OSError as error:
        print(
            f"failed: {error.filename}: {error.strerror}; the ranks cannot be started. "
            "Make room or repair it; the same command resumes the run",
            file=sys.stderr,
        )
        return 1
    return 0


def _print_decision(decision: LaunchDecision) -> int:
    reason = " ".join(decision.reason.split())
    try:
        print(f"{decision.action} {decision.fruitless_starts}\n{reason}", flush=True)
    except BrokenPipeError:
        # The batch script was killed in the meantime (its node died). Python flushes stdout once
        # more at its exit; discard that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
