"""Bytes per second through our all-reduce, by size of the message, and the ratio to torch.distributed's own call.

    python -m benchmarks.allreduce --compare                    # 2 processes on this machine (gloo)
    srun ... python -m benchmarks.allreduce --sizes 4K 1M 100M  # the ranks of a job (nccl on GPUs); rank 0 prints

`bytes_per_s` is the message's size over the time of one call; `bus_bytes_per_s` what each link carries in a ring, 2 (W-1)/W of it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np

from benchmarks.rows import emit, spread

CLUSTER = [
    "--sizes",
    "4K",
    "1M",
    "{gradient}",
]  # the last is what a step of data-parallel training sends
QUICK = ["--compare", "--sizes", "4K", "256K", "4M", "--rounds", "7"]
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def num_bytes(text: str) -> int:
    """'4K' -> 4096. Raises ArgumentTypeError."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    if not number.isdigit() or int(number) * unit < 4:
        raise argparse.ArgumentTypeError(
            f"'{text}': a size is 4 or more bytes, as 4096, 4K, 1M or 2G"
        )
    return int(number) * unit


def timings(sizes: list[int], rounds: int, compare: bool) -> dict[int, list[tuple[float, float]]]:
    """Seconds of (our call, torch's) by size, on this rank; all ranks call it together."""
    import torch
    import torch.distributed as dist

    from dist_scan.world.collectives import all_sum, barrier
    from dist_scan.world.world import current

    def timed(work: Callable[[], object], calls: int) -> float:
        barrier()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if current().device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - began) / calls

    found = {}
    for size in sizes:
        message = torch.ones(size // 4, device=current().device)
        calls = max(1, min(50, 2**22 // size))
        timed(lambda: all_sum(message), 2)
        found[size] = [
            (
                timed(lambda: all_sum(message), calls),
                timed(lambda: dist.all_reduce(message), calls) if compare else 0.0,
            )
            for _ in range(rounds)
        ]
    return found


def worker(sizes: list[int], rounds: int, compare: bool) -> Callable[[], dict]:
    """A rank's turn (benchmarks.interleaved)."""
    return lambda: timings(sizes, rounds, compare)


def report(by_rank: list[dict[int, list[tuple[float, float]]]]) -> None:
    """A row per size: the slowest rank of each round counts."""
    for size in by_rank[0]:
        seconds = np.array([rank[size] for rank in by_rank]).max(0)
        call_s, w = float(np.median(seconds[:, 0])), len(by_rank)
        row = {
            "row": size,
            "world_size": w,
            "call_ms": round(1000 * call_s, 3),
            "bytes_per_s": round(size / call_s),
            "bus_bytes_per_s": round(size / call_s * 2 * (w - 1) / w),
        }
        emit(
            row
            | (spread(seconds[:, 0] / seconds[:, 1], "time_ratio") if seconds[:, 1].any() else {})
        )


def main(argv: list[str] | None = None) -> None:
    """The ranks of a job, or two processes of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=num_bytes,
        default=[num_bytes(s) for s in ("4K", "64K", "1M", "16M", "100M")],
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="on this machine, when not started by srun or torchrun",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args(argv)
    from benchmarks.interleaved import RankGroup, job_world

    if "RANK" in os.environ:
        from dist_scan.world.collectives import gather_objects

        with job_world() as world:
            by_rank = (
                gather_objects(timings(args.sizes, args.rounds, args.compare))
                if world.world_size > 1
                else []
            )  # alone: nothing is sent
            if world.rank == 0 and by_rank:
                report(by_rank)
        return

    group = RankGroup(worker, args.processes, args.processes, args.sizes, args.rounds, args.compare)
    report(group.measure().values)
    group.close()


if __name__ == "__main__":
    main()
