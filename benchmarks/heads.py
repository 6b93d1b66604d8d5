"""One step of ten heads (loss and the weights' gradient), one JSON line per row: CPU milliseconds and peak memory above weights and gradient.

    python -m benchmarks.heads --compare        # beside: a loop over ten nn.Linear with the published softmax + BCE, and the bare products
    python -m benchmarks.heads --imagenet       # 100 epochs of 1.28M images, from timed steps (scaled down on a CPU)

Under srun or torchrun (RANK is set) the ranks share --batch images of --dim features, and rank 0 prints one row.
--compare runs all in turns; ratios are medians over rounds. `loss_only` is the loss and its gradient by given logits, without products.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.interleaved import job_world, measure_job, medians
from benchmarks.rows import emit
from dist_scan.engine.precision import set_determinism
from dist_scan.heads.autograd import mean_probabilities, scan_heads_loss
from dist_scan.heads.cpu_loops import LoopHead
from dist_scan.heads.linear import ClusterHeads
from dist_scan.heads.products import release_buffers
from dist_scan.heads.torch_head import entropy_and_gradient
from dist_scan.losses import scan_loss_released
from dist_scan.monitoring.memory import peak_gpu_memory

CLUSTER = ["--clusters", "{clusters}", "--dim", "{dim}"]
QUICK = ["--compare", "--rounds", "3"]
SIZES = ((1024, 200, 512), (1024, 1000, 512), (256, 1000, 2048))
HEADS, WEIGHT = 10, 5.0
IMAGENET = {"images": 1_281_167, "epochs": 100, "batch": 4096, "clusters": 1000, "dim": 2048}
Run = Callable[[], None]


Tensors = tuple[list[Tensor], list[Tensor]]


def steps(
    batch: int, clusters: int, dim: int, device: torch.device
) -> tuple[dict[str, Run], dict[str, Tensors]]:
    """The three on the same features; and (inputs, weights) of the two that train."""
    first, second = torch.randn(2 * batch, dim, device=device).chunk(
        2
    )  # as the feed of a bank gives them
    heads = ClusterHeads(dim, clusters, HEADS).to(device)
    loop = [nn.Linear(dim, clusters, device=device) for _ in range(HEADS)]
    both, logits, grad = (
        torch.cat([first, second]),
        torch.empty(2 * batch, clusters, device=device),
        torch.empty_like(heads.weight),
    )

    def ours() -> None:
        heads.zero_grad()
        scan_heads_loss(
            first, second, heads.weight, heads.bias, heads.sizes, WEIGHT
        ).total.sum().backward()

    def published() -> None:
        for head in loop:
            head.zero_grad()
        sum(
            scan_loss_released(head(first)[None], head(second)[None], WEIGHT).total[0]
            for head in loop
        ).backward()

    def bare() -> None:
        for h in range(HEADS):
            at = heads.rows(h)
            torch.mm(both, heads.weight[at].detach().T, out=logits)
            torch.mm(logits.T, both, out=grad[at])

    weights = {
        "ours": list(heads.parameters()),
        "published_loop": [p for head in loop for p in head.parameters()],
    }
    held = {row: ([first, second], parameters) for row, parameters in weights.items()}
    return {"ours": ours, "published_loop": published, "bare_products": bare}, held


def losses(batch: int, clusters: int, device: torch.device) -> tuple[dict[str, Run], Run]:
    """Loss and gradient by the logits of one head; and what is done before each run: ours takes the logits' place."""
    given = torch.randn(2, batch, clusters, device=device) * 3
    work, bias = (
        torch.empty_like(given).view(2 * batch, clusters),
        torch.zeros(clusters, device=device),
    )

    def before() -> None:
        work.copy_(given.view(2 * batch, clusters))

    def ours() -> None:
        if device.type == "cpu":
            LoopHead(
                work, bias, batch, lambda rows: (given[0, rows], given[1, rows])
            ).loss_and_gradients_(WEIGHT)
            return
        from dist_scan.heads.gpu_kernels import KernelHead

        head = KernelHead(work, batch)
        means, count = mean_probabilities([head.anchor_sum()], batch, whole_batch=True)
        head.to_gradients_(entropy_and_gradient(means[0], WEIGHT)[1], 1 / count)

    def published() -> None:
        a, n = (x[None].detach().requires_grad_() for x in given)
        scan_loss_released(a, n, WEIGHT).total.sum().backward()

    return {"ours": ours, "published_loop": published}, before


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds when the work is on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.zeros(1, device=device).item()  # wait for what was asked for
    return time.perf_counter()


def timed(
    runs: dict[str, Run], rounds: int, device: torch.device, before: Run = lambda: None
) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each, in turns; the first round warms up. What is done `before` each is not counted."""
    out: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            before()
            began = clock(device)
            run()
            out[name].append(clock(device) - began)
    return {name: np.array(values[1:]) for name, values in out.items()}


class Held(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made while it is on (what a kernel uses inside is not seen)."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out

    def of(self, run: Run, given: list[Tensor]) -> int:
        """The peak of a run, its inputs and weights left out."""
        self.given = {x.untyped_storage().data_ptr() for x in given}
        with self:
            run()
        return self.peak


def memory(run: Run, given: list[Tensor], weights: list[Tensor]) -> float:
    """MiB above the inputs, the weights and their gradient."""
    for p in weights:
        p.grad = None
    return round(
        (Held().of(run, given + weights) - sum(p.numel() * p.element_size() for p in weights))
        / 2**20,
        1,
    )


def compare(size: tuple[int, int, int], rounds: int, device: torch.device) -> None:
    """Rows of one size."""
    batch, clusters, dim = size
    release_buffers()  # what is kept of the size before
    (runs, held), name = steps(*size, device), dict(zip(("batch", "clusters", "dim"), size))
    seconds = timed(runs, rounds, device)
    for row, values in seconds.items():
        emit(
            {
                "row": row,
                **name,
                "ms": round(1000 * float(np.median(values)), 1),
                "ratio_to_loop": round(float(np.median(values / seconds["published_loop"])), 3),
                "ratio_to_bare": round(float(np.median(values / seconds["bare_products"])), 3),
                "peak_mib": memory(runs[row], *held[row]) if row in held else None,
            }
        )
    alone_runs, before = losses(batch, clusters, device)
    alone = timed(alone_runs, HEADS * rounds, device, before)
    emit(
        {
            "row": "loss_only",
            **name,
            "ms": round(1000 * float(np.median(alone["ours"])), 1),
            "published_ms": round(1000 * float(np.median(alone["published_loop"])), 1),
            "times_cheaper": round(float(np.median(alone["published_loop"] / alone["ours"])), 2),
        }
    )


def imagenet(rounds: int, device: torch.device) -> None:
    """Steps of the full size (a sixteenth of the batch on a CPU), times their number."""
    scale = 16 if device.type == "cpu" else 1
    seconds = timed(
        steps(IMAGENET["batch"] // scale, IMAGENET["clusters"], IMAGENET["dim"], device)[0],
        rounds,
        device,
    )
    count = IMAGENET["images"] // IMAGENET["batch"] * IMAGENET["epochs"]
    flop = (
        8 * IMAGENET["batch"] * HEADS * IMAGENET["clusters"] * IMAGENET["dim"]
    )  # two views; a product there and one back, 2 a number
    hours = {
        f"{name}_hours": round(float(np.median(values)) * scale * count / 3600, 3)
        for name, values in seconds.items()
    }
    emit(
        {
            "row": "imagenet",
            **IMAGENET,
            "heads": HEADS,
            "steps": count,
            "device": str(device),
            "rounds": rounds,
            "formula": f"median step of batch / {scale}, x {scale} x steps; products alone: 8 x batch x heads x clusters x dim x steps",
            **hours,
            "products_pflop": round(flop * count / 1e15, 2),
            "gflop_per_s": round(
                flop / scale / 1e9 / float(np.median(seconds["bare_products"])), 1
            ),
            "peak_gpu_mib": round(peak_gpu_memory() / 2**20),
        }
    )


class Loss(nn.Module):
    """Ten heads and their loss, to be wrapped as the engine wraps a method."""

    def __init__(self, dim: int, clusters: int) -> None:
        super().__init__()
        self.heads = ClusterHeads(dim, clusters, HEADS)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[b, D] twice -> the sum of the heads' losses over the batch of all ranks."""
        return scan_heads_loss(
            first, second, self.heads.weight, self.heads.bias, self.heads.sizes, WEIGHT
        ).total.sum()


def over_ranks(args: argparse.Namespace) -> None:
    """Steps of all ranks of a job together: means over the whole batch, gradients averaged, no update. Raises ValueError for a batch
    that does not divide."""
    from dist_scan.world.world import wrap_ddp

    with job_world() as world:
        if args.batch % world.world_size:
            raise ValueError(
                f"--batch {args.batch} does not divide over {world.world_size} ranks; allowed: a multiple of that"
            )
        model = wrap_ddp(Loss(args.dim, args.clusters).to(world.device))
        first, second = (
            torch.randn(args.batch // world.world_size, args.dim, device=world.device)
            for _ in range(2)
        )

        def work() -> None:
            model.zero_grad(set_to_none=True)
            model(first, second).backward()

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
    """Warm up, measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--imagenet", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--batch",
        type=int,
        default=4096,
        help="for the ranks of a job: images of all ranks together",
    )
    parser.add_argument("--clusters", type=int, default=1000, help="for the ranks of a job")
    parser.add_argument("--dim", type=int, default=2048, help="for the ranks of a job")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        set_determinism()
        over_ranks(args)
        return
    if not (args.compare or args.imagenet):
        parser.error("give --compare or --imagenet")
    set_determinism()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    for size in SIZES if args.compare else ():
        compare(size, args.rounds, device)
    if args.imagenet:
        imagenet(args.rounds, device)


if __name__ == "__main__":
    main()
