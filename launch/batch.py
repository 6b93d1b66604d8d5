"""The text around srun: relaunch in place, requeue, markers (pure functions -> str). launch/recovery.py decides, this obeys.

Two loops (RELIABILITY.md): a crash or a hang is relaunched inside the allocation; a time limit, a preemption or a dead node
goes through Slurm's requeue.
"""
from __future__ import annotations

import shlex
from pathlib import Path

from dist_scan.settings import SlurmConfig

RUN = "dist_scan.run"


def header(options: SlurmConfig, run_dir: Path, name: str) -> list[str]:
    """The #SBATCH lines. --signal without B: goes to the ranks; the ranks tell the script through a file."""
    wanted: dict[str, str | int | bool | None] = {
        "job-name": name, "nodes": options.nodes, "ntasks-per-node": options.tasks_per_node, "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task, "mem": options.mem, "partition": options.partition, "account": options.account,
        "qos": options.qos, "time": options.time, "constraint": options.constraint, "exclude": options.exclude,
        "reservation": options.reservation, "dependency": options.dependency, "mail-user": options.mail_user, "mail-type": options.mail_type,
        "signal": f"USR2@{options.notice_s}", "requeue": True, "open-mode": "append", "output": str(run_dir / "slurm" / "%j.out")}
    wanted |= options.sbatch
    return [f"#SBATCH {flag(key, value)}" for key, value in wanted.items() if value not in (None, False)]


def flag(key: str, value: str | int | bool) -> str:
    """--key=value as sbatch and srun read it; --key for True."""
    return f"--{key}" if value is True else f"--{key}={shlex.quote(str(value))}"


def srun(options: SlurmConfig) -> str:
    """The srun line of one start. env blocks the notices until the ranks' handlers stand: one that comes before would kill."""
    flags = {"kill-on-bad-exit": 1, "label": True, "container-image": options.container, "container-mounts": options.container_mounts} | options.srun
    words = " ".join(flag(key, value) for key, value in flags.items() if value not in (None, False))
    return f"srun {words} env --block-signal=USR2,TERM bash -c {shlex.quote(rank_line(options))} &"


def rank_line(options: SlurmConfig) -> str:
    """What one task runs: Slurm's names for who it is become ours."""
    return (f"export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={options.tasks_per_node}; "
            f'exec "$PYTHON" -m {RUN} "$RUN"')


def script(options: SlurmConfig, run_dir: Path, name: str, python: str, root: Path, relaunches: int) -> str:
    """The whole batch script. `root` is the checkout, `python` the interpreter of the batch script (the ranks' unless options say)."""
    q = shlex.quote
    recovery = f"{q(python)} {q(str(root / 'launch' / 'recovery.py'))}"
    setup = "\n".join(options.setup)
    return f"""#!/bin/bash
{chr(10).join(header(options, run_dir, name))}
# Written by launch/slurm.py. Its copy in the run folder is for reading; nothing there is ever executed.
export RUN={q(str(run_dir))} PYTHON={q(options.python or python)}
export PYTHONPATH={q(str(root))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}} OMP_WAIT_POLICY=${{OMP_WAIT_POLICY:-PASSIVE}}
{setup}
say() {{ echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }}
trap ':' USR2 TERM  # the ranks act on these; this script waits for them

# One job a run folder. A file system without locks (code other than 1) is said and gone on with: the submission has checked.
exec 9>>"$RUN/lock"
flock -n 9; locked=$?
if [ $locked = 1 ]; then say "the run folder is in use by $(cat "$RUN/lock"); this job leaves"; exit 1; fi
[ $locked = 0 ] || say "no locks on this file system (flock: $locked); two jobs on one run folder would not be noticed here"
echo -n "job $SLURM_JOB_ID on $(hostname)" >"$RUN/lock"

start=0
while :; do
  if [ -e "$RUN/DONE" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then say "done before"; exit 0; fi
  mark=$({recovery} begin "$RUN") || exit 1
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
  MASTER_PORT=$({recovery} port)
  export MASTER_ADDR=${{MASTER_ADDR:-$first}} MASTER_PORT
  say "start $start on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks, $MASTER_ADDR:$MASTER_PORT"
  {srun(options)}
  step=$!
  while kill -0 $step 2>/dev/null; do wait $step; done
  action=$({recovery} decide "$RUN" "$mark" $start {relaunches} 2>"$RUN/slurm/why") || exit 1
  say "$action: $(cat "$RUN/slurm/why")"
  case $action in
    done|stopped) exit 0 ;;
    requeue) rm -f "$RUN/STOPPED"; scontrol requeue "$SLURM_JOB_ID"; sleep 30; exit 0 ;;  # Slurm ends this script
    relaunch) start=$((start + 1)) ;;
    *) exit 1 ;;
  esac
done
"""
