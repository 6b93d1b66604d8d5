"""The batch script run by bash, with stand-ins for Slurm's commands: setup lines, faults."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dist_scan.config import SlurmConfig
from launch.sbatch_script import BatchJob, build_script
from tests.support.commands import write_commands


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with Slurm's commands: the first srun fails, the second leaves DONE."""
    count = f'echo x >>{tmp_path}/sruns; [ "$(wc -l <{tmp_path}/sruns)" = 1 ] && exit 3'
    lines = {
        "srun": f'{count}; echo now >"$RUN/DONE"',
        "scontrol": "echo JobState=RUNNING",
        "env": "true",
    }
    return write_commands(tmp_path / "bin", lines)


def run_script(
    tmp_path: Path, commands: Path, *setup: str, relaunches: int = 3
) -> subprocess.CompletedProcess[str]:
    """Run the batch script from a file, as Slurm does."""
    run_dir = tmp_path / "a run"
    (run_dir / "slurm").mkdir(parents=True)
    path = tmp_path / "script.sh"
    path.write_text(build_script(BatchJob(SlurmConfig(setup=setup), run_dir, "a", relaunches)))
    return subprocess.run(
        ["bash", path],
        text=True,
        capture_output=True,
        timeout=60,
        env={
            "PATH": f"{commands}:/usr/bin:/bin",
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
def test_setup_lines_do_not_disturb_relaunches(tmp_path: Path, commands: Path, line: str) -> None:
    """`wait` returns the code of ranks that failed: under errexit the script would end there."""
    done = run_script(tmp_path, commands, line)
    assert done.returncode == 0, done
    assert "relaunch: a process ended" in done.stdout
    assert "done: the run is complete" in done.stdout


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (("true", "module load cuda"), "'module load cuda' failed with code 127"),
        (("false", "true"), "'false' failed with code 1"),
        (("loads() {", "return 4; }", "loads it"), "'loads it' failed with code 4"),
    ],
)
def test_a_setup_line_that_fails_ends_the_job(
    tmp_path: Path, commands: Path, lines: tuple[str, ...], error: str
) -> None:
    done = run_script(tmp_path, commands, *lines)
    assert done.returncode == 1, done
    assert f"fatal_error: slurm.setup: the line {error}" in done.stderr
    assert "|| true" in done.stderr
    assert error in (tmp_path / "a run" / "FATAL_ERROR").read_text()
    assert not (tmp_path / "sruns").exists()


def test_a_setup_line_that_is_ended_by_a_signal_is_no_invalid_setting(
    tmp_path: Path, commands: Path
) -> None:
    done = run_script(tmp_path, commands, "bash -c 'kill -TERM $$'")
    assert done.returncode == 143, done
    assert not (tmp_path / "a run" / "FATAL_ERROR").exists()
    assert not (tmp_path / "sruns").exists()


def test_commands_may_fail_inside_a_sourced_file_or_a_function(
    tmp_path: Path, commands: Path
) -> None:
    (tmp_path / "activate").write_text("false\nexport GIVEN=1\n")
    setup = (
        f"source {tmp_path}/activate",
        "inner() { false; true; }",
        "inner",
        '[ "$GIVEN" = 1 ]',
    )
    done = run_script(tmp_path, commands, *setup)
    assert done.returncode == 0, done
    assert "done: the run is complete" in done.stdout


def test_three_faults_end_the_job_even_if_none_can_be_logged(
    tmp_path: Path, commands: Path
) -> None:
    """The script keeps the count from one decision to the next."""
    write_commands(commands, {"srun": f"echo x >>{tmp_path}/sruns; exit 3"})
    (tmp_path / "a run" / "logs" / "faults.jsonl").mkdir(parents=True)
    done = run_script(tmp_path, commands, relaunches=20)
    assert done.returncode == 1, done
    assert "give_up: a process ended" in done.stdout
    assert len((tmp_path / "sruns").read_text().split()) == 3
