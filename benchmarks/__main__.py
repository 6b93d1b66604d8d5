"""All benchmarks: `python -m benchmarks` lists them; `python -m benchmarks --run [NAME ...] [--quick] [--compare] [--out FOLDER]` runs
those that fit this machine, one after another, and prints one table. --quick ends within 10 minutes on two cores (--minutes gives it more
on a busy machine); what was cut off or left out for want of time is in the table too.

A benchmark is a file here with a `main`. `QUICK = [...]` in it are its arguments for --quick, `NEEDS = "gpu"` what it cannot do without,
`CLUSTER = [...]` its arguments over the ranks of a job, with {names} that launch/benchmark.py fills in from a config.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import COMMON_FIELDS, ROOT, common_fields, device, with_common_fields

QUICK_MINUTES = 9.5  # for all of them together
LONGEST = 0.25  # share of that for one of them


@dataclass(frozen=True)
class Benchmark:
    """One file, as read from its source (nothing is imported for a list)."""

    name: str
    about: str
    quick: list[str] | None
    needs: str
    compares: bool
    cluster: list[str] | None = None


def find_benchmarks(folder: Path = Path(__file__).parent) -> list[Benchmark]:
    """Every file with a `main`, by name."""
    return [
        b
        for path in sorted(folder.glob("*.py"))
        if not path.name.startswith("_") and (b := read(path)) is not None
    ]


def read(path: Path) -> Benchmark | None:
    """What a file says about itself; None when it has no `main`."""
    text = path.read_text()
    tree = ast.parse(text)
    if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
        return None
    named = {
        t.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for t in node.targets
        if isinstance(t, ast.Name)
    }
    quick = ast.literal_eval(named["QUICK"]) if "QUICK" in named else None
    needs = ast.literal_eval(named["NEEDS"]) if "NEEDS" in named else ""
    cluster = ast.literal_eval(named["CLUSTER"]) if "CLUSTER" in named else None
    return Benchmark(
        path.stem,
        (ast.get_docstring(tree) or "-").splitlines()[0],
        quick,
        needs,
        '"--compare"' in text,
        cluster,
    )


def why_not(benchmark: Benchmark, quick: bool) -> str:
    """Why it does not fit this machine or this way of running; '' when it does."""
    if benchmark.needs == "gpu" and device() == "cpu":
        return "needs a GPU"
    if benchmark.needs.startswith("data:") and not data_path(benchmark).exists():
        return f"needs {benchmark.needs.removeprefix('data:')} in ../shared/data or $DIST_SCAN_SHARED_DATA"
    return "has no quick form" if quick and benchmark.quick is None else ""


def data_path(benchmark: Benchmark) -> Path:
    """The file or folder beside the checkout that a benchmark takes as its first argument."""
    shared = Path(os.environ.get("DIST_SCAN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    return shared / benchmark.needs.removeprefix("data:")


def run(
    benchmark: Benchmark, quick: bool, compare: bool, limit_s: float | None
) -> tuple[list[dict[str, Any]], str]:
    """Its rows, and what went wrong ('' if nothing). Rows printed before a failure or the limit count."""
    arguments = (
        [os.path.relpath(data_path(benchmark), ROOT)] if benchmark.needs.startswith("data:") else []
    )
    arguments += (benchmark.quick or []) if quick else []
    arguments += (
        ["--compare"] if compare and benchmark.compares and "--compare" not in arguments else []
    )
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{benchmark.name}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    cut: list[bool] = []

    def end() -> None:
        cut.append(True)
        os.killpg(
            process.pid, signal.SIGKILL
        )  # its own session: also the processes that it started

    timer = threading.Timer(limit_s, end) if limit_s else None
    if timer:
        timer.start()
    out, errors = process.communicate()
    if timer:
        timer.cancel()
    rows = [
        with_common_fields(json.loads(line), benchmark.name, arguments)
        for line in out.splitlines()
        if line.startswith("{") and line.endswith("}")
    ]
    if cut:
        return rows, f"cut off after {limit_s:.0f} s"
    last = (errors.strip().splitlines() or ["no message"])[-1]
    return rows, "" if process.returncode == 0 else f"failed: {last}"


def figures(row: dict[str, Any]) -> str:
    """A row's own fields in short."""
    return ", ".join(
        f"{k} {'-'.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in row.items()
        if k not in (*COMMON_FIELDS, "row") and v not in ("", None)
    )


def table(rows: list[dict[str, Any]], problems: dict[str, str]) -> str:
    """Markdown that also reads well on a terminal: one line a row, then what was not measured and why."""
    lines = [("benchmark", "row", "figures"), ("---", "---", "---")]
    lines += [(row["benchmark"], str(row.get("row", "")), figures(row)) for row in rows]
    lines += [(name, "-", problem) for name, problem in problems.items()]
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return "\n".join(f"| {a.ljust(widths[0])} | {b.ljust(widths[1])} | {c} |" for a, b, c in lines)


def write(
    folder: Path, name: str, rows: list[dict[str, Any]], problems: dict[str, str], command: str
) -> None:
    """NAME.jsonl, and NAME.md with the machine's description and the table."""
    about = common_fields(
        ()
    )  # before anything is written: rows of an earlier time may be part of the checkout
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    busy = sorted({row["load"] for row in rows if "load" in row})
    head = [
        f"# {command}",
        "",
        f"{about['date']}, commit {about['commit']}. {about['machine']}; device: {about['device']}. "
        f"Processes wanting a core, per core, while it ran: {f'{busy[0]} to {busy[-1]}' if busy else 'not known'}"
        f"{' (busy: trust ratios, not seconds)' if busy and busy[-1] > 1.5 else ''}. "
        + ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        + ".",
        "",
    ]
    (folder / f"{name}.md").write_text("\n".join([*head, table(rows, problems), ""]))


def main(argv: list[str] | None = None) -> int:
    """List, or run and print the table. Returns 1 when a benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", help="which ones (default: all)")
    parser.add_argument(
        "--run",
        action="store_true",
        help="run them (without it, and without --quick, they are listed)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; all within 10 minutes")
    parser.add_argument(
        "--minutes",
        type=float,
        default=QUICK_MINUTES,
        help="for all of --quick together (default %(default)s)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="with the peer a user would otherwise take, in turns"
    )
    parser.add_argument(
        "--out", type=Path, help="also write the rows and the table into this folder"
    )
    parser.add_argument("--name", default="local", help="of the files in --out")
    args = parser.parse_args(argv)
    found = {b.name: b for b in find_benchmarks()}
    unknown = [name for name in args.names if name not in found]
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}'; there are: {', '.join(found)}")
    chosen = [found[name] for name in args.names or found]
    if not (args.run or args.quick):
        print("\n".join(f"{b.name:<14}{b.about}" for b in chosen))
        return 0
    rows, problems, began = [], {}, time.monotonic()
    for i, benchmark in enumerate(chosen):
        problem = why_not(benchmark, args.quick)
        left = 60 * args.minutes - (time.monotonic() - began)
        if not problem and args.quick and left < 10:
            problem = "no time left"
        if not problem:
            print(f"[{i + 1}/{len(chosen)}] {benchmark.name}", file=sys.stderr, flush=True)
            more, problem = run(
                benchmark,
                args.quick,
                args.compare,
                min(LONGEST * 60 * args.minutes, left) if args.quick else None,
            )
            rows += more
        if problem:
            problems[benchmark.name] = problem
    print(table(rows, problems))
    if args.out:
        write(
            args.out,
            args.name,
            rows,
            problems,
            " ".join(["python -m benchmarks", *(argv if argv is not None else sys.argv[1:])]),
        )
    return int(any(p.startswith("failed") for p in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
