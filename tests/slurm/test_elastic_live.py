"""What the next start finds: another number of nodes, damaged checkpoints, changed settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import losses, step_rows
from tests.slurm.tiny import LocalRun, TinyJob

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
# In fp64, so that rounding hides no difference.
EXACT = ("stages.pretext.precision=fp64", "runtime.keep_checkpoints=4")
# A TERM to a rank ends the job, because none may be relaunched.
NO_RELAUNCH = (*EXACT, "runtime.relaunches=0")
STOP = {"kind": "signal", "signal": "SIGTERM", "rank": 0}


def test_other_numbers_of_nodes_and_damaged_checkpoints_continue_one_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Every step has the same images on any number of ranks."""
    local = LocalRun(tmp_path / "one", *EXACT, processes=1)
    folder = tmp_path / "nodes"
    stop_at_6, stop_at_13 = ({**STOP, "step": step} for step in (6, 13))
    TinyJob(cluster, folder, 4, *NO_RELAUNCH, armed_faults=(stop_at_6,)).submit_until_stopped()
    flipped = checkpoints(folder)[-1]
    flip_bit(flipped)
    TinyJob(cluster, folder, 2, *NO_RELAUNCH, armed_faults=(stop_at_13,)).submit_until_stopped()
    deleted, truncated = checkpoints(folder)[-2:]
    (deleted / "state.pt").unlink()
    truncate(truncated)
    stop_in_embed = {**STOP, "at": "shard"}
    job = TinyJob(cluster, folder, 3, *NO_RELAUNCH, armed_faults=(stop_in_embed,))
    job.submit_until_stopped()
    assert "3 ranks" in job.log()

    # Every damaged checkpoint is named and set aside, and costs the step that it would have saved.
    assert_set_aside(job, flipped, "state.pt does not match its sha256")
    assert_set_aside(job, deleted, "No such file")
    assert_set_aside(job, truncated, "bytes instead of")
    expected = losses(local.finish())
    rows = step_rows(job.run_dir)
    assert len(rows) == 20 + 1 + 2
    assert {row["step"] for row in rows} == set(expected)
    assert all(abs(expected[row["step"]] - row["loss"]) < 1e-5 for row in rows)

    # Two ranks use the shards that three had finished.
    shards_of_three = finished_shards(job)
    job = TinyJob(cluster, folder, 2, *EXACT).submit()
    job.finish()
    assert shards_of_three
    assert shards_of_three.items() < finished_shards(job).items()
    start_again(cluster, folder)


def start_again(cluster: Cluster, folder: Path) -> None:
    """After the end: unchanged, with a runtime setting changed, with a stage's setting changed."""
    every_stage = {"beton_train", "features", "kmeans", "neighbours", "pretext"}
    log = folder / "run" / "logs" / "run.log"
    for edits, skipped in (
        ((), every_stage),
        (("runtime.log_every=2",), every_stage),
        (("stages.features.num_shards=5",), {"beton_train", "pretext"}),
    ):
        before = log.read_text()
        TinyJob(cluster, folder, 1, *EXACT, *edits).submit().finish()
        added = log.read_text().removeprefix(before)
        assert stages_in(added, "already done") == sorted(skipped), added
        assert stages_in(added, "starts") == sorted(every_stage - skipped), added


def stages_in(log: str, event: str) -> list[str]:
    """The stages with such a line in the log."""
    lines = [line for line in log.splitlines() if f": {event} " in line]
    return sorted(line.split()[1].removesuffix(":") for line in lines)


def checkpoints(folder: Path) -> list[Path]:
    """The pretext's checkpoints, oldest first."""
    return sorted(folder.glob("run/stages/pretext/*/work/checkpoints/step-*"))


def flip_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "state.pt").read_bytes())
    data[len(data) // 2] ^= 16
    (checkpoint / "state.pt").write_bytes(data)


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "state.pt"
    file.write_bytes(file.read_bytes()[:-5])


def assert_set_aside(job: TinyJob, checkpoint: Path, reason: str) -> None:
    """Fail unless the log names the checkpoint, the reason, and its new name."""
    log = (job.run_dir / "logs" / "run.log").read_text()
    lines = [line for line in log.splitlines() if f"{checkpoint} is damaged" in line]
    assert any(reason in line and f"bad-{checkpoint.name}" in line for line in lines), log


def finished_shards(job: TinyJob) -> dict[str, int]:
    """The embed stage's finished shards with the time when each was written."""
    shards = job.run_dir.glob("stages/features/*/*-[0-9]*.npy")
    return {path.name: path.stat().st_mtime_ns for path in shards}
