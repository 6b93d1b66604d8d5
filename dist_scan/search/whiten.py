"""PCA whitening of sharded rows: y = diag(eigenvalues)^-1/2 components (x - mean), as DeepCluster does before it clusters.

Bitwise the same for any number of ranks, any cut of the rows and any BLAS. Rows are scaled by a power of two so that the longest has a norm
of 2 to 4, and lie on multiples of 2^-24. Products of a number and the coarse or the fine part of another then add up exactly in float64 over a
chunk; chunks and ranks add up in integers. The eigenvectors are rank 0's and lie on the same grid, so that a projection is exact too.
(LAPACK may round differently with another number of threads: then the eigenvectors differ in their last bits.)
Memory: 40 D^2 bytes and 24 D bytes for each of CHUNK rows. One all-reduce of 16 D^2 bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.feature_table import FeatureTable
from dist_scan.monitoring.progress import StopRequested
from dist_scan.search.exact_rows import check_view, content, held_by_rank
from dist_scan.world.collectives import (
    all_max,
    all_sum,
    any_rank,
    barrier,
    broadcast,
    broadcast_object,
    gather_objects,
    on_every_rank,
)
from dist_scan.world.world import current

CHUNK = 8192  # 2^13 products below 2^39 units each fit float64's 53 bits
GRID = 2.0**24
COARSE = 2.0**12
Blocks = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Whitening:
    """mean [D], components [dim, D] of unit length, eigenvalues [dim] descending (of the covariance with 1/n): float64, equal on all ranks.

    Of each component the entry largest in magnitude is positive. `scale` brings the rows it was made from to a norm of 2 to 4.
    """

    mean: np.ndarray
    components: np.ndarray
    eigenvalues: np.ndarray
    scale: float

    def mark(self, view: int, unit: bool) -> str:
        """16 hex digits that tell what it makes of a view from what others make."""
        digest = hashlib.sha256(f"{view} {unit}".encode())
        for part in (self.mean, self.components, self.eigenvalues):
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()[:16]

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """[n, D] of any float type to [n, dim] float32; over the rows it was made from the mean is 0 and the covariance 1.

        A row's result depends on the row alone. Raises ValueError for rows of another width, or that are no numbers.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(
                f"rows of shape {list(rows.shape)}; this whitening was made from rows of {len(self.mean)} features: "
                f"give [n, {len(self.mean)}]"
            )
        if len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
            raise ValueError(
                f"rows {bad[:8].tolist()} to be whitened are NaN or Inf; look at what made them"
            )
        device, axes = current().device, np.rint(self.components * (2 * GRID)) / GRID
        offset = (axes * (self.mean * self.scale)).sum(1)
        project, shrink = (
            torch.from_numpy(axes.T).to(device),
            1 / (2 * self.scale * np.sqrt(self.eigenvalues)),
        )
        pieces = (rows[b : b + CHUNK] for b in range(0, len(rows), CHUNK))
        parts = [
            (torch.mm(on_grid(piece, self.scale), project).cpu().numpy() - offset) * shrink
            for piece in pieces
        ]
        return np.concatenate([*parts, np.zeros((0, len(shrink)))]).astype(np.float32)


def fit_whitening(rows: np.ndarray, dim: int) -> Whitening:
    """The whitening of all ranks' rows [n, D] (any float type, any number on each rank) to `dim` dimensions. Collective.

    Raises ValueError on all ranks: rows that are no numbers, fewer rows than needed, fewer directions than `dim` in which the rows vary.
    """
    if rows.ndim != 2:
        raise ValueError(f"rows to be whitened of shape {list(rows.shape)}; allowed: [n, D]")
    return _whiten(
        lambda: (rows[b : b + CHUNK] for b in range(0, len(rows), CHUNK)), rows.shape[1], dim
    )


def fit_table_whitening(table: FeatureTable, dim: int, view: int = 0) -> Whitening:
    """`fit_whitening` for a view of a table; its shards are dealt over the ranks."""
    view = check_view(table, view)

    def blocks() -> Iterator[np.ndarray]:
        for s in range(current().rank, table.num_shards, current().world_size):
            rows = table.shard(s)
            yield from (rows[b : b + CHUNK, view] for b in range(0, len(rows), CHUNK))

    return _whiten(blocks, table.dim, dim)


def write_whitened_table(
    table: FeatureTable,
    whitening: Whitening,
    out: Path,
    view: int = 0,
    unit: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> FeatureTable:
    """A new table [N, 1, dim] of a view's whitened rows, of unit length when `unit`. Collective; goes on from the shards that are there.

    Raises ValueError when `out` was made of other rows, or by another whitening (or view, or unit): it stands for what it was made from.
    """
    world, view = current(), check_view(table, view)
    asked = {
        "whitening": whitening.mark(view, unit),
        "of": content(table, held_by_rank(table), view),
        "num_rows": table.num_rows,
        "num_shards": table.num_shards,
    }

    def opened() -> FeatureTable:
        made = FeatureTable.open(out)
        if (found := {name: made.metadata.get(name) for name in asked}) != asked:
            raise ValueError(
                f"{out} holds other rows, or of another whitening ({found}, asked for: {asked}); give another folder, or remove it"
            )
        return made

    def created() -> None:
        if world.rank == 0 and not (Path(out) / "table.json").exists():
            FeatureTable.create(
                out,
                table.num_rows,
                1,
                len(whitening.eigenvalues),
                table.num_shards,
                whitening=asked["whitening"],
                of=asked["of"],
            )

    on_every_rank(created)
    made = on_every_rank(opened)
    missing = broadcast_object(made.missing_shards())
    for turn in range(0, len(missing), world.world_size):
        if any_rank(stop()):
            raise StopRequested()
        for s in missing[turn : turn + world.world_size][world.rank : world.rank + 1]:
            rows = whitening.apply(table.shard(s)[:, view]).astype(np.float64)
            length = np.sqrt((rows**2).sum(1, keepdims=True)) if unit else 1.0
            made.write_shard(s, (rows / np.maximum(length, 1e-30))[:, None])
    barrier()
    return FeatureTable.open(out)


def on_grid(rows: np.ndarray, scale: float) -> Tensor:
    """[n, D] float64 on the device: scaled, rounded to multiples of 2^-24."""
    return (
        torch.from_numpy(np.asarray(rows, np.float64))
        .to(current().device)
        .mul(scale * GRID)
        .round_()
        .div_(GRID)
    )


def _whiten(blocks: Blocks, width: int, dim: int) -> Whitening:
    if not 1 <= dim <= width:
        raise ValueError(f"{dim} whitened dimensions of {width}; allowed: 1 to {width}")
    scale = _scale(blocks)
    count, total, products = _moments(blocks, width, scale)
    if count <= dim:
        raise ValueError(
            f"{count} rows cannot be whitened to {dim} dimensions; allowed: at most {max(count - 1, 0)}. Lower it, or give more rows"
        )
    mean = total / count
    values, vectors = _eigen(products / count - torch.outer(mean, mean), dim)
    noise = (
        width * 2.0**-50 * float(values[0])
    )  # what rounding leaves of a direction in which nothing varies
    if not float(values[-1]) > noise:
        raise ValueError(
            f"the rows vary in {int((values > noise).sum())} directions only and cannot be whitened to {dim}; lower it to that"
        )
    return Whitening((mean / scale).numpy(), vectors.numpy(), (values / scale**2).numpy(), scale)


def _scale(blocks: Blocks) -> float:
    longest, bad = 0.0, 0
    for rows in blocks():
        wide = np.asarray(rows, np.float64)
        bad += int((~np.isfinite(wide).all(1)).sum())
        with np.errstate(over="ignore"):
            longest = max(
                longest,
                float(np.sqrt(np.nan_to_num((wide**2).sum(1), posinf=np.inf).max(initial=0))),
            )
    bad_by_rank = gather_objects(bad)
    if any(bad_by_rank):
        raise ValueError(
            f"rows to be whitened are NaN or Inf (how many on each rank: {bad_by_rank}); look at what made them"
        )
    longest = float(all_max(torch.tensor(longest, dtype=torch.float64)))
    if not 1e-30 < longest < 1e30:
        raise ValueError(
            f"the longest of the rows to be whitened has a length of {longest:.3g}; allowed: 1e-30 to 1e30, scale them"
        )
    return 2.0 ** math.floor(math.log2(4.0 / longest))


def _moments(blocks: Blocks, width: int, scale: float) -> tuple[int, Tensor, Tensor]:
    """(n, sum of x [D], sum of x x^T [D, D]) of all ranks' scaled rows, float64, each correctly rounded from exact integers."""
    device = current().device
    count, total = 0, torch.zeros(width, dtype=torch.int64, device=device)
    high, low = (
        torch.zeros(width, width, dtype=torch.int64, device=device) for _ in range(2)
    )  # high * 2^-16 + low * 2^-48
    for rows in blocks():
        x = on_grid(rows, scale)
        coarse = (x * COARSE).round_().div_(COARSE)
        first = torch.mm(x.T, coarse).mul_(GRID * COARSE).long()  # in units of 2^-36
        second = torch.mm(x.T, coarse.neg_().add_(x)).mul_(GRID * GRID).long()  # in units of 2^-48
        high += first >> 20
        low += ((first & (2**20 - 1)) << 12) + second
        high += low >> 32
        low &= 2**32 - 1
        total += (x * GRID).sum(0).long()
        count += len(x)
    count = int(all_sum(torch.tensor(count)))
    total, high, low = (all_sum(t).cpu() for t in (total, high, low))
    high += low >> 32
    low &= 2**32 - 1
    return count, total.double() / GRID, high.double() * 2.0**-16 + low.double() * 2.0**-48


def _eigen(covariance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The `dim` largest eigenvalues, descending, and their vectors [dim, D] with fixed signs: rank 0's, on all ranks."""
    values, vectors = (
        torch.zeros(dim, dtype=torch.float64),
        torch.zeros(dim, len(covariance), dtype=torch.float64),
    )
    if current().rank == 0:
        ascending, columns = torch.linalg.eigh(covariance.to(current().device))
        values, vectors = ascending.flip(0)[:dim].cpu(), columns.T.flip(0)[:dim].cpu()
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return broadcast(values.contiguous()), broadcast(vectors.contiguous())
