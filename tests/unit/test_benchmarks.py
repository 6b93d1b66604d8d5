"""The suite around the benchmarks: files are found by name, rows carry what must be known, failures are told, scaling is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks.rows import COMMON_FIELDS, with_common_fields
from benchmarks.scaling import collect, curves, draw, page

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_with_a_main_is_found_and_described() -> None:
    found = {b.name: b for b in suite.find_benchmarks()}
    assert {
        "loader",
        "augment",
        "step",
        "allreduce",
        "checkpoint",
        "bankfill",
        "pipeline",
        "metrics",
        "neighbours",
        "kmeans",
    } <= found.keys()
    assert not {"rows", "interleaved", "scaling", "__main__"} & found.keys()
    assert all(b.about.strip() for b in found.values())
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert listed.returncode == 0 and all(name in listed.stdout for name in found)


def write(folder: Path, name: str, text: str) -> suite.Benchmark:
    (folder / f"{name}.py").write_text(text)
    return suite.read_benchmark(folder / f"{name}.py")


def test_a_file_says_what_it_needs(tmp_path: Path) -> None:
    assert write(tmp_path, "part", "def other(): pass") is None
    made = write(
        tmp_path,
        "mine",
        '"""First.\n\nRest."""\nQUICK = ["--n", "2"]\nNEEDS = "gpu"\ndef main(): "--compare"',
    )
    assert (made.about, made.quick, made.needs, made.compares) == (
        "First.",
        ["--n", "2"],
        "gpu",
        True,
    )
    assert (
        suite.missing_requirement(write(tmp_path, "slow", "def main(): pass"), quick=True)
        == "has no quick form"
    )
    assert "nowhere" in suite.missing_requirement(
        write(tmp_path, "d", 'NEEDS = "data:nowhere"\ndef main(): pass'), quick=False
    )


@pytest.mark.parametrize(
    ("body", "rows", "problem"),
    [
        ('print(\'{"row": "a", "wall_s": 2}\'); print(\'not a row\')', 1, ""),
        (
            "print('{\"row\": \"a\"}', flush=True); raise KeyError('gone')",
            1,
            "failed: KeyError: 'gone'",
        ),
        (
            'print(\'{"row": "a"}\', flush=True); import time; time.sleep(60)',
            1,
            "cut off after 6 s",
        ),
    ],
)
def test_rows_before_a_failure_or_the_limit_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body, rows, problem
) -> None:
    (tmp_path / "benchmarks").mkdir()
    made = write(tmp_path / "benchmarks", "mine", f"def main():\n    {body}\nmain()")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.delenv(
        "PYTHONPATH", raising=False
    )  # it would lead to the benchmarks that there are
    found, said = suite.run_benchmark(made, False, False, 6.0 if "cut off" in problem else 60.0)
    assert len(found) == rows and said == problem
    assert set(COMMON_FIELDS) <= found[0].keys() and found[0]["benchmark"] == "mine"


def test_the_table_shows_every_row_and_every_problem(tmp_path: Path) -> None:
    rows = [
        with_common_fields(
            {"row": "x", "images_per_s": 12.5, "speedup_quartiles": [1, 2]}, "step", ["--quick"]
        )
    ]
    text = suite.format_table(rows, {"heads": "needs a GPU"})
    assert (
        "images_per_s 12.5, speedup_quartiles 1-2" in text
        and "needs a GPU" in text
        and "commit" not in text
    )
    suite.write_results(tmp_path / "here", rows, {}, "python -m benchmarks --quick")
    assert json.loads((tmp_path / "here.jsonl").read_text())["configuration"] == "--quick"
    assert rows[0]["machine"] in (tmp_path / "here.md").read_text()


def row(nodes: int, rate: float, **more):
    return {
        "benchmark": "step",
        "row": "fp32",
        "model": "resnet50",
        "nodes": nodes,
        "images_per_s": rate,
        "date": f"2026-01-0{nodes}",
        **more,
    }


def test_scaling_is_counted_from_the_fewest_nodes() -> None:
    (curve,) = curves([row(4, 3000), row(2, 1800), row(2, 1, date="2025")])
    assert [(p.nodes, p.speedup, p.efficiency) for p in curve.points] == [
        (2, 2.0, 1.0),
        (4, pytest.approx(3000 / 900), pytest.approx(3000 / 3600)),
    ]
    (flat,) = curves(
        [
            {"benchmark": "allreduce", "row": 4096, "nodes": n, "bytes_per_s": r}
            for n, r in ((1, 100), (4, 80))
        ]
    )
    assert flat.flat and flat.points[1].efficiency == 0.8 and flat.label == "4 KiB"
    sizes = (4096, 78496, 2**20, 3)
    several = curves(
        [{"benchmark": "allreduce", "row": n, "nodes": 2, "bytes_per_s": 2.5e9} for n in sizes]
    )
    assert [c.label for c in several] == ["4 KiB", "76.66 KiB", "1 MiB", "3 bytes"], (
        "in the order in which they were measured"
    )
    alone = page([{"benchmark": "allreduce", "row": 4096, "nodes": 2, "bytes_per_s": 2.5e9}])
    assert "MB per s" in alone and "2,500" in alone and "<svg" not in alone, "one point is no curve"
    (seconds,) = curves(
        [
            {"benchmark": "kmeans", "row": "a", "nodes": n, "wall_s": s}
            for n, s in ((1, 8.0), (2, 5.0))
        ]
    )
    assert seconds.points[1].speedup == 1.6


def test_the_page_stands_alone_names_the_worst_rank_and_escapes(tmp_path: Path) -> None:
    sections = {"data_wait": 0.1, "forward": 0.3, "backward": 0.5, "all_reduce": 0.1}
    rows = [
        row(n, 100 * n, sections=sections, worst_rank=3, worst_host="<n7>", worst_behind=0.12)
        for n in (1, 2, 4)
    ]
    (tmp_path / "array" / "2").mkdir(parents=True)
    (tmp_path / "array" / "2" / "a.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows) + 'noise\n{"torn": '
    )
    assert len(collect(tmp_path)) == 3 and draw(tmp_path, tmp_path / "page.html") == 3
    text = (tmp_path / "page.html").read_text()
    assert (
        "4 nodes: rank 3 on &lt;n7&gt;, 12% behind the median" in text
        and "100%" in text
        and "<svg" in text
        and "http" not in text
    )
    HTMLParser().feed(text)
    with pytest.raises(ValueError, match="no rows to draw"):
        page([{"benchmark": "x", "nodes": 1}])


def test_rows_tell_no_folder_of_the_machine() -> None:
    from benchmarks.rows import common_fields

    line = (
        "/srv/data/train.beton",
        "--dir",
        "/home/me/views",
        "--out=/var/x/y.json",
        "runtime.run_dir=/scratch/me/run",
        "configs/a.yaml",
        "lr=0.1",
        "--compare",
    )
    assert (
        common_fields(line)["configuration"]
        == "train.beton --dir views --out=y.json runtime.run_dir=run configs/a.yaml lr=0.1 --compare"
    )
