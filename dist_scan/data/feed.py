"""Feeds turn dataset rows into Batches of images (ImageFeed) or cached features (FeatureFeed).

`feed.batches(epoch, first_step)` yields this rank's part of every step, as a pure function of
(seed, epoch, step): the same for any number of ranks or threads, and after a restart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.augment.recipes import Recipe
from dist_scan.data.batch import Batch, HeldOut
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feature_cache import FeatureCache, Placement
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.data.order import (
    cached_views,
    check_divisible,
    epoch_order,
    neighbour_columns,
    rank_plan,
)
from dist_scan.monitoring.step_timer import timed
from dist_scan.world.world import World


@dataclass(frozen=True)
class NeighbourSampler:
    """Draws one of the K nearest neighbours of each row uniformly, a new one every epoch."""

    table: NeighbourTable
    num_neighbours: int | None = None
    """Number K of nearest neighbours to draw from; None: all of the table; 0: the row itself."""
    self_as_candidate: bool = False
    """Draw the row itself with probability 1 / (K + 1), as SCAN's released code does."""

    def draw(self, index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """[n] the row that each row of `index` [n] is paired with in this epoch."""
        count = self.num_neighbours
        if count is None:
            count = self.table.num_neighbours
        if count == 0:
            return index
        column = neighbour_columns(index, seed, epoch, count, self.self_as_candidate)
        ids = self.table.rows(index)[0]
        neighbour = ids[np.arange(len(index)), np.maximum(column, 0)]
        return np.where(column < 0, index, neighbour)


@dataclass(frozen=True)
class EpochPlan:
    """Rows of each step on this rank, and their neighbours.

    Raises ValueError if the rows do not fill one global batch, or if the global batch is not
    divisible by the number of ranks.
    """

    rows: np.ndarray
    """[n] dataset rows to train on."""
    global_batch: int
    seed: int
    world: World
    max_steps: int | None = None
    """Of an epoch; None: as many as the rows give."""
    neighbours: NeighbourSampler | None = None

    def __post_init__(self) -> None:
        check_divisible(self.global_batch, self.world.world_size)
        if len(self.rows) < self.global_batch:
            raise ValueError(
                f"global_batch: {self.global_batch} is larger than the number of images to train "
                f"on; allowed: at most {len(self.rows)}. Lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        full_steps = len(self.rows) // self.global_batch
        return min(full_steps, self.max_steps or full_steps)

    def batch_rows(
        self, epoch: int, first_step: int, order: np.ndarray | None = None
    ) -> np.ndarray:
        """[steps, b] rows of this rank: of `order`, or of all training rows, shuffled."""
        if order is None:
            order = epoch_order(self.rows, self.seed, epoch)
        if len(order) < self.steps_per_epoch * self.global_batch:
            raise ValueError(
                f"an epoch of {len(order)} rows is shorter than {self.steps_per_epoch} steps of "
                f"{self.global_batch}; the method's epoch_rows must return all rows of the epoch"
            )
        plan = rank_plan(
            order, self.global_batch, self.world.rank, self.world.world_size, first_step
        )
        return plan[: self.steps_per_epoch - first_step]

    def neighbours_of(self, index: np.ndarray, epoch: int) -> np.ndarray:
        """[n] the row that each row of `index` [n] is paired with; itself without neighbours."""
        if self.neighbours is None:
            return index
        return self.neighbours.draw(index, self.seed, epoch)


class Feed(ABC):
    """Source of Batches for the training loop."""

    def __init__(self, plan: EpochPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.steps_per_epoch = plan.steps_per_epoch
        self.rows = plan.rows

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        slots: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """Batches of this rank, from `first_step` of the epoch on.

        slots: which views each Batch has, as positions in `views` of a full Batch; None: all. The
        crops and augmentations of an image depend on its position in `slots`, not on the slot.
        order: dataset rows of this epoch in the order of training; None: `rows`, shuffled.
        """
        anchors = self.plan.batch_rows(epoch, first_step, order)
        step = epoch * self.steps_per_epoch + first_step
        for i, tensors in enumerate(self._views(anchors, epoch, slots)):
            yield _batch(anchors[i], tensors, epoch, step + i)

    @abstractmethod
    def _views(
        self, anchors: np.ndarray, epoch: int, slots: tuple[int, ...] | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Views of each step of anchors [steps, b]."""


class ImageFeed(Feed):
    """Views are decoded from a .beton on the CPU and augmented by their recipes on the device.

    With neighbours, the last view is the neighbour's.
    """

    def __init__(
        self,
        loader: BetonLoader,
        recipes: tuple[Recipe, ...],
        plan: EpochPlan,
        device: torch.device,
    ) -> None:
        super().__init__(plan, device)
        self.loader = loader
        self.recipes = recipes

    def _views(
        self, anchors: np.ndarray, epoch: int, slots: tuple[int, ...] | None
    ) -> Iterator[tuple[Tensor, ...]]:
        recipes = self.recipes
        if slots is not None:
            recipes = tuple(self.recipes[slot] for slot in slots)
        # The loader reads anchors and neighbours of a step as one batch
        to_decode = anchors
        if self.plan.neighbours is not None:
            neighbours = np.stack([self.plan.neighbours_of(rows, epoch) for rows in anchors])
            to_decode = np.concatenate([anchors, neighbours], axis=1)
        for rows, crops in self.loader.batches(to_decode.reshape(-1), epoch, slots):
            yield self._augment(rows, crops, recipes, epoch)

    def _augment(
        self,
        rows: np.ndarray,
        crops: tuple[Tensor, ...],
        recipes: tuple[Recipe, ...],
        epoch: int,
    ) -> tuple[Tensor, ...]:
        """Views of one step on the device.

        With neighbours, the loader has decoded every view of the anchors, then of the neighbours.
        The last view takes the neighbours' images, all others take the anchors'.
        """
        views = []
        for v, (recipe, images) in enumerate(zip(recipes, crops)):
            index = rows
            if self.plan.neighbours is not None:
                num_anchors = len(rows) // 2
                is_last = v == len(recipes) - 1
                half = slice(num_anchors, None) if is_last else slice(num_anchors)
                images, index = images[half], rows[half]
            with timed("copy"):
                images = images.to(self.device, non_blocking=True)
            with timed("augmentation"):
                views.append(recipe(images, index, seed=self.plan.seed, epoch=epoch, view=v))
        return tuple(views)


class FeatureFeed(Feed):
    """Views are random cached views from a feature table: of each row, and of its neighbour.

    Without neighbours the second view is another random view of the same row.
    """

    def __init__(
        self,
        table: FeatureTable,
        plan: EpochPlan,
        device: torch.device,
        placement: Placement = "mapped",
    ) -> None:
        super().__init__(plan, device)
        self.cache = FeatureCache(table, placement, device)

    def _views(
        self, anchors: np.ndarray, epoch: int, slots: tuple[int, ...] | None
    ) -> Iterator[tuple[Tensor, ...]]:
        slots = slots or (0, 1)
        for index in anchors:
            pair = (index, self.plan.neighbours_of(index, epoch))
            yield self._read([pair[slot] for slot in slots], epoch, slots)

    def _read(
        self, indices: list[np.ndarray], epoch: int, slots: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """One view [b, D] per slot.

        They are chunks of one tensor, so that a matrix product over all of them needs no copy.
        """
        num_views = self.cache.table.num_views
        views = [
            cached_views(index, self.plan.seed, epoch, slot, num_views)
            for index, slot in zip(indices, slots)
        ]
        rows = self.cache.read(np.concatenate(indices), np.concatenate(views))
        with timed("copy"):
            return rows.to(self.device, non_blocking=True).float().chunk(len(slots))


def _batch(index: np.ndarray, views: tuple[Tensor, ...], epoch: int = 0, step: int = 0) -> Batch:
    return Batch(torch.from_numpy(index.astype(np.int64)), views, epoch, step)


def eval_batches(
    loader: BetonLoader, recipe: Recipe, rows: np.ndarray, device: torch.device, *, seed: int = 0
) -> Iterator[Batch]:
    """One view (usually the centre crop) of each of these rows, in order; no padding."""
    for index, views in loader.batches(rows, 0):
        images = recipe(views[0].to(device, non_blocking=True), index, seed=seed, epoch=0, view=0)
        yield _batch(index, (images,))


def held_out_features(
    table: FeatureTable, anchors: np.ndarray, ids: np.ndarray, world: World, chunk: int = 8192
) -> HeldOut:
    """Anchors [A] and their neighbours `ids` [A, K], from cached features (view 0)."""

    def batches(rows: np.ndarray) -> Iterator[Batch]:
        for start in range(0, len(rows), chunk):
            index = rows[start : start + chunk]
            features = torch.from_numpy(table.rows(index)).to(world.device).float()
            yield _batch(index, (features,))

    return _held_out(anchors, ids, world, batches)


def held_out_images(
    loader: BetonLoader, recipe: Recipe, anchors: np.ndarray, ids: np.ndarray, world: World
) -> HeldOut:
    """Anchors [A] and their neighbours `ids` [A, K], decoded with a recipe (centre crop)."""
    return _held_out(
        anchors, ids, world, lambda rows: eval_batches(loader, recipe, rows, world.device)
    )


def _held_out(
    anchors: np.ndarray,
    ids: np.ndarray,
    world: World,
    batches: Callable[[np.ndarray], Iterator[Batch]],
) -> HeldOut:
    """The rows are the anchors, then every neighbour that is not an anchor."""
    others = np.setdiff1d(ids, anchors)
    rows = np.concatenate([anchors, others])
    order = np.argsort(rows)
    positions = order[np.searchsorted(rows, ids, sorter=order)]
    local_rows = np.array_split(rows, world.world_size)[world.rank]
    return HeldOut(lambda: batches(local_rows), positions)
