"""The batch script as a function of the settings; no Slurm is needed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_scan.config import SlurmConfig
from dist_scan.config.slurm import limit_in_seconds
from dist_scan.world.world import World, cores_per_rank
from launch import sbatch_script
from launch.sbatch_script import BatchJob

RUN_DIR = Path("/shared/my runs/a")


def sbatch_lines(**options: Any) -> list[str]:
    """The #SBATCH lines without their beginning."""
    lines = sbatch_script.sbatch_lines(SlurmConfig(**options), Path("/runs/a"), "a")
    return [line.removeprefix("#SBATCH --") for line in lines]


def script_text(**options: Any) -> str:
    job = BatchJob(SlurmConfig(**options), RUN_DIR, "a", 7, Path("/code dir"))
    return sbatch_script.build_script(job)


def test_every_setting_reaches_sbatch_and_nothing_else_does() -> None:
    lines = sbatch_lines(
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=12,
        mem="240G",
        partition="gpu",
        account="lab",
        qos="long",
        time="2-00",
        constraint="a100",
        exclude="n7",
        reservation="r",
        dependency="afterok:3",
        mail_user="a@b",
        mail_type="END,FAIL",
        notice_s=300,
        sbatch={"exclusive": True, "licenses": "x y:1", "wckey": False},
    )
    assert sorted(lines) == [
        "account=lab",
        "constraint=a100",
        "cpus-per-task=12",
        "dependency=afterok:3",
        "exclude=n7",
        "exclusive",
        "gpus-per-node=8",
        "job-name=a",
        "licenses='x y:1'",
        "mail-type=END,FAIL",
        "mail-user=a@b",
        "mem=240G",
        "nodes=4",
        "ntasks-per-node=8",
        "open-mode=append",
        "output=/runs/a/slurm/%j.out",
        "partition=gpu",
        "qos=long",
        "requeue",
        "reservation=r",
        "signal=USR2@300",
        "time=2-00",
    ]
    assert sorted(sbatch_lines()) == [
        "job-name=a",
        "nodes=1",
        "ntasks-per-node=1",
        "open-mode=append",
        "output=/runs/a/slurm/%j.out",
        "requeue",
        "signal=USR2@120",
    ]


def test_zero_is_a_value_and_false_leaves_an_option_out() -> None:
    """mem=0 means all memory of a node."""
    sbatch = {"mem": 0, "nice": False}
    assert [line for line in sbatch_lines(sbatch=sbatch) if line[:3] in ("mem", "nic")] == ["mem=0"]
    options = SlurmConfig(srun={"mem": 0, "overlap": True, "exact": False})
    assert sbatch_script.srun_command(options).endswith(" --mem=0 --overlap")


def test_the_script_is_valid_shell_for_names_with_spaces_and_quotes() -> None:
    text = script_text(
        setup=("module load cuda", 'export A="b c"'),
        container="img.sqsh",
        container_mounts="/a:/a",
        python="python",
        srun={"cpu-bind": "none"},
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "export RUN='/shared/my runs/a' PYTHON=python" in text
    assert 'module load cuda\nexport A="b c"\n' in text
    assert (
        "srun --kill-on-bad-exit=1 --label --container-image=img.sqsh --container-mounts=/a:/a "
        '--cpu-bind=none "${block_signals[@]}" bash -c' in text
    )
    assert 'recovery decide "$RUN" "$digest" $start 7' in text


@pytest.mark.parametrize(
    ("bound", "slurm_cores", "expected"),
    [(12, "12", 12), (96, None, 12), (96, "12", 12), (4, "12", 4), (3, None, 1)],
)
def test_a_rank_uses_the_cores_that_slurm_gave_it_or_its_share_of_all(
    monkeypatch: pytest.MonkeyPatch, bound: int, slurm_cores: str | None, expected: int
) -> None:
    """One of eight ranks that srun has bound to 12 cores must not take only an eighth of them."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(bound)))
    monkeypatch.delenv("CORES_PER_RANK", raising=False)
    if slurm_cores:
        monkeypatch.setenv("CORES_PER_RANK", slurm_cores)
    assert cores_per_rank(World(local_world_size=8)) == expected


def test_slurms_variables_become_the_place_of_a_rank() -> None:
    line = sbatch_script.export_rank(SlurmConfig(gpus_per_node=8, cpus_per_task=12))
    result = subprocess.run(
        ["bash", "-c", f"{line}; echo $RANK $LOCAL_WORLD_SIZE $CORES_PER_RANK $NODE_NAME"],
        capture_output=True,
        text=True,
        env={
            "SLURM_PROCID": "3",
            "SLURM_NTASKS": "8",
            "SLURM_LOCALID": "3",
            "SLURMD_NODENAME": "n7",
        },
    )
    assert result.stdout == "3 8 12 n7\n"
    assert "CORES" not in sbatch_script.export_rank(SlurmConfig(gpus_per_node=8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time", "two days"),
        ("nodes", 0),
        ("setup", ("a\nb",)),
        ("partition", " "),
        ("nodez", 1),
        ("sbatch", {"array": "1-2"}),
        ("sbatch", {"gpus_per": 1}),
        ("srun", {"a": "b\nc"}),
        ("time", "2"),
        ("python", "py\n"),
        ("container", ""),
        ("container_mounts", "/a:/a\n/b:/b"),
        ("partition", "a\r#SBATCH"),
    ],
)
def test_invalid_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SlurmConfig.model_validate({field: value})


@pytest.mark.parametrize(
    "key",
    ["arr", "out", "o", "sig", "no-req", "clusters", "cluster", "error", "err", "time", "quiet"],
)
def test_the_beginning_of_an_option_that_the_launcher_sets_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is set by the launcher and cannot be given here"):
        SlurmConfig(sbatch={key: "x"})


def test_options_that_resemble_the_launchers_own_are_allowed() -> None:
    lines = sbatch_lines(sbatch={"nodelist": "n1", "time-min": 5})
    assert lines[-2:] == ["nodelist=n1", "time-min=5"]


def test_a_time_limit_is_read_as_slurm_reads_it() -> None:
    limits = {
        "30": 1800,
        "1:30": 90,
        "2:00:00": 7200,
        "1-2": 93600,
        "1-02:30": 95400,
        "1-02:30:07": 95407,
        "0": 0,
    }
    assert {limit: limit_in_seconds(limit) for limit in limits} == limits
    assert SlurmConfig(time="0", notice_s=500).time == "0", "0 means no limit"


@pytest.mark.parametrize(
    ("options", "setup", "program"),
    [
        ({}, "", "env"),
        ({}, "env() { return 125; }", sys.executable),  # a version without --block-signal
        ({"container": "img"}, "", sys.executable),
    ],
)
def test_usr2_and_term_are_blocked_in_the_command_that_starts_a_rank(
    options: dict[str, Any], setup: str, program: str
) -> None:
    lines = (
        setup,
        f"PYTHON={sys.executable}",
        sbatch_script.choose_signal_blocker(SlurmConfig(**options)),
        '"${block_signals[@]}" bash -c "exec grep SigBlk /proc/self/status"',
        'echo "${block_signals[0]}"',
    )
    result = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    mask, first = result.stdout.splitlines()
    blocked = int(mask.split()[1], 16)
    assert blocked >> (signal.SIGUSR2 - 1) & 1
    assert blocked >> (signal.SIGTERM - 1) & 1
    assert first == program
