"""The benchmark suite: how it finds and runs benchmarks, its rows and table, and scaling curves."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as suite
from benchmarks.rows import COMMON_FIELDS, common_fields, over_seeds, with_common_fields
from benchmarks.scaling import collect, curves, draw, page

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = {
    "allreduce",
    "augment",
    "bankfill",
    "checkpoint",
    "kmeans",
    "loader",
    "metrics",
    "neighbours",
    "pipeline",
    "step",
}
HELPERS = {"__main__", "interleaved", "rows", "scaling", "search_rows", "torchvision_peer"}


def test_every_file_with_a_main_is_found_and_described() -> None:
    found = {benchmark.name: benchmark for benchmark in suite.find_benchmarks()}
    assert found.keys() >= BENCHMARKS
    assert not found.keys() & HELPERS
    assert all(benchmark.about.strip() for benchmark in found.values())
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in found)


def write(folder: Path, name: str, text: str) -> suite.Benchmark | None:
    """The description of a benchmark with this source."""
    file = folder / f"{name}.py"
    file.write_text(text)
    return suite.read_benchmark(file)


def write_benchmark(folder: Path, name: str, text: str) -> suite.Benchmark:
    benchmark = write(folder, name, text)
    assert benchmark is not None
    return benchmark


def test_a_benchmark_is_described_by_its_source(tmp_path: Path) -> None:
    assert write(tmp_path, "helper", "def other(): pass") is None
    benchmark = write_benchmark(
        tmp_path,
        "mine",
        '"""First.\n\nRest."""\nQUICK = ["--n", "2"]\nNEEDS = "gpu"\ndef main(): "--compare"',
    )
    assert benchmark.about == "First."
    assert benchmark.quick == ["--n", "2"]
    assert benchmark.needs == "gpu"
    assert benchmark.compares


def test_missing_requirements_are_named(tmp_path: Path) -> None:
    slow = write_benchmark(tmp_path, "slow", "def main(): pass")
    assert suite.missing_requirement(slow, quick=True) == "has no quick form"
    needs_data = write_benchmark(tmp_path, "d", 'NEEDS = "data:nowhere"\ndef main(): pass')
    assert "nowhere" in suite.missing_requirement(needs_data, quick=False)


@pytest.mark.parametrize(
    "body, limit_s, problem",
    [
        ('print(\'{"row": "a", "wall_s": 2}\'); print(\'not a row\')', 60, ""),
        (
            "print('{\"row\": \"a\"}', flush=True); raise KeyError('gone')",
            60,
            "failed: KeyError: 'gone'",
        ),
        (
            'print(\'{"row": "a"}\', flush=True); import time; time.sleep(60)',
            6,
            "stopped after 6 s",
        ),
    ],
)
def test_rows_before_a_failure_or_the_limit_are_kept(
    body: str, limit_s: float, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    source = f"def main():\n    {body}\nmain()"
    benchmark = write_benchmark(tmp_path / "benchmarks", "mine", source)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # or the real benchmarks would be imported
    rows, got_problem = suite.run_benchmark(benchmark, False, False, limit_s)
    assert got_problem == problem
    (row,) = rows
    assert row.keys() >= set(COMMON_FIELDS)
    assert row["benchmark"] == "mine"


def test_the_table_has_every_row_and_every_problem(tmp_path: Path) -> None:
    figures = {"row": "x", "images_per_s": 12.5, "speedup_quartiles": [1, 2]}
    row = with_common_fields(figures, "step", ["--quick"])
    text = suite.format_table([row], {"heads": "needs a GPU"})
    assert "images_per_s 12.5, speedup_quartiles 1-2" in text
    assert "needs a GPU" in text
    assert "commit" not in text
    suite.write_results(tmp_path / "here", [row], {}, "python -m benchmarks --quick")
    assert json.loads((tmp_path / "here.jsonl").read_text())["configuration"] == "--quick"
    assert row["machine"] in (tmp_path / "here.md").read_text()


def test_the_configuration_of_a_row_has_no_folders_of_the_machine() -> None:
    words = (
        "/srv/data/train.beton",
        "--dir",
        "/home/me/views",
        "--out=/var/x/y.json",
        "runtime.run_dir=/scratch/me/run",
        "configs/a.yaml",
        "lr=0.1",
        "--compare",
    )
    assert common_fields(words)["configuration"] == (
        "train.beton --dir views --out=y.json runtime.run_dir=run configs/a.yaml lr=0.1 --compare"
    )


def test_figures_of_several_seeds_have_a_spread() -> None:
    assert over_seeds([0.5], "acc") == {"acc": 0.5}
    assert over_seeds([0.5, 0.7], "acc") == {"acc": 0.6, "acc_spread": 0.1414}


def step_row(nodes: int, rate: float, **fields: Any) -> dict[str, Any]:
    return {
        "benchmark": "step",
        "row": "fp32",
        "model": "resnet50",
        "nodes": nodes,
        "images_per_s": rate,
        "date": f"2026-01-0{nodes}",
        **fields,
    }


def allreduce_row(nodes: int, size: int, rate: float) -> dict[str, Any]:
    return {"benchmark": "allreduce", "row": size, "nodes": nodes, "bytes_per_s": rate}


def test_speed_up_and_efficiency_are_relative_to_the_fewest_nodes() -> None:
    older = step_row(2, 1, date="2025")
    (curve,) = curves([step_row(4, 3000), step_row(2, 1800), older])
    assert [(p.nodes, p.speedup, p.efficiency) for p in curve.points] == [
        (2, 2.0, 1.0),
        (4, pytest.approx(3000 / 900), pytest.approx(3000 / 3600)),
    ]
    seconds = [
        {"benchmark": "kmeans", "row": "a", "nodes": nodes, "wall_s": wall_s}
        for nodes, wall_s in ((1, 8.0), (2, 5.0))
    ]
    (curve,) = curves(seconds)
    assert curve.points[1].speedup == 1.6


def test_curves_of_the_all_reduce_are_flat_and_labelled_by_size() -> None:
    (curve,) = curves([allreduce_row(1, 4096, 100), allreduce_row(4, 4096, 80)])
    assert curve.flat
    assert curve.points[1].efficiency == 0.8
    assert curve.label == "4 KiB"
    several = curves(allreduce_row(2, size, 2.5e9) for size in (4096, 78496, 2**20, 3))
    labels = [curve.label for curve in several]
    assert labels == ["4 KiB", "76.66 KiB", "1 MiB", "3 bytes"], "in the order of measurement"


def test_one_point_is_a_table_and_no_curve() -> None:
    text = page([allreduce_row(2, 4096, 2.5e9)])
    assert "MB per s" in text
    assert "2,500" in text
    assert "<svg" not in text


def test_the_page_is_self_contained_and_names_the_slowest_rank(tmp_path: Path) -> None:
    fields = {
        "sections": {"data_wait": 0.1, "forward": 0.3, "backward": 0.5, "all_reduce": 0.1},
        "worst_rank": 3,
        "worst_host": "<n7>",
        "worst_behind": 0.12,
    }
    rows = [step_row(nodes, 100 * nodes, **fields) for nodes in (1, 2, 4)]
    folder = tmp_path / "array" / "2"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines + 'noise\n{"torn": ')
    assert len(collect(tmp_path)) == 3
    assert draw(tmp_path, tmp_path / "page.html") == 3
    text = (tmp_path / "page.html").read_text()
    assert "4 nodes: rank 3 on &lt;n7&gt;, 12% behind the median" in text
    assert "100%" in text
    assert "<svg" in text
    assert "http" not in text
    HTMLParser().feed(text)


def test_a_page_without_rates_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows to draw"):
        page([{"benchmark": "x", "nodes": 1}])
