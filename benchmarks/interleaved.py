"""Groups of processes that measure in turns: while one works the others sleep, so that what else the machine does hits all alike."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Work = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """What one turn took: seconds until the last rank was done, CPU seconds of all, the largest rank's peak memory, and ranks' values."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    values: list[Any]


@contextlib.contextmanager
def job_world() -> Iterator[Any]:
    """The world of the ranks that srun or torchrun started (RANK is set); one that is open already stays so."""
    from dist_scan.world.world import close_world, current, open_world

    found = current().world_size > 1
    yield current() if found else open_world()
    if not found:
        close_world()


def measure_job(work: Work, rounds: int) -> list[Measurement]:
    """`work` on all ranks of the open world, `rounds` times after one to warm up; each time all begin together."""
    from dist_scan.monitoring.step_timer import cuda_event_recorder
    from dist_scan.world.collectives import barrier, gather_objects
    from dist_scan.world.world import current

    record_event, turns = cuda_event_recorder(current().device), []
    for _ in range(rounds + 1):
        barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        value = work()
        if record_event is not None:
            record_event().synchronize()
        mine = (
            time.perf_counter() - wall,
            time.process_time() - cpu,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            value,
        )
        all_ranks = gather_objects(mine)
        turns.append(
            Measurement(
                max(a[0] for a in all_ranks),
                sum(a[1] for a in all_ranks),
                max(a[2] for a in all_ranks),
                [a[3] for a in all_ranks],
            )
        )
    return turns[1:]


def medians(turns: list[Measurement]) -> dict[str, float]:
    """Fields of a row: medians over turns, and the rank that held most memory."""
    return {
        "wall_s": round(statistics.median(t.wall_s for t in turns), 4),
        "cpu_s": round(statistics.median(t.cpu_s for t in turns), 4),
        "peak_host_mib": round(max(t.peak_mib for t in turns)),
    }


class RankGroup:
    """`make(*args) -> work` runs once in each of W new processes (ranks of one world, each with threads / W threads); `turn()` runs work once."""

    def __init__(
        self,
        make: Callable[..., Work],
        world_size: int,
        threads: int,
        *args: Any,
        in_world: bool = True,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.orders, self.results = [context.Queue() for _ in range(world_size)], context.Queue()
        self.ranks = [
            context.Process(
                target=_rank,
                daemon=True,
                args=(
                    make,
                    args,
                    r,
                    world_size,
                    port,
                    max(1, threads // world_size),
                    in_world,
                    self.orders[r],
                    self.results,
                ),
            )
            for r in range(world_size)
        ]
        for p in self.ranks:
            p.start()
        self._answers()

    def measure(self) -> Measurement:
        """All ranks work once."""
        begin = time.perf_counter()
        for orders in self.orders:
            orders.put(True)
        answers = self._answers()
        return Measurement(
            time.perf_counter() - begin,
            sum(a[1] for a in answers),
            max(a[2] for a in answers),
            [a[3] for a in answers],
        )

    def close(self) -> None:
        """End the processes."""
        for orders, p in zip(self.orders, self.ranks):
            orders.put(None)
            p.join(10)

    def _answers(self) -> list[tuple]:
        found = [self.results.get() for _ in self.ranks]
        for answer in found:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        return sorted(found, key=lambda a: a[0])


def _rank(
    make: Callable[..., Work],
    args: tuple,
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    in_world: bool,
    orders,
    results,
) -> None:
    try:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS=str(threads),
            OPENBLAS_NUM_THREADS=str(threads),
            MKL_NUM_THREADS=str(threads),
        )
        if in_world:
            import torch

            from dist_scan.world.world import open_world

            torch.set_num_threads(threads)
            open_world("cpu")
        work = make(*args)
        results.put((rank, 0.0, 0.0, None))
        while orders.get():
            cpu = time.process_time()
            value = work()
            results.put(
                (
                    rank,
                    time.process_time() - cpu,
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    value,
                )
            )
    except BaseException as error:
        results.put(f"rank {rank} of {make.__name__}: {type(error).__name__}: {error}")
        raise
