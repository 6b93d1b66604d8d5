"""Run a function on W real gloo processes: `run_ranks(fn, 3, arg)` -> [result of rank 0, 1, 2]. fn is a module-level function."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import traceback

# Importing torch takes 4 s a process: a server imports it once (and does nothing else, so no OpenMP pool exists) and forks the ranks.
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
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when the fork server imports torch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _enter(fn, rank: int, world_size: int, port, args, results) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    import torch

    from dist_scan.world.world import close_world, open_world

    torch.set_num_threads(1)
    try:
        open_world("cpu", timeout_s=120)
        results.put((rank, True, fn(*args)))
        close_world()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1)


def run_ranks(fn, world_size: int, *args, timeout_s: float = 180):
    """Results by rank. Raises the first rank's traceback when one fails."""
    results, port = CONTEXT.Queue(), free_port()
    ranks = [
        CONTEXT.Process(target=_enter, args=(fn, r, world_size, port, args, results))
        for r in range(world_size)
    ]
    for p in ranks:
        p.start()
    out = {}
    try:
        while len(out) < world_size:
            try:
                rank, ok, value = results.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(
                    f"ranks {sorted(set(range(world_size)) - set(out))} gave nothing in {timeout_s} s"
                ) from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            out[rank] = value
    finally:
        for p in ranks:
            if len(out) < world_size:
                p.kill()
            p.join()
    return [out[r] for r in range(world_size)]
