"""Interleaved measurements: groups of processes that work one after another, round by round.

While one group works the others sleep, so that other load on the machine affects all alike.
Imports NumPy and torch only inside functions: new processes first set their number of threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING, Any

from dist_scan.world.processes import free_port, set_rank_environment

if TYPE_CHECKING:
    import numpy as np

    from dist_scan.world.world import World

Work = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """One round of all ranks."""

    wall_s: float
    """Until the last rank had finished."""
    cpu_s: float
    """Sum over ranks."""
    peak_mib: float
    """Peak memory of the largest rank."""
    values: list[Any]
    """What each rank returned, by rank."""


@dataclass(frozen=True)
class RankResult:
    """One round of one rank."""

    rank: int
    wall_s: float
    cpu_s: float
    peak_mib: float
    value: Any


def _combine(results: list[RankResult]) -> Measurement:
    results = sorted(results, key=lambda result: result.rank)
    return Measurement(
        wall_s=max(result.wall_s for result in results),
        cpu_s=sum(result.cpu_s for result in results),
        peak_mib=max(result.peak_mib for result in results),
        values=[result.value for result in results],
    )


def _run_timed(work: Work, rank: int, synchronize: Callable[[], object] | None) -> RankResult:
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    if synchronize is not None:
        synchronize()
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return RankResult(rank, wall_s, cpu_s, peak_mib, value)


@contextlib.contextmanager
def job_world() -> Iterator[World]:
    """The world of the ranks that srun or torchrun started; one that is open already stays open."""
    from dist_scan.world.world import close_world, current, open_world

    if current().world_size > 1:
        yield current()
        return
    yield open_world()
    close_world()


def measure_job(work: Work, rounds: int) -> list[Measurement]:
    """Measure `work` on all ranks of the open world, after one round to warm up.

    All ranks begin each round together.
    """
    import torch

    from dist_scan.world.collectives import barrier, gather_objects
    from dist_scan.world.world import current

    world = current()
    synchronize = torch.accelerator.synchronize if world.device.type != "cpu" else None
    measurements = []
    for _ in range(rounds + 1):
        barrier()
        result = _run_timed(work, world.rank, synchronize)
        measurements.append(_combine(gather_objects(result)))
    return measurements[1:]


def medians(measurements: list[Measurement]) -> dict[str, float]:
    """Fields of a row: median times, and the peak memory of the largest rank."""
    return {
        "wall_s": round(statistics.median(m.wall_s for m in measurements), 4),
        "cpu_s": round(statistics.median(m.cpu_s for m in measurements), 4),
        "peak_host_mib": round(max(m.peak_mib for m in measurements)),
    }


class RankGroup:
    """Processes that are the ranks of a world of their own and run the same work on request.

    Each calls `make(*args)` once, which returns the work. `threads` are divided among the ranks.
    """

    def __init__(
        self,
        make: Callable[..., Work],
        world_size: int,
        threads: int,
        *args: Any,
        in_world: bool = True,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.results = context.Queue()
        self.requests = [context.Queue() for _ in range(world_size)]
        self.ranks = []
        for rank, requests in enumerate(self.requests):
            environment = RankEnvironment(
                rank, world_size, port, max(1, threads // world_size), in_world
            )
            self.ranks.append(
                context.Process(
                    target=_run_group_rank,
                    args=(environment, make, args, requests, self.results),
                    daemon=True,
                )
            )
        for process in self.ranks:
            process.start()
        self._collect()

    def measure(self) -> Measurement:
        """Let all ranks work once."""
        for requests in self.requests:
            requests.put(True)
        return self._collect()

    def close(self) -> None:
        """End the processes."""
        for requests, process in zip(self.requests, self.ranks):
            requests.put(False)
            process.join(10)

    def _collect(self) -> Measurement:
        """The results of all ranks. Raises RuntimeError with the text of a rank's error."""
        results = [self.results.get() for _ in self.ranks]
        for result in results:
            if isinstance(result, str):
                raise RuntimeError(result)
        return _combine(results)


def measure_works(
    works: Mapping[str, Work],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    prepare: Callable[[], object] | None = None,
) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each work in this process; in a round they work one after another.

    A first round warms up. `prepare()` is called before each measurement and not measured.
    """
    import numpy as np

    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            if prepare is not None:
                prepare()
            begin = clock()
            work()
            seconds[name].append(clock() - begin)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def measure_groups(groups: Mapping[str, RankGroup], rounds: int) -> dict[str, list[Measurement]]:
    """Measurements of all rounds by group; in a round the groups work one after another.

    Closes the groups.
    """
    measurements: dict[str, list[Measurement]] = {name: [] for name in groups}
    for _ in range(rounds):
        for name, group in groups.items():
            measurements[name].append(group.measure())
    for group in groups.values():
        group.close()
    return measurements


@dataclass(frozen=True)
class RankEnvironment:
    """The place of a process of a RankGroup."""

    rank: int
    world_size: int
    port: int
    threads: int
    in_world: bool
    """Whether to open a world before the work is made."""

    def enter(self) -> None:
        """Set the environment variables, and open the world."""
        set_rank_environment(self.rank, self.world_size, self.port)
        for library in ("OMP", "OPENBLAS", "MKL"):
            os.environ[f"{library}_NUM_THREADS"] = str(self.threads)
        if self.in_world:
            import torch

            from dist_scan.world.world import open_world

            torch.set_num_threads(self.threads)
            open_world("cpu")


def _run_group_rank(
    environment: RankEnvironment,
    make: Callable[..., Work],
    args: tuple[Any, ...],
    requests: Queue[bool],
    results: Queue[RankResult | str],
) -> None:
    """The main function of a process: one result when it is ready, one per request."""
    try:
        environment.enter()
        work = make(*args)
        results.put(RankResult(environment.rank, 0.0, 0.0, 0.0, None))
        while requests.get():
            results.put(_run_timed(work, environment.rank, synchronize=None))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        results.put(f"rank {environment.rank} of {make.__name__}: {text}")
        raise
