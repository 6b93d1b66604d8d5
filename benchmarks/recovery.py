"""What a fault costs, in real processes on this machine: one JSON line per case (RELIABILITY.md, figures kept).

    python -m benchmarks.recovery                    # every case once: two ranks, a small SimCLR on the digits
    python -m benchmarks.recovery --soak 20          # random kills of random ranks for 20 minutes

steps_lost: done again. first_exit_s: from the fault to the first rank's end. new_step_s: from the fault to the first step that was not
done before. identical: losses and weights equal an undisturbed run's, bit for bit. stalls: relaunches after which nothing was finished.
A case that ends the job (USR2) is started again by this script at once, so new_step_s holds a whole start, imports included.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOOK_S = 0.02
CONFIG = """
name: recovery
data: {{train: {{source: "sklearn:digits", limit: 960}}, size: 32, stored: raw, resolution: 32}}
stages:
  pretext: {{kind: train, images: train, network: {{name: resnet_small, width: 8}}, method: {{kind: simclr, projection_dim: 16}}, recipes: [digits, digits],
            optimizer: {{kind: sgd, lr: 0.05}}, epochs: {epochs}, global_batch: 96}}
runtime: {{workers: 1, checkpoint_s: 2.0, log_every: 1, device: cpu, step_limit_s: 5, relaunches: 1000}}
"""
CASES: dict[str, list[dict]] = {
    "1 kill -9 of rank 1 in a step": [{"kind": "kill", "rank": 1, "step": 25}],
    "2 kill -9 of rank 0 in a step": [{"kind": "kill", "rank": 0, "step": 25}],
    "3 exception on rank 1": [{"kind": "exception", "rank": 1, "step": 25}],
    "4 rank 1 stopped (SIGSTOP; limit 5 s)": [{"kind": "stop", "rank": 1, "step": 25}],
    "4 loader of rank 1 stuck (limit 5 s)": [{"kind": "hang", "rank": 1, "at": "batch", "step": 25}],
    **{f"5 kill -9 in a save, before {at}": [{"kind": "kill", "at": at, "step": 1}] for at in ("data", "manifest", "rename", "prune")},
    "8 disk full at a save": [{"kind": "full", "at": "write", "step": 1}],
    "8 disk read-only at a save": [{"kind": "read_only", "at": "prepare", "step": 1}],
    "9 USR2 to rank 1, started again": [{"kind": "signal", "rank": 1, "step": 25}],
    "16 NaN in rank 1's loss, once": [{"kind": "nan", "rank": 1, "at": "loss", "step": 25}],
}
CHANGES_RESULT = ("16",)  # an update is left out: not the undisturbed run's result


@dataclass
class Run:
    """One run folder, watched while it runs: `seen` is (time, step) of every row of metrics.jsonl, as written."""

    folder: Path
    epochs: int
    seen: list[tuple[float, int]] = field(default_factory=list)
    exits: list[float] = field(default_factory=list)
    read: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "recovery.yaml").write_text(CONFIG.format(epochs=self.epochs))

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def fault_path(self) -> Path:
        return self.folder / "fault.json"

    def start(self, faults: Sequence[dict] = ()) -> subprocess.Popen:
        if faults:
            self.fault_path.write_text(json.dumps(list(faults)))
        env = os.environ | {"DIST_SCAN_FAULT": str(self.fault_path), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        line = [sys.executable, str(ROOT / "launch" / "local.py"), str(self.folder / "recovery.yaml"), "--processes", "2", f"runtime.run_dir={self.run_dir}"]
        with open(self.folder / "said.txt", "ab") as out:
            return subprocess.Popen(line, env=env, stdout=out, stderr=out)

    def watch(self, launcher: subprocess.Popen, kills: Kills | None = None) -> int:
        """Until the launcher ends; returns its code."""
        alive: set[int] = set()
        while launcher.poll() is None:
            self.look()
            now = {pid for pid in children(launcher.pid) if not ended(pid)}
            self.exits += [time.time()] * len(alive - now)
            alive = now
            if kills is not None:
                kills.strike(sorted(now))
            time.sleep(LOOK_S)
        self.look()
        return launcher.returncode

    def look(self) -> None:
        """Rows that were written since the last look."""
        path = self.run_dir / "logs" / "pretext.metrics.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as f:
            f.seek(self.read)
            new = f.read()
        whole = new[:new.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if "loss" in row:
                self.seen.append((time.time(), row["step"]))

    def losses(self) -> dict[int, float]:
        from dist_scan.engine.log import read_rows

        return {r["step"]: r["loss"] for r in read_rows(self.run_dir / "logs" / "pretext.metrics.jsonl") if "loss" in r}

    def weights(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.run_dir.glob("stages/pretext/*/*.safetensors")}

    def faults(self) -> list[dict]:
        path = self.run_dir / "logs" / "faults.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def training_s(self) -> float:
        """Seconds from the first step to the last."""
        return self.seen[-1][0] - self.seen[0][0]


class Kills:
    """Random kills of random ranks: exponential with this mean, for so long."""

    def __init__(self, mean_s: float, length_s: float, seed: int):
        self.random, self.mean_s = random.Random(seed), mean_s
        self.end = time.time() + length_s
        self.next = time.time() + self.random.expovariate(1 / mean_s)
        self.count = 0

    def strike(self, ranks: list[int]) -> None:
        """Kill one when it is time."""
        if ranks and self.next <= time.time() < self.end:
            os.kill(self.random.choice(ranks), signal.SIGKILL)
            self.next = time.time() + self.random.expovariate(1 / self.mean_s)
            self.count += 1


def children(pid: int) -> list[int]:
    """The processes that this one started."""
    try:
        return [int(k) for k in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ended(pid: int) -> bool:
    """Gone, or waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def one(name: str, faults: list[dict], folder: Path, whole: Run) -> dict:
    """One case to its end, and its figures."""
    run = Run(folder, whole.epochs)
    code, starts = run.watch(run.start(faults)), 1
    while code == 128 + signal.SIGUSR2 and starts < 5:
        code, starts = run.watch(run.start()), starts + 1
    fired = [json.loads(line)["time"] for line in Path(f"{run.fault_path}.fired").read_text().splitlines()][-1]
    before = max((step for at, step in run.seen if at <= fired), default=0)
    new = [at for at, step in run.seen if at > fired and step > before]
    gone = [at for at in run.exits if at >= fired]
    row = {"case": name, "ended": code, "steps_lost": len(run.seen) - len({step for _, step in run.seen}), "steps": len(run.losses()),
           "first_exit_s": round(gone[0] - fired, 2) if run.faults() or starts > 1 else None, "new_step_s": round(new[0] - fired, 2) if new else None,
           "relaunches": len(run.faults()), "stalls": sum(not f["advanced"] for f in run.faults())}
    if not name.startswith(CHANGES_RESULT):
        row["identical"] = run.losses() == whole.losses() and run.weights() == whole.weights()
    return row


def saves(folder: Path) -> dict:
    """A MoCo ResNet-50's checkpoint (two encoders, a queue, momentum buffers: 100 M numbers): its cost, and Young's interval for it."""
    import torch

    from dist_scan.engine.checkpoint import Checkpoints
    from dist_scan.engine.position import MTBF_S

    state = {"method": {f"w{i}": torch.randn(1_000_000) for i in range(100)}}
    store, save, load = Checkpoints(folder, 2), [], []
    for step in (1, 2, 3):
        store.save(step, state, {})
        save.append(store.save_s)
        began = time.monotonic()
        store.load(torch.device("cpu"))
        load.append(time.monotonic() - began)
    save_s = sorted(save)[1]
    interval_s = (2 * save_s * MTBF_S) ** 0.5
    return {"case": "save and load 400 MB", "save_s": round(save_s, 2), "load_and_verify_s": round(sorted(load)[1], 2),
            "interval_s": round(interval_s, 1), "time_lost_to_saves": round(save_s / interval_s, 4)}


def soak(minutes: float, folder: Path, seed: int) -> dict:
    """Kills for so many minutes; the run is as long as an undisturbed one of about half the time."""
    trial = Run(folder / "trial", 10)
    trial.watch(trial.start())
    epochs = max(10, int(10 * minutes * 60 * 0.5 / trial.training_s()))
    whole, run = Run(folder / "whole", epochs), Run(folder / "run", epochs)
    whole.watch(whole.start())
    kills = Kills(60.0, minutes * 60, seed)
    began = time.time()
    code = run.watch(run.start(), kills)
    took = time.time() - began
    return {"case": f"soak, {minutes:g} minutes, mean 60 s between kills", "ended": code, "kills": kills.count, "relaunches": len(run.faults()),
            "stalls": sum(not f["advanced"] for f in run.faults()), "steps": len(run.losses()),
            "steps_lost": len(run.seen) - len({step for _, step in run.seen}), "took_s": round(took),
            "undisturbed_s": round(whole.training_s()), "goodput": round(whole.training_s() / took, 3),
            "identical": run.losses() == whole.losses() and run.weights() == whole.weights()}


def main() -> None:
    """Every case, or the soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", type=float, nargs="?", const=20.0, metavar="MINUTES")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    where = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.soak is not None:
            print(json.dumps(soak(args.soak, folder, args.seed) | where), flush=True)
            return
        print(json.dumps(saves(folder / "checkpoints") | where), flush=True)
        whole = Run(folder / "whole", 6)
        assert whole.watch(whole.start()) == 0, (whole.folder / "said.txt").read_text()
        for number, (case, faults) in enumerate(CASES.items()):
            if args.only in case:
                print(json.dumps(one(case, faults, folder / str(number), whole) | where), flush=True)


if __name__ == "__main__":
    main()
