"""Run several configs over several seeds on the same data; one table and one page that compare them. Finished runs are skipped."""
from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from dist_scan.artefacts import write_json, write_text
from dist_scan.config import ConfigError, RunConfig, Strict, dump, load, override, read_yaml

LOCAL = Path(__file__).resolve().parents[2] / "launch" / "local.py"
NOTICE = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class MemberConfig(Strict):
    """One config that takes part."""

    config: str
    """A run's YAML file, relative to the comparison's."""
    overrides: tuple[str, ...] = ()
    """dotted.path=value, as on the launcher's command line."""


class ComparisonConfig(Strict):
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
            raise ValueError(f"baseline: '{self.baseline}' is no row; allowed: {', '.join(self.rows)}")
        for row, target in self.rows.items():
            if target.partition(".")[0] not in self.members:
                raise ValueError(f"rows.{row}: '{target}' names no member; allowed: {', '.join(f'{m}.SUBJECT' for m in self.members)}")
        return self


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The comparison's file, and where it goes."""
    parser.add_argument("config", help="a YAML file, as configs/compare_digits.yaml")
    parser.add_argument("--out", help="the folder of its runs, table and page (default runs/<name>)")
    parser.add_argument("--processes", type=int, default=1, help="of each run (default 1)")
    parser.add_argument("overrides", nargs="*", help="dotted.path=value of the comparison, as in seeds=[0]")


def main(args: argparse.Namespace) -> int:
    """Check everything, run what is not done, write the table after each run."""
    path = Path(args.config)
    comparison = read_comparison(path, args.overrides)
    out = Path(args.out or Path("runs") / comparison.name)
    runs = planned(comparison, path.parent, out)
    same_data(runs)
    for number, (key, run) in enumerate(runs.items(), 1):
        if finished(run):
            print(f"[{number}/{len(runs)}] {run.run_dir}: done before, skipped", flush=True)
            continue
        print(f"[{number}/{len(runs)}] {run.run_dir}", flush=True)
        write_text(_made(run.run_dir) / "wanted.yaml", dump(run))
        code = start(run.run_dir, args.processes)
        if code:
            print(f"{run.run_dir}: ended with {code}; the same command goes on", file=sys.stderr)
            return code
        publish(comparison, runs, out)
    print("\n" + publish(comparison, runs, out) + f"\ncomparison: {out / 'compare.html'}")
    return 0


def read_comparison(path: Path, overrides: list[str] = ()) -> ComparisonConfig:
    """A validated comparison. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"comparison '{path}' does not exist; see configs/compare_digits.yaml")
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a block of settings")
    tree = override({"name": path.stem, **tree}, list(overrides))
    try:
        return ComparisonConfig.model_validate_json(json.dumps(tree))  # JSON: lists are tuples' only spelling there
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".replace("  : ", "  ") for e in error.errors()]
        raise ConfigError(f"{path}: {error.error_count()} mistake{'s' * (error.error_count() > 1)}\n" + "\n".join(lines)) from None


def planned(comparison: ComparisonConfig, configs: Path, out: Path) -> dict[tuple[str, int], RunConfig]:
    """(member, seed) -> its validated settings, one seed after the other. Raises ConfigError, also for subjects that nobody evaluates."""
    runs = {}
    for seed in comparison.seeds:
        for name, member in comparison.members.items():
            own = [f"seed={seed}", f"runtime.run_dir={out / f'{name}-seed{seed}'}", f"runtime.cache_dir={out / 'data'}"]
            runs[name, seed] = load(configs / member.config, [*member.overrides, *own])
    for row, target in comparison.rows.items():
        name, _, subject = target.partition(".")
        subjects = [s for stage in runs[name, comparison.seeds[0]].stages.values() for s in getattr(stage, "subjects", {})]
        if subject not in subjects:
            raise ConfigError(f"rows.{row}: '{subject}' is no subject of {name}; allowed: {', '.join(f'{name}.{s}' for s in subjects)}")
    return runs


def same_data(runs: dict[tuple[str, int], RunConfig]) -> None:
    """Raises ConfigError unless every run clusters the same images."""
    from dist_scan.pipeline import fingerprints, preflight

    marks = {}
    for (name, _), run in runs.items():
        if name not in marks:
            marks[name] = {k: v for k, v in fingerprints(run, preflight(run)).items() if k.startswith("beton_")}
    first = next(iter(marks))
    for name, mark in marks.items():
        if mark != marks[first]:
            raise ConfigError(f"members.{name} and members.{first} do not cluster the same images; give both the same `data:` (source, limit, "
                              "stored, resolution), with overrides where needed")


def finished(run: RunConfig) -> bool:
    """Whether a run with exactly these settings is done."""
    done, settings = run.run_dir / "DONE", run.run_dir / "config.yaml"
    return done.is_file() and settings.is_file() and settings.read_text() == dump(run)


def start(run_dir: Path, processes: int) -> int:
    """One run through launch/local.py, to its end; notices are passed on. Returns its exit code."""
    child = subprocess.Popen([sys.executable, str(LOCAL), str(run_dir / "wanted.yaml"), "--processes", str(processes)], start_new_session=True)
    before = {number: signal.signal(number, lambda n, frame: child.send_signal(n)) for number in NOTICE}
    try:
        code = child.wait()
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def publish(comparison: ComparisonConfig, runs: dict[tuple[str, int], RunConfig], out: Path) -> str:
    """Write compare.json, compare.md and compare.html from the runs that are done. Returns the table as text."""
    from dist_scan.evaluate.compare import Comparison, Row, markdown, write_page

    facts = {key: json.loads((run.run_dir / "report.json").read_text()) for key, run in runs.items() if finished(run)}
    rows = []
    for row, target in comparison.rows.items():
        name, _, subject = target.partition(".")
        rows.append(Row(row, {seed: facts[name, seed][subject] for seed in comparison.seeds if (name, seed) in facts}))
    images = next(iter(facts.values()))["num_images"] if facts else 0
    found = Comparison(comparison.name, images, rows, comparison.baseline, len(comparison.seeds))
    text = markdown(found)
    write_json(_made(out) / "compare.json", {"name": comparison.name, "num_images": images, "baseline": comparison.baseline,
                                             "rows": {r.name: {str(s): v for s, v in r.scores.items()} for r in rows}})
    write_text(out / "compare.md", text)
    write_page(found, out / "compare.html")
    return text


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
