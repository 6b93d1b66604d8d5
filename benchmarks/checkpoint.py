"""Saving and loading a checkpoint (hashed, flushed to the disk, read back, renamed in) against torch.save alone.

    python -m benchmarks.checkpoint --compare [--model resnet50] [--folder WHERE_RUNS_LIVE]

The state is a MoCo's: two networks, SGD's momentum, a queue. The peer writes the same state with torch.save and flushes it, and loads it
with torch.load; it notices neither a torn file nor a flipped bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import emit, spread

QUICK = ["--compare", "--model", "resnet18", "--rounds", "5"]


def state_of(name: str, queue: int) -> dict[str, Any]:
    """What a MoCo of this backbone saves."""
    from dist_scan.models.backbone import BackboneConfig, build_backbone

    backbone = build_backbone(BackboneConfig(name=name))
    weights = backbone.state_dict()
    method = {
        f"{part}.{k}": v.clone() for part in ("backbone", "key") for k, v in weights.items()
    } | {"queue": torch.randn(queue, 128)}
    momentum = {
        i: {"momentum_buffer": torch.randn_like(p)} for i, p in enumerate(backbone.parameters())
    }
    return {
        "method": method,
        "optimizer": {"state": momentum, "param_groups": [{"params": list(momentum)}]},
        "position": {"step": 1},
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain_save(state: dict[str, Any], path: Path) -> None:
    """The peer."""
    with open(path, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())


def main() -> None:
    """Rounds of save, load, plain save, plain load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument(
        "--folder", help="a folder on the disk to measure (default: the temporary one)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    from dist_scan.engine.checkpoint import CheckpointStore

    state, cpu = state_of(args.model, args.queue), torch.device("cpu")
    seconds: dict[str, list[float]] = {"save": [], "load": [], "plain_save": [], "plain_load": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store, path = CheckpointStore(Path(folder) / "checkpoints", 2), Path(folder) / "plain.pt"
        for step in range(args.rounds):
            seconds["save"].append(timed(lambda: store.save(step, state, {})))
            seconds["load"].append(timed(lambda: store.load(cpu)))
            if args.compare:
                seconds["plain_save"].append(timed(lambda: plain_save(state, path)))
                seconds["plain_load"].append(timed(lambda: torch.load(path, weights_only=True)))
        size = sum(f.stat().st_size for f in next(store.folder.glob("step-*")).iterdir())
    for name in ("save", "load"):
        took = np.array(seconds[name])
        row = {
            "row": name,
            "model": args.model,
            "mib": round(size / 2**20, 1),
            "seconds": round(float(np.median(took)), 3),
            "mib_per_s": round(size / 2**20 / float(np.median(took)), 1),
        }
        emit(
            row
            | (
                spread(took / np.array(seconds[f"plain_{name}"]), "time_ratio")
                if args.compare
                else {}
            )
        )


if __name__ == "__main__":
    main()
