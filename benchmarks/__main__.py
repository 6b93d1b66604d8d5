"""All benchmarks: list them, or run those that fit this machine.

    python -m benchmarks                                                        list
    python -m benchmarks --run [NAME ...] [--quick] [--compare] [--out FOLDER]  run, print a table

With --quick all of them end within 10 minutes on two cores (--minutes changes it); what was
stopped or left out for lack of time is in the table too.

A benchmark is a file here with a `main`. It may define `QUICK`, its arguments for --quick; `NEEDS`,
what it cannot run without ("gpu", or "data:NAME"); `CLUSTER`, its arguments over the ranks of a
job, with {names} that launch/benchmark.py fills in from a config.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import COMMON_FIELDS, ROOT, common_fields, device, with_common_fields

QUICK_MINUTES = 9.5
"""For all benchmarks together."""
MAX_SHARE = 0.25
"""Largest share of this time for one benchmark."""
BUSY_LOAD = 1.5


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, as read from its source; nothing is imported for a list."""

    name: str
    about: str
    quick: list[str] | None
    needs: str
    compares: bool
    cluster: list[str] | None = None


def find_benchmarks(folder: Path = Path(__file__).parent) -> list[Benchmark]:
    """Every file with a `main`, by name."""
    paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    benchmarks = map(read_benchmark, paths)
    return [benchmark for benchmark in benchmarks if benchmark is not None]


def read_benchmark(path: Path) -> Benchmark | None:
    """The description of a benchmark from its source; None if it has no `main`."""
    text = path.read_text()
    tree = ast.parse(text)
    constants = {}
    has_main = False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            has_main = True
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
    if not has_main:
        return None

    def constant(name: str, default: Any) -> Any:
        return ast.literal_eval(constants[name]) if name in constants else default

    return Benchmark(
        name=path.stem,
        about=(ast.get_docstring(tree) or "-").splitlines()[0],
        quick=constant("QUICK", None),
        needs=constant("NEEDS", ""),
        compares='"--compare"' in text,
        cluster=constant("CLUSTER", None),
    )


def missing_requirement(benchmark: Benchmark, quick: bool) -> str:
    """Why a benchmark cannot run on this machine or in this way; '' if it can."""
    if benchmark.needs == "gpu" and device() == "cpu":
        return "needs a GPU"
    if benchmark.needs.startswith("data:") and not data_path(benchmark).exists():
        name = benchmark.needs.removeprefix("data:")
        return f"needs {name} in ../shared/data or $DIST_SCAN_SHARED_DATA"
    return "has no quick form" if quick and benchmark.quick is None else ""


def data_path(benchmark: Benchmark) -> Path:
    """File or folder outside the checkout that a benchmark takes as its first argument."""
    shared = Path(os.environ.get("DIST_SCAN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    return shared / benchmark.needs.removeprefix("data:")


def run_benchmark(
    benchmark: Benchmark, quick: bool, compare: bool, limit_s: float | None
) -> tuple[list[dict[str, Any]], str]:
    """(rows, what went wrong or ''). Rows printed before a failure or the time limit are kept."""
    arguments = []
    if benchmark.needs.startswith("data:"):
        arguments.append(os.path.relpath(data_path(benchmark), ROOT))
    if quick:
        arguments += benchmark.quick or []
    if compare and benchmark.compares and "--compare" not in arguments:
        arguments.append("--compare")
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{benchmark.name}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    is_cut_off = threading.Event()

    def cut_off() -> None:
        is_cut_off.set()
        # The benchmark has its own session, so this includes the processes that it started.
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s or threading.TIMEOUT_MAX, cut_off)
    timer.daemon = True
    timer.start()
    output, errors = process.communicate()
    timer.cancel()
    rows = [
        with_common_fields(json.loads(line), benchmark.name, arguments)
        for line in output.splitlines()
        if line.startswith("{") and line.endswith("}")
    ]
    if is_cut_off.is_set():
        return rows, f"stopped after {limit_s:.0f} s"
    if process.returncode:
        return rows, f"failed: {(errors.strip().splitlines() or ['no message'])[-1]}"
    return rows, ""


def run_all(
    benchmarks: Sequence[Benchmark], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(rows of all benchmarks, by name what went wrong)."""
    rows: list[dict[str, Any]] = []
    problems = {}
    begin = time.monotonic()
    for number, benchmark in enumerate(benchmarks, 1):
        remaining_s = 60 * args.minutes - (time.monotonic() - begin)
        problem = missing_requirement(benchmark, args.quick)
        if not problem and args.quick and remaining_s < 10:
            problem = "no time left"
        if not problem:
            progress = f"[{number}/{len(benchmarks)}] {benchmark.name}"
            print(progress, file=sys.stderr, flush=True)
            limit_s = min(MAX_SHARE * 60 * args.minutes, remaining_s) if args.quick else None
            new_rows, problem = run_benchmark(benchmark, args.quick, args.compare, limit_s)
            rows += new_rows
        if problem:
            problems[benchmark.name] = problem
    return rows, problems


def format_figures(row: dict[str, Any]) -> str:
    """A row's own fields in one line."""
    texts = []
    for key, value in row.items():
        if key in COMMON_FIELDS or key == "row" or value in ("", None):
            continue
        texts.append(f"{key} {'-'.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(texts)


def format_table(rows: list[dict[str, Any]], problems: dict[str, str]) -> str:
    """Markdown, aligned for a terminal: one line per row, then what was not measured and why."""
    lines = [("benchmark", "row", "figures"), ("---", "---", "---")]
    lines += [(row["benchmark"], str(row.get("row", "")), format_figures(row)) for row in rows]
    lines += [(name, "-", problem) for name, problem in problems.items()]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"| {a.ljust(widths[0])} | {b.ljust(widths[1])} | {c} |" for a, b, c in lines)


def write_results(
    path: Path, rows: list[dict[str, Any]], problems: dict[str, str], command: str
) -> None:
    """PATH.jsonl with the rows, PATH.md with the table and a description of the machine."""
    # Before anything is written: the files may be part of the checkout, whose state is described.
    fields = common_fields(())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loads = sorted({row["load"] for row in rows if "load" in row})
    load = f"{loads[0]} to {loads[-1]}" if loads else "not known"
    if loads and loads[-1] > BUSY_LOAD:
        load += " (busy: trust ratios, not seconds)"
    versions = ", ".join(f"{name} {version}" for name, version in fields["versions"].items())
    lines = [
        f"# {command}",
        "",
        f"{fields['date']}, commit {fields['commit']}. {fields['machine']}; device: "
        f"{fields['device']}. Load average per core: {load}. {versions}.",
        "",
        format_table(rows, problems),
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """List the benchmarks, or run them and print the table. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", help="which ones (default: all)")
    parser.add_argument("--run", action="store_true", help="run them at full size")
    parser.add_argument("--quick", action="store_true", help="run them at small sizes")
    parser.add_argument(
        "--minutes",
        type=float,
        default=QUICK_MINUTES,
        help="for all of --quick together (default %(default)s)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="interleaved with the library used otherwise"
    )
    parser.add_argument("--out", type=Path, help="folder for the rows and the table")
    parser.add_argument("--name", default="local", help="name of the files in --out")
    args = parser.parse_args(argv)
    known = {benchmark.name: benchmark for benchmark in find_benchmarks()}
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}'; allowed: {', '.join(known)}")
    benchmarks = [known[name] for name in args.names or known]
    if not (args.run or args.quick):
        print("\n".join(f"{benchmark.name:<14}{benchmark.about}" for benchmark in benchmarks))
        return 0
    rows, problems = run_all(benchmarks, args)
    print(format_table(rows, problems))
    if args.out:
        words = sys.argv[1:] if argv is None else argv
        command = " ".join(["python -m benchmarks", *words])
        write_results(args.out / args.name, rows, problems, command)
    return int(any(problem.startswith("failed") for problem in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
