"""What a run will do and cost, before it is submitted.

Images, steps, bytes on disk, memory per GPU and hours; every assumption is named.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from dist_scan.config import RunConfig

GPU_TFLOPS = 60.0
"""Sustained, per process: ResNet-50 in bf16 on one A100 (2,470 images/s in training are 61)."""
CPU_TFLOPS = 0.03
"""Sustained, per process: one x86 core."""
PASSES_PER_IMAGE = {"moco": 2 + 1 / 3, "selflabel": 1 + 1 / 3}
"""Forward and backward passes per image; 2 (one per view) for methods not listed."""
JPEG_BYTES_PER_PIXEL = 0.41
"""Per squared shorter side, at quality 90: 200 ImageNet images at 256 px have 27 KB on average."""
PARAMETER_BYTES = {"sgd": 12, "adam": 16, "adamw": 16}
"""Weight, gradient and optimizer state per parameter."""
NUMBER_BYTES = {"bf16": 2, "fp64": 8}
"""Bytes of an activation; 4 for any other precision."""
HEADER = ["stage", "images", "work", "disk", "memory", "time"]


class NetworkCost(NamedTuple):
    """What one image costs in a backbone."""

    parameters: int
    flops: float
    """Multiply-adds of a forward pass, times two."""
    activations: int
    """Numbers kept for the backward pass."""
    dim: int
    """Width of the features."""


class StageCost(NamedTuple):
    """Work of a stage in words, bytes on disk, bytes of memory per process, operations."""

    work: str
    disk: float = 0.0
    memory: float = 0.0
    flops: float = 0.0


def plan(run: RunConfig, tflops: float | None, counts: dict[str, int] | None = None) -> str:
    """A table of the stages, a line of totals, and the assumptions.

    tflops: sustained TFLOP/s of one process (None: assumed). counts: images of train and val (None:
    counted in the sources).
    """
    from dist_scan.report.page import pad_columns

    num_images = counts or image_counts(run)
    assumed = GPU_TFLOPS if _has_gpu(run) else CPU_TFLOPS
    flops_per_s = (tflops or assumed) * 1e12 * run.slurm.world_size
    rows = []
    disk = seconds = memory = 0.0

    # Each .beton file that is built, then each stage.
    for split, count in num_images.items():
        size = count * _stored_bytes_per_image(run)
        disk += size
        work = f"stored as {run.data.stored}"
        rows.append([f"beton_{split}", f"{count:,}", work, _format_bytes(size), "-", "-"])
    networks = _networks(run)
    for name, stage in run.stages.items():
        count = num_images.get(stage.images_split(run.stages) or "", 0)
        cost = _stage_cost(run, stage, count, networks[name])
        stage_s = cost.flops / flops_per_s
        disk += cost.disk
        seconds += stage_s
        memory = max(memory, cost.memory)
        sizes = [_format_bytes(cost.disk), _format_bytes(cost.memory)]
        rows.append([name, f"{count:,}", cost.work, *sizes, _format_hours(stage_s)])

    table = "\n".join("  ".join(cells) for cells in pad_columns([HEADER, *rows]))
    return (
        f"plan: {run.slurm.nodes} nodes x {run.slurm.tasks_per_node} processes\n"
        f"{table}\n"
        f"in all: {_format_bytes(disk)} on disk, at most {_format_bytes(memory)} per process, "
        f"about {_format_hours(seconds)} of arithmetic\n"
        f"{_assumptions(run, tflops)}"
    )


def training_memory(run: RunConfig) -> dict[str, int]:
    """Bytes that each training on images is expected to hold per process (on its GPU, if any)."""
    networks = _networks(run)
    memory = {}
    for name, stage in run.stages.items():
        if stage.kind == "train":
            size = int(_training_cost(run, stage, 0, networks[name]).memory)
            if size:
                memory[name] = size
    return memory


def image_counts(run: RunConfig) -> dict[str, int]:
    """Number of images of each split in the config, counted in its source."""
    from dist_scan.data.sources.open import open_source

    return {split: len(open_source(config)) for split, config in run.data.splits().items()}


def _has_gpu(run: RunConfig) -> bool:
    return run.slurm.gpus_per_node is not None


def _stored_bytes_per_image(run: RunConfig) -> float:
    pixels = (run.data.resolution or run.data.size) ** 2
    return pixels * (3 if run.data.stored == "raw" else JPEG_BYTES_PER_PIXEL)


def _networks(run: RunConfig) -> dict[str, NetworkCost | None]:
    """By stage: its own network, or that of the stage that it refers to; None if it has none."""
    networks: dict[str, NetworkCost | None] = {}
    for name, stage in run.stages.items():
        config = getattr(stage, "network", None)
        if config is not None:
            networks[name] = measure_network(config, run.data.size)
            continue
        references = [getattr(stage, role, None) for role in ("backbone", "model")]
        networks[name] = next((networks[ref] for ref in references if ref in networks), None)
    return networks


@cache
def measure_network(config: Any, size: int) -> NetworkCost:
    """Cost of one image of size x size pixels in the network that a config describes.

    On the meta device: it takes no memory and no arithmetic.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dist_scan.models.backbone import build_backbone, without_checkpoint

    activations = []

    def count_output(
        module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        activations.append(output.numel())

    with torch.device("meta"):
        network = build_backbone(without_checkpoint(config)).eval()
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(count_output)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features = network(torch.empty(1, 3, size, size))
    return NetworkCost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops=counter.get_total_flops(),
        activations=sum(activations),
        dim=features.shape[1],
    )


def _stage_cost(run: RunConfig, stage: Any, count: int, network: NetworkCost | None) -> StageCost:
    if stage.kind == "train":
        return _training_cost(run, stage, count, network)
    forward = network.flops if network else 0.0
    if stage.kind == "embed":
        dim = network.dim if network else 3 * run.data.size**2
        plural = "s" if stage.views > 1 else ""
        return StageCost(
            f"{stage.views} view{plural} x {dim} numbers",
            disk=count * stage.views * dim * 2,
            flops=forward * stage.views * count,
        )
    if stage.kind == "neighbours":
        return StageCost(
            f"{stage.num_neighbours} nearest of each", disk=count * stage.num_neighbours * 12
        )
    return StageCost(stage.kind, flops=forward * count if stage.kind == "assign" else 0.0)


def _training_cost(
    run: RunConfig, stage: Any, count: int, network: NetworkCost | None
) -> StageCost:
    epoch_steps = int(count * (1 - stage.held_out_share)) // stage.global_batch
    steps = min(epoch_steps, stage.steps_per_epoch or epoch_steps) * stage.epochs
    work = f"{steps:,} steps of {stage.global_batch:,}, {stage.epochs} epochs"
    if stage.features is not None or network is None:
        return StageCost(work)
    parameter_bytes = network.parameters * PARAMETER_BYTES[stage.optimizer.kind]
    rank_batch = stage.global_batch // run.slurm.world_size
    activation_bytes = 2 * network.activations * NUMBER_BYTES.get(stage.precision, 4) * rank_batch
    queue_size = getattr(stage.method, "queue_size", 0)
    queue_bytes = 4 * queue_size * getattr(stage.method, "projection_dim", 0)
    passes = PASSES_PER_IMAGE.get(stage.method.kind, 2)
    return StageCost(
        work,
        disk=2 * parameter_bytes,
        memory=parameter_bytes + activation_bytes + queue_bytes,
        flops=3 * network.flops * passes * steps * stage.global_batch,
    )


def _assumptions(run: RunConfig, tflops: float | None) -> str:
    if tflops:
        rate = f"{tflops:g} (stated)"
    elif _has_gpu(run):
        rate = f"{GPU_TFLOPS:g} (assumed: one A100, bf16)"
    else:
        rate = f"{CPU_TFLOPS:g} (assumed: one x86 core)"
    return (
        f"assumed: {rate} TFLOP/s sustained per process (--tflops sets another), the loader and "
        f"the network keep up, {JPEG_BYTES_PER_PIXEL} bytes per pixel (shorter side squared) in a "
        "JPEG, activations as in a plain forward pass; search, heads, evaluation and saving are "
        "not in the time"
    )


def _format_bytes(size: float) -> str:
    """`1.28 GB` or `460 KB`; `-` for 0."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B" if size else "-"


def _format_hours(seconds: float) -> str:
    from dist_scan.monitoring.progress import format_duration

    return format_duration(seconds) if seconds >= 1 else "-"
