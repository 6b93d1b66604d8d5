"""A real Slurm of four nodes on this host: python tests/slurm/cluster.py up|down|run [--dir FOLDER] [CMD...]

munged, slurmctld and four slurmd in a folder and on ports of their own, for the tests and for trying launch/slurm.py at home.
Needs root and the packages slurm-wlm and munge. Nothing outside the folder is written; processes are ended by their own pid.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NODES = 4
COMMANDS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sinfo",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "scancel",
)
DEFAULT = Path("/tmp") / f"dist_scan-slurm-{os.getuid()}"

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=15
CredType=cred/munge
SlurmctldPort={ctl}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_min_interval=500000,batch_sched_delay=1
SchedulerTimeSlice=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=30
ReturnToService=2
InactiveLimit=0
MinJobAge=300
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=low Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=15 PreemptMode=REQUEUE
PartitionName=high Nodes=n[1-{count}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Missing(RuntimeError):
    """What this host lacks, in one line."""


def check() -> None:
    """Raises Missing unless this host can run the cluster."""
    lacking = [c for c in COMMANDS if shutil.which(c) is None]
    if lacking:
        raise Missing(
            f"no test cluster here: {', '.join(lacking)} not found; apt-get install slurm-wlm munge"
        )
    if os.getuid() != 0:
        raise Missing("no test cluster here: it runs as root (slurmd starts job steps)")


class Cluster:
    """The cluster in one folder. `up` and `down` may be called at any time; both wait until it is so."""

    def __init__(self, folder: Path = DEFAULT) -> None:
        self.folder = Path(folder).resolve()
        self.conf = self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """This process's, with SLURM_CONF: job processes need it too."""
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def call(self, *command: str, check: bool = True) -> str:
        """A Slurm command's output. A slurmctld that does not answer for a moment is asked again for 20 s."""
        deadline = time.monotonic() + 20
        while True:
            done = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, timeout=60
            )
            if (
                "Unable to contact slurm controller" not in done.stderr
                or time.monotonic() > deadline
            ):
                break
            time.sleep(0.5)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def up(self) -> None:
        """Start whatever does not run; returns when all nodes are idle."""
        check()
        if not self.conf.exists():
            self._write()
        self.start_munged()
        self.start_controller()
        for node in range(1, NODES + 1):
            self.start_node(node)
        self.wait(
            lambda: (
                self.call("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False).strip()
                == str(NODES)
            ),
            60,
            "four idle nodes",
        )

    def down(self) -> None:
        """End everything, by pid, jobs included."""
        if self.pid("slurmctld"):
            self.call("scancel", "-u", "root", check=False)
            deadline = time.monotonic() + 15
            while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.3)
        for pid in self._job_processes():  # of jobs that a killed slurmctld has forgotten
            os.kill(pid, signal.SIGKILL)
        for name in [*(f"slurmd-n{n}" for n in range(1, NODES + 1)), "slurmctld", "munged"]:
            self.stop(name)

    def _job_processes(self) -> list[int]:
        """What still runs in jobs of this cluster, known by its SLURM_CONF."""
        found, mark = [], f"SLURM_CONF={self.conf}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                mark in words
                and any(w.startswith(b"SLURM_JOB_ID=") for w in words)
                and int(process.name) != os.getpid()
            ):
                found.append(int(process.name))
        return found

    def start_munged(self) -> None:
        if not self.pid("munged"):
            at = self.folder / "munge"
            (at / "socket").unlink(missing_ok=True)
            self._run(
                "munged",
                "--force",
                f"--socket={at}/socket",
                f"--key-file={at}/key",
                f"--pid-file={self.folder}/munged.pid",
                f"--log-file={self.folder}/munged.log",
                f"--seed-file={at}/seed",
                "--num-threads=2",
            )
            self.wait(lambda: (at / "socket").exists(), 10, "munged's socket")

    def start_controller(self) -> None:
        if not self.pid("slurmctld"):
            self._run("slurmctld", "-f", str(self.conf))
            self.wait(lambda: "UP" in self.call("scontrol", "ping", check=False), 30, "slurmctld")

    def start_node(self, node: int) -> None:
        if not self.pid(f"slurmd-n{node}"):
            self._run("slurmd", "-N", f"n{node}", "-f", str(self.conf))
            self.wait(lambda: self.pid(f"slurmd-n{node}"), 15, f"slurmd of n{node}")

    def pid(self, name: str) -> int | None:
        """The pid of munged, slurmctld or slurmd-n<i> when it lives."""
        try:
            number = int((self.folder / f"{name}.pid").read_text())
            alive = name.split("-")[0] in Path(f"/proc/{number}/comm").read_text()
        except (OSError, ValueError):
            return None
        return number if alive else None

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Signal one daemon and wait until it is gone (killed after 10 s)."""
        pid = self.pid(name)
        if pid is None:
            return
        os.kill(pid, number)
        deadline = time.monotonic() + 10
        while self.pid(name) == pid:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        (self.folder / f"{name}.pid").unlink(missing_ok=True)

    @staticmethod
    def wait(until, seconds: float, what: str) -> None:
        """Poll until it is so. Raises RuntimeError naming what did not come."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {seconds:.0f} s for {what}")
            time.sleep(0.1)

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stdout.strip()}")

    def _write(self) -> None:
        for name in ("munge", "state", *(f"spool-n{n}" for n in range(1, NODES + 1))):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o755)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = free_ports(NODES + 1)
        # sockets: a node's cores are said, not found, so that four nodes fit on two cores
        nodes = "\n".join(
            f"NodeName=n{n} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[n]} CPUs=4 RealMemory=4000 State=UNKNOWN"
            for n in range(1, NODES + 1)
        )
        self.conf.write_text(
            CONF.format(
                host=socket.gethostname(),
                folder=self.folder,
                ctl=ports[0],
                nodes=nodes,
                count=NODES,
            )
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses, below those that the kernel gives to outgoing connections: a controller that is away for a moment finds
    its own taken otherwise (gloo opens hundreds)."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        port = 10_000 + secrets.randbelow(max(lowest - 10_000, 1_000))
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit code: the command's; 2 when this host cannot run it."""
    parser = argparse.ArgumentParser(
        prog="tests/slurm/cluster.py", description=__doc__.splitlines()[0]
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, meaning in (
        ("up", "start it"),
        ("down", "end it, jobs included"),
        ("run", "run a command that finds this Slurm (default: sinfo)"),
    ):
        action = actions.add_parser(name, help=meaning)
        action.add_argument(
            "--dir", type=Path, default=DEFAULT, help=f"its folder (default {DEFAULT})"
        )
        if name == "run":
            action.add_argument(
                "command", nargs=argparse.REMAINDER, help="the command and its own options"
            )
    args = parser.parse_args(argv)
    cluster = Cluster(args.dir)
    try:
        if args.action == "down":
            cluster.down()
        elif args.action == "up":
            cluster.up()
            print(f"up: export SLURM_CONF={cluster.conf}")
        elif not cluster.pid("slurmctld"):
            raise Missing(
                f"no cluster runs in {cluster.folder}; start it with: python tests/slurm/cluster.py up --dir {cluster.folder}"
            )
        else:
            return subprocess.run(args.command or ["sinfo"], env=cluster.environment()).returncode
    except (Missing, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
