"""The batch text on a real Slurm, with ranks that only obey signals: what the text owes a run when the ranks cannot help it.

The ranks' program stands where dist_scan/run.py would; everything else (script, recovery.py, Slurm, signals) is the real thing.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from dist_scan.config import SlurmConfig
from launch.sbatch_script import BatchJob, script
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]

RANK = """
import json, os, signal, sys, time
from pathlib import Path
run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
def standing():  # what dist_scan.run's StopFlag does
    for n in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(n, lambda n, frame: told.append(n))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, told_by)
def leave(): (run / "STOPPED").write_text(json.dumps({"signal": int(min(told))})); sys.exit(0)  # USR2 before TERM
def wait():
    while not told: time.sleep(0.05)
    leave()
told, told_by = [], (signal.SIGUSR2, signal.SIGTERM)
starts = len(list(run.glob(f"start-*-{rank}")))  # its own: the other rank may be a moment ahead
(run / f"start-{starts if rank == 0 else time.time()}-{rank}").write_text(json.dumps({**os.environ, "PID": os.getpid()}))
if starts > 0 and rank == 0: (run / "DONE").write_text("now")
if starts > 0 or list(run.glob("DONE")): sys.exit(0)
"""


class Toy:
    """A job of the real batch script whose ranks run a few lines; at their second start they are done."""

    def __init__(
        self, cluster: Cluster, folder: Path, body: str, nodes: int = 2, **options
    ) -> None:
        self.cluster, self.run_dir = cluster, folder / "a run"
        root = folder / "code"
        (root / "dist_scan").mkdir(parents=True)
        (root / "launch").symlink_to(ROOT / "launch")
        (root / "dist_scan" / "__init__.py").write_text("")
        (root / "dist_scan" / "run.py").write_text(RANK + body)
        (self.run_dir / "slurm").mkdir(parents=True)
        job = BatchJob(SlurmConfig(nodes=nodes, **options), self.run_dir, "toy", 3, checkout=root)
        self.text = script(job)

    def submit(self) -> Toy:
        path = self.run_dir / "slurm" / "script.sh"
        path.write_text(self.text)
        self.id = self.cluster.call("sbatch", "--parsable", str(path)).strip()
        return self

    def log(self) -> str:
        path = self.run_dir / "slurm" / f"{self.id}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, until, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, (
                self.cluster.call("scontrol", "show", "job", self.id, check=False) + self.log()
            )
            time.sleep(0.1)

    def wait_ranks(self) -> None:
        self.wait(lambda: len(list(self.run_dir.glob("start-*"))) >= 2)
        time.sleep(0.3)  # the handlers stand

    def facts(self) -> dict[str, str]:
        """What scontrol says of the job."""
        words = self.cluster.call("scontrol", "show", "job", "-o", self.id).split()
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def ended(self, seconds: float = 90) -> dict[str, str]:
        """Wait until the job is over; its last facts."""
        self.wait(
            lambda: self.facts()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"),
            seconds,
        )
        return self.facts()


def test_a_preemption_told_by_term_alone_comes_back(cluster, tmp_path: Path) -> None:
    """Without --signal, or preempt_send_user_signal, Slurm sends TERM at the start of the grace time: as scancel does."""
    toy = Toy(cluster, tmp_path, "standing(); wait()", partition="low")
    toy.text = toy.text.replace("#SBATCH --signal=USR2@120\n", "")
    assert "--signal" not in toy.text
    toy.submit().wait_ranks()
    cluster.call(
        "sbatch", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    facts = toy.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1") and (
        toy.run_dir / "DONE"
    ).exists()
    assert "requeue: SIGTERM" in toy.log()


def test_a_time_limit_that_the_ranks_do_not_follow_comes_back(cluster, tmp_path: Path) -> None:
    """Stuck ranks, or a notice that came while none ran: the script asks for the requeue when Slurm ends the job."""
    toy = Toy(cluster, tmp_path, "time.sleep(600)", time="1", notice_s=5).submit()
    facts = toy.ended(180)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1") and (
        toy.run_dir / "DONE"
    ).exists()
    assert "requeue: Slurm ends the job before the ranks have stopped" in toy.log()


@pytest.mark.parametrize("old_env", [False, True])
def test_a_notice_before_the_handlers_stand_is_kept(cluster, tmp_path: Path, old_env) -> None:
    """While a rank imports: kept by env, or where env is too old by a line of Python."""
    toy = Toy(
        cluster,
        tmp_path,
        "time.sleep(3); standing(); wait()",
        setup=("env() { return 125; }",) if old_env else (),
    )
    toy.submit().wait_ranks()
    cluster.call("scancel", "--signal=USR2", toy.id)
    facts = toy.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), toy.log()
    assert "requeue: SIGUSR2" in toy.log() and toy.log().count(": start 0") == 2


def test_the_requeue_waits_for_a_controller_that_is_away(cluster, tmp_path: Path) -> None:
    toy = Toy(cluster, tmp_path, "standing(); wait()").submit()
    toy.wait_ranks()
    cluster.stop("slurmctld")  # in good order: killed, it would forget a job this young
    for path in toy.run_dir.glob("start-*"):
        os.kill(json.loads(path.read_text())["PID"], signal.SIGUSR2)
    toy.wait(lambda: "requeue: SIGUSR2" in toy.log())
    time.sleep(4)
    cluster.start_controller()
    facts = toy.ended(240)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1") and (
        toy.run_dir / "DONE"
    ).exists(), toy.log()


def test_scancel_stays_away(cluster, tmp_path: Path) -> None:
    toy = Toy(cluster, tmp_path, "standing(); wait()").submit()
    toy.wait_ranks()
    cluster.call("scancel", toy.id)
    assert toy.ended()["JobState"] == "CANCELLED"
    time.sleep(2)
    assert (
        toy.facts()["Restarts"] == "0"
        and not (toy.run_dir / "DONE").exists()
        and "requeue" not in toy.log()
        and "relaunch" not in toy.log()
    )


def test_a_term_that_slurm_did_not_mean_is_no_end(cluster, tmp_path: Path) -> None:
    """slurmctld tells a node that was away the end of an older step of the same number: to one rank, while the job runs on."""
    toy = Toy(cluster, tmp_path, "standing(); wait()").submit()
    toy.wait_ranks()
    for path in toy.run_dir.glob("start-*"):
        os.kill(json.loads(path.read_text())["PID"], signal.SIGTERM)
    facts = toy.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0") and (
        toy.run_dir / "DONE"
    ).exists(), toy.log()
    assert "relaunch: SIGTERM" in toy.log() and "Slurm has not ended this job" in toy.log()


def test_a_run_folder_in_use_is_left_and_the_holder_named(cluster, tmp_path: Path) -> None:
    toy = Toy(cluster, tmp_path, "standing(); wait()")
    with open(toy.run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 123 on elsewhere", file=lock, flush=True)
        assert toy.submit().ended()["JobState"] == "FAILED"
    assert "in use by process 123 on elsewhere; this job ends" in toy.log() and not list(
        toy.run_dir.glob("start-*")
    )


def test_a_lock_left_by_the_jobs_own_dead_node_is_waited_for(cluster, tmp_path: Path) -> None:
    """A file server frees a dead client's lock after a minute or two: the requeued job must not leave because of itself."""
    toy = Toy(cluster, tmp_path, "(run / 'DONE').write_text('now')", nodes=1)
    with open(toy.run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        toy.text = toy.text.replace(
            "exec 9>>", 'echo -n "job $SLURM_JOB_ID on gone" >"$RUN/lock"\nexec 9>>'
        )  # it was this job
        toy.submit()
        toy.wait(lambda: "earlier start of this job still holds" in toy.log())
        time.sleep(1)
        assert not list(toy.run_dir.glob("start-*"))
    assert toy.ended()["JobState"] == "COMPLETED" and "done: " in toy.log()


def test_every_rank_gets_its_cores_and_its_place(cluster, tmp_path: Path) -> None:
    body = """
import subprocess
words = subprocess.run(["scontrol", "show", "step", "-o", os.environ["SLURM_JOB_ID"] + ".0"], capture_output=True, text=True).stdout
if rank == 0: (run / "step").write_text(words); (run / "DONE").write_text("now")
"""
    toy = Toy(cluster, tmp_path, body, processes_per_node=2, cpus_per_task=2)
    toy.submit().ended()
    assert "CPUs=8 " in (toy.run_dir / "step").read_text(), (
        "2 nodes x 2 ranks x 2 cores; srun alone would take 4"
    )
    places = [json.loads(p.read_text()) for p in toy.run_dir.glob("start-*")]
    threads = os.environ.get("OMP_NUM_THREADS", "2")  # whoever sets it at submission is obeyed
    got = sorted(
        (
            e["RANK"],
            e["LOCAL_RANK"],
            e["LOCAL_WORLD_SIZE"],
            e["WORLD_SIZE"],
            e["MASTER_ADDR"],
            e["OMP_NUM_THREADS"],
        )
        for e in places
    )
    assert (
        got == [(str(r), str(r % 2), "2", "4", "127.0.0.1", threads) for r in range(4)]
        and len({e["MASTER_PORT"] for e in places}) == 1
    )
