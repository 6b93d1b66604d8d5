"""The test cluster of a test file, and the undisturbed run that its results are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, MissingError, check_host
from tests.slurm.jobs import LONG
from tests.support.launches import RunningLauncher, command


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes, started for the file and ended after it."""
    try:
        check_host()
    except MissingError as error:
        if os.environ.get("DIST_SCAN_TEST_SLURM") == "1":
            pytest.fail(f"DIST_SCAN_TEST_SLURM=1 requires these tests; {error}")
        pytest.skip(str(error))
    slurm = Cluster(tmp_path_factory.mktemp("slurm"))
    slurm.up()
    yield slurm
    slurm.down()


class UndisturbedRun:
    """The long quickstart in two local processes; runs in the background from the start."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.launcher = RunningLauncher(command(self.run_dir, *LONG, processes=2), folder)

    def finish(self) -> Path:
        """Wait for its end; returns its run folder."""
        done = self.launcher.wait()
        assert done.returncode == 0, done.stdout
        return self.run_dir


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> UndisturbedRun:
    """A run without faults, which a test compares its job with."""
    return UndisturbedRun(tmp_path_factory.mktemp("undisturbed"))
