"""PCA whitening of sharded rows: y = diag(eigenvalues)^-1/2 components (x - mean).

DeepCluster whitens features before it clusters them. Given the eigenvectors, the result is bitwise
equal for any number of ranks, any partition of the rows and any BLAS:

- Rows are scaled by a power of two to norms of at most 4 and rounded to multiples of 2^-24.
- The second moment sum x x^T is computed exactly (`_sums`): x is split into a coarse part, a
  multiple of 2^-12, and the rest, so that the products of a block of rows add up exactly in
  float64; blocks and ranks are added up as integers.
- Eigenvectors are computed by rank 0 and rounded to multiples of 2^-25, so that a projection is
  an exact inner product (exact_rows.py).

LAPACK may round differently with another number of threads; the eigenvectors then differ in their
last bits. Memory: 40 D^2 bytes, and 24 D bytes for each of BLOCK_ROWS rows. Communication: one
all-reduce of 16 D^2 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.feature_table import FeatureTable
from dist_scan.search.exact_rows import MAX_LISTED, ExactRows, blocks_of, prepare_rows
from dist_scan.search.shard_readers import content_digest, find_shard_readers
from dist_scan.search.stopping import never_stop, raise_if_stopped
from dist_scan.world.collectives import (
    all_sum,
    barrier,
    broadcast,
    broadcast_object,
)
from dist_scan.world.world import current

GRID = 2.0**24  # rows are multiples of its inverse
COARSE_GRID = 2.0**12


@dataclass(frozen=True)
class Whitening:
    """A fitted whitening, equal on all ranks.

    mean [D]; components [dim, D] of unit length, the entry of largest magnitude positive;
    eigenvalues [dim] of the covariance (with 1/N), descending: all float64. `scale` is the power of
    two that scales the fitted rows to norms of at most 4.
    """

    mean: np.ndarray
    components: np.ndarray
    eigenvalues: np.ndarray
    scale: float

    def fingerprint(self) -> str:
        """16 hex digits that identify a whitening in the metadata of a table."""
        digest = hashlib.sha256(b"0 True")  # a constant; without it stored fingerprints change
        for array in (self.mean, self.components, self.eigenvalues):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Whitened rows [n, dim] float32 of rows [n, D] of any floating type.

        Over the rows that it was fitted to, the mean is 0 and the covariance the identity. The
        result of a row does not depend on the other rows. Raises ValueError for rows of another
        width and rows that are not finite.
        """
        width = len(self.mean)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(
                f"rows of shape {list(rows.shape)}; this whitening was fitted to {width} features: "
                f"give [n, {width}]"
            )
        bad = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(bad):
            raise ValueError(
                f"rows {bad[:MAX_LISTED].tolist()} to be whitened are NaN or Inf; "
                "check the code that computed them"
            )
        # Twice the components, on the rows' grid: x and axes have norms below 4 and about 2, so
        # that their products are exact.
        axes = np.rint(self.components * (2 * GRID)) / GRID
        offset = (axes * (self.mean * self.scale)).sum(1)
        factor = 1 / (2 * self.scale * np.sqrt(self.eigenvalues))
        projection = torch.from_numpy(axes.T).to(current().device)
        # y = (axes x - axes mean) / (2 scale sqrt(eigenvalue)), in exact products.
        parts = [np.zeros((0, len(factor)))]
        for block in blocks_of(rows):
            projected = torch.mm(_on_grid(block, self.scale), projection).cpu().numpy()
            parts.append((projected - offset) * factor)
        return np.concatenate(parts).astype(np.float32)


def fit_whitening(table: FeatureTable, dim: int) -> Whitening:
    """The whitening of view 0 of a table to `dim` dimensions. Collective.

    Raises ValueError on all ranks for rows that are not finite, and for too few rows or too few
    directions of variance for `dim`.
    """
    if not 1 <= dim <= table.dim:
        raise ValueError(f"{dim} whitened dimensions of {table.dim}; allowed: 1 to {table.dim}")
    if table.num_rows <= dim:
        raise ValueError(
            f"{table.num_rows} rows cannot be whitened to {dim} dimensions; allowed: at most "
            f"{table.num_rows - 1}. Lower the dimension, or give more rows"
        )
    # Covariance, from exact sums.
    rows = prepare_rows(table, normalise=False)
    total, products = _sums(rows)
    mean = total / table.num_rows
    covariance = products / table.num_rows - torch.outer(mean, mean)
    # Its largest eigenvalues, which must be more than rounding errors.
    eigenvalues, components = _largest_eigenpairs(covariance, dim)
    # What rounding leaves as the eigenvalue of a direction in which the rows do not vary.
    noise = table.dim * 2.0**-50 * float(eigenvalues[0])
    if not float(eigenvalues[-1]) > noise:
        raise ValueError(
            f"the rows vary in {int((eigenvalues > noise).sum())} directions only and cannot be "
            f"whitened to {dim}; lower the dimension to that"
        )
    scale = rows.scale
    return Whitening(
        (mean / scale).numpy(), components.numpy(), (eigenvalues / scale**2).numpy(), scale
    )


def write_whitened_table(
    table: FeatureTable,
    whitening: Whitening,
    out: Path,
    stop_requested: Callable[[], bool] = never_stop,
) -> FeatureTable:
    """Write the whitened rows of view 0, scaled to unit length, to `out`. Collective.

    Returns the table [N, 1, dim]. Shards that an earlier call has finished are kept. Raises
    ValueError when `out` was made from other rows or by another whitening, and StopRequested
    between shards.
    """
    metadata = {
        "num_rows": table.num_rows,
        "num_views": 1,
        "dim": len(whitening.eigenvalues),
        "num_shards": table.num_shards,
        "whitening": whitening.fingerprint(),
        "of": content_digest(table, find_shard_readers(table), view=0),
    }
    result = FeatureTable.open_or_create(Path(out), metadata)
    # A shard per rank at a time.
    missing = broadcast_object(result.missing_shards())
    world = current()
    for first in range(0, len(missing), world.world_size):
        raise_if_stopped(stop_requested)
        for shard in missing[first : first + world.world_size][world.rank : world.rank + 1]:
            rows = whitening.apply(table.shard(shard)[:, 0]).astype(np.float64)
            norms = np.sqrt((rows**2).sum(1, keepdims=True))
            result.write_shard(shard, (rows / np.maximum(norms, 1e-30))[:, None])
    barrier()
    return FeatureTable.open(out)


def _on_grid(rows: np.ndarray, scale: float) -> Tensor:
    """Rows [n, D] float64 on the device, scaled and rounded to multiples of 2^-24."""
    values = torch.from_numpy(np.asarray(rows, np.float64)).to(current().device)
    return values.mul(scale * GRID).round_().div_(GRID)


def _sums(rows: ExactRows) -> tuple[Tensor, Tensor]:
    """(sum of x [D], sum of x x^T [D, D]) over all scaled rows x. Collective.

    Both are float64, rounded once from exact integers. x is a multiple of 2^-24 of magnitude at
    most 4; it is split into c, a multiple of 2^-12, and f = x - c of magnitude at most 2^-13.

    - x c is at most 2^40 in units of 2^-36. A block of 2^13 rows adds up to 2^53: exact in float64.
    - x f is at most 2^37 in units of 2^-48: exact, too.
    - x itself is at most 2^26 in units of 2^-24.

    Sums over blocks are int64: x x^T = upper * 2^-16 + lower * 2^-48, with 0 <= lower < 2^32 after
    each block.
    """
    device, dim = current().device, rows.table.dim
    total = torch.zeros(dim, dtype=torch.int64, device=device)
    upper = torch.zeros(dim, dim, dtype=torch.int64, device=device)
    lower = torch.zeros(dim, dim, dtype=torch.int64, device=device)
    for shard in rows.readers.local_shards():
        for block in blocks_of(rows.table.shard(shard)[:, rows.view]):
            x = _on_grid(block, rows.scale)
            # Coarse and fine part of the products, each exact in float64.
            coarse = (x * COARSE_GRID).round_().div_(COARSE_GRID)
            coarse_products = torch.mm(x.T, coarse).mul_(GRID * COARSE_GRID).long()
            fine = coarse.neg_().add_(x)
            fine_products = torch.mm(x.T, fine).mul_(GRID * GRID).long()
            # Add them up as integers.
            upper += coarse_products >> 20
            lower += ((coarse_products & (2**20 - 1)) << 12) + fine_products
            _carry(upper, lower)
            total += (x * GRID).sum(0).long()
    # Over all ranks, rounded once.
    total, upper, lower = (all_sum(part).cpu() for part in (total, upper, lower))
    _carry(upper, lower)
    return total.double() / GRID, upper.double() * 2.0**-16 + lower.double() * 2.0**-48


def _carry(upper: Tensor, lower: Tensor) -> None:
    """Move what exceeds 32 bits of `lower` to `upper`, in place."""
    upper += lower >> 32
    lower &= 2**32 - 1


def _largest_eigenpairs(covariance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The `dim` largest eigenvalues, descending, and eigenvectors [dim, D] of rank 0. Collective.

    The entry of largest magnitude of an eigenvector is positive.
    """
    values = torch.zeros(dim, dtype=torch.float64)
    vectors = torch.zeros(dim, len(covariance), dtype=torch.float64)
    if current().rank == 0:
        ascending, columns = torch.linalg.eigh(covariance.to(current().device))
        values = ascending.flip(0)[:dim].cpu()
        vectors = columns.T.flip(0)[:dim].cpu()
        # Fix the signs, which are arbitrary.
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return broadcast(values.contiguous()), broadcast(vectors.contiguous())
