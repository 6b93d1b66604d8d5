"""`launch/slurm.py --nodes 1,2 --benchmark` on the test cluster: two jobs in order, one page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_scan.run_config import load_config
from tests.slurm.cluster import Cluster, wait_until
from tests.support.launches import ROOT, SMALL, environment

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
QUICK = ROOT / "configs" / "quickstart.yaml"
ONE_TRAINING = [
    f"stages.{name}="
    for name in load_config(QUICK).stages
    if name not in ("beton_train", "pretext")
]


def launch(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """Exit code and output of launch/slurm.py."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "slurm.py"), *words],
        env=environment(SLURM_CONF=str(cluster.config)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def test_one_page_from_two_jobs(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    small = [word for word in SMALL if word.startswith(("data.", "stages.pretext."))]
    words = ["--nodes", "1,2", "--benchmark", "run,allreduce", "--steps", "6"]
    words += [str(QUICK), f"runtime.run_dir={folder}", *small, *ONE_TRAINING]
    submitted = launch(cluster, *words)
    assert submitted.returncode == 0, submitted.stdout
    run_dirs = [folder / f"nodes-{nodes}" for nodes in (1, 2)]
    jobs = [
        json.loads((run_dir / "slurm" / "job.json").read_text())["job_id"] for run_dir in run_dirs
    ]
    second = cluster.call("scontrol", "show", "job", jobs[1])
    assert f"afterany:{jobs[0]}" in second.replace("(unfulfilled)", "")
    squeue = ("squeue", "-h", "-t", "PD,R,CG", "-j", ",".join(jobs))
    wait_until(lambda: not cluster.call(*squeue, check=False).strip(), 300, "the end of both jobs")

    logs = "".join(path.read_text() for path in folder.glob("nodes-*/slurm/*.out"))
    figures = json.loads((folder / "scaling.json").read_text())
    assert figures["missing"] == {}, logs
    curves = {(curve["benchmark"], curve["label"]): curve for curve in figures["curves"]}
    one, two = curves["trainings", "pretext"]["points"]
    assert (one["nodes"], two["nodes"]) == (1, 2)
    assert one["efficiency"] == 1.0
    assert (one["row"]["world_size"], two["row"]["world_size"]) == (1, 2)
    for point in (one, two):
        assert point["row"]["steps"] == 7
        assert point["row"]["peak_host_mib"] > 0
        assert point["row"]["bottleneck"]
    slowest = (two["row"]["worst_rank"], two["row"]["worst_host"])
    assert slowest in ((0, "n1"), (1, "n2"))
    assert sum(two["row"]["sections"].values()) == pytest.approx(1.0, abs=1e-3)
    for (benchmark, _), curve in curves.items():
        if benchmark == "allreduce":  # a single rank sends nothing
            assert [point["nodes"] for point in curve["points"]] == [2]

    page = (folder / "scaling.html").read_text()
    assert "2 nodes give" in page
    assert "2 nodes: " in page
    assert "http" not in page
    again = launch(cluster, *words)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("measured before") == 2
    assert "done at" in launch(cluster, "status", str(folder)).stdout
