"""An explicit plan of rows -> batches of views. Reads a checked .beton, cuts on threads of its own, keeps a few batches ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import local

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.augment.crops import CropSpec, crop_boxes
from dist_scan.data.beton.decode import PROBLEMS, cutter
from dist_scan.data.beton.format import InvalidBetonError, check_beton, read_names

AHEAD = 3  # batches in the making beside the one in use


class BetonLoader:
    """Batches of V views of exactly the rows asked for. One loader serves any number of plans; nothing runs between them.

    A view is a function of (seed, epoch, row, view): the same for any number of threads, batch size, order, or start.
    """

    def __init__(
        self, path: Path, views: tuple[CropSpec, ...], *, seed: int, batch_size: int, workers: int
    ) -> None:
        if batch_size < 1 or workers < 1 or not views:
            raise ValueError(
                f"a loader needs views, a batch and a worker (got {len(views)}, {batch_size}, {workers})"
            )
        self.path, self.views, self.seed, self.batch_size, self.workers = (
            Path(path),
            tuple(views),
            seed,
            batch_size,
            workers,
        )
        tables = check_beton(self.path)
        image = tables.rows["f0"]
        self.starts, self.sizes = image["data_ptr"].astype(np.int64), tables.sizes.astype(np.int64)
        self.modes, self.heights, self.widths = (
            image["mode"].astype(np.int64),
            image["height"].astype(np.int64),
            image["width"].astype(np.int64),
        )
        self.num_images = len(self.starts)
        self.sums = tables.sums
        self.file = open(self.path, "rb", buffering=0)
        self.stored_bytes = -(-int(self.sizes.max()) // 8) * 8
        jpeg = self.modes == 0
        self.scratch_bytes = int((self.heights * self.widths)[jpeg].max()) * 3 if jpeg.any() else 1
        self._local, self._cutter = local(), cutter()

    def batches(
        self, plan: np.ndarray, epoch: int, views: tuple[int, ...] | None = None
    ) -> Iterator[tuple[np.ndarray, tuple[Tensor, ...]]]:
        """(rows [b], V uint8 tensors [b, S_v, S_v, 3]) for the rows of `plan` in order; the last batch may be smaller.
        views: which of the loader's, by number, also one several times (place k draws as view k); None: all.

        Tensors are the caller's to keep. Raises ValueError for a row that does not exist (before anything is read), BadBeton
        naming the image when one does not decode. Leaving early ends the threads.
        """
        plan = np.asarray(plan, np.int64).reshape(-1)
        if len(plan) and (plan.min() < 0 or plan.max() >= self.num_images):
            raise ValueError(
                f"{self.path}: rows {plan.min()}..{plan.max()} were asked for; allowed: 0..{self.num_images - 1}"
            )
        return self._batches(
            plan, epoch, self.views if views is None else tuple(self.views[v] for v in views)
        )

    def _batches(
        self, plan: np.ndarray, epoch: int, specs: tuple[CropSpec, ...]
    ) -> Iterator[tuple[np.ndarray, tuple[Tensor, ...]]]:
        pieces = (plan[s : s + self.batch_size] for s in range(0, len(plan), self.batch_size))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="beton")
        making: deque = deque()
        try:
            for rows in pieces:
                making.append(self._begin(pool, rows, epoch, specs))
                if len(making) > AHEAD:
                    yield self._finish(*making.popleft())
            while making:
                yield self._finish(*making.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, epoch: int, specs: tuple[CropSpec, ...]
    ) -> tuple[np.ndarray, tuple[Tensor, ...], list[Future]]:
        # pinned where there is a GPU: torch keeps a pinned block until copies begun with non_blocking are over
        tensors = tuple(
            torch.empty(
                (len(rows), s.size, s.size, 3),
                dtype=torch.uint8,
                pin_memory=torch.cuda.is_available(),
            )
            for s in specs
        )
        outs = tuple(t.numpy() for t in tensors)
        share = max(1, -(-len(rows) // self.workers))
        return (
            rows,
            tensors,
            [
                pool.submit(
                    self._decode_part,
                    rows[s : s + share],
                    epoch,
                    specs,
                    tuple(o[s : s + share] for o in outs),
                )
                for s in range(0, len(rows), share)
            ],
        )

    def _finish(
        self, rows: np.ndarray, tensors: tuple[Tensor, ...], parts: list[Future]
    ) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        for part in parts:
            part.result()
        return rows, tensors

    def _decode_part(
        self,
        rows: np.ndarray,
        epoch: int,
        specs: tuple[CropSpec, ...],
        outs: tuple[np.ndarray, ...],
    ) -> None:
        """One thread's share of a batch."""
        height, width = self.heights[rows], self.widths[rows]
        found = [
            crop_boxes(spec, height, width, self.seed, epoch, rows, v)
            for v, spec in enumerate(specs)
        ]
        boxes, flips = np.stack([b for b, _ in found], 1), np.stack([f for _, f in found], 1)
        if not hasattr(self._local, "scratch"):
            self._local.stored, self._local.scratch = (
                np.empty(self.stored_bytes, np.uint8),
                np.empty(self.scratch_bytes, np.uint8),
            )
        bad, problem = self._cutter(
            self.file.fileno(),
            self.starts[rows],
            self.sizes[rows],
            self.sums[rows],
            self.modes[rows],
            height,
            width,
            boxes,
            flips,
            self._local.stored,
            self._local.scratch,
            outs,
        )
        if bad >= 0:
            row = int(rows[bad])
            raise InvalidBetonError(
                self.path, f"image {row} ({read_names(self.path)[row]}) {PROBLEMS[problem]}"
            )
