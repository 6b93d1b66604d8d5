"""launch/slurm.py before, during and after a submission, with stand-ins for Slurm's commands."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from dist_scan.config import ConfigError
from dist_scan.run_config import load_config
from launch import slurm, submission, watch
from launch.job import queued_job
from launch.run_lock import acquire_lock
from tests.support.commands import write_commands
from tests.support.launches import ROOT

QUICK = str(ROOT / "configs" / "quickstart.yaml")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and a Slurm whose queue is the file `queue`: STATE|NODES|REASON|SCRIPT."""
    queue = tmp_path / "queue"
    lines = {
        "sbatch": f'echo "PENDING|1|x|$1" >{queue}; sleep 0.2; echo "Submitted batch job 12"',
        "squeue": f"cat {queue} 2>/dev/null; true",
        "scancel": f'echo "$@" >{tmp_path}/cancelled',
    }
    commands = write_commands(tmp_path / "bin", lines)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    return tmp_path


def submit(run_dir: Path | str) -> str:
    return submission.submit(load_config(QUICK, [f"runtime.run_dir={run_dir}"]), "#!/bin/bash\n")


def test_a_copied_run_folder_has_no_job(folder: Path, capsys: Capture) -> None:
    original, copy = folder / "a", folder / "b"
    submit(original)
    shutil.copytree(original, copy)
    job = queued_job(original)
    assert job is not None
    assert job.job_id == "12"
    assert queued_job(copy) is None
    submission.require_unused(copy)

    assert slurm.main(["status", str(copy)]) == 0
    output = capsys.readouterr().out
    assert f"this folder is a copy of {original}, and job 12 belongs to that" in output
    assert slurm.main(["cancel", str(copy)]) == 1
    assert not (folder / "cancelled").exists()

    (folder / "link").symlink_to(original)
    assert slurm.main(["cancel", str(folder / "link")]) == 0
    assert (folder / "cancelled").read_text() == "12\n"
    original.rename(folder / "c")
    assert queued_job(folder / "c"), "a folder that was moved keeps its job"


def test_a_job_id_that_slurm_has_reused_is_another_job(folder: Path) -> None:
    submit(folder / "a")
    (folder / "queue").write_text("RUNNING|4|n[1-4]|/home/other/train.sh\n")
    assert queued_job(folder / "a") is None
    submission.require_unused(folder / "a")


def test_a_cancel_that_slurm_refuses_is_reported_in_one_line(folder: Path, capsys: Capture) -> None:
    submit(folder / "a")
    refusal = "echo 'scancel: error: Access denied' >&2; exit 1"
    write_commands(folder / "bin", {"scancel": refusal})
    assert slurm.main(["cancel", str(folder / "a")]) == 2
    error = capsys.readouterr().err
    assert "scancel could not cancel job 12: scancel: error: Access denied; try again" in error


def test_one_submission_at_a_time(folder: Path) -> None:
    (folder / "a" / "slurm").mkdir(parents=True)
    with open(folder / "a" / submission.SUBMITTING, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 1 on elsewhere", file=lock, flush=True)
        with pytest.raises(ConfigError, match="is being submitted by process 1 on elsewhere"):
            submit(folder / "a")
    assert not (folder / "queue").exists()
    assert not (folder / "a" / "config.yaml").exists()
    submit(folder / "a")
    with pytest.raises(ConfigError, match="belongs to job 12"):
        submit(folder / "a")


@pytest.mark.parametrize(
    ("run_dir", "existing"),
    [("/dev/null", "/dev/null"), ("/dev/null/x", "/dev/null"), ("/proc/x", "/proc")],
)
def test_a_run_folder_that_cannot_be_created_is_reported_in_one_line(
    folder: Path, capsys: Capture, run_dir: str, existing: str
) -> None:
    for flags in ((), ("--dry-run",)):
        words = [*flags, "--images", "400", QUICK, f"runtime.run_dir={run_dir}"]
        assert slurm.main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2, lines
        assert f"runtime.run_dir: cannot write in '{existing}' (" in lines[1]
    with pytest.raises(ConfigError, match="nothing was submitted"):
        submit(run_dir)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a%jb"])
def test_names_that_slurm_would_replace_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="which Slurm would replace"):
        submission.check_folder(tmp_path / name)
    submission.check_folder(tmp_path / "sp ace é ' q $HOME" / "does not exist yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setup", "error"),
    [
        (("true", "if true; then"), "line 2"),
        (("echo 'unclosed", "true"), "line"),
        (("cat <<X", "x"), "line 1, 'cat <<X'"),
        (("fi",), "line 1, 'fi'"),
    ],
)
def test_setup_lines_that_are_no_valid_shell_are_refused(
    folder: Path, capsys: Capture, setup: tuple[str, ...], error: str
) -> None:
    lines = [word for line in setup for word in ("--setup", line)]
    for flags in ((), ("--dry-run",)):
        words = [*flags, *lines, "--images", "400", QUICK, f"runtime.run_dir={folder}/r"]
        assert slurm.main(words) == 2
        output = capsys.readouterr().err
        assert "error: slurm.setup: bash cannot parse" in output
        assert error in output
    assert not (folder / "r").exists()


def test_the_scripts_of_a_benchmark_are_checked_too(tmp_path: Path, capsys: Capture) -> None:
    words = ["--dry-run", "--nodes", "1,2", "--benchmark", "run", "--images", "400"]
    words += ["--setup", "cat <<X", QUICK, f"runtime.run_dir={tmp_path}/b"]
    assert slurm.main(words) == 2
    assert "slurm.setup: bash cannot parse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--nodes", ""], "--nodes ''"),
        (["--mem", " "], "--mem ''"),
        (["--tflops", "nan"], "--tflops nan"),
        (["--tflops", "-1"], "--tflops -1"),
        (["--tflops", "0"], "--tflops 0"),
        (["--time", "３０"], "slurm.time"),
        (["--images", "４"], "--images"),
        (["--images", "²"], "--images"),
    ],
)
def test_impossible_values_are_refused(
    capsys: Capture, flags: list[str], error: str, tmp_path: Path
) -> None:
    words = ["--dry-run", "--images", "400", *flags, QUICK, f"runtime.run_dir={tmp_path}/r"]
    assert slurm.main(words) == 2
    assert error in capsys.readouterr().err


def test_the_printed_commands_can_be_pasted(folder: Path, capsys: Capture) -> None:
    assert slurm.main(["--images", "400", QUICK, f"runtime.run_dir={folder}/a b"]) == 0
    output = capsys.readouterr().out
    for command in watch.COMMANDS:
        assert f"{command} '{folder}/a b'" in output


@pytest.mark.parametrize(
    "files",
    [
        {"logs/faults.jsonl": '{"time": "a", "fault": "x"}\n{"time": "2026'},
        {"logs/faults.jsonl": "[]\n"},
        {"logs/faults.jsonl": "{}\n"},
        {"slurm/job.json": '{"job_'},
        {"slurm/job.json": "{}"},
        {"slurm/job.json": "[1]"},
        {"slurm/job.json": '{"job_id": 12345}'},
        {"slurm/job.json": '{"job_id": "abc"}'},
        {"slurm/job.json": '{"job_id": true}'},
        {"slurm/job.json": '{"job_id": "12", "run_dir": 3}'},
        {"slurm/job.json": '{"job_id": "12", "run_dir": "\\u0000"}'},
        {"slurm/job.json": "\udcff"},
        {"DONE": "\udcff"},
        {"DONE/folder": ""},
        {"FATAL_ERROR": "\udcff"},
        {
            "nodes-1x/config.yaml": "",
            "nodes-x/config.yaml": "",
            "nodes-1/config.yaml": "",
            "benchmark.json": "",
        },
    ],
)
def test_status_follow_and_cancel_tolerate_damaged_files(
    folder: Path, files: dict[str, str], capsys: Capture
) -> None:
    run_dir = folder / "r"
    for name, text in ({"config.yaml": "x"} | files).items():
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert slurm.main(["status", str(run_dir)]) == 0
    assert slurm.main(["cancel", str(run_dir)]) == 1
    assert slurm.main(["follow", str(run_dir)]) == (0 if "DONE" in files else 1)
    output = capsys.readouterr().out
    if "fault" in files.get("logs/faults.jsonl", ""):
        assert "last     a x" in output


def test_status_and_cancel_name_a_run_on_this_machine(folder: Path, capsys: Capture) -> None:
    run_dir = folder / "r"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("x")
    with acquire_lock(run_dir):
        assert slurm.main(["status", str(run_dir)]) == 0
        assert f"running on this machine: process {os.getpid()} on" in capsys.readouterr().out
        assert slurm.main(["cancel", str(run_dir)]) == 1
        assert f"process {os.getpid()} on" in capsys.readouterr().out
    assert slurm.main(["status", str(run_dir)]) == 0
    assert "not running" in capsys.readouterr().out
