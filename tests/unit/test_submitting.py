"""What launch/slurm.py says before, while and after a job is handed to Slurm. Stand-ins for sbatch, squeue and scancel; no Slurm is needed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from dist_scan.config import ConfigError, SlurmConfig
from dist_scan.run_config import load_config
from launch import sbatch_script as batch
from launch import slurm, submission, watch

QUICK = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Slurm whose queue is a file: STATE|NODES|REASON|SCRIPT."""
    folder = tmp_path / "bin"
    folder.mkdir()
    queue = tmp_path / "queue"
    for name, line in {
        "sbatch": f'echo "PENDING|1|x|$1" >{queue}; sleep 0.2; echo "Submitted batch job 12"',
        "squeue": f"cat {queue} 2>/dev/null; true",
        "scancel": f'echo "$@" >{tmp_path}/cancelled',
    }.items():
        folder.joinpath(name).write_text(f"#!/bin/bash\n{line}\n")
        folder.joinpath(name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def submit(run_dir: Path) -> str:
    return submission.place(load_config(QUICK, [f"runtime.run_dir={run_dir}"]), "#!/bin/bash\n")


def test_a_copied_run_folder_has_no_job(tools, capsys: pytest.CaptureFixture[str]) -> None:
    """cancel COPY cancelled the original's job."""
    submit(tools / "a")
    shutil.copytree(tools / "a", tools / "b")
    assert watch.live_job(tools / "a")["job_id"] == "12" and watch.live_job(tools / "b") is None
    assert (
        slurm.main(["status", str(tools / "b")]) == 0
        and f"this folder is a copy of {tools / 'a'}, and job 12 belongs to that"
        in capsys.readouterr().out
    )
    assert slurm.main(["cancel", str(tools / "b")]) == 1 and not (tools / "cancelled").exists()
    submission.refuse_second(tools / "b")
    (tools / "by another way").symlink_to(tools / "a")
    assert (
        slurm.main(["cancel", str(tools / "by another way")]) == 0
        and (tools / "cancelled").read_text() == "12\n"
    )
    (tools / "a").rename(tools / "c")
    assert watch.live_job(tools / "c"), "a folder that was moved keeps its job"


def test_an_id_that_is_used_again_is_another_job(tools) -> None:
    submit(tools / "a")
    (tools / "queue").write_text("RUNNING|4|n[1-4]|/home/other/train.sh\n")
    assert watch.live_job(tools / "a") is None
    submission.refuse_second(tools / "a")
    facts = json.loads((tools / "a" / "slurm" / "job.json").read_text())
    del facts["run_dir"]
    (tools / "a" / "slurm" / "job.json").write_text(json.dumps(facts))
    assert watch.live_job(tools / "a")["nodes"] == 4, (
        "a job.json of before run_dir was kept says no more than its id"
    )


def test_a_cancel_that_slurm_refuses_is_told_in_one_line(
    tools, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(tools / "a")
    (tools / "bin" / "scancel").write_text(
        "#!/bin/bash\necho 'scancel: error: Access denied' >&2; exit 1\n"
    )
    assert slurm.main(["cancel", str(tools / "a")]) == 2
    assert (
        "scancel could not cancel job 12: scancel: error: Access denied; try again"
        in capsys.readouterr().err
    )


def test_one_submission_at_a_time(tools) -> None:
    (tools / "a" / "slurm").mkdir(parents=True)
    with open(tools / "a" / submission.SUBMITTING, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 1 on elsewhere", file=lock, flush=True)
        with pytest.raises(ConfigError, match="is being submitted by process 1 on elsewhere"):
            submit(tools / "a")
    assert not (tools / "queue").exists() and not (tools / "a" / "config.yaml").exists()
    submit(tools / "a")
    with pytest.raises(ConfigError, match="belongs to job 12"):
        submit(tools / "a")


@pytest.mark.parametrize("where", ["/dev/null", "/dev/null/x", "/proc/x"])
def test_a_folder_that_cannot_be_is_told_in_one_line(
    tools, capsys: pytest.CaptureFixture[str], where
) -> None:
    for words in ((), ("--dry-run",)):
        assert slurm.main([*words, "--images", "400", QUICK, f"runtime.run_dir={where}"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 and f"runtime.run_dir: cannot write in '{where}'" in said[1], said
    with pytest.raises(ConfigError, match="nothing was submitted"):
        submit(where)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a%jb"])
def test_names_that_slurm_would_misread_are_refused(tmp_path: Path, name) -> None:
    with pytest.raises(ConfigError, match="in its name"):
        submission.check_folder(tmp_path / name)
    submission.check_folder(tmp_path / "sp ace é ' q $HOME" / "not there yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (("true", "if true; then"), "line 2"),
        (("echo 'unclosed", "true"), "line"),
        (("cat <<X", "x"), "line 1, 'cat <<X'"),
        (("fi",), "line 1, 'fi'"),
    ],
)
def test_setup_lines_that_break_the_script_are_told_at_submission(
    tools, capsys: pytest.CaptureFixture[str], setup, said
) -> None:
    lines = [word for line in setup for word in ("--setup", line)]
    for words in ((), ("--dry-run",)):
        assert (
            slurm.main([*words, *lines, "--images", "400", QUICK, f"runtime.run_dir={tools}/r"])
            == 2
        )
        error = capsys.readouterr().err
        assert "error: slurm.setup: bash cannot read" in error and said in error, error
    assert not (tools / "r").exists()


def test_the_benchmarks_jobs_are_checked_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        slurm.main(
            [
                "--dry-run",
                "--nodes",
                "1,2",
                "--benchmark",
                "run",
                "--images",
                "400",
                "--setup",
                "cat <<X",
                QUICK,
                f"runtime.run_dir={tmp_path}/b",
            ]
        )
        == 2
    )
    assert "slurm.setup: bash cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
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
def test_values_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], flags, said, tmp_path: Path
) -> None:
    assert (
        slurm.main(["--dry-run", "--images", "400", *flags, QUICK, f"runtime.run_dir={tmp_path}/r"])
        == 2
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "key",
    ["arr", "out", "o", "sig", "no-req", "clusters", "cluster", "error", "err", "time", "quiet"],
)
def test_a_short_name_of_our_own_options_is_refused(key) -> None:
    with pytest.raises(ValueError, match="is set by the launcher and cannot be changed"):
        SlurmConfig(sbatch={key: "x"})
    assert batch.header(
        SlurmConfig(sbatch={"nodelist": "n1", "time-min": 5}), Path("/runs/a"), "a"
    )[-2:] == ["#SBATCH --nodelist=n1", "#SBATCH --time-min=5"]


def test_the_printed_lines_can_be_pasted(tools, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(["--images", "400", QUICK, f"runtime.run_dir={tools}/a b"]) == 0
    said = capsys.readouterr().out
    assert all(f"{command} '{tools}/a b'" in said for command in watch.COMMANDS), said


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
        {"MISTAKE": "\udcff"},
        {
            "nodes-1x/config.yaml": "",
            "nodes-x/config.yaml": "",
            "nodes-1/config.yaml": "",
            "benchmark.json": "",
        },
    ],
)
def test_status_follow_and_cancel_read_what_they_find(
    tools, files, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in ({"config.yaml": "x"} | files).items():
        path = tools / "r" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert (
        slurm.main(["status", str(tools / "r")]) == 0
        and slurm.main(["cancel", str(tools / "r")]) == 1
    )
    assert slurm.main(["follow", str(tools / "r")]) == (0 if "DONE" in files else 1)
    out = capsys.readouterr().out
    assert "last     a x" in out or "fault" not in str(files.get("logs/faults.jsonl"))


def test_a_run_on_this_machine_is_told_from_one_that_nobody_holds(
    tools, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.local import take_lease

    (tools / "r").mkdir()
    (tools / "r" / "config.yaml").write_text("x")
    with take_lease(tools / "r"):
        assert (
            slurm.main(["status", str(tools / "r")]) == 0
            and f"runs here: process {os.getpid()} on" in capsys.readouterr().out
        )
        assert (
            slurm.main(["cancel", str(tools / "r")]) == 1
            and f"process {os.getpid()} on" in capsys.readouterr().out
        )
    assert (
        slurm.main(["status", str(tools / "r")]) == 0 and "not running" in capsys.readouterr().out
    )
