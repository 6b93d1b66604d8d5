"""Benchmarks over the ranks of a job: rank 0 prints the rate of all ranks. Two gloo ranks here."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

from benchmarks.rows import COMMON_FIELDS
from benchmarks.scaling import rate_of
from tests.support.ranks import run_ranks

ARGUMENTS = {
    "step": "--model resnet_small --width 4 --size 16 --batch 4 --steps 6",
    "allreduce": "--sizes 4K 8232 --rounds 3",
    "neighbours": "--sizes 600x16 --k 5 --rounds 2",
    "kmeans": "--rows 600 --dim 16 --clusters 7 --iterations 3 --rounds 2",
    "heads": "--batch 32 --clusters 7 --dim 16 --rounds 2",
    "loader": "sklearn:digits --images 50 --size 16 --stored raw --resolution 16 --rounds 2",
}
WITH_FOLDER = ("neighbours", "kmeans", "loader")


def measure(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of all benchmarks by name; in one pair of ranks, because imports take long."""
    rows = {}
    for name, arguments in ARGUMENTS.items():
        words = arguments.split()
        if name in WITH_FOLDER:
            words += ["--folder", str(folder / name)]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            importlib.import_module(f"benchmarks.{name}").main(words)
        lines = output.getvalue().splitlines()
        rows[name] = [json.loads(line) for line in lines if line.startswith("{")]
    return rows


def test_rank_0_prints_the_rate_of_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(measure, 2, tmp_path, timeout_s=500)
    assert not any(second.values())
    assert {name: len(rows) for name, rows in first.items()} == {
        name: 2 if name == "allreduce" else 1 for name in ARGUMENTS
    }
    for name, (row, *_) in first.items():
        assert row.keys() >= set(COMMON_FIELDS), name
        assert row["world_size"] == 2, name
        rate = rate_of(row)
        assert rate is not None, name
        assert rate[0] > 0, name
        assert rate[1] != "runs_per_s", name
    (loader,), (heads,), (step,) = first["loader"], first["heads"], first["step"]
    assert loader["images"] == 50
    assert loader["images_per_s"] == round(50 / loader["wall_s"], 1)
    assert heads["images_per_s"] == round(32 / heads["wall_s"], 1)
    assert step["worst_rank"] in (0, 1)
