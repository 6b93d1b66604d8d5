"""The text around srun: relaunch in place, requeue, markers (pure functions -> str). launch/recovery.py decides, this obeys.

Two loops (RELIABILITY.md): a crash or a hang is relaunched inside the allocation; a time limit, a preemption or a dead node
goes through Slurm's requeue. A notice that came while no rank ran, or that the ranks could not follow, costs what was not saved
but not the run: the script asks for the requeue itself when Slurm ends the job for a reason of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from dist_scan.config import SlurmConfig

RUN = "dist_scan.run"
LEASE_WAIT_S = 180  # a file server frees a dead node's lock after its own time: 90 s with NFSv4
# Blocks the notices, then becomes its arguments: for an env without --block-signal (coreutils before 8.31, busybox).
BLOCK = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM}); os.execvp(sys.argv[1], sys.argv[1:])"


def header(options: SlurmConfig, run_dir: Path, name: str) -> list[str]:
    """The #SBATCH lines. --signal without B: goes to the ranks; the ranks tell the script through a file."""
    wanted: dict[str, str | int | bool | None] = {
        "job-name": name,
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "reservation": options.reservation,
        "dependency": options.dependency,
        "mail-user": options.mail_user,
        "mail-type": options.mail_type,
        "signal": f"USR2@{options.notice_s}",
        "requeue": True,
        "open-mode": "append",
        "output": f"{run_dir}/slurm/".replace("%", "%%") + "%j.out",
    }
    wanted |= options.sbatch
    return [f"#SBATCH {text}" for text in flags(wanted)]


def flags(options: Mapping[str, str | int | bool | None]) -> list[str]:
    """--key=value as sbatch and srun read it; --key for True, nothing for None and False. 0 is a value (mem=0: all of a node's memory)."""
    return [
        f"--{key}" if value is True else f"--{key}={shlex.quote(str(value))}"
        for key, value in options.items()
        if value is not None and value is not False
    ]


def srun(options: SlurmConfig) -> str:
    """The srun line of one start. Notices are blocked until the ranks' handlers stand: one that comes before would kill."""
    return (
        f'{step(options, label=True)} "${{block[@]}}" bash -c {shlex.quote(rank_line(options))} &'
    )


def step(options: SlurmConfig, **own: str | int | bool) -> str:
    """srun and its options, for a step of the job; `own` options of this step are written with _ for -."""
    # cpus-per-task: since Slurm 22.05 srun no longer takes it from sbatch, and every rank would sit on one core
    wanted = (
        {"kill-on-bad-exit": 1}
        | {key.replace("_", "-"): value for key, value in own.items()}
        | {
            "cpus-per-task": options.cpus_per_task,
            "container-image": options.container,
            "container-mounts": options.container_mounts,
        }
        | options.srun
    )
    return " ".join(["srun", *flags(wanted)])


def blocker(options: SlurmConfig) -> str:
    """The lines that choose what blocks the notices. Inside a container nothing is known of its env, its Python is there."""
    python = f'block=("$PYTHON" -c {shlex.quote(BLOCK)})'
    return (
        python
        if options.container
        else f'block=(env --block-signal=USR2,TERM); "${{block[@]}}" true 2>/dev/null || {python}'
    )


def rank_line(options: SlurmConfig) -> str:
    """What one task runs: Slurm's names for who it is become ours."""
    return f'{identity(options)}; exec "$PYTHON" -m {RUN} "$RUN"'


def identity(options: SlurmConfig) -> str:
    """Who a task is."""
    cores = f" CORES_PER_RANK={options.cpus_per_task}" if options.cpus_per_task else ""
    return f"export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={options.tasks_per_node}{cores} NODE_NAME=$SLURMD_NODENAME"


def script(
    options: SlurmConfig,
    run_dir: Path,
    name: str,
    python: str,
    root: Path,
    relaunches: int,
    before: str = "",
    after: str = "",
) -> str:
    """The whole batch script. `root` is the checkout, `python` the interpreter of the batch script (the ranks' unless options say).
    `before`: lines between taking the run folder and the first start; `after`: a command for the script's end, however it ends."""
    q = shlex.quote
    recovery = f"{q(python)} {q(str(root / 'launch' / 'recovery.py'))}"
    return f"""#!/bin/bash
{chr(10).join(header(options, run_dir, name))}
# Written by launch/slurm.py. Its copy in the run folder is for reading; nothing there is ever executed.
export RUN={q(str(run_dir))} PYTHON={q(options.python or python)}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH={q(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}  # this checkout, not the one in the current folder
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}} OMP_WAIT_POLICY=${{OMP_WAIT_POLICY:-PASSIVE}}
{setup(options)}
say() {{ echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }}
ask() {{ (trap '' USR2 TERM; exec {recovery} "$@"); }}  # a notice must not kill the one who decides
{ENDINGS}
{blocker(options)}
{lease()}
{STEPS}
{MEET}{f"{chr(10)}trap {q(after)} EXIT" if after else ""}{f"{chr(10)}{before}" if before else ""}
start=0 idle=0  # idle: faulty starts in a row with nothing finished
while :; do
  if [ -f "$RUN/DONE" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then say "done before"; exit 0; fi
  until scontrol show job "$SLURM_JOB_ID" >/dev/null; do say "no answer from slurmctld, which srun needs; asked again in 10 s"; sleep 10; done
  mark=$(ask begin "$RUN") || exit 1
  meet
  say "start $start on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks, $MASTER_ADDR:$MASTER_PORT"
  {srun(options)}
  step=$!
  while kill -0 $step 2>/dev/null; do wait $step; done
  verdict=$(ask decide "$RUN" "$mark" $start {relaunches} $idle) || exit 1
  action=${{verdict%%$'\\n'*}} why=${{verdict#*$'\\n'}}
  idle=${{action#* }} action=${{action% *}}
  case $action in stopped|relaunch|give_up) if comes_back; then action=requeue; fi ;; esac
  if [ "$action" = stopped ] && [ -z "$told" ] && [ $start -lt {relaunches} ] && runs_on; then
    action=relaunch why="$why; but Slurm lets this job run on (to stop it: scancel)"
  fi
  say "$action: $why"
  case $action in
    done|stopped) exit 0 ;;
    requeue) rm -f "$RUN/STOPPED"; requeue; sleep 60; exit 1 ;;  # Slurm ends this script
    relaunch) start=$((start + 1)) ;;
    *) exit 1 ;;
  esac
done
"""


def setup(options: SlurmConfig) -> str:
    """The user's lines, each of which must succeed, and the end of what they have changed in how this shell runs."""
    # the empty line: one that ends in a backslash would take the next with it
    quoted = " ".join(map(shlex.quote, options.setup))
    lines = (
        "\n".join((f"setup_lines=({quoted})", SETUP, *options.setup, "", "trap - ERR"))
        if options.setup
        else ""
    )
    return f"{lines}\nset +eu +o pipefail  # the loop below lives on codes that are not 0: srun's, flock's, grep's".strip()


# ERR looks at what errexit would look at, but a function or a sourced file only by its own code: module and activate scripts are full of commands
# that may fail. The lock is held while MISTAKE is written: the run folder may be another job's.
SETUP = r"""
setup_failed() {
  [ "${FUNCNAME[1]:-main}" = main ] || return "$1"
  case "$1" in 138 | 140 | 143) exit "$1" ;; esac  # ended by USR1, USR2, TERM: a notice or a cancel, no mistake
  local said="slurm.setup: the line '${setup_lines[$3 - setup_from]:-$2}' failed with code $1, and no rank was started; mend it, or end it with || true where it may fail"
  echo "$(date +%FT%T) job $SLURM_JOB_ID: mistake: $said" >&2
  (exec 9>>"$RUN/lock" && { flock -n 9; [ $? != 1 ]; } && echo "$said" >"$RUN/MISTAKE")
  exit 1
}
setup_from=$((LINENO + 2))
trap 'setup_failed $? "$BASH_COMMAND" "$LINENO"' ERR
""".strip()


STEPS = r"""
# A node that died and is back is told a minute late how steps ended that it missed, and a job that was queued again would have steps of the
# same numbers: slurmctld (22.05) then ends the new ranks. The old numbers are used up by steps that do nothing.
steps="$RUN/slurm/steps-$SLURM_JOB_ID" used=0
one_more_step() { used=$((used + 1)); echo $used >"$steps"; }  # before every srun
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -s "$steps" ]; then
  for ((i = $(cat "$steps"); i > 0 && used < 20; i--)); do timeout 20 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 true && used=$((used + 1)); done
fi
""".strip()


MEET = r"""
meet() {  # where the ranks of one start find each other
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$(ask port)
  one_more_step
  export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT
}
""".strip()


ENDINGS = r"""
# Slurm ends the job for a reason of its own (time limit, preemption): the run must come back. After scancel it must not.
comes_back() { facts | grep -Eq 'Reason=TimeLimit|PreemptTime=[0-9]'; }
# A TERM that Slurm did not mean: a kill by hand, or the end of an older step of the same number (below).
runs_on() { facts | grep -q ' JobState=RUNNING '; }
facts() { for i in {1..30}; do if scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null; then return; fi; sleep 2; done; }  # slurmctld may not answer at once
queued= told=
requeue() {
  [ -z "$queued" ] || return
  for i in {1..60}; do  # slurmctld may be away just now
    if scontrol requeue "$SLURM_JOB_ID"; then queued=yes; return; fi
    sleep 10
  done
  say "could not be queued again; submit the same command once more, it goes on"; exit 1
}
# The ranks act on a notice, this script waits for them. TERM reaches it only when the job's end is near: it may be killed any moment.
trap ':' USR2
trap 'told=yes; if comes_back; then say "requeue: Slurm ends the job before the ranks have left"; requeue; fi' TERM
""".strip()


def lease() -> str:
    """The lines that take the run folder's lock: one job a run folder, and the same lock as launch/local.py's."""
    return f"""
# One job a run folder. A file system without locks (code other than 1) is said and gone on with: the submission has checked.
exec 9>>"$RUN/lock"
flock -n 9; locked=$?
if [ $locked = 1 ] && grep -q "^job $SLURM_JOB_ID " "$RUN/lock"; then
  say "this job's former start still holds the run folder (its node died?); waiting up to {LEASE_WAIT_S} s for the file server to see it"
  flock -w {LEASE_WAIT_S} 9 || say "it still holds it; Slurm has ended that start, so this one goes on"
  locked=0
fi
if [ $locked = 1 ]; then say "the run folder is in use by $(cat "$RUN/lock"); this job leaves"; exit 1; fi
[ $locked = 0 ] || say "no locks on this file system (flock: $locked); two jobs on one run folder would not be noticed here"
echo -n "job $SLURM_JOB_ID on $(hostname)" >"$RUN/lock"
""".strip()
