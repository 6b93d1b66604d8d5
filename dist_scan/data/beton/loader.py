"""Batches of views from a .beton, decoded on threads, a few batches ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.augment.crops import CropSpec, crop_boxes
from dist_scan.data.beton.format import InvalidBetonError, read_image_table, read_names
from dist_scan.data.encode import JPEG
from dist_scan.data.order import check_rows

PREFETCH = 3  # batches that are decoded while one is in use

Crops = tuple[Tensor, ...]
"""One uint8 tensor [b, S_v, S_v, 3] per view."""


class _Pending(NamedTuple):
    """A batch that is being decoded."""

    rows: np.ndarray
    crops: Crops
    parts: list[Future]

    def wait(self) -> tuple[np.ndarray, Crops]:
        """(rows, crops) when all parts are decoded; raises the error of a part."""
        for part in self.parts:
            part.result()
        return self.rows, self.crops


class BetonLoader:
    """Reads batches of views of any dataset rows, in any order, any number of times.

    A view is a function of (seed, epoch, row, view): the same for any number of threads, batch
    size, order or start. Threads run only while batches are read.
    """

    def __init__(
        self,
        path: str | Path,
        crop_specs: tuple[CropSpec, ...],
        *,
        seed: int,
        batch_size: int,
        num_threads: int,
    ) -> None:
        # numba takes a second to import.
        from dist_scan.data.beton.crop_kernel import PROBLEMS, crop_views

        self.path = Path(path)
        self.crop_specs = crop_specs
        self.seed = seed
        self.batch_size = batch_size
        self.num_threads = num_threads
        self.images = read_image_table(self.path)
        self.num_images = len(self.images)
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  open as long as the loader
        self._crop_views = crop_views
        self._problems = PROBLEMS
        # Buffers of each thread: for the largest stored and the largest decoded image
        self._buffers = local()
        jpegs = self.images[self.images["mode"] == JPEG]
        self._stored_bytes = -(-int(self.images["size"].max()) // 8) * 8
        self._decoded_bytes = 3 * int((jpegs["height"] * jpegs["width"]).max(initial=1))

    def batches(
        self, rows: np.ndarray, epoch: int, view_numbers: tuple[int, ...] | None = None
    ) -> Iterator[tuple[np.ndarray, Crops]]:
        """(rows [b], crops) of the dataset rows [n] in order; the last batch may be smaller.

        view_numbers: positions in `crop_specs`, in any order and also repeated; None: all.
        Randomness depends on a view's position in `view_numbers`, not on its number.

        The tensors belong to the caller. Threads end when the iterator is closed. Raises ValueError
        for rows out of range (before anything is read), and InvalidBetonError with the name of an
        image that cannot be read.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        check_rows(rows, self.num_images, self.path)
        specs = self.crop_specs
        if view_numbers is not None:
            specs = tuple(self.crop_specs[v] for v in view_numbers)
        return self._batches(rows, epoch, specs)

    def _batches(
        self, rows: np.ndarray, epoch: int, specs: tuple[CropSpec, ...]
    ) -> Iterator[tuple[np.ndarray, Crops]]:
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="beton")
        pending: deque[_Pending] = deque()
        try:
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                pending.append(self._submit(pool, batch, epoch, specs))
                if len(pending) > PREFETCH:
                    yield pending.popleft().wait()
            while pending:
                yield pending.popleft().wait()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, epoch: int, specs: tuple[CropSpec, ...]
    ) -> _Pending:
        """Start to decode a batch, an equal part of it on each thread."""
        # With a GPU in pinned memory: torch reuses a block only after the copies from it.
        pinned = torch.cuda.is_available()
        tensors = tuple(
            torch.empty((len(rows), s.size, s.size, 3), dtype=torch.uint8, pin_memory=pinned)
            for s in specs
        )
        # One part of the batch for each thread
        outs = [tensor.numpy() for tensor in tensors]
        part_size = max(1, -(-len(rows) // self.num_threads))
        parts = []
        for start in range(0, len(rows), part_size):
            part = slice(start, start + part_size)
            part_outs = tuple(out[part] for out in outs)
            parts.append(pool.submit(self._decode_part, rows[part], epoch, specs, part_outs))
        return _Pending(rows, tensors, parts)

    def _decode_part(
        self,
        rows: np.ndarray,
        epoch: int,
        specs: tuple[CropSpec, ...],
        outs: tuple[np.ndarray, ...],
    ) -> None:
        """Decode the rows [n] of one thread into outs, one [n, S_v, S_v, 3] per view."""
        # Where the images are, and which boxes are cut
        images = self.images[rows]
        boxes_and_flips = [
            crop_boxes(spec, images["height"], images["width"], self.seed, epoch, rows, v)
            for v, spec in enumerate(specs)
        ]
        boxes, flips = (np.stack(arrays, 1) for arrays in zip(*boxes_and_flips))
        # Buffers of this thread
        buffers = self._buffers
        if not hasattr(buffers, "stored"):
            buffers.stored = np.empty(self._stored_bytes, np.uint8)
            buffers.decoded = np.empty(self._decoded_bytes, np.uint8)
        failed, problem = self._crop_views(
            self._file.fileno(), images, boxes, flips, buffers.stored, buffers.decoded, outs
        )
        if failed >= 0:
            row = int(rows[failed])
            name = read_names(self.path)[row]
            raise InvalidBetonError(self.path, f"image {row} ({name}) {self._problems[problem]}")
