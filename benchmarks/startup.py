"""From the command to the first training step: seconds, and CPU seconds of all processes.

    python -m benchmarks.startup                  # rows: imports, first step, nothing compiled yet
    python -m benchmarks.startup --before COMMIT  # interleaved with an earlier commit

A start is launch/local.py with a config; it is ended once the row of its first step is written. The
data is built by a start that does not count, so `first step` is that of every start but the very
first. time_ratio is our time over the earlier commit's.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pipeline import has_first_step
from benchmarks.rows import ROOT, emit, spread

QUICK = ["--rounds", "1"]
IMPORTS = "imports"
FIRST_STEP = "first step"
COLD_STEP = "first step, nothing compiled"
IMPORT_ALL = "import dist_scan.run, dist_scan.stages.train, dist_scan.data.beton.loader"
LIMIT_S = 300.0


class Seconds(NamedTuple):
    """Times of one start."""

    wall_s: float
    cpu_s: float


class Checkout(NamedTuple):
    """A version of the code, and the folder of its runs, data and compiled code."""

    root: Path
    folder: Path

    def environment(self, cache: str) -> dict[str, str]:
        """Environment with this checkout's package only, and its own compiled code."""
        compiled = str(self.folder / cache)
        return os.environ | {"PYTHONPATH": str(self.root), "NUMBA_CACHE_DIR": compiled}

    def imports(self) -> Seconds:
        """A process that imports what every rank does."""
        begin, cpu = time.monotonic(), children_cpu_s()
        command = [sys.executable, "-c", IMPORT_ALL]
        subprocess.run(command, cwd=self.root, env=self.environment("compiled"), check=True)
        return Seconds(time.monotonic() - begin, children_cpu_s() - cpu)

    def first_step(self, config: str, processes: int, cold: bool) -> Seconds:
        """A start until its first step is logged; `cold`: with nothing compiled.

        Raises RuntimeError with the end of its output if there is no step.
        """
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.rmtree(self.folder / "cold", ignore_errors=True)
        command = [sys.executable, str(self.root / "launch" / "local.py"), str(self.root / config)]
        command += ["--processes", str(processes), f"runtime.run_dir={run_dir}"]
        command += [f"runtime.cache_dir={self.folder / 'cache'}"]
        environment = self.environment("cold" if cold else "compiled")
        with tempfile.TemporaryFile("w+") as output:
            begin = time.monotonic()
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            try:
                while not has_first_step(run_dir):
                    if process.poll() is not None or time.monotonic() - begin > LIMIT_S:
                        output.seek(0)
                        text = output.read()[-800:]
                        raise RuntimeError(f"{' '.join(command)}: no step: ...{text}")
                    time.sleep(0.02)
                return Seconds(time.monotonic() - begin, family_cpu_s(process.pid))
            finally:
                end_process(process)


def children_cpu_s() -> float:
    """CPU seconds of the processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def family_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants, and of those that they have waited for."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        ticks[process] = sum(map(int, fields[11:15]))  # user and system, its own and children's
    family = [pid]
    for member in family:  # grows as it is read
        family += [process for process, parent in parents.items() if parent == member]
    return sum(ticks.get(process, 0) for process in family) / os.sysconf("SC_CLK_TCK")


def end_process(process: subprocess.Popen[Any]) -> None:
    """Stop a launcher: it passes TERM on to its ranks, which save and stop."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def checkouts(before: str) -> Iterator[dict[str, Checkout]]:
    """`now`, and the earlier commit as `before` in a temporary worktree.

    Raises subprocess.CalledProcessError if git does not know the commit.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"now": Checkout(ROOT, folder / "now")}
        worktree = ["git", "-C", str(ROOT), "worktree"]
        if before:
            code = folder / "code"
            found["before"] = Checkout(code, folder / "before")
            add = [*worktree, "add", "--quiet", "--detach", str(code), before]
            subprocess.run(add, check=True)
        try:
            yield found
        finally:
            if before:
                subprocess.run([*worktree, "remove", "--force", str(code)], check=True)


def measure(
    versions: dict[str, Checkout], args: argparse.Namespace
) -> dict[str, dict[str, list[Seconds]]]:
    """Seconds by case and version; the versions take turns."""
    seconds: dict[str, dict[str, list[Seconds]]] = {
        case: {name: [] for name in versions} for case in (IMPORTS, FIRST_STEP, COLD_STEP)
    }
    for version in versions.values():
        version.first_step(args.config, args.processes, cold=False)
    for _ in range(args.rounds):
        for name, version in versions.items():
            seconds[IMPORTS][name].append(version.imports())
            for case in (FIRST_STEP, COLD_STEP):
                cold = case == COLD_STEP
                seconds[case][name].append(version.first_step(args.config, args.processes, cold))
    return seconds


def median_fields(seconds: list[Seconds], prefix: str = "") -> dict[str, float]:
    """Median wall and CPU seconds as fields of a row."""
    return {
        f"{prefix}{name}": round(statistics.median(values), 2)
        for name, values in zip(Seconds._fields, zip(*seconds))
    }


def main() -> None:
    """Measure, and print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml", help="below the checkout")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--before", default="", metavar="COMMIT", help="interleaved with an earlier commit"
    )
    args = parser.parse_args()
    with checkouts(args.before) as versions:
        seconds = measure(versions, args)
    for case, by_version in seconds.items():
        row: dict[str, Any] = {
            "row": case,
            "config": Path(args.config).stem,
            "processes": args.processes,
            "rounds": args.rounds,
        }
        row |= median_fields(by_version["now"])
        if args.before:
            row |= {"before": args.before} | median_fields(by_version["before"], "before_")
            pairs = list(zip(by_version["now"], by_version["before"]))
            row |= spread([now.wall_s / before.wall_s for now, before in pairs], "time_ratio")
            row |= spread([now.cpu_s / before.cpu_s for now, before in pairs], "cpu_time_ratio")
        emit(row)


if __name__ == "__main__":
    main()
