"""What a run will do and cost, before it is submitted: images, steps, bytes on disk, memory per GPU, hours; every assumption is named."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

GPU_TFLOPS, CPU_TFLOPS = (
    60.0,
    0.03,
)  # sustained, per process: ResNet-50 in bf16 on one A100 (2,470 images/s forward and backward is 61); one x86 core
PASSES = {
    "moco": 2 + 1 / 3,
    "selflabel": 1 + 1 / 3,
}  # forward-and-backward passes over a view per image where it is not one per view
JPEG_BYTES_PER_PIXEL = 0.41  # of shorter side squared, at quality 90: 200 ImageNet images at 256 px are 27 KB on average
STEP_BYTES = {"sgd": 12, "adam": 16, "adamw": 16}  # weight, gradient, optimizer state per parameter


class Network(NamedTuple):
    """One image through a backbone: parameters, multiply-adds x 2, numbers kept for the backward pass, width of the features."""

    parameters: int
    flops: float
    kept: int
    dim: int


def plan(run: Any, tflops: float | None, counts: dict[str, int] | None = None) -> str:
    """A table of stages and a line of sums. `tflops`: sustained TFLOP/s of one process; left out, an assumed one. `counts`: images
    of train and val where the sources cannot be read here."""
    rows, sizes, nets = [], counts or image_counts(run), {}
    rate = (tflops or (GPU_TFLOPS if _on_gpu(run) else CPU_TFLOPS)) * 1e12 * run.slurm.world_size
    disk = seconds = memory = 0.0
    for name, stage in run.stages.items():
        split = stage.images_split(run.stages)
        n, net = sizes.get(split, 0), _network(run, stage, nets)
        nets[name] = net
        cost = _train(run, stage, n, net) if stage.kind == "train" else _other(stage, n, net, run)
        disk, memory = disk + cost["disk"], max(memory, cost["memory"])
        seconds += cost["flops"] / rate
        rows.append(
            (
                name,
                f"{n:,}",
                cost["what"],
                _bytes(cost["disk"]),
                _bytes(cost["memory"]),
                _hours(cost["flops"] / rate),
            )
        )
    for split, n in sizes.items():
        size = (
            n
            * (run.data.resolution or run.data.size) ** 2
            * (3 if run.data.stored == "raw" else JPEG_BYTES_PER_PIXEL)
        )
        disk += size
        rows.insert(
            0, (f"beton_{split}", f"{n:,}", f"stored as {run.data.stored}", _bytes(size), "-", "-")
        )
    widths = [max(len(r[i]) for r in [*rows, HEAD]) for i in range(len(HEAD))]
    table = "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 2) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in [HEAD, *rows]
    )
    return (
        f"plan: {run.slurm.nodes} nodes x {run.slurm.tasks_per_node} processes\n{table}\n"
        f"in all: {_bytes(disk)} on disk, at most {_bytes(memory)} per process, about {_hours(seconds)} of arithmetic\n{_assumed(run, tflops)}"
    )


def memory(run: Any) -> dict[str, int]:
    """Bytes that each training on images is expected to hold on one process (on its GPU, where it has one)."""
    nets: dict[str, Network | None] = {}
    found = {}
    for name, stage in run.stages.items():
        nets[name] = _network(run, stage, nets)
        if stage.kind == "train":
            found[name] = int(_train(run, stage, 0, nets[name])["memory"])
    return {name: size for name, size in found.items() if size}


HEAD = ("stage", "images", "work", "disk", "memory", "time")


def _assumed(run: Any, tflops: float | None) -> str:
    stated = (
        f"{tflops:g} (stated)"
        if tflops
        else f"{GPU_TFLOPS:g} (assumed: one A100, bf16)"
        if _on_gpu(run)
        else f"{CPU_TFLOPS:g} (assumed: one x86 core)"
    )
    return (
        f"assumed: {stated} TFLOP/s sustained per process (--tflops states another), the loader and the network keep up, {JPEG_BYTES_PER_PIXEL} bytes per pixel (shorter side squared) in a "
        "JPEG, activations as a plain forward pass keeps them; search, heads, evaluation and saving are left out of the time"
    )


def _on_gpu(run: Any) -> bool:
    return run.slurm.gpus_per_node is not None


def image_counts(run: Any) -> dict[str, int]:
    """Images of each split that the config gives, counted in its source."""
    from dist_scan.data.sources.open import open_source

    return {split: len(open_source(config)) for split, config in run.data.splits().items()}


def _network(run: Any, stage: Any, earlier: dict[str, Network | None]) -> Network | None:
    """What the stage runs images through: its own network, or that of the stage it refers to."""
    config = getattr(stage, "network", None)
    if config is not None:
        return measure(config, run.data.size)
    for role in ("backbone", "model"):
        if getattr(stage, role, None) in earlier:
            return earlier[getattr(stage, role)]
    return None


@cache
def measure(config: Any, size: int) -> Network:
    """One image of size x size pixels through the network that a config describes, on the meta device: no memory, no arithmetic."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dist_scan.models.backbone import build_backbone, plain

    with torch.device("meta"):
        network = build_backbone(plain(config)).eval()
        kept = []
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda m, i, out: kept.append(out.numel()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = network(torch.empty(1, 3, size, size))
    return Network(
        sum(p.numel() for p in network.parameters()),
        counter.get_total_flops(),
        sum(kept),
        out.shape[1],
    )


def _train(run: Any, stage: Any, n: int, net: Network | None) -> dict[str, Any]:
    steps = int(n * (1 - stage.held_out_share)) // stage.global_batch
    steps = min(steps, stage.steps_per_epoch or steps) * stage.epochs
    what = f"{steps:,} steps of {stage.global_batch:,}, {stage.epochs} epochs"
    per_rank = stage.global_batch // run.slurm.world_size
    if stage.features is not None or net is None:
        return {"what": what, "disk": 0, "memory": 0, "flops": 0}
    views = PASSES.get(stage.method.kind, 2)
    number = 2 if stage.precision == "bf16" else 8 if stage.precision == "fp64" else 4
    queue = getattr(stage.method, "queue_size", 0) * getattr(stage.method, "projection_dim", 0) * 4
    memory = (
        net.parameters * STEP_BYTES[stage.optimizer.kind] + net.kept * per_rank * 2 * number + queue
    )
    return {
        "what": what,
        "disk": 2 * net.parameters * STEP_BYTES[stage.optimizer.kind],
        "memory": memory,
        "flops": 3 * net.flops * views * steps * stage.global_batch,
    }


def _other(stage: Any, n: int, net: Network | None, run: Any) -> dict[str, Any]:
    views, k = getattr(stage, "views", 1), getattr(stage, "num_neighbours", None)
    dim = net.dim if net else 3 * run.data.size**2
    if stage.kind == "embed":
        return {
            "what": f"{views} view{'s' * (views > 1)} x {dim} numbers",
            "disk": n * views * dim * 2,
            "memory": 0,
            "flops": (net.flops if net else 0) * views * n,
        }
    if stage.kind == "neighbours":
        return {"what": f"{k} nearest of each", "disk": n * k * 12, "memory": 0, "flops": 0}
    return {
        "what": stage.kind,
        "disk": 0,
        "memory": 0,
        "flops": (net.flops if net else 0) * n if stage.kind == "assign" else 0,
    }


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count else "-"
        count /= 1000
    return ""


def _hours(seconds: float) -> str:
    from dist_scan.monitoring.progress import format_duration

    return format_duration(seconds) if seconds >= 1 else "-"
