"""Saving and loading a checkpoint (hashed, flushed, read back, renamed) against torch.save alone.

    python -m benchmarks.checkpoint --compare [--model resnet50] [--folder WHERE_RUNS_ARE]

The state is that of a MoCo: two networks, SGD's momentum, a queue. The peer writes the same state
with torch.save, flushes it, and loads it with torch.load; it detects neither an incomplete file
nor a flipped bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import emit, spread
from dist_scan.engine.checkpoint import CheckpointStore
from dist_scan.models.backbone import BackboneConfig, build_backbone

QUICK = ["--compare", "--model", "resnet18", "--rounds", "5"]


def moco_state(name: str, queue_size: int) -> dict[str, Any]:
    """What a MoCo of this backbone saves."""
    backbone = build_backbone(BackboneConfig(name=name))
    method = {
        f"{encoder}.{key}": value.clone()
        for encoder in ("backbone", "key")
        for key, value in backbone.state_dict().items()
    }
    method["queue"] = torch.randn(queue_size, 128)
    momentum = {
        index: {"momentum_buffer": torch.randn_like(parameter)}
        for index, parameter in enumerate(backbone.parameters())
    }
    return {
        "method": method,
        "optimizer": {"state": momentum, "param_groups": [{"params": list(momentum)}]},
        "train_state": {"step": 1},
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def torch_save(state: dict[str, Any], path: Path) -> None:
    """Save as the peer does: torch.save, flushed to disk."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Rounds of save, load and, with --compare, the peer's save and load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument(
        "--folder", help="a folder on the disk to measure (default: the temporary one)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    state = moco_state(args.model, args.queue)
    cpu = torch.device("cpu")
    timings: dict[str, list[float]] = {"save": [], "load": [], "peer_save": [], "peer_load": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", 2)
        peer = Path(folder) / "plain.pt"
        for step in range(args.rounds):
            timings["save"].append(seconds(partial(store.save, step, state, {})))
            timings["load"].append(seconds(partial(store.load, cpu)))
            if args.compare:
                timings["peer_save"].append(seconds(partial(torch_save, state, peer)))
                load = partial(torch.load, peer, weights_only=True)
                timings["peer_load"].append(seconds(load))
        checkpoint = next(store.folder.glob("step-*"))
        mib = sum(file.stat().st_size for file in checkpoint.iterdir()) / 2**20
    for name in ("save", "load"):
        median_s = float(np.median(timings[name]))
        row = {
            "row": name,
            "model": args.model,
            "mib": round(mib, 1),
            "seconds": round(median_s, 3),
            "mib_per_s": round(mib / median_s, 1),
        }
        if args.compare:
            ratios = np.array(timings[name]) / np.array(timings[f"peer_{name}"])
            row |= spread(ratios, "time_ratio")
        emit(row)


if __name__ == "__main__":
    main()
