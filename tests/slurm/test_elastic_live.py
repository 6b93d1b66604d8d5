"""Rows 6, 18 and 19 of RELIABILITY.md's catalogue on the real Slurm: what one start leaves, and the next one finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import losses, rows
from tests.slurm.tiny import Tiny, local

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
EXACT = (
    "stages.pretext.precision=fp64",
    "runtime.keep_checkpoints=4",
)  # in fp64 nothing hides a difference
LEAVE = {"kind": "signal", "signal": "SIGTERM", "rank": 0}


def test_four_nodes_then_two_then_three_are_one_run_and_bad_checkpoints_cost_their_steps(
    cluster, tmp_path: Path
) -> None:
    """The same images at each step on any number of ranks. A TERM to a rank ends the job where none may be relaunched."""
    folder, once = tmp_path / "nodes", "runtime.relaunches=0"
    Tiny(cluster, folder, 4, *EXACT, once, faults=({**LEAVE, "step": 6},)).stopped()
    bad = [flipped(saved(folder)[-1])]
    Tiny(cluster, folder, 2, *EXACT, once, faults=({**LEAVE, "step": 13},)).stopped()
    bad += [without(saved(folder)[-2]), truncated(saved(folder)[-1])]
    job = Tiny(cluster, folder, 3, *EXACT, once, faults=({**LEAVE, "at": "shard"},))
    job.stopped()
    assert "3 ranks" in job.log()
    said = (job.run_dir / "logs" / "run.log").read_text()
    for path, why in zip(
        bad, ("state.pt does not match its sha256", "No such file", "bytes instead of")
    ):
        assert [
            line
            for line in said.splitlines()
            if f"{path} is damaged" in line and why in line and f"bad-{path.name}" in line
        ], said
    expected, trained = losses(local(tmp_path / "one", *EXACT, processes=1)), rows(job.run_dir)
    assert len(trained) == 20 + 1 + 2 and {row["step"] for row in trained} == set(expected), (
        "a step for each bad one, none was left out"
    )
    assert all(abs(expected[row["step"]] - row["loss"]) < 1e-5 for row in trained)
    kept = shards(job)
    job = Tiny(cluster, folder, 2, *EXACT).submit()
    job.finish()
    assert kept and kept.items() < shards(job).items(), (
        "the shards that three ranks had finished are used by two"
    )
    started_again(cluster, folder)


def started_again(cluster: Cluster, folder: Path) -> None:
    """After the end: as it is, after a runtime edit, after an edit of a stage's meaning."""
    everything = ["beton_train", "features", "kmeans", "neighbours", "pretext"]
    for edit, skipped in (
        ((), everything),
        (("runtime.log_every=2",), everything),
        (("stages.features.num_shards=5",), ["beton_train", "pretext"]),
    ):
        before = (folder / "run" / "logs" / "run.log").read_text()
        Tiny(cluster, folder, 1, *EXACT, *edit).submit().finish()
        added = (folder / "run" / "logs" / "run.log").read_text().removeprefix(before)
        stages = {
            name: [line.split()[1][:-1] for line in added.splitlines() if f": {name} " in line]
            for name in ("already done", "starts")
        }
        assert sorted(stages["already done"]) == skipped and sorted(stages["starts"]) == sorted(
            set(everything) - set(skipped)
        ), (edit, added)


def saved(folder: Path) -> list[Path]:
    """The pretext's checkpoints, oldest first."""
    return sorted(folder.glob("run/stages/pretext/*/work/checkpoints/step-*"))


def flipped(checkpoint: Path) -> Path:
    """One bit of it."""
    data = bytearray((checkpoint / "state.pt").read_bytes())
    data[len(data) // 2] ^= 16
    (checkpoint / "state.pt").write_bytes(data)
    return checkpoint


def truncated(checkpoint: Path) -> Path:
    """Five bytes less of it."""
    (checkpoint / "state.pt").write_bytes((checkpoint / "state.pt").read_bytes()[:-5])
    return checkpoint


def without(checkpoint: Path) -> Path:
    """A file of it gone."""
    (checkpoint / "state.pt").unlink()
    return checkpoint


def shards(job: Tiny) -> dict[str, int]:
    """The embed stage's finished shards, each with the moment it was written."""
    return {
        p.name: p.stat().st_mtime_ns for p in job.run_dir.glob("stages/features/*/*-[0-9]*.npy")
    }
