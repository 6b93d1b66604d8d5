"""A step of ten linear heads: CPU milliseconds and memory of the loss and the weights' gradient.

    python -m benchmarks.heads --compare   # beside a loop over ten nn.Linear, and bare products
    python -m benchmarks.heads --imagenet  # 100 epochs of 1.28M images, from measured steps

The peer is a loop over ten nn.Linear with the published softmax and binary cross-entropy;
`bare_products` are the matrix products without a loss. All are measured interleaved; ratios are
medians over rounds. peak_mib is above the inputs, the weights and their gradient. `loss_only` is
the loss and its gradient from given logits, without products.

Under srun or torchrun (RANK is set) the ranks share --batch images of --dim features, and rank 0
prints one row.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.interleaved import job_world, measure_job, measure_works, medians
from benchmarks.rows import emit
from dist_scan.engine.precision import set_determinism
from dist_scan.heads.autograd import mean_probabilities, scan_heads_loss
from dist_scan.heads.cpu_loops import LoopHead
from dist_scan.heads.linear import ClusterHeads
from dist_scan.heads.products import release_buffers
from dist_scan.heads.torch_head import entropy_and_gradient
from dist_scan.losses import scan_loss_released

CLUSTER = ["--clusters", "{clusters}", "--dim", "{dim}"]
QUICK = ["--compare", "--rounds", "3"]
SIZES = ((1024, 200, 512), (1024, 1000, 512), (256, 1000, 2048))
"""(batch, clusters, dim)."""
HEADS = 10
ENTROPY_WEIGHT = 5.0
IMAGENET = {"images": 1_281_167, "epochs": 100, "batch": 4096, "clusters": 1000, "dim": 2048}
CPU_SCALE = 16
"""On a CPU --imagenet measures steps with the batch divided by this."""
Work = Callable[[], None]


class HeadsLoss(nn.Module):
    """Ten heads and their loss."""

    def __init__(self, dim: int, clusters: int) -> None:
        super().__init__()
        self.heads = ClusterHeads(dim, clusters, HEADS)

    def forward(self, anchors: Tensor, neighbours: Tensor) -> Tensor:
        """Features [b, D] of both -> sum of the heads' losses over the global batch."""
        heads = self.heads
        losses = scan_heads_loss(
            anchors, neighbours, heads.weight, heads.bias, heads.sizes, ENTROPY_WEIGHT
        )
        return losses.total.sum()


@dataclass(frozen=True)
class Steps:
    """Steps on the same features, by the names of their rows."""

    works: dict[str, Work]
    inputs: list[Tensor]
    weights: dict[str, list[Tensor]]
    """Of the steps that compute gradients."""


def make_steps(batch: int, clusters: int, dim: int, device: torch.device) -> Steps:
    """Ours, the published loop and the products alone."""
    # Adjacent in memory, as a feature feed gives them.
    features = torch.randn(2 * batch, dim, device=device)
    anchors, neighbours = features.chunk(2)
    model = HeadsLoss(dim, clusters).to(device)
    loop = [nn.Linear(dim, clusters, device=device) for _ in range(HEADS)]
    weight = model.heads.weight
    logits = torch.empty(2 * batch, clusters, device=device)
    gradient = torch.empty_like(weight)

    def ours() -> None:
        model.zero_grad()
        model(anchors, neighbours).backward()

    def published() -> None:
        losses = []
        for head in loop:
            head.zero_grad()
            terms = scan_loss_released(head(anchors)[None], head(neighbours)[None], ENTROPY_WEIGHT)
            losses.append(terms.total[0])
        torch.stack(losses).sum().backward()

    def bare_products() -> None:
        for h in range(HEADS):
            rows = model.heads.slices[h]
            torch.mm(features, weight[rows].detach().T, out=logits)
            torch.mm(logits.T, features, out=gradient[rows])

    return Steps(
        works={"ours": ours, "published_loop": published, "bare_products": bare_products},
        inputs=[anchors, neighbours],
        weights={
            "ours": list(model.parameters()),
            "published_loop": [parameter for head in loop for parameter in head.parameters()],
        },
    )


def make_losses(batch: int, clusters: int, device: torch.device) -> tuple[dict[str, Work], Work]:
    """Loss and gradient from the logits of one head, and what must be done before each.

    Ours overwrites the logits with their gradient, so that they are copied anew.
    """
    logits = torch.randn(2, batch, clusters, device=device) * 3
    overwritten = torch.empty_like(logits).view(2 * batch, clusters)
    bias = torch.zeros(clusters, device=device)

    def prepare() -> None:
        overwritten.copy_(logits.view(2 * batch, clusters))

    def ours_on_cpu() -> None:
        head = LoopHead(overwritten, bias, batch, lambda rows: (logits[0, rows], logits[1, rows]))
        head.loss_and_gradients_(ENTROPY_WEIGHT)

    def ours_on_gpu() -> None:
        from dist_scan.heads.gpu_kernels import KernelHead

        head = KernelHead(overwritten, batch)
        means, count = mean_probabilities([head.anchor_sum()], batch, whole_batch=True)
        entropy_gradient = entropy_and_gradient(means[0], ENTROPY_WEIGHT)[1]
        head.to_gradients_(entropy_gradient, 1 / count)

    def published() -> None:
        anchors, neighbours = (view[None].detach().requires_grad_() for view in logits)
        scan_loss_released(anchors, neighbours, ENTROPY_WEIGHT).total.sum().backward()

    ours = ours_on_cpu if device.type == "cpu" else ours_on_gpu
    return {"ours": ours, "published_loop": published}, prepare


def clock(device: torch.device) -> float:
    """CPU seconds of this process; for a GPU wall seconds, when its work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensors alive at a time, of those made while it is active.

    Memory that a kernel allocates internally is not seen.
    """

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.ignored:
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak_mib(work: Work, inputs: list[Tensor], weights: list[Tensor]) -> float:
    """Peak memory above the inputs, the weights and their gradient."""
    for weight in weights:
        weight.grad = None
    gradient_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    with PeakBytes(inputs + weights) as memory:
        work()
    return round((memory.peak - gradient_bytes) / 2**20, 1)


def compare(batch: int, clusters: int, dim: int, rounds: int, device: torch.device) -> None:
    """Measure one size and print its rows."""
    release_buffers()  # of the size before
    size = {"batch": batch, "clusters": clusters, "dim": dim}
    steps = make_steps(batch, clusters, dim, device)
    seconds = measure_works(steps.works, rounds, partial(clock, device))
    for name, values in seconds.items():
        row = {
            "row": name,
            **size,
            "ms": median_ms(values),
            "ratio_to_loop": round(float(np.median(values / seconds["published_loop"])), 3),
            "ratio_to_bare": round(float(np.median(values / seconds["bare_products"])), 3),
            "peak_mib": None,
        }
        if name in steps.weights:
            row["peak_mib"] = peak_mib(steps.works[name], steps.inputs, steps.weights[name])
        emit(row)
    losses, prepare = make_losses(batch, clusters, device)
    seconds = measure_works(losses, HEADS * rounds, partial(clock, device), prepare)
    ours, published = seconds["ours"], seconds["published_loop"]
    emit(
        {
            "row": "loss_only",
            **size,
            "ms": median_ms(ours),
            "published_ms": median_ms(published),
            "times_cheaper": round(float(np.median(published / ours)), 2),
        }
    )


def median_ms(seconds: np.ndarray) -> float:
    """Median in milliseconds."""
    return round(1000 * float(np.median(seconds)), 1)


def imagenet(rounds: int, device: torch.device) -> None:
    """Measure steps of the full size, on a CPU scaled down, and print the hours of all of them."""
    scale = CPU_SCALE if device.type == "cpu" else 1
    batch, clusters, dim = (IMAGENET[name] for name in ("batch", "clusters", "dim"))
    steps = make_steps(batch // scale, clusters, dim, device)
    seconds = measure_works(steps.works, rounds, partial(clock, device))
    num_steps = IMAGENET["images"] // batch * IMAGENET["epochs"]
    hours = {
        f"{name}_hours": round(float(np.median(values)) * scale * num_steps / 3600, 3)
        for name, values in seconds.items()
    }
    # Two views, a product forward and one backward, two operations for each multiplication.
    flop = 8 * batch * HEADS * clusters * dim
    products_s = float(np.median(seconds["bare_products"]))
    emit(
        {
            "row": "imagenet",
            **IMAGENET,
            "heads": HEADS,
            "steps": num_steps,
            "device": str(device),
            "rounds": rounds,
            "formula": f"median step of batch / {scale}, x {scale} x steps; products alone: "
            "8 x batch x heads x clusters x dim x steps",
            **hours,
            "products_pflop": round(flop * num_steps / 1e15, 2),
            "gflop_per_s": round(flop / scale / 1e9 / products_s, 1),
            "peak_gpu_mib": round(torch.cuda.max_memory_allocated() / 2**20),
        }
    )


def measure_over_job(args: argparse.Namespace) -> None:
    """Measure steps of all ranks of a job: means over the global batch, averaged gradients.

    Raises ValueError for a batch that does not divide among the ranks.
    """
    from dist_scan.world.world import wrap_ddp

    with job_world() as world:
        if args.batch % world.world_size:
            raise ValueError(
                f"--batch: {args.batch} on {world.world_size} ranks; "
                "allowed: a multiple of the number of ranks"
            )
        model = wrap_ddp(HeadsLoss(args.dim, args.clusters).to(world.device))
        shape = args.batch // world.world_size, args.dim
        anchors = torch.randn(shape, device=world.device)
        neighbours = torch.randn(shape, device=world.device)

        def work() -> None:
            model.zero_grad(set_to_none=True)
            model(anchors, neighbours).backward()

        took = medians(measure_job(work, args.rounds))
        if world.rank == 0:
            emit(
                {
                    "row": "all ranks",
                    "batch": args.batch,
                    "clusters": args.clusters,
                    "dim": args.dim,
                    "world_size": world.world_size,
                    "rounds": args.rounds,
                    **took,
                    "images_per_s": round(args.batch / took["wall_s"], 1),
                }
            )


def main(argv: list[str] | None = None) -> None:
    """Measure and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--imagenet", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    job = parser.add_argument_group("for the ranks of a job")
    job.add_argument("--batch", type=int, default=4096, help="images of all ranks together")
    job.add_argument("--clusters", type=int, default=1000)
    job.add_argument("--dim", type=int, default=2048)
    args = parser.parse_args(argv)
    set_determinism()
    if "RANK" in os.environ:
        measure_over_job(args)
        return
    if not (args.compare or args.imagenet):
        parser.error("give --compare or --imagenet")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.compare:
        for batch, clusters, dim in SIZES:
            compare(batch, clusters, dim, args.rounds, device)
    if args.imagenet:
        imagenet(args.rounds, device)


if __name__ == "__main__":
    main()
