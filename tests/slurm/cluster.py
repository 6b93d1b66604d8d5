"""A real Slurm of four nodes on this host: python tests/slurm/cluster.py up|down|run [CMD...]

The test cluster: munged, slurmctld and four slurmd with their own folder and ports, for the tests
and for trying launch/slurm.py without a cluster. Needs root and the packages slurm-wlm and munge.
Nothing outside the folder is written; processes are ended by their pid.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_NODES = 4
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
DEFAULT_FOLDER = Path("/tmp") / f"dist_scan-slurm-{os.getuid()}"
# A requeued job waits for cred_expire (120 s by default), and then until a scheduler looks for jobs
# that may start (sched_interval and bf_interval, 60 and 30 s by default).
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=8
CredType=cred/munge
SlurmctldPort={port}
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
SchedulerParameters=sched_min_interval=500000,batch_sched_delay=1,sched_interval=1,bf_interval=1
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
PartitionName=DEFAULT Nodes=n[1-{num_nodes}] MaxTime=INFINITE State=UP
PartitionName=low Default=YES PriorityTier=1 GraceTime=15 PreemptMode=REQUEUE
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
# The number of cores is stated, not detected, so that four nodes fit on two cores.
NODE = """
NodeName=n{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000
""".strip()


class MissingError(RuntimeError):
    """This host lacks something that the cluster needs."""


def check_host() -> None:
    """Raise MissingError unless this host can run the cluster."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        raise MissingError(
            f"no test cluster on this host: {', '.join(missing)} not found; "
            "apt-get install slurm-wlm munge"
        )
    if os.getuid() != 0:
        raise MissingError("no test cluster on this host: it needs root (slurmd starts job steps)")


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Poll until the condition holds. Raises RuntimeError that names what did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


class Cluster:
    """The cluster in one folder.

    `up` and `down` can be called at any time, and return when all is started or ended.
    """

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self.folder = Path(folder).resolve()
        self.config = self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """This process's environment with SLURM_CONF, which processes of jobs need too."""
        return os.environ | {"SLURM_CONF": str(self.config)}

    def call(self, *command: str, check: bool = True) -> str:
        """Output of a Slurm command; repeated for 20 s if slurmctld does not answer."""
        deadline = time.monotonic() + 20
        while True:
            result = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, timeout=60
            )
            no_answer = "Unable to contact slurm controller" in result.stderr
            if not no_answer or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout

    def up(self) -> None:
        """Start whatever is not running; returns when all nodes are idle."""
        check_host()
        if not self.config.exists():
            self._write_files()
        self.start_munged()
        self.start_controller()
        for number in range(1, NUM_NODES + 1):
            self.start_node(number)
        sinfo = ("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D")
        wait_until(
            lambda: self.call(*sinfo, check=False).strip() == str(NUM_NODES), 60, "idle nodes"
        )

    def down(self) -> None:
        """End all jobs and daemons."""
        if self.pid("slurmctld"):
            self.call("scancel", "-u", "root", check=False)
            deadline = time.monotonic() + 15
            while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.3)
        # Processes of jobs that a killed slurmctld has forgotten.
        for pid in self._job_processes():
            os.kill(pid, signal.SIGKILL)
        nodes = [f"slurmd-n{number}" for number in range(1, NUM_NODES + 1)]
        for name in (*nodes, "slurmctld", "munged"):
            self.stop(name)

    def _job_processes(self) -> list[int]:
        """Processes in jobs of this cluster, found by their SLURM_CONF."""
        own_config = f"SLURM_CONF={self.config}".encode()
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
            if in_job and own_config in variables and int(process.name) != os.getpid():
                pids.append(int(process.name))
        return pids

    def start_munged(self) -> None:
        """Start munged if it is not running."""
        if self.pid("munged"):
            return
        folder = self.folder / "munge"
        (folder / "socket").unlink(missing_ok=True)
        self._run(
            "munged",
            "--force",
            f"--socket={folder}/socket",
            f"--key-file={folder}/key",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={folder}/seed",
            "--num-threads=2",
        )
        wait_until((folder / "socket").exists, 10, "munged's socket")

    def start_controller(self) -> None:
        """Start slurmctld if it is not running."""
        if not self.pid("slurmctld"):
            self._run("slurmctld", "-f", str(self.config))
            ping = ("scontrol", "ping")
            wait_until(lambda: "UP" in self.call(*ping, check=False), 30, "slurmctld")

    def start_node(self, number: int) -> None:
        """Start slurmd of node n<number> if it is not running."""
        if not self.pid(f"slurmd-n{number}"):
            self._run("slurmd", "-N", f"n{number}", "-f", str(self.config))
            wait_until(lambda: self.pid(f"slurmd-n{number}"), 15, f"slurmd of n{number}")

    def pid(self, name: str) -> int | None:
        """Process of munged, slurmctld or slurmd-n<number>; None if it is not running."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
            is_running = name.split("-")[0] in Path(f"/proc/{pid}/comm").read_text()
        except (OSError, ValueError):
            return None
        return pid if is_running else None

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to a daemon and wait for its end (killed after 10 s)."""
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

    def _run(self, *command: str) -> None:
        result = subprocess.run(
            command,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if result.returncode:
            output = result.stdout.strip()
            raise RuntimeError(f"{command[0]} ended with {result.returncode}: {output}")

    def _write_files(self) -> None:
        """Write slurm.conf, munge's key, and the daemons' folders."""
        numbers = range(1, NUM_NODES + 1)
        for name in ("munge", "state", *(f"spool-n{number}" for number in numbers)):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o755)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        controller_port, *node_ports = free_ports(NUM_NODES + 1)
        nodes = [NODE.format(number=n, port=port) for n, port in zip(numbers, node_ports)]
        self.config.write_text(
            CONFIG.format(
                host=socket.gethostname(),
                folder=self.folder,
                port=controller_port,
                nodes="\n".join(nodes),
                num_nodes=NUM_NODES,
            )
        )


def free_ports(count: int) -> list[int]:
    """Free ports below those that the kernel gives to outgoing connections.

    gloo opens hundreds of connections; a controller that restarts would find its port taken.
    """
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    num_candidates = max(int(ephemeral[0]) - 10_000, 1_000)
    ports: list[int] = []
    while len(ports) < count:
        port = 10_000 + secrets.randbelow(num_candidates)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of the command, or 2 if this host cannot run the cluster."""
    args = parse_arguments(argv)
    cluster = Cluster(args.dir)
    try:
        if args.action == "down":
            cluster.down()
        elif args.action == "up":
            cluster.up()
            print(f"up: export SLURM_CONF={cluster.config}")
        elif cluster.pid("slurmctld"):
            command = args.command or ["sinfo"]
            return subprocess.run(command, env=cluster.environment()).returncode
        else:
            raise MissingError(
                f"no cluster runs in {cluster.folder}; start it with: "
                f"python tests/slurm/cluster.py up --dir {cluster.folder}"
            )
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tests/slurm/cluster.py", description=str(__doc__).splitlines()[0]
    )
    actions = parser.add_subparsers(dest="action", required=True)
    helps = {
        "up": "start it",
        "down": "end it, jobs included",
        "run": "run a command that finds this Slurm (default: sinfo)",
    }
    for name, text in helps.items():
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "--dir",
            type=Path,
            default=DEFAULT_FOLDER,
            help="its folder (default %(default)s)",
        )
        if name == "run":
            action.add_argument(
                "command", nargs=argparse.REMAINDER, help="the command and its own options"
            )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
