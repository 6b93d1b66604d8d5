"""Run several configs over several seeds on the same data; one table and one page compare them."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_scan.commands import _arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The comparison's file, its output, and how its runs share this machine."""
    parser.add_argument(
        "config", type=Path, help="a YAML file, such as configs/compare_digits.yaml"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the runs, the table and the page (default runs/<name>)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes of each run (default 1)"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="number of runs at a time, which share the cores (default 1); "
        "with more than one their output goes to RUN/output.txt",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="settings of the comparison, dotted.path=value, such as seeds=[0]",
    )


def main(args: argparse.Namespace) -> int:
    """Check everything, run what is not finished, write the table after each run."""
    from dist_scan.compare.config import read_comparison
    from dist_scan.compare.local_runs import LocalRuns
    from dist_scan.compare.results import write_results
    from dist_scan.compare.runs import data_manifests, is_finished, plan_runs, shared_data

    _arguments.check_at_least(args, processes=1, at_once=1)
    comparison = read_comparison(args.config, args.overrides)
    out = args.out or Path("runs") / comparison.name
    runs = plan_runs(comparison, args.config.parent, out)
    data = data_manifests(shared_data(runs), out / "data")
    unfinished = {}
    for number, run in enumerate(runs.values(), 1):
        title = f"[{number}/{len(runs)}] {run.run_dir}"
        if is_finished(run):
            print(f"{title}: already done, skipped", flush=True)
        else:
            unfinished[title] = run
    local = LocalRuns(args.processes, args.at_once, data)
    code = local.run_all(unfinished, lambda: write_results(comparison, runs, out))
    if code == 0:
        table = write_results(comparison, runs, out)
        print(f"\n{table}\ncomparison: {out / 'compare.html'}")
    return code
