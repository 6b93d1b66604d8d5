"""Run several configs over several seeds on the same data; one table and one page that compare them. Finished runs are skipped."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from dist_scan.config import (
    ConfigError,
    RunConfig,
    StrictModel,
    dump,
    read_settings,
    validate_settings,
)
from dist_scan.run_config import load_config
from dist_scan.storage.atomic import write_json, write_text

LOCAL = Path(__file__).resolve().parents[2] / "launch" / "local.py"
NOTICE = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class MemberConfig(StrictModel):
    """One config that takes part."""

    config: str
    """A run's YAML file, relative to the comparison's."""
    overrides: tuple[str, ...] = ()
    """dotted.path=value, as on the launcher's command line."""


class ComparisonConfig(StrictModel):
    """What is compared. Every run is a folder OUT/<member>-seed<N>, stopped, resumed and skipped like any other."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seeds: tuple[int, ...] = Field(min_length=1)
    members: dict[str, MemberConfig] = Field(min_length=1)
    rows: dict[str, str] = Field(min_length=1)
    """Name in the table -> member.subject (a subject of the member's evaluate stage)."""
    baseline: str
    """The row that the others are held against."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"seeds {list(seeds)}: allowed: different numbers from 0 on")
        return seeds

    @model_validator(mode="after")
    def _fit(self) -> ComparisonConfig:
        if self.baseline not in self.rows:
            raise ValueError(
                f"baseline: '{self.baseline}' is no row; allowed: {', '.join(self.rows)}"
            )
        for row, target in self.rows.items():
            if target.partition(".")[0] not in self.members:
                raise ValueError(
                    f"rows.{row}: '{target}' names no member; allowed: {', '.join(f'{m}.SUBJECT' for m in self.members)}"
                )
        return self


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The comparison's file, and where it goes."""
    parser.add_argument("config", help="a YAML file, as configs/compare_digits.yaml")
    parser.add_argument(
        "--out", help="the folder of its runs, table and page (default runs/<name>)"
    )
    parser.add_argument("--processes", type=int, default=1, help="of each run (default 1)")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="how many runs at a time share the cores (default 1); what they say goes to RUN/said.txt",
    )
    parser.add_argument(
        "overrides", nargs="*", help="dotted.path=value of the comparison, as in seeds=[0]"
    )


def main(args: argparse.Namespace) -> int:
    """Check everything, run what is not done, write the table after each run."""
    path = Path(args.config)
    comparison = read_comparison(path, args.overrides)
    out = Path(args.out or Path("runs") / comparison.name)
    if args.at_once < 1 or args.processes < 1:
        raise ConfigError(
            f"--at-once {args.at_once}, --processes {args.processes}; allowed: 1 or more"
        )
    runs = planned(comparison, path.parent, out)
    data = same_data(runs)
    for number, run in enumerate(runs.values(), 1):
        if finished(run):
            print(f"[{number}/{len(runs)}] {run.run_dir}: done before, skipped", flush=True)
    missing = {
        f"[{number}/{len(runs)}] {run.run_dir}": run
        for number, run in enumerate(runs.values(), 1)
        if not finished(run)
    }
    code = Runs(args.processes, args.at_once, data).all(
        missing, lambda: publish(comparison, runs, out)
    )
    if code:
        return code
    print("\n" + publish(comparison, runs, out) + f"\ncomparison: {out / 'compare.html'}")
    return 0


def read_comparison(path: Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """A validated comparison. Raises ConfigError."""
    return validate_settings(ComparisonConfig, read_settings(path, overrides), str(path))


def planned(
    comparison: ComparisonConfig, configs: Path, out: Path
) -> dict[tuple[str, int], RunConfig]:
    """(member, seed) -> its validated settings, one seed after the other. Raises ConfigError, also for subjects that nobody evaluates."""
    runs = {}
    for seed in comparison.seeds:
        for name, member in comparison.members.items():
            own = [
                f"seed={seed}",
                f"runtime.run_dir={out / f'{name}-seed{seed}'}",
                f"runtime.cache_dir={out / 'data'}",
            ]
            runs[name, seed] = load_config(configs / member.config, [*member.overrides, *own])
    for row, target in comparison.rows.items():
        name, _, subject = target.partition(".")
        subjects = [
            s
            for stage in runs[name, comparison.seeds[0]].stages.values()
            for s in getattr(stage, "subjects", {})
        ]
        if subject not in subjects:
            raise ConfigError(
                f"rows.{row}: '{subject}' is no subject of {name}; allowed: {', '.join(f'{name}.{s}' for s in subjects)}"
            )
    return runs


def same_data(runs: dict[tuple[str, int], RunConfig]) -> list[Path]:
    """The manifests that say that the data is built. Raises ConfigError unless every run clusters the same images."""
    from dist_scan.preflight import check_data, fingerprints
    from dist_scan.storage.artifacts import MANIFEST

    marks = {}
    for (name, _), run in runs.items():
        if name not in marks:
            marks[name] = {
                k: v for k, v in fingerprints(run, check_data(run)).items() if k.startswith("beton_")
            }
    first = next(iter(marks))
    for name, mark in marks.items():
        if mark != marks[first]:
            raise ConfigError(
                f"members.{name} and members.{first} do not cluster the same images; give both the same `data:` (source, limit, "
                "stored, resolution), with overrides where needed"
            )
    return [
        Path(next(iter(runs.values())).runtime.cache_dir) / stage / mark / MANIFEST
        for stage, mark in marks[first].items()
    ]


def finished(run: RunConfig) -> bool:
    """Whether a run with exactly these settings is done."""
    done, settings = run.run_dir / "DONE", run.run_dir / "config.yaml"
    return done.is_file() and settings.is_file() and settings.read_text() == dump(run)


class Runs:
    """Runs through launch/local.py, at most `at_once` at a time; the first alone while it builds the data that all share (until the files `data`
    are there). Each gets its part of the cores; a notice to this process is passed on, and when a run fails the others are asked to save and leave."""

    def __init__(self, processes: int, at_once: int, data: Sequence[Path] = ()) -> None:
        self.processes, self.at_once, self.data, self.code = processes, at_once, data, 0
        self.built = False
        self.running: dict[subprocess.Popen, tuple[str, Path]] = {}
        self.threads = max(1, len(os.sched_getaffinity(0)) // (processes * at_once))

    def all(self, missing: dict[str, RunConfig], ended: Callable[[], object]) -> int:
        """Every run to its end, in order, `ended` after each that is done. Returns 0, or the exit code of the first that failed."""
        waiting = list(missing.items())
        before = {
            number: signal.signal(number, lambda n, frame: self._tell(n)) for number in NOTICE
        }
        try:
            while self.running or (waiting and not self.code):
                while waiting and not self.code and len(self.running) < self._room():
                    self._start(*waiting.pop(0))
                self._look(ended)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.code

    def _room(self) -> int:
        self.built = self.built or all(file.is_file() for file in self.data)
        return self.at_once if self.built else 1

    def _start(self, title: str, run: RunConfig) -> None:
        print(title, flush=True)
        write_text(_made(run.run_dir) / "wanted.yaml", dump(run))
        said = open(run.run_dir / "said.txt", "ab") if self.at_once > 1 else None
        line = [
            sys.executable,
            str(LOCAL),
            str(run.run_dir / "wanted.yaml"),
            "--processes",
            str(self.processes),
        ]
        child = subprocess.Popen(
            line,
            start_new_session=True,
            stdout=said,
            stderr=said and subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(self.threads)} | os.environ,
        )
        self.running[child] = title, run.run_dir
        if said:
            said.close()

    def _tell(self, number: int) -> None:
        """Pass a notice on; nothing is started after it."""
        self.code = self.code or 128 + number
        for child in self.running:
            child.send_signal(number)

    def _look(self, ended: Callable[[], object]) -> None:
        time.sleep(0.1)
        for child in [c for c in self.running if c.poll() is not None]:
            title, folder = self.running.pop(child)
            code = child.returncode if child.returncode >= 0 else 128 - child.returncode
            if code == 0:
                if self.at_once > 1:
                    print(f"{title}: done", flush=True)
                self.built = True
                ended()
                continue
            last = (
                (folder / "said.txt").read_text(errors="replace").splitlines()[-20:]
                if self.at_once > 1
                else []
            )
            print(
                "\n".join([*last, f"{folder}: ended with {code}; the same command goes on"]),
                file=sys.stderr,
            )
            if not self.code:
                self._tell(signal.SIGTERM)
                self.code = code


def publish(comparison: ComparisonConfig, runs: dict[tuple[str, int], RunConfig], out: Path) -> str:
    """Write compare.json, compare.md and compare.html from the runs that are done. Returns the table as text."""
    from dist_scan.report.comparison import Comparison, Row, markdown, write_page

    facts = {
        key: json.loads((run.run_dir / "report.json").read_text())
        for key, run in runs.items()
        if finished(run)
    }
    rows = []
    for row, target in comparison.rows.items():
        name, _, subject = target.partition(".")
        rows.append(
            Row(
                row,
                {
                    seed: facts[name, seed][subject]
                    for seed in comparison.seeds
                    if (name, seed) in facts
                },
            )
        )
    images = next(iter(facts.values()))["num_images"] if facts else 0
    found = Comparison(comparison.name, images, rows, comparison.baseline, len(comparison.seeds))
    text = markdown(found)
    write_json(
        _made(out) / "compare.json",
        {
            "name": comparison.name,
            "num_images": images,
            "baseline": comparison.baseline,
            "rows": {r.name: {str(s): v for s, v in r.scores.items()} for r in rows},
        },
    )
    write_text(out / "compare.md", text)
    write_page(found, out / "compare.html")
    return text


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
