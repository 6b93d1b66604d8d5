"""The engine's training step against a bare PyTorch loop of the same model: images per second, and the ratio of their times.

    python -m benchmarks.step --compare                                # SimCLR on ResNet-18 at 64 px
    python -m benchmarks.step --variants fp32 bf16 channels_last compile --model resnet50 --size 224 --batch 256

Both take the same images from memory. With --compare one step of ours and one of the bare loop (forward, backward, update; no look
at whether numbers are finite, no log, no stopping) follow each other, so that what else the machine does hits both (cpu_time_ratio is of CPU seconds: on a busy machine
trust that one). `timers_us` is what
the section clock costs a step. Under srun or torchrun (RANK is set) the ranks train together, and rank 0 prints. --batch is a rank's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.rows import emit, spread

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
WARM_UP = 3


class Turns:
    """A feed of one batch from memory that times each step of whoever asks, and lets the bare loop take its turn in between."""

    def __init__(self, batch, steps: int, bare, sync) -> None:
        self.batch, self.steps_per_epoch, self.bare, self.sync = batch, steps, bare, sync
        self.rows = batch.index.numpy()
        self.ours: list[tuple[float, float]] = []
        self.theirs: list[tuple[float, float]] = []

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator:
        """See data.feed.Feed."""
        for step in range(first_step, self.steps_per_epoch):
            if self.bare is not None and step % 2:
                self.theirs.append(self._timed(self.bare))
            began = now()
            yield type(self.batch)(self.batch.index, self.batch.views, epoch, step)
            self.sync()
            self.ours.append(since(began))
            if self.bare is not None and step % 2 == 0:
                self.theirs.append(self._timed(self.bare))

    def _timed(self, work) -> tuple[float, float]:
        began = now()
        work()
        self.sync()
        return since(began)


def now() -> tuple[float, float]:
    """Wall clock and this process's CPU seconds."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Seconds of both clocks since then."""
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def build(args: argparse.Namespace, variant: str, device: torch.device):
    """The method on its device, and its batch."""
    from dist_scan.data.batch import Batch
    from dist_scan.engine.precision import move_to_device
    from dist_scan.methods.base import MethodInputs, method_class
    from dist_scan.models.backbone import BackboneConfig, build_backbone
    from dist_scan.world.world import current

    torch.manual_seed(0)
    config, cls = (
        BackboneConfig(name=args.model, stem=args.stem, width=args.width),
        method_class("simclr"),
    )
    backbone = build_backbone(config)
    method = cls(
        cls.Config(kind="simclr"),
        MethodInputs(
            num_images=args.batch,
            global_batch=args.batch * current().world_size,
            seed=0,
            feature_dim=backbone.num_features,
            backbone=backbone,
            backbone_config=config,
        ),
    )
    method = move_to_device(method, device)
    layout = (
        torch.channels_last
        if variant == "channels_last" or device.type == "cuda"
        else torch.contiguous_format
    )
    method = method.to(memory_format=layout)
    if variant == "compile":
        method.backbone.compile()
    views = tuple(
        torch.randn(args.batch, 3, args.size, args.size).to(device, memory_format=layout)
        for _ in range(2)
    )
    return method.train(), Batch(torch.arange(args.batch), views, 0, 0)


def bare_loop(method, batch, precision: str, device: torch.device):
    """The peer: a step as in any tutorial."""
    from dist_scan.world.world import wrap_ddp

    network = wrap_ddp(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    cast = (
        (lambda: torch.autocast(device.type, torch.bfloat16))
        if precision == "bf16"
        else contextlib.nullcontext
    )

    def work() -> None:
        with cast():
            loss = network(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def measure(args: argparse.Namespace, variant: str, device: torch.device) -> None:
    """One variant: train through the engine, with the bare loop's turns inside its feed."""
    from dist_scan.engine.optimizer import OptimizerConfig, ScheduleConfig
    from dist_scan.engine.training_loop import Trainer, TrainJob, TrainSettings
    from dist_scan.monitoring.bottleneck import TrainingSetup, section_fractions
    from dist_scan.monitoring.step_timer import SECTIONS
    from dist_scan.world.world import current

    method, batch = build(args, variant, device)
    images = args.batch * current().world_size
    precision = "bf16" if variant == "bf16" else "fp32"
    bare = bare_loop(copy.deepcopy(method), batch, precision, device) if args.compare else None
    feed = Turns(
        batch,
        args.steps + WARM_UP,
        bare,
        torch.accelerator.synchronize if device.type != "cpu" else lambda: None,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            TrainJob(
                method=method,
                feed=feed,
                settings=TrainSettings(
                    OptimizerConfig(kind="sgd", lr=0.01), ScheduleConfig(), 1, 0, precision
                ),
                run_dir=Path(folder),
                out=Path(folder),
                setup=TrainingSetup(images, current().world_size, device.type),
                name="step",
                log=lambda text: None,
            )
        )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            trainer.run()
    timing = trainer.profile
    ours, theirs = np.array(feed.ours[WARM_UP:]), np.array(feed.theirs[WARM_UP:])
    step_s, share = float(np.median(ours[:, 0])), section_fractions(timing.total)
    busy = (
        sum(v for name, v in share.items() if name != "data_wait") or 1.0
    )  # data wait holds the bare loop's turns
    row = {
        "row": variant,
        "model": args.model,
        "size": args.size,
        "batch": args.batch,
        "world_size": current().world_size,
        "steps": args.steps,
        "images_per_s": round(images / step_s, 1),
        "step_ms": round(1000 * step_s, 2),
        "timers_us": round(1e6 * timers_s(), 1),
        "timers_share": round(timers_s() / step_s, 5),
        "sections": {
            name: round(share[name] / busy, 4)
            for name in SECTIONS
            if share[name] > 0 and name != "data_wait"
        },
    }
    if current().world_size > 1:
        row |= slowest(timing)
    if args.compare:
        row |= {
            "bare_images_per_s": round(images / float(np.median(theirs[:, 0])), 1),
            **spread(ours[:, 0] / theirs[:, 0], "time_ratio"),
            **spread(ours[:, 1] / theirs[:, 1], "cpu_time_ratio"),
        }
    if current().rank == 0:
        emit(row)


def slowest(timing) -> dict[str, object]:
    """The rank whose own work (all but all-reduce) takes longest, where it runs, and how far it is behind the median."""
    from dist_scan.monitoring.step_timer import SECTIONS

    busy = timing.total.sum(1) - timing.total[:, SECTIONS.index("all_reduce")]
    worst = int(busy.argmax())
    return {
        "worst_rank": worst,
        "worst_host": timing.setup.hosts[worst],
        "worst_behind": round(float(busy[worst] / np.median(busy) - 1), 3),
    }


def timers_s(steps: int = 2000) -> float:
    """Seconds that the section clock takes in one step of a method without collectives: 10 sections and the step's end."""
    from dist_scan.monitoring.step_timer import StepTimer, section, use_timer

    clock = StepTimer()
    use_timer(clock)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(steps):
            with section("data_wait"):
                for _ in range(2):
                    with section("copy"):
                        pass
                    with section("augmentation"):
                        pass
            for name in ("forward", "backward", "all_reduce", "optimizer", "end_step"):
                with section(name):
                    pass
            clock.settle()
        best = min(best, (time.process_time() - began) / steps)
    use_timer(None)
    return best


def main(argv: list[str] | None = None) -> None:
    """Each variant in turn."""
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
    from benchmarks.interleaved import job_world
    from dist_scan.engine.precision import set_determinism

    set_determinism()
    with job_world() as world:
        for variant in args.variants:
            measure(args, variant, world.device)


if __name__ == "__main__":
    main()
