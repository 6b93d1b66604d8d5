"""What a launcher does when the ranks have ended: nothing, requeue, relaunch in place, or give up. launch/local.py asks it as
functions, the batch script as `python launch/recovery.py begin|decide RUN ...`; both so decide the same. Standard library only.

Exit codes do not survive srun (RELIABILITY.md), so the ranks leave files in RUN: DONE; STOPPED with the signal; MISTAKE when the
user's settings are wrong; PORT_TAKEN when the rendezvous could not listen. launch/records.py reads them as they may be found.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # `python launch/recovery.py` from a batch script

from dist_scan.world.processes import free_port  # noqa: E402
from launch import records  # noqa: E402

MARKERS = ("DONE", "STOPPED", "MISTAKE", "PORT_TAKEN")
PORT_RETRIES = 5
IDLE_REQUEUES = 10  # starts in a row that may be asked to leave before anything was finished
STALLS = 2  # starts in a row that may end with nothing finished: two kills soon after one another are bad luck, three are a cause


class LaunchDecision(NamedTuple):
    """What to do next: done, requeue, stopped, mistake, relaunch or give_up; and why, in one line for the log. `idle`: faulty starts in a row
    with nothing finished, this one included, for the next `decide`: on a full disk only the launcher can remember."""

    action: str
    why: str
    idle: int = 0


def begin(run_dir: Path) -> str:
    """Clear what the last start left; a folder that stands in a marker's place is put aside. Returns a mark of how far the run has come,
    for `decide`. Raises OSError."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for stale in [*(run_dir / m for m in MARKERS), *run_dir.glob("logs/error-rank*.json")]:
        if stale.is_dir() and not stale.is_symlink():
            stale.rename(stale.with_name(f"bad-{stale.name}-{uuid.uuid4().hex[:8]}"))
        else:
            stale.unlink(missing_ok=True)
    return progress_mark(run_dir)


def progress_mark(run_dir: Path) -> str:
    """Changes when a checkpoint, a shard or a stage has been finished: a digest of the names of what is complete."""
    stages = run_dir / "stages"
    done = [
        p
        for pattern in ("*/*/manifest.json", "*/*/work/**/manifest.json", "*/*/**/*.npy")
        for p in stages.glob(pattern)
    ]
    names = sorted(
        {
            str(p.relative_to(stages))
            for p in done
            if not any(part.startswith((".tmp", "bad-")) for part in p.parts)
        }
    )
    return fnv1a("\n".join(names))


def fnv1a(text: str) -> str:
    """A short digest that no library has to be imported for."""
    value = 0xCBF29CE484222325
    for byte in text.encode(errors="surrogateescape"):
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def decide(
    run_dir: Path, before: str, start: int, relaunches: int, idle: int = 0
) -> LaunchDecision:
    """Look at what start number `start` (0, 1, ...) left. `before` is what begin returned, `idle` that of the last verdict. Remembers a fault
    in logs/faults.jsonl."""
    if (run_dir / "DONE").is_file():
        return LaunchDecision("done", "the run is done")
    number = asked(run_dir)
    if number is not None:
        return _stopped(run_dir, number, before)
    if (run_dir / "MISTAKE").is_file():
        return LaunchDecision(
            "mistake",
            records.text(run_dir / "MISTAKE")
            or "a mistake in the settings, which was not written down (MISTAKE is empty)",
        )
    if (run_dir / "PORT_TAKEN").is_file() and start < PORT_RETRIES:
        return LaunchDecision("relaunch", "the port was taken; another is tried", idle)
    error = first_error(run_dir)
    text = (
        f"rank {error['rank']}: {error['error']}"
        if error
        else "a process ended and left no error (killed?)"
    )
    advanced = progress_mark(run_dir) != before
    _remember(run_dir, start, text, advanced)
    idle = 0 if advanced else max(idle + 1, stalls(run_dir))
    if start >= relaunches:
        return LaunchDecision(
            "give_up",
            f"{text} (after {relaunches} relaunches; raise runtime.relaunches, or mend the cause)",
            idle,
        )
    if idle > STALLS:
        return LaunchDecision(
            "give_up",
            f"{text} (no checkpoint, shard or stage was finished in {STALLS + 1} starts: a relaunch would end the same)",
            idle,
        )
    return LaunchDecision("relaunch", text, idle)


def asked(run_dir: Path) -> int | None:
    """The signal that the ranks have followed (0: not known which), from STOPPED; None where they did not say so."""
    left = records.record(run_dir / "STOPPED") or {}
    return records.number(left["signal"] or 0) if "signal" in left else None


def _stopped(run_dir: Path, number: int, before: str) -> LaunchDecision:
    name = (
        signal.Signals(number).name
        if number in set(signal.Signals)
        else f"signal {number}"
        if number
        else "a signal"
    )
    if number != signal.SIGUSR2:
        return LaunchDecision("stopped", f"{name}: everything is saved, the same command goes on")
    if _idle_requeues(run_dir, progress_mark(run_dir) != before) >= IDLE_REQUEUES:
        return LaunchDecision(
            "give_up",
            f"{IDLE_REQUEUES} starts in a row were asked to leave before a checkpoint, shard or stage was finished; "
            "raise slurm.time, or lower slurm.notice_s",
        )
    return LaunchDecision("requeue", f"{name}: everything is saved, the job is queued again")


def _idle_requeues(run_dir: Path, further: bool) -> int:
    """How many starts in a row have been queued again without getting further, this one included."""
    path = run_dir / "logs" / "idle_requeues"
    before = records.text(path)
    count = (
        0
        if further
        else 1 + (int(before) if before.isascii() and before.isdigit() and len(before) < 9 else 0)
    )
    try:
        path.write_text(str(count))
    except OSError:
        return 0  # a full disk must not keep the run out of the queue
    return count


def first_error(run_dir: Path) -> dict[str, Any] | None:
    """The earliest error any rank left: {rank, error, time, traceback}; None when there is none that can be read."""
    errors = [
        error
        for error in map(records.record, run_dir.glob("logs/error-rank*.json"))
        if error
        and {"rank", "error"} <= error.keys()
        and isinstance(error.get("time"), (int, float))
    ]
    return min(errors, key=lambda e: e["time"], default=None)


def stalls(run_dir: Path) -> int:
    """How many of this job's last starts ended in a fault with nothing finished, as far as logs/faults.jsonl could be written."""
    count = 0
    for fault in reversed(records.entries(run_dir / "logs" / "faults.jsonl")):
        if records.number(fault.get("start")) is None:  # of another make
            continue
        if fault.get("advanced", True) or fault.get("job") != _job():
            break
        count += 1
        if fault["start"] == 0:
            break
    return count


def _job() -> str | None:
    """Of which start of which Slurm job this is: a job that was queued again may be on other nodes, and counts anew."""
    return (
        f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        if "SLURM_JOB_ID" in os.environ
        else None
    )


def _remember(run_dir: Path, start: int, text: str, advanced: bool) -> None:
    try:
        records.append(
            run_dir / "logs" / "faults.jsonl",
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "job": _job(),
                "start": start,
                "fault": text,
                "advanced": advanced,
            },
        )
    except OSError:
        pass  # a full disk must not stop a relaunch


def main(argv: list[str]) -> int:
    """For the batch script. begin RUN: prints the mark. port: prints a free port. decide RUN MARK START RELAUNCHES IDLE: the action and the next
    IDLE, then a line that says why. Returns 1, with one line, where the run folder cannot be written."""
    if argv[0] == "port":
        print(free_port(""))
    elif argv[0] == "begin":
        try:
            print(begin(Path(argv[1])))
        except OSError as error:
            print(
                f"failed: {error.filename}: {error.strerror}, so no start can be made; make room or mend it, the same command goes on",
                file=sys.stderr,
            )
            return 1
    else:
        verdict = decide(Path(argv[1]), argv[2], *map(int, argv[3:]))
        try:
            print(f"{verdict.action} {verdict.idle}\n{' '.join(verdict.why.split())}", flush=True)
        except (
            BrokenPipeError
        ):  # the script was killed meanwhile (its node died): nobody asks any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
