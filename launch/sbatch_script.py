"""Text of the batch script: #SBATCH lines, srun, relaunch in place, requeue.

There are two loops. A crash or a hang is relaunched inside the allocation. A time limit, a
preemption or a dead node goes through Slurm's requeue. If no rank saved after a notice, the
script requeues the job when Slurm ends it; only work since the last checkpoint is lost.
launch/recovery.py decides, and the script carries it out.

All functions are pure: settings in, text out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_scan.config import SlurmConfig

Settings = Mapping[str, str | int | bool | None]
SBATCH_FIELDS = (
    "nodes",
    "gpus_per_node",
    "cpus_per_task",
    "mem",
    "partition",
    "account",
    "qos",
    "time",
    "constraint",
    "exclude",
    "reservation",
    "dependency",
    "mail_user",
    "mail_type",
)
"""Fields of `slurm:` that are sbatch options of the same name, with - for _."""
CHECKOUT = Path(__file__).resolve().parents[1]
LOCK_WAIT_S = 180
"""A file server releases the lock of a dead node after a while: 90 s with NFSv4."""


@dataclass(frozen=True)
class BatchJob:
    """What one batch script runs."""

    options: SlurmConfig
    run_dir: Path
    name: str
    relaunches: int
    """Starts of the ranks after the first one, at most."""
    checkout: Path = CHECKOUT
    before_start: str = ""
    """Shell lines between taking the lock of the run folder and the first start."""
    at_exit: str = ""
    """Shell command that runs when the script ends, for whatever reason."""


def sbatch_lines(options: SlurmConfig, run_dir: Path, name: str) -> list[str]:
    """The #SBATCH lines.

    --signal without "B:" notifies the ranks, not the script; the script learns of it from the run
    marker STOPPED.
    """
    settings: Settings = {
        "job-name": name,
        "ntasks-per-node": options.tasks_per_node,
        "signal": f"USR2@{options.notice_s}",
        "requeue": True,
        "open-mode": "append",
        "output": f"{run_dir}/slurm/".replace("%", "%%") + "%j.out",
        **{field.replace("_", "-"): getattr(options, field) for field in SBATCH_FIELDS},
        **options.sbatch,
    }
    return [f"#SBATCH {flag}" for flag in to_flags(settings)]


def to_flags(settings: Settings) -> list[str]:
    """Command line options of sbatch and srun: --key=value, or --key for True.

    None and False give no option. 0 is a value (mem=0: all memory of a node).
    """
    flags = []
    for key, value in settings.items():
        if value is None or value is False:
            continue
        flags.append(f"--{key}" if value is True else f"--{key}={shlex.quote(str(value))}")
    return flags


def srun_command(options: SlurmConfig, **step_options: str | int | bool) -> str:
    """srun and its options for one job step; in names of `step_options` write _ for -."""
    settings: Settings = {
        "kill-on-bad-exit": 1,
        **{key.replace("_", "-"): value for key, value in step_options.items()},
        # Since Slurm 22.05 srun does not inherit it from sbatch: every rank would get one core.
        "cpus-per-task": options.cpus_per_task,
        "container-image": options.container,
        "container-mounts": options.container_mounts,
        **options.srun,
    }
    return " ".join(["srun", *to_flags(settings)])


def start_ranks_line(options: SlurmConfig) -> str:
    """The line that starts the ranks in the background.

    USR2 and TERM are blocked until the ranks have installed their handlers: before that they would
    kill a rank.
    """
    rank = f'{export_rank(options)}; exec "$PYTHON" -m dist_scan.run "$RUN"'
    step = srun_command(options, label=True)
    return f'{step} "${{block_signals[@]}}" bash -c {shlex.quote(rank)} &'


def export_rank(options: SlurmConfig) -> str:
    """The line that sets a task's rank and world size from Slurm's variables."""
    variables = {
        "RANK": "$SLURM_PROCID",
        "WORLD_SIZE": "$SLURM_NTASKS",
        "LOCAL_RANK": "$SLURM_LOCALID",
        "LOCAL_WORLD_SIZE": str(options.tasks_per_node),
    }
    if options.cpus_per_task:
        variables["CORES_PER_RANK"] = str(options.cpus_per_task)
    variables["NODE_NAME"] = "$SLURMD_NODENAME"
    return "export " + " ".join(f"{name}={value}" for name, value in variables.items())


def choose_signal_blocker(options: SlurmConfig) -> str:
    """The lines that set `block_signals`: a command that runs its arguments with signals blocked.

    Old versions of env cannot do it (coreutils before 8.31, busybox); a line of Python can. In a
    container the version of env is unknown, but Python is there.
    """
    program = (
        "import os, signal, sys; "
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM}); "
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    with_python = f'block_signals=("$PYTHON" -c {shlex.quote(program)})'
    if options.container:
        return with_python
    return f"""block_signals=(env --block-signal=USR2,TERM)
"${{block_signals[@]}}" true 2>/dev/null || {with_python}"""


def build_script(job: BatchJob) -> str:
    """The whole batch script."""
    options = job.options
    run_dir = shlex.quote(str(job.run_dir))
    checkout = shlex.quote(str(job.checkout))
    # The interpreter that submits runs the ranks too, unless the options name another.
    rank_python = shlex.quote(options.python or sys.executable)
    recovery = shlex.join([sys.executable, str(job.checkout / "launch" / "recovery.py")])
    sections = [
        "#!/bin/bash",
        *sbatch_lines(options, job.run_dir, job.name),
        "# Written by launch/slurm.py. The copy in the run folder is for reading only.",
        f"export RUN={run_dir} PYTHON={rank_python}",
        "# The ranks import this checkout, not a package in their current folder.",
        f"export PYTHONPATH={checkout}${{PYTHONPATH:+:$PYTHONPATH}}",
        ENVIRONMENT,
        setup_lines(options),
        'log() { echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }',
        "# USR2 and TERM must not kill the process that decides what to do about them.",
        f"recovery() {{ (trap '' USR2 TERM; exec {recovery} \"$@\"); }}",
        SIGNALS,
        choose_signal_blocker(options),
        LOCK,
        STEPS,
        RENDEZVOUS,
    ]
    if job.at_exit:
        sections.append(f"trap {shlex.quote(job.at_exit)} EXIT")
    if job.before_start:
        sections.append(job.before_start)
    loop = LOOP.replace("@START_RANKS@", start_ranks_line(options))
    sections.append(loop.replace("@RELAUNCHES@", str(job.relaunches)))
    return "\n".join(sections) + "\n"


def setup_lines(options: SlurmConfig) -> str:
    """The user's setup lines, each of which must succeed; then the shell's default behaviour."""
    lines = []
    if options.setup:
        quoted = " ".join(map(shlex.quote, options.setup))
        # The empty line: a setup line that ends in a backslash would continue in the next one.
        lines = [f"setup_lines=({quoted})", SETUP, *options.setup, "", "trap - ERR"]
    lines += [
        "# Undo what setup lines may have set: below, commands may fail (srun, flock, grep).",
        "set +eu +o pipefail",
    ]
    return "\n".join(lines)


ENVIRONMENT = """
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
""".strip()


SETUP = r"""
# Called if a setup line fails: ends the job before any rank starts. Commands that fail inside a
# function or a sourced file (module and activate scripts) do not count, only its exit code.
setup_failed() {
  [ "${FUNCNAME[1]:-main}" = main ] || return "$1"
  # Ended by USR1, USR2 or TERM: a notice or a cancel, not an invalid setting.
  case "$1" in 138 | 140 | 143) exit "$1" ;; esac
  local line=${setup_lines[$3 - setup_from]:-$2}
  local error="slurm.setup: the line '$line' failed with code $1, and no rank was started;"
  error+=" fix it, or append || true if it may fail"
  echo "$(date +%FT%T) job $SLURM_JOB_ID: fatal_error: $error" >&2
  # Only under the lock: the run folder may belong to another job.
  (exec 9>>"$RUN/lock" && { flock -n 9; [ $? != 1 ]; } && echo "$error" >"$RUN/FATAL_ERROR")
  exit 1
}
setup_from=$((LINENO + 2))
trap 'setup_failed $? "$BASH_COMMAND" "$LINENO"' ERR
""".strip()


SIGNALS = r"""
job_info() {  # slurmctld may not answer at once
  for i in {1..30}; do
    if scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null; then return; fi
    sleep 2
  done
}
# Slurm itself ends the job (time limit, preemption): requeue it; after scancel do not.
ended_by_slurm() { job_info | grep -Eq 'Reason=TimeLimit|PreemptTime=[0-9]'; }
# The ranks got TERM, but not because the job ends: sent by hand, or a late message to a node that
# missed the end of an older job step.
job_continues() { job_info | grep -q ' JobState=RUNNING '; }
requeued= term_received=
requeue() {
  [ -z "$requeued" ] || return
  for i in {1..65}; do  # slurmctld may be down for a while: try for ten minutes
    if scontrol requeue "$SLURM_JOB_ID"; then requeued=yes; return; fi
    sleep $((i < 10 ? i : 10))
  done
  log "the job could not be requeued; submit the same command again to resume the run"
  exit 1
}
on_term() {  # the job ends soon: this script may be killed at any time
  term_received=yes
  if ended_by_slurm; then
    log "requeue: Slurm ends the job before the ranks have stopped"
    requeue
  fi
}
# The ranks act on a notice; this script waits for them.
trap ':' USR2
trap on_term TERM
""".strip()


LOCK = rf"""
# One job per run folder; launch/local.py takes the same lock. On a file system without locks (an
# exit code other than 1) only the check at submission protects the run folder.
exec 9>>"$RUN/lock"
flock -n 9; lock_code=$?
if [ $lock_code = 1 ] && grep -q "^job $SLURM_JOB_ID " "$RUN/lock"; then
  log "an earlier start of this job still holds the run folder (its node died?);" \
    "waiting up to {LOCK_WAIT_S} s for the file server to release it"
  flock -w {LOCK_WAIT_S} 9 || log "not released; Slurm has ended that start, so this one continues"
  lock_code=0
fi
if [ $lock_code = 1 ]; then
  log "the run folder is in use by $(cat "$RUN/lock"); this job ends"
  exit 1
fi
if [ $lock_code != 0 ]; then
  log "this file system has no locks (flock: $lock_code);" \
    "a second job on this run folder would go unnoticed"
fi
echo -n "job $SLURM_JOB_ID on $(hostname)" >"$RUN/lock"
""".strip()


STEPS = r"""
# A node that returns after a failure reports the end of its old job steps a minute later. If the
# requeued job then has a step of the same number, slurmctld (22.05) ends its ranks. So job steps
# that do nothing use up the old numbers first.
steps_file="$RUN/slurm/steps-$SLURM_JOB_ID" num_steps=0
count_step() { num_steps=$((num_steps + 1)); echo $num_steps >"$steps_file"; }  # before every srun
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -s "$steps_file" ]; then
  for ((i = $(cat "$steps_file"); i > 0 && num_steps < 20; i--)); do
    timeout 20 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 true && num_steps=$((num_steps + 1))
  done
fi
""".strip()


RENDEZVOUS = r"""
set_rendezvous() {  # address and port at which the ranks of one start connect
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$(recovery port)
  count_step
  export MASTER_ADDR=${MASTER_ADDR:-$first_node} MASTER_PORT
}
""".strip()


LOOP = r"""
start=0 fruitless_starts=0  # faulty starts in a row without progress
while :; do
  if [ -f "$RUN/DONE" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    log "the run is complete already"
    exit 0
  fi
  until scontrol show job "$SLURM_JOB_ID" >/dev/null; do
    log "slurmctld does not answer, and srun needs it; trying again in 10 s"
    sleep 10
  done

  # Start the ranks and wait for their end; a signal interrupts `wait`, so it is repeated.
  digest=$(recovery prepare "$RUN") || exit 1
  set_rendezvous
  log "start $start on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks, $MASTER_ADDR:$MASTER_PORT"
  @START_RANKS@
  step=$!
  while kill -0 $step 2>/dev/null; do wait $step; done

  # Decide: the first line is "ACTION FRUITLESS_STARTS", the second the reason.
  decision=$(recovery decide "$RUN" "$digest" $start @RELAUNCHES@ $fruitless_starts) || exit 1
  action=${decision%%$'\n'*} reason=${decision#*$'\n'}
  fruitless_starts=${action#* } action=${action% *}
  case $action in stopped | relaunch | give_up) if ended_by_slurm; then action=requeue; fi ;; esac
  if [ "$action" = stopped ] && [ -z "$term_received" ] && [ $start -lt @RELAUNCHES@ ] &&
    job_continues; then
    action=relaunch reason="$reason; but Slurm has not ended this job (to stop it: scancel)"
  fi

  log "$action: $reason"
  case $action in
    done | stopped) exit 0 ;;
    requeue) rm -f "$RUN/STOPPED"; requeue; sleep 60; exit 1 ;;  # Slurm ends this script
    relaunch) start=$((start + 1)) ;;
    *) exit 1 ;;
  esac
done
""".strip()
