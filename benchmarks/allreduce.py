"""All-reduce: bytes per second by size of the message, and the ratio to torch.distributed's call.

    python -m benchmarks.allreduce --compare                    # 2 processes on this machine (gloo)
    srun ... python -m benchmarks.allreduce --sizes 4K 1M 100M  # the ranks of a job; rank 0 prints

`bytes_per_s` is the message's size over the time of one call; `bus_bytes_per_s` is what each link
carries in a ring, 2 (W-1)/W of it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.interleaved import RankGroup, job_world
from benchmarks.rows import emit, spread

CLUSTER = ["--sizes", "4K", "1M", "{gradient}"]  # the last is sent by a data-parallel step
QUICK = ["--compare", "--sizes", "4K", "256K", "4M", "--rounds", "7"]
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
SIZES = [2**12, 2**16, 2**20, 2**24, 100 * 2**20]
MAX_CALLS = 50
Timings = dict[int, list[tuple[float, float]]]
"""Seconds of (our call, torch's call) for each round, by size in bytes."""


def num_bytes(text: str) -> int:
    """'4K' -> 4096. Raises ArgumentTypeError."""
    unit = UNITS.get(text[-1:], 1)
    number = text[:-1] if unit > 1 else text
    if not number.isdigit() or int(number) * unit < 4:
        raise argparse.ArgumentTypeError(
            f"'{text}': a size is 4 or more bytes, as 4096, 4K, 1M or 2G"
        )
    return int(number) * unit


def measure(sizes: list[int], rounds: int, compare: bool) -> Timings:
    """Timings of this rank; a collective call."""
    import torch
    import torch.distributed as dist

    from dist_scan.world.collectives import all_sum, barrier
    from dist_scan.world.world import current

    device = current().device

    def seconds(work: Callable[[], object], calls: int) -> float:
        barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - begin) / calls

    timings: Timings = {}
    for size in sizes:
        message = torch.ones(size // 4, device=device)
        ours = partial(all_sum, message)
        peer = partial(dist.all_reduce, message)
        calls = max(1, min(MAX_CALLS, 2**22 // size))
        seconds(ours, 2)
        timings[size] = [
            (seconds(ours, calls), seconds(peer, calls) if compare else 0.0) for _ in range(rounds)
        ]
    return timings


def make_work(sizes: list[int], rounds: int, compare: bool) -> Callable[[], Timings]:
    """The work of a rank of a RankGroup."""
    return partial(measure, sizes, rounds, compare)


def report(by_rank: list[Timings]) -> None:
    """A row per size: the slowest rank of each round counts."""
    ranks = len(by_rank)
    for size in by_rank[0]:
        ours, peer = np.array([timings[size] for timings in by_rank]).max(0).T
        call_s = float(np.median(ours))
        row = {
            "row": size,
            "world_size": ranks,
            "call_ms": round(1000 * call_s, 3),
            "bytes_per_s": round(size / call_s),
            "bus_bytes_per_s": round(size / call_s * 2 * (ranks - 1) / ranks),
        }
        if peer.any():
            row |= spread(ours / peer, "time_ratio")
        emit(row)


def measure_over_job(args: argparse.Namespace) -> None:
    """Measure over the ranks of a job; rank 0 reports. A single rank sends nothing."""
    from dist_scan.world.collectives import gather_objects

    with job_world() as world:
        if world.world_size > 1:
            by_rank = gather_objects(measure(args.sizes, args.rounds, args.compare))
            if world.rank == 0:
                report(by_rank)


def main(argv: list[str] | None = None) -> None:
    """Measure over the ranks of a job, or over processes of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=num_bytes, default=SIZES)
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="on this machine, if not started by srun or torchrun",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        measure_over_job(args)
        return
    processes = args.processes
    group = RankGroup(make_work, processes, processes, args.sizes, args.rounds, args.compare)
    report(group.measure().values)
    group.close()


if __name__ == "__main__":
    main()
