"""`launch/slurm.py --nodes 1,2 --benchmark` on a real Slurm: the jobs follow one another, and the last leaves one page of both."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_scan.run_config import load_config
from tests.support.launches import ROOT, SMALL, environment

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
QUICK = ROOT / "configs" / "quickstart.yaml"
ONE_TRAINING = [
    f"stages.{name}="
    for name in load_config(QUICK).stages
    if name not in ("beton_train", "pretext")
]


def launch(cluster, *words: str) -> subprocess.CompletedProcess:
    """launch/slurm.py's output and exit code."""
    env = environment() | {"SLURM_CONF": str(cluster.conf)}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "slurm.py"), *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def test_one_page_from_two_jobs(cluster, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    words = [
        "--nodes",
        "1,2",
        "--benchmark",
        "run,allreduce",
        "--steps",
        "6",
        str(QUICK),
        f"runtime.run_dir={folder}",
        *(word for word in SMALL if word.startswith(("data.", "stages.pretext."))),
        *ONE_TRAINING,
    ]
    sent = launch(cluster, *words)
    assert sent.returncode == 0, sent.stdout
    jobs = [
        json.loads((folder / f"nodes-{n}" / "slurm" / "job.json").read_text())["job_id"]
        for n in (1, 2)
    ]
    assert f"afterany:{jobs[0]}" in cluster.call("scontrol", "show", "job", jobs[1]).replace(
        "(unfulfilled)", ""
    )
    deadline, page = time.monotonic() + 300, folder / "scaling.html"
    while cluster.call("squeue", "-h", "-t", "PD,R,CG", "-j", ",".join(jobs), check=False).strip():
        assert time.monotonic() < deadline, [
            p.read_text()[-2000:] for p in folder.glob("nodes-*/slurm/*.out")
        ]
        time.sleep(0.3)
    logs = "".join(p.read_text() for p in folder.glob("nodes-*/slurm/*.out"))
    facts = json.loads((folder / "scaling.json").read_text())
    assert facts["missing"] == {}, logs
    curves = {(c["benchmark"], c["label"]): c for c in facts["curves"]}
    pretext = curves["trainings", "pretext"]
    assert [p["nodes"] for p in pretext["points"]] == [1, 2] and pretext["points"][0][
        "efficiency"
    ] == 1.0
    rows = [p["row"] for p in pretext["points"]]
    assert [r["world_size"] for r in rows] == [1, 2] and all(
        r["steps"] == 7 and r["peak_host_mib"] > 0 and r["verdict"] for r in rows
    )
    assert (rows[1]["worst_rank"], rows[1]["worst_host"]) in ((0, "n1"), (1, "n2")) and sum(
        rows[1]["sections"].values()
    ) == pytest.approx(1.0, abs=1e-3)
    assert all(
        p["nodes"] == 2
        for (name, _), c in curves.items()
        if name == "allreduce"
        for p in c["points"]
    ), "alone nothing is sent"
    text = page.read_text()
    assert "2 nodes give" in text and "2 nodes: " in text and "http" not in text
    again = launch(cluster, *words)
    assert again.returncode == 0 and again.stdout.count("measured before") == 2, again.stdout
    assert "done at" in launch(cluster, "status", str(folder)).stdout
