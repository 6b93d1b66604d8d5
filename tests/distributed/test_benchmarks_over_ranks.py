"""Benchmarks that run over the ranks of a job: one row from rank 0 with the rate of all of them. Two gloo ranks stand for the job."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from benchmarks.rows import COMMON_FIELDS
from benchmarks.scaling import rate_of
from tests.support.ranks import run_ranks

WORDS = {
    "step": [
        "--model",
        "resnet_small",
        "--width",
        "4",
        "--size",
        "16",
        "--batch",
        "4",
        "--steps",
        "6",
    ],
    "allreduce": ["--sizes", "4K", "8232", "--rounds", "3"],
    "neighbours": ["--sizes", "600x16", "--k", "5", "--rounds", "2"],
    "kmeans": [
        "--rows",
        "600",
        "--dim",
        "16",
        "--clusters",
        "7",
        "--iterations",
        "3",
        "--rounds",
        "2",
    ],
    "heads": ["--batch", "32", "--clusters", "7", "--dim", "16", "--rounds", "2"],
    "loader": [
        "sklearn:digits",
        "--images",
        "50",
        "--size",
        "16",
        "--stored",
        "raw",
        "--resolution",
        "16",
        "--rounds",
        "2",
    ],
}


def measure(folder: Path) -> dict[str, list[dict]]:
    """All of them in one pair of ranks: imports are slow."""
    import importlib

    found = {}
    for name, words in WORDS.items():
        more = (
            ["--folder", str(folder / name)] if name in ("neighbours", "kmeans", "loader") else []
        )
        with contextlib.redirect_stdout(io.StringIO()) as said:
            importlib.import_module(f"benchmarks.{name}").main([*words, *more])
        found[name] = [
            json.loads(line) for line in said.getvalue().splitlines() if line.startswith("{")
        ]
    return found


def test_rank_0_tells_the_rate_of_all(tmp_path: Path) -> None:
    first, second = run_ranks(measure, 2, tmp_path, timeout_s=500)
    assert not any(second.values())
    assert {name: len(rows) for name, rows in first.items()} == {
        name: 2 if name == "allreduce" else 1 for name in WORDS
    }
    for name, (row, *_) in first.items():
        assert set(COMMON_FIELDS) <= row.keys() and row["world_size"] == 2, name
        assert rate_of(row)[0] > 0 and rate_of(row)[1] != "runs_per_s", name
    (loader,), (heads,) = first["loader"], first["heads"]
    assert loader["images"] == 50 and loader["images_per_s"] == round(50 / loader["wall_s"], 1)
    assert heads["images_per_s"] == round(32 / heads["wall_s"], 1) and first["step"][0][
        "worst_rank"
    ] in (0, 1)
