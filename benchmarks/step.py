"""The engine's training step against a bare PyTorch loop of the same model: images per second.

    python -m benchmarks.step --compare                         # SimCLR on ResNet-18 at 64 px
    python -m benchmarks.step --variants fp32 bf16 channels_last compile --model resnet50 \\
        --size 224 --batch 256

Both train on one batch in memory. With --compare one step of ours and one of the bare loop
(forward, backward, update; no check for non-finite values, no log, no checkpoints) follow each
other, so that other load on the machine affects both. `cpu_time_ratio` is of CPU seconds: on a busy
machine it is the more reliable ratio. `timers_us` is the cost of the section timers per step.
Under srun or torchrun (RANK is set) the ranks train together, and rank 0 prints; --batch is per
rank.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.interleaved import job_world
from benchmarks.rows import emit, spread
from benchmarks.runs import slowest_rank
from dist_scan.data.batch import Batch
from dist_scan.engine.optimizer import OptimizerConfig
from dist_scan.engine.precision import Precision, autocast, move_to_device, set_determinism
from dist_scan.engine.training_loop import Trainer, TrainingLoopConfig, TrainJob
from dist_scan.methods.base import Method, MethodInputs, method_class
from dist_scan.models.backbone import BackboneConfig, build_backbone
from dist_scan.monitoring.bottleneck import TrainingSetup, section_fractions
from dist_scan.monitoring.step_timer import StepTimer, timed, use_timer
from dist_scan.world.world import current, wrap_ddp

CLUSTER = [
    "--model",
    "{model}",
    "--stem",
    "{stem}",
    "--width",
    "{width}",
    "--size",
    "{size}",
    "--batch",
    "{batch}",
    "--variants",
    "{precision}",
]
QUICK = ["--compare", "--steps", "16", "--batch", "16"]
WARM_UP_STEPS = 3
Work = Callable[[], None]


class Seconds(NamedTuple):
    """Wall time and CPU time of this process."""

    wall: float
    cpu: float


class InterleavedFeed:
    """A feed of one batch that times the engine's steps and runs the peer's step between them.

    The two change places from step to step.
    """

    def __init__(self, batch: Batch, steps: int, peer: Work | None, synchronize: Work) -> None:
        self.batch = batch
        self.steps_per_epoch = steps
        self.rows = batch.index.numpy()
        self.peer = peer
        self.synchronize = synchronize
        self.engine_seconds: list[Seconds] = []
        self.peer_seconds: list[Seconds] = []

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """See `dist_scan.data.feed.Feed`."""
        for step in range(first_step, self.steps_per_epoch):
            if step % 2:
                self._run_peer()
            begin = _now()
            yield Batch(self.batch.index, self.batch.views, epoch, step)
            self.engine_seconds.append(self._since(begin))
            if step % 2 == 0:
                self._run_peer()

    def _run_peer(self) -> None:
        if self.peer is not None:
            begin = _now()
            self.peer()
            self.peer_seconds.append(self._since(begin))

    def _since(self, begin: Seconds) -> Seconds:
        self.synchronize()
        now = _now()
        return Seconds(now.wall - begin.wall, now.cpu - begin.cpu)


def _now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def build_method(args: argparse.Namespace, variant: str, device: torch.device) -> Method:
    """SimCLR with a new backbone on the device."""
    torch.manual_seed(0)
    config = BackboneConfig(name=args.model, stem=args.stem, width=args.width)
    backbone = build_backbone(config)
    cls = method_class("simclr")
    inputs = MethodInputs(
        num_images=args.batch,
        global_batch=args.batch * current().world_size,
        seed=0,
        feature_dim=backbone.num_features,
        backbone=backbone,
        backbone_config=config,
    )
    method = move_to_device(cls(cls.Config(kind="simclr"), inputs), device)
    method = method.to(memory_format=memory_format(variant, device))
    if variant == "compile":
        method.backbone.compile()
    return method.train()


def memory_format(variant: str, device: torch.device) -> torch.memory_format:
    """Layout of weights and images."""
    is_channels_last = variant == "channels_last" or device.type == "cuda"
    return torch.channels_last if is_channels_last else torch.contiguous_format


def build_batch(args: argparse.Namespace, variant: str, device: torch.device) -> Batch:
    """Two views of random images on the device."""
    shape = (args.batch, 3, args.size, args.size)
    layout = memory_format(variant, device)
    views = tuple(torch.randn(shape).to(device, memory_format=layout) for _ in range(2))
    return Batch(torch.arange(args.batch), views, 0, 0)


def bare_step(method: Method, batch: Batch, precision: Precision, device: torch.device) -> Work:
    """The peer: a training step as in any tutorial."""
    network: nn.Module = wrap_ddp(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with autocast(precision, device):
            loss = network(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(args: argparse.Namespace, variant: str, device: torch.device) -> None:
    """Train one variant with the engine, the peer's steps inside its feed; rank 0 prints a row."""
    world = current()
    method = build_method(args, variant, device)
    batch = build_batch(args, variant, device)
    precision: Precision = "bf16" if variant == "bf16" else "fp32"
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    peer = bare_step(copy.deepcopy(method), batch, precision, device) if args.compare else None
    feed = InterleavedFeed(batch, args.steps + WARM_UP_STEPS, peer, synchronize)
    images = args.batch * world.world_size
    optimizer = OptimizerConfig(kind="sgd", lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(
            method=method,
            feed=feed,
            settings=TrainingLoopConfig(optimizer=optimizer, epochs=1, precision=precision),
            run_dir=Path(folder),
            out=Path(folder),
            setup=TrainingSetup(images, world.world_size, device.type),
            name="step",
            log=lambda text: None,
        )
        trainer = Trainer(job)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            trainer.run()

    ours = np.array(feed.engine_seconds[WARM_UP_STEPS:])
    step_s = float(np.median(ours[:, 0]))
    timers_s = seconds_of_timers()
    row = {
        "row": variant,
        "model": args.model,
        "size": args.size,
        "batch": args.batch,
        "world_size": world.world_size,
        "steps": args.steps,
        "images_per_s": round(images / step_s, 1),
        "step_ms": round(1000 * step_s, 2),
        "timers_us": round(1e6 * timers_s, 1),
        "timers_share": round(timers_s / step_s, 5),
        "sections": section_shares(trainer.profile.total),
    }
    if world.world_size > 1:
        row |= slowest_rank(trainer.profile.total, trainer.profile.setup.hosts)
    if args.compare:
        theirs = np.array(feed.peer_seconds[WARM_UP_STEPS:])
        row["bare_images_per_s"] = round(images / float(np.median(theirs[:, 0])), 1)
        row |= spread(ours[:, 0] / theirs[:, 0], "time_ratio")
        row |= spread(ours[:, 1] / theirs[:, 1], "cpu_time_ratio")
    if world.rank == 0:
        emit(row)


def section_shares(seconds: np.ndarray) -> dict[str, float]:
    """Share of each section in a step without data wait, which includes the peer's steps."""
    fractions = section_fractions(seconds)
    del fractions["data_wait"]
    total = sum(fractions.values()) or 1.0
    return {name: round(value / total, 4) for name, value in fractions.items() if value > 0}


def seconds_of_timers(steps: int = 2000) -> float:
    """CPU seconds that the section timers take in one step: 10 sections and the step's end."""
    timer = StepTimer()
    use_timer(timer)
    best = float("inf")
    for _ in range(5):
        begin = time.process_time()
        for _ in range(steps):
            with timed("data_wait"):
                for name in ("copy", "augmentation", "copy", "augmentation"):
                    with timed(name):
                        pass
            for name in ("forward", "backward", "all_reduce", "optimizer", "end_step"):
                with timed(name):
                    pass
            timer.collect_events()
        best = min(best, (time.process_time() - begin) / steps)
    use_timer(None)
    return best


def main(argv: list[str] | None = None) -> None:
    """Measure each variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--stem", default="imagenet", help="of a ResNet: imagenet, cifar or stl")
    parser.add_argument("--width", type=int, default=32, help="of resnet_small")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="images of one rank")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=["fp32", "bf16", "channels_last", "compile"],
        default=["fp32"],
    )
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args(argv)
    set_determinism()
    with job_world() as world:
        for variant in args.variants:
            measure(args, variant, world.device)


if __name__ == "__main__":
    main()
