"""From the command to the first training step: seconds, and CPU seconds of all processes; the imports alone; what compiling adds.

    python -m benchmarks.startup                          # a row each: imports, first step, first step of a machine that has compiled nothing
    python -m benchmarks.startup --before COMMIT          # in turns with the same of an earlier commit of this repository

A start is launch/local.py with a config cut to its first training; it is ended once the row of its first step is written. The data is
built by a start that is not counted, so `first step` is that of every start but the very first. time_ratio is ours over the earlier commit's.
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
from typing import NamedTuple

from benchmarks.rows import ROOT, emit, spread

QUICK = ["--rounds", "1"]
CASES = ("imports", "first step", "first step, nothing compiled")
LIMIT_S = 300.0


class Took(NamedTuple):
    """One start."""

    wall_s: float
    cpu_s: float


class Checkout(NamedTuple):
    """A version of the code, and where its runs, data and compiled code lie."""

    root: Path
    folder: Path

    def environment(self, compiled: str = "compiled") -> dict[str, str]:
        """This checkout's package and no other, compiled code in a folder of its own."""
        return os.environ | {
            "PYTHONPATH": str(self.root),
            "NUMBA_CACHE_DIR": str(self.folder / compiled),
        }

    def imports(self) -> Took:
        """A process that imports what every rank does."""
        began, used = time.monotonic(), children_s()
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import dist_scan.run, dist_scan.stages.train, dist_scan.data.beton.loader",
            ],
            cwd=self.root,
            env=self.environment(),
            check=True,
        )
        return Took(time.monotonic() - began, children_s() - used)

    def first_step(self, config: str, processes: int, cold: bool) -> Took:
        """A start until its first step is written. Raises RuntimeError with the output's end when it comes to none."""
        run_dir, compiled = self.folder / "run", "fresh" if cold else "compiled"
        for old in (run_dir, self.folder / "fresh"):
            shutil.rmtree(old, ignore_errors=True)
        words = [
            sys.executable,
            str(self.root / "launch" / "local.py"),
            str(self.root / config),
            "--processes",
            str(processes),
            f"runtime.run_dir={run_dir}",
            f"runtime.cache_dir={self.folder / 'cache'}",
        ]
        with tempfile.TemporaryFile("w+") as said:
            began = time.monotonic()
            process = subprocess.Popen(
                words, stdout=said, stderr=subprocess.STDOUT, env=self.environment(compiled)
            )
            try:
                while not any(p.stat().st_size for p in run_dir.glob("logs/*.metrics.jsonl")):
                    if process.poll() is not None or time.monotonic() - began > LIMIT_S:
                        said.seek(0)
                        raise RuntimeError(f"{' '.join(words)}: no step: ...{said.read()[-800:]}")
                    time.sleep(0.02)
                return Took(time.monotonic() - began, family_s(process.pid))
            finally:
                end(process)


def children_s() -> float:
    """CPU seconds of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def family_s(pid: int) -> float:
    """CPU seconds of a process, of its living descendants, and of those that these have waited for."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        stats[int(path.parent.name)] = (
            int(fields[1]),
            sum(map(int, fields[11:15])),
        )  # parent; user and system ticks, its own and its dead children's
    found = [pid]
    for parent in found:
        found += [p for p, (its_parent, _) in stats.items() if its_parent == parent]
    return sum(stats[p][1] for p in found if p in stats) / os.sysconf("SC_CLK_TCK")


def end(process: subprocess.Popen) -> None:
    """The launcher passes it on to its ranks, which save and leave."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def checkouts(before: str) -> Iterator[dict[str, Checkout]]:
    """`now`, and the earlier commit in a worktree that is removed at the end. Raises subprocess.CalledProcessError when git knows no such commit."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"now": Checkout(ROOT, Path(folder) / "now")}
        git = ["git", "-C", str(ROOT), "worktree"]
        if before:
            found["before"] = Checkout(Path(folder) / "code", Path(folder) / "before")
            subprocess.run(
                [*git, "add", "--quiet", "--detach", str(found["before"].root), before], check=True
            )
        try:
            yield found
        finally:
            if before:
                subprocess.run([*git, "remove", "--force", str(found["before"].root)], check=True)


def main() -> None:
    """Warm up, measure in turns, a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml", help="below the checkout")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--before", default="", metavar="COMMIT", help="in turns with an earlier commit"
    )
    args = parser.parse_args()
    with checkouts(args.before) as versions:
        took: dict[str, dict[str, list[Took]]] = {
            case: {name: [] for name in versions} for case in CASES
        }
        for version in versions.values():
            version.first_step(args.config, args.processes, cold=False)
        for _ in range(args.rounds):
            for name, version in versions.items():
                took["imports"][name].append(version.imports())
                for case in CASES[1:]:
                    took[case][name].append(
                        version.first_step(args.config, args.processes, case != "first step")
                    )
    for case, by_name in took.items():
        row = {
            "row": case,
            "config": Path(args.config).stem,
            "processes": args.processes,
            "rounds": args.rounds,
        }
        row |= {
            name: round(statistics.median(getattr(t, name) for t in by_name["now"]), 2)
            for name in Took._fields
        }
        if args.before:
            row |= {"before": args.before} | {
                f"before_{name}": round(
                    statistics.median(getattr(t, name) for t in by_name["before"]), 2
                )
                for name in Took._fields
            }
            for field, name in (("wall_s", "time_ratio"), ("cpu_s", "cpu_time_ratio")):
                row |= spread(
                    [
                        getattr(a, field) / getattr(b, field)
                        for a, b in zip(by_name["now"], by_name["before"])
                    ],
                    name,
                )
        emit(row)


if __name__ == "__main__":
    main()
