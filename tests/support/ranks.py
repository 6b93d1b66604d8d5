"""Run a function on several ranks: real processes that communicate by gloo.

Importing torch takes 4 s, so a fork server imports everything once and forks the ranks. It does
nothing else: a process that has used OpenMP must not be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any, TypeVar

from dist_scan.world.processes import free_port, set_rank_environment

T = TypeVar("T")
ONE_THREAD_NO_GPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "numpy",
        "dist_scan.world.collectives",
        "torch._dynamo",
        "torch.nn.parallel.distributed",
        "faiss",
        "dist_scan.search.kernels",
        "launch.local",
        "dist_scan.run",
        "dist_scan.pipeline",
        "dist_scan.engine.training_loop",
        "tests.support.faults",
        "dist_scan.engine.embed",
        "dist_scan.methods.simclr",
        "dist_scan.stages.train",
        "dist_scan.search.kmeans",
        "dist_scan.data.beton.loader",
        "dist_scan.data.feed",
        "dist_scan.search.index",
        "dist_scan.report.figures",
        "tensorboard.compat.proto.event_pb2",
        "tensorboard.summary.writer.record_writer",
        "torchvision.models",
        "tests.support.preload",
    ]
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the fork server imports torch


def run_ranks(
    function: Callable[..., T], world_size: int, *args: Any, timeout_s: float = 180
) -> list[T]:
    """``function(*args)`` on every rank; returns the results in rank order.

    The function must be defined at the top level of a module. Raises RuntimeError with the
    traceback of the first rank that fails.
    """
    results: Queue = CONTEXT.Queue()
    port = free_port()
    ranks = [
        CONTEXT.Process(target=run_rank, args=(function, rank, world_size, port, args, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    values: dict[int, T] = {}
    try:
        while len(values) < world_size:
            try:
                rank, succeeded, value = results.get(timeout=timeout_s)
            except queue.Empty:
                missing = sorted(set(range(world_size)) - set(values))
                raise TimeoutError(f"no result of ranks {missing} in {timeout_s} s") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            values[rank] = value
    finally:
        for process in ranks:
            if len(values) < world_size:
                process.kill()
            process.join()
    return [values[rank] for rank in range(world_size)]


def run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    args: tuple[Any, ...],
    results: Queue,
) -> None:
    """The main function of one rank's process; puts (rank, succeeded, value or traceback)."""
    set_rank_environment(rank, world_size, port)
    os.environ.update(ONE_THREAD_NO_GPU)
    import torch

    from dist_scan.world.world import close_world, open_world

    torch.set_num_threads(1)
    try:
        open_world("cpu", timeout_s=120)
        results.put((rank, True, function(*args)))
        close_world()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None
