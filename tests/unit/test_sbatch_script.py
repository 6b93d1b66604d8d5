"""The batch script is text from settings; recovery.py is what it asks. Neither needs a Slurm to be checked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_scan.config import SlurmConfig
from dist_scan.config.slurm import limit_in_seconds
from launch import recovery
from launch import sbatch_script as batch

ROOT = Path(__file__).resolve().parents[2]


def script(**options) -> str:
    return batch.script(
        SlurmConfig(**options),
        Path("/shared/my runs/a"),
        "a",
        "/venv/bin/python",
        Path("/code dir"),
        7,
    )


def test_every_setting_reaches_sbatch_and_nothing_else_does() -> None:
    lines = batch.header(
        SlurmConfig(
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
        ),
        Path("/runs/a"),
        "a",
    )
    assert lines == [
        f"#SBATCH --{x}"
        for x in (
            "job-name=a",
            "nodes=4",
            "ntasks-per-node=8",
            "gpus-per-node=8",
            "cpus-per-task=12",
            "mem=240G",
            "partition=gpu",
            "account=lab",
            "qos=long",
            "time=2-00",
            "constraint=a100",
            "exclude=n7",
            "reservation=r",
            "dependency=afterok:3",
            "mail-user=a@b",
            "mail-type=END,FAIL",
            "signal=USR2@300",
            "requeue",
            "open-mode=append",
            "output=/runs/a/slurm/%j.out",
            "exclusive",
            "licenses='x y:1'",
        )
    ]
    bare = batch.header(SlurmConfig(), Path("/runs/a"), "a")
    assert (
        bare[:3] == ["#SBATCH --job-name=a", "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1"]
        and len(bare) == 7
    )


def test_zero_is_a_value() -> None:
    """mem=0 is sbatch's word for all of a node's memory; false leaves an option out."""
    options = SlurmConfig(
        sbatch={"mem": 0, "nice": False}, srun={"mem": 0, "overlap": True, "exact": False}
    )
    assert [
        x for x in batch.header(options, Path("/runs/a"), "a") if "mem" in x or "nice" in x
    ] == ["#SBATCH --mem=0"]
    assert batch.step(options).endswith(" --mem=0 --overlap")


def test_the_script_is_shell_whatever_the_names_hold() -> None:
    text = script(
        setup=("module load cuda", 'export A="b c"'),
        container="img.sqsh",
        container_mounts="/a:/a",
        python="python",
        srun={"cpu-bind": "none"},
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert (
        "export RUN='/shared/my runs/a' PYTHON=python" in text
        and 'module load cuda\nexport A="b c"\n' in text
    )
    assert (
        'srun --kill-on-bad-exit=1 --label --container-image=img.sqsh --container-mounts=/a:/a --cpu-bind=none "${block[@]}" bash -c'
        in text
    )
    assert 'ask decide "$RUN" "$mark" $start 7' in text


def test_a_rank_has_the_cores_that_slurm_gave_it_or_its_part_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bound to 12 cores by srun, a rank of eight must not take a further eighth of them."""
    from dist_scan.world.world import World, cores_per_rank

    said = subprocess.run(
        [
            "bash",
            "-c",
            f"{batch.identity(SlurmConfig(gpus_per_node=8, cpus_per_task=12))}; echo $LOCAL_WORLD_SIZE $CORES_PER_RANK $NODE_NAME",
        ],
        capture_output=True,
        text=True,
        env={
            "SLURM_PROCID": "3",
            "SLURM_NTASKS": "8",
            "SLURM_LOCALID": "3",
            "SLURMD_NODENAME": "n7",
        },
    )
    assert said.stdout == "8 12 n7\n" and "CORES" not in batch.identity(
        SlurmConfig(gpus_per_node=8)
    )
    place = World(local_world_size=8)
    for bound, told, expected in (
        (12, "12", 12),
        (96, None, 12),
        (96, "12", 12),
        (4, "12", 4),
        (3, None, 1),
    ):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, bound=bound: set(range(bound)))
        monkeypatch.delenv("CORES_PER_RANK", raising=False)
        if told:
            monkeypatch.setenv("CORES_PER_RANK", told)
        assert cores_per_rank(place) == expected


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
def test_bad_settings_are_refused(field, value) -> None:
    with pytest.raises(ValueError, match=field):
        SlurmConfig(**{field: value})


def test_a_limit_is_read_as_slurm_reads_it() -> None:
    assert [
        limit_in_seconds(x) for x in ("30", "1:30", "2:00:00", "1-2", "1-02:30", "1-02:30:07", "0")
    ] == [
        1800,
        90,
        7200,
        93600,
        95400,
        95407,
        0,
    ]
    assert SlurmConfig(time="0", notice_s=500).time == "0", "no limit"


def test_what_blocks_the_notices_is_there(tmp_path: Path) -> None:
    """env where it can, else a line of Python; in a container always that. Both leave USR2 and TERM blocked in what they become."""
    for options, setup in (({}, ""), ({}, "env() { return 125; }"), ({"container": "img"}, "")):
        text = "\n".join(
            (
                setup,
                f"PYTHON={sys.executable}",
                batch.blocker(SlurmConfig(**options)),
                '"${block[@]}" bash -c "exec grep SigBlk /proc/self/status"; echo "${block[0]}"',
            )
        )
        mask, first = subprocess.run(
            ["bash", "-c", text], capture_output=True, text=True
        ).stdout.splitlines()
        blocked = int(mask.split()[1], 16)
        assert blocked >> (signal.SIGUSR2 - 1) & 1 and blocked >> (signal.SIGTERM - 1) & 1
        assert (first == "env") == (not options and not setup)


def test_requeues_that_get_nowhere_end(tmp_path: Path) -> None:
    mark = recovery.begin(tmp_path)
    left(tmp_path, STOPPED=json.dumps({"signal": int(signal.SIGUSR2)}))
    actions = [recovery.decide(tmp_path, mark, 0, 5).action for _ in range(recovery.IDLE_REQUEUES)]
    assert actions == ["requeue"] * (recovery.IDLE_REQUEUES - 1) + ["give_up"]
    publish(tmp_path, "step-10")
    assert (
        recovery.decide(tmp_path, mark, 0, 5).action == "requeue"
        and recovery.decide(tmp_path, recovery.begin(tmp_path), 0, 5).action != "requeue"
    )


def left(run_dir: Path, **markers) -> None:
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for name, text in markers.items():
        (run_dir / name).write_text(text)


def publish(run_dir: Path, name: str) -> None:
    path = run_dir / "stages" / "pretext" / "f00" / "work" / "checkpoints" / name
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


def test_what_is_decided_follows_the_markers(tmp_path: Path) -> None:
    mark = recovery.begin(tmp_path)
    left(tmp_path, STOPPED=json.dumps({"signal": int(signal.SIGUSR2)}))
    assert recovery.decide(tmp_path, mark, 0, 5).action == "requeue"
    left(tmp_path, STOPPED=json.dumps({"signal": int(signal.SIGTERM)}))
    assert recovery.decide(tmp_path, mark, 0, 5).action == "stopped"
    left(tmp_path, DONE="now")
    assert recovery.decide(tmp_path, mark, 0, 5).action == "done", "DONE comes before everything"
    assert (
        recovery.begin(tmp_path) == mark
        and not (tmp_path / "DONE").exists()
        and not (tmp_path / "STOPPED").exists()
    )
    left(tmp_path, MISTAKE="data.train: no such folder\n")
    assert recovery.decide(tmp_path, mark, 0, 5)[:2] == ("mistake", "data.train: no such folder")


def test_a_fault_is_relaunched_only_while_the_run_gets_further(tmp_path: Path) -> None:
    mark = recovery.begin(tmp_path)
    publish(tmp_path, "step-10")
    verdict = recovery.decide(tmp_path, mark, 0, 5)
    assert verdict.action == "relaunch" and "killed?" in verdict.why
    assert recovery.decide(tmp_path, mark, 5, 5).action == "give_up", "relaunches are counted"
    left(tmp_path, PORT_TAKEN="")
    assert (
        recovery.decide(tmp_path, mark, 1, 5).action == "relaunch"
        and recovery.decide(tmp_path, mark, 5, 5).action == "give_up"
    )
    faults = [
        json.loads(line) for line in (tmp_path / "logs" / "faults.jsonl").read_text().splitlines()
    ]
    assert [f["start"] for f in faults] == [0, 5, 5] and all(f["advanced"] for f in faults)


def test_a_job_that_was_queued_again_counts_its_idle_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    mark = recovery.begin(tmp_path)
    actions = [recovery.decide(tmp_path, mark, start, 9).action for start in range(1, 4)]
    assert actions == ["relaunch", "relaunch", "give_up"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert [recovery.decide(tmp_path, mark, start, 9).action for start in range(1, 4)] == actions


def test_three_starts_that_finish_nothing_are_the_last(tmp_path: Path) -> None:
    mark = recovery.begin(tmp_path)
    publish(tmp_path, ".tmp-step-20")  # an unfinished checkpoint is no progress
    assert [recovery.decide(tmp_path, mark, start, 9).action for start in (0, 1, 2)] == [
        "relaunch",
        "relaunch",
        "give_up",
    ]
    assert recovery.decide(tmp_path, mark, 0, 9).action == "relaunch", "the next job counts anew"
    publish(tmp_path, "step-10")
    mark = (recovery.decide(tmp_path, mark, 1, 9), recovery.begin(tmp_path))[1]
    assert [recovery.decide(tmp_path, mark, start, 9).action for start in (2, 3, 4)] == [
        "relaunch",
        "relaunch",
        "give_up",
    ]


def test_the_first_error_of_all_ranks_is_told(tmp_path: Path) -> None:
    mark = recovery.begin(tmp_path)
    for rank, when in ((0, 5.0), (1, 3.0), (2, 4.0)):
        (tmp_path / "logs" / f"error-rank{rank:05d}.json").write_text(
            json.dumps({"time": when, "rank": rank, "error": f"Boom: {rank}"})
        )
    (tmp_path / "logs" / "error-rank00003.json").write_text("{torn")
    assert "rank 1: Boom: 1" in recovery.decide(tmp_path, mark, 0, 5).why
    recovery.begin(tmp_path)
    assert recovery.first_error(tmp_path) is None


def test_the_batch_script_can_ask(tmp_path: Path) -> None:
    def ask(*words: str):
        return subprocess.run(
            [sys.executable, ROOT / "launch" / "recovery.py", *words],
            capture_output=True,
            text=True,
        )

    mark = ask("begin", str(tmp_path)).stdout.strip()
    assert len(mark) == 16 and int(ask("port").stdout) > 1023
    left(tmp_path, DONE="now")
    out = ask("decide", str(tmp_path), mark, "0", "3", "2")
    assert (out.stdout, out.stderr) == ("done 0\nthe run is done\n", "")
    (tmp_path / "DONE").unlink()
    assert ask("decide", str(tmp_path), mark, "1", "9", "1").stdout.splitlines()[0] == "relaunch 2"
    assert (
        ask("decide", str(tmp_path), mark, "1", "9", "2").stdout.splitlines()[0] == "give_up 3"
    ), "the launcher remembers what no disk does"
    (tmp_path / "a file").write_text("")
    out = ask("begin", str(tmp_path / "a file"))
    assert (
        out.returncode == 1 and len(out.stderr.splitlines()) == 1 and "Traceback" not in out.stderr
    )
