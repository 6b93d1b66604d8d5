"""The live cluster of a test file: four nodes, up for the file and down after it."""

from __future__ import annotations

import os

import pytest

from tests.slurm.cluster import Cluster, Missing, check
from tests.slurm.jobs import LONG
from tests.support.launches import run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    try:
        check()
    except Missing as why:
        if os.environ.get("DIST_SCAN_TEST_SLURM") == "1":
            pytest.fail(f"DIST_SCAN_TEST_SLURM=1 asks for these tests; {why}")
        pytest.skip(str(why))
    slurm = Cluster(tmp_path_factory.mktemp("slurm"))
    slurm.up()
    yield slurm
    slurm.down()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """Two local processes, nothing happens to them: their run folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder, *LONG, processes=2)
    assert done.returncode == 0, done.stdout
    return folder
