"""The batch script run by bash, with stand-ins for Slurm's tools: what setup lines may do to the job, and what a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_scan.config import SlurmConfig
from launch import sbatch_script as batch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tools(tmp_path: Path):
    """A folder with Slurm's tools: the first srun fails, the second leaves DONE."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = f'echo x >>{tmp_path}/sruns; [ "$(wc -l <{tmp_path}/sruns)" = 1 ] && exit 3; echo now >"$RUN/DONE"'
    for name, line in {"srun": srun, "scontrol": "echo JobState=RUNNING", "env": "true"}.items():
        folder.joinpath(name).write_text(f"#!/bin/bash\n{line}\n")
        folder.joinpath(name).chmod(0o755)
    return folder


def run(
    tmp_path: Path, tools: Path, *setup: str, relaunches: int = 3
) -> subprocess.CompletedProcess:
    """The batch script as a file, as Slurm runs it."""
    run_dir = tmp_path / "a run"
    (run_dir / "slurm").mkdir(parents=True)
    script = tmp_path / "script.sh"
    script.write_text(
        batch.script(SlurmConfig(setup=setup), run_dir, "a", sys.executable, ROOT, relaunches)
    )
    return subprocess.run(
        ["bash", script],
        text=True,
        capture_output=True,
        timeout=60,
        env={
            "PATH": f"{tools}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NTASKS": "1",
        },
    )


@pytest.mark.parametrize(
    "line",
    [
        "set -e",
        "set -euo pipefail",
        "trap 'exit 9' ERR",
        "true \\",
        "grep -q nothing /dev/null || true",
        "[ -e /nowhere ] && source /nowhere",
    ],
)
def test_setup_lines_leave_the_relaunches_alone(tmp_path: Path, tools, line) -> None:
    """`wait` returns the code of ranks that failed: under errexit the script left there, without a decision."""
    done = run(tmp_path, tools, line)
    assert (
        done.returncode == 0
        and "relaunch: a process ended" in done.stdout
        and "done: the run is done" in done.stdout
    ), done


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (("true", "module load cuda"), "'module load cuda' failed with code 127"),
        (("false", "true"), "'false' failed with code 1"),
        (("loads() {", "return 4; }", "loads it"), "'loads it' failed with code 4"),
    ],
)
def test_a_setup_line_that_fails_ends_the_job(tmp_path: Path, tools, lines, named) -> None:
    done = run(tmp_path, tools, *lines)
    assert (
        done.returncode == 1
        and f"mistake: slurm.setup: the line {named}" in done.stderr
        and "|| true" in done.stderr
    ), done
    assert (
        named in (tmp_path / "a run" / "MISTAKE").read_text() and not (tmp_path / "sruns").exists()
    )


def test_a_setup_line_that_was_ended_by_a_notice_is_no_mistake(tmp_path: Path, tools) -> None:
    done = run(tmp_path, tools, "bash -c 'kill -TERM $$'")
    assert (
        done.returncode == 143
        and not (tmp_path / "a run" / "MISTAKE").exists()
        and not (tmp_path / "sruns").exists()
    ), done


def test_what_fails_inside_a_sourced_file_or_a_function_is_its_own_affair(
    tmp_path: Path, tools
) -> None:
    (tmp_path / "activate").write_text("false\nexport GIVEN=1\n")
    done = run(
        tmp_path,
        tools,
        f"source {tmp_path}/activate",
        "inner() { false; true; }",
        "inner",
        '[ "$GIVEN" = 1 ]',
    )
    assert done.returncode == 0 and "done: the run is done" in done.stdout, done


def test_three_faults_end_the_job_also_where_none_can_be_written_down(
    tmp_path: Path, tools
) -> None:
    """The script itself keeps the count from one decision to the next."""
    (tools / "srun").write_text(f"#!/bin/bash\necho x >>{tmp_path}/sruns; exit 3\n")
    (tmp_path / "a run" / "logs" / "faults.jsonl").mkdir(parents=True)
    done = run(tmp_path, tools, relaunches=20)
    assert (
        done.returncode == 1
        and "give_up: a process ended" in done.stdout
        and len((tmp_path / "sruns").read_text().split()) == 3
    ), done
