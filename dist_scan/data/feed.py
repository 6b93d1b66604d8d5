"""From rows to Batches: the two places a method's views come from, decoded images and cached features.

A feed's `batches(epoch, first_step)` is this rank's part of every step from `first_step` of the epoch on, as a pure
function of (seed, epoch, step): the same for any number of ranks, workers or threads. `views` are numbers of recipes (of the
anchor's and the partner's row with features); view k of a batch draws as view k whichever recipe makes it. None: each once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

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
    batch_per_rank,
    cached_views,
    epoch_order,
    neighbour_columns,
    rank_plan,
)
from dist_scan.monitoring.step_timer import section
from dist_scan.world.world import World


class Feed(Protocol):
    """What the loop asks for."""

    steps_per_epoch: int
    rows: np.ndarray
    """The rows [n] to train on."""

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """views: the numbers of the recipes to decode; None: all. order: the rows of this epoch as the method wants them; None: each once, shuffled."""


class EpochPlan:
    """Rows of an epoch, and each row's partner: shared by both feeds."""

    def __init__(
        self,
        rows: np.ndarray,
        global_batch: int,
        seed: int,
        world: World,
        steps: int | None = None,
        neighbours: NeighbourTable | None = None,
        num_neighbours: int | None = None,
        self_as_candidate: bool = False,
    ) -> None:
        self.rows, self.global_batch, self.seed, self.world = rows, global_batch, seed, world
        self.batch = batch_per_rank(global_batch, world.world_size)
        full = len(rows) // global_batch
        if full == 0:
            raise ValueError(
                f"global_batch: {global_batch} is larger than the {len(rows)} images to train on; "
                f"allowed: at most {len(rows)}. Lower it"
            )
        self.steps_per_epoch = min(full, steps or full)
        self.neighbours, self.self_as_candidate = neighbours, self_as_candidate
        self.num_neighbours = (
            num_neighbours
            if num_neighbours is not None
            else (neighbours.num_neighbours if neighbours else 0)
        )

    def grid(self, epoch: int, first_step: int, order: np.ndarray | None = None) -> np.ndarray:
        """[steps, b] rows of this rank, of `order` or of every row once, shuffled."""
        order = epoch_order(self.rows, self.seed, epoch) if order is None else order
        if len(order) < self.steps_per_epoch * self.global_batch:
            raise ValueError(
                f"an epoch of {len(order)} rows has fewer than {self.steps_per_epoch} steps of {self.global_batch}; epoch_rows must return all it needs"
            )
        plan = rank_plan(
            order, self.global_batch, self.world.rank, self.world.world_size, first_step
        )
        return plan[: self.steps_per_epoch - first_step]

    def partners(self, index: np.ndarray, epoch: int) -> np.ndarray:
        """The row each row is paired with this epoch."""
        if self.neighbours is None:
            return index
        column = neighbour_columns(
            index, self.seed, epoch, self.num_neighbours, self.self_as_candidate
        )
        if self.num_neighbours == 0:
            return index
        ids = self.neighbours.rows(index)[0]
        return np.where(column < 0, index, ids[np.arange(len(index)), np.maximum(column, 0)])


class ImageFeed:
    """Views decoded from a .beton, coloured on the device by their recipes."""

    def __init__(
        self,
        loader: BetonLoader,
        recipes: tuple[Recipe, ...],
        plan: EpochPlan,
        device: torch.device,
    ) -> None:
        self.loader, self.recipes, self.plan, self.device = loader, recipes, plan, device
        self.paired = plan.neighbours is not None
        self.steps_per_epoch, self.rows = plan.steps_per_epoch, plan.rows

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """See Feed. With neighbours the last view is the partner's."""
        recipes = self.recipes if views is None else tuple(self.recipes[v] for v in views)
        grid = self.plan.grid(epoch, first_step, order)
        partners = (
            np.stack([self.plan.partners(rows, epoch) for rows in grid]) if self.paired else None
        )
        rows = np.concatenate([grid, partners], axis=1) if self.paired else grid
        step = epoch * self.steps_per_epoch + first_step
        for i, (index, cut) in enumerate(self.loader.batches(rows.reshape(-1), epoch, views)):
            yield Batch(
                torch.from_numpy(grid[i].astype(np.int64)),
                self._colour(index, cut, recipes, epoch, grid.shape[1]),
                epoch,
                step + i,
            )

    def _colour(
        self,
        index: np.ndarray,
        cut: tuple[Tensor, ...],
        recipes: tuple[Recipe, ...],
        epoch: int,
        b: int,
    ) -> tuple[Tensor, ...]:
        out, last = [], len(recipes) - 1
        for v, (recipe, images) in enumerate(zip(recipes, cut)):
            if self.paired:  # the loader gave anchors then partners; each view needs one of the two
                half = slice(b, None) if v == last else slice(0, b)
                images, rows = images[half], index[half]
            else:
                rows = index
            with section("copy"):
                images = images.to(self.device, non_blocking=True)
            with section("augmentation"):
                out.append(recipe(images, rows, seed=self.plan.seed, epoch=epoch, view=v))
        return tuple(out)


class FeatureFeed:
    """Views are random cached views of rows of a feature table: anchor, and partner when there are neighbours."""

    def __init__(
        self,
        table: FeatureTable,
        plan: EpochPlan,
        device: torch.device,
        place: Placement = "mapped",
    ) -> None:
        self.bank, self.plan = FeatureCache(table, place, device), plan
        self.steps_per_epoch, self.rows = plan.steps_per_epoch, plan.rows

    def _rows(
        self, indices: list[np.ndarray], epoch: int, slots: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """A view per slot: parts of one tensor, so that a product over all of them needs no copy (heads.products.as_one_tensor)."""
        views = [
            cached_views(index, self.plan.seed, epoch, slot, self.bank.table.num_views)
            for index, slot in zip(indices, slots)
        ]
        rows = self.bank.read(np.concatenate(indices), np.concatenate(views))
        with section("copy"):
            return rows.to(self.bank.device, non_blocking=True).float().chunk(len(slots))

    def batches(
        self,
        epoch: int,
        first_step: int = 0,
        views: tuple[int, ...] | None = None,
        order: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """See Feed."""
        step = epoch * self.steps_per_epoch + first_step
        for i, index in enumerate(self.plan.grid(epoch, first_step, order)):
            pair, slots = (index, self.plan.partners(index, epoch)), views or (0, 1)
            yield Batch(
                torch.from_numpy(index.astype(np.int64)),
                self._rows([pair[v] for v in slots], epoch, slots),
                epoch,
                step + i,
            )


def eval_batches(
    loader: BetonLoader, recipe: Recipe, rows: np.ndarray, device: torch.device, *, seed: int = 0
) -> Iterator[Batch]:
    """One view (usually the centre crop) of exactly these rows, in order, nothing padded or dropped."""
    for index, views in loader.batches(rows, 0):
        images = recipe(views[0].to(device, non_blocking=True), index, seed=seed, epoch=0, view=0)
        yield Batch(torch.from_numpy(np.asarray(index).astype(np.int64)), (images,), 0, 0)


def held_out_rows(anchors: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows [M]: the anchors, then every neighbour that is no anchor; positions [A, K] of the neighbours in them)."""
    rest = np.setdiff1d(ids, anchors)
    rows = np.concatenate([anchors, rest])
    order = np.argsort(rows)
    return rows, order[np.searchsorted(rows, ids, sorter=order)]


def held_out_features(
    table: FeatureTable, anchors: np.ndarray, ids: np.ndarray, world: World, chunk: int = 8192
) -> HeldOut:
    """Held-out rows from cached features (view 0)."""
    rows, positions = held_out_rows(anchors, ids)
    mine = np.array_split(rows, world.world_size)[world.rank]

    def batches() -> Iterator[Batch]:
        for start in range(0, len(mine), chunk):
            index = mine[start : start + chunk]
            views = torch.from_numpy(table.rows(index, 0)).to(world.device).float()
            yield Batch(torch.from_numpy(index.astype(np.int64)), (views,), 0, 0)

    return HeldOut(batches, positions)


def held_out_images(
    loader: BetonLoader, recipe: Recipe, anchors: np.ndarray, ids: np.ndarray, world: World
) -> HeldOut:
    """Held-out rows decoded as centre crops."""
    rows, positions = held_out_rows(anchors, ids)
    mine = np.array_split(rows, world.world_size)[world.rank]
    return HeldOut(lambda: eval_batches(loader, recipe, mine, world.device), positions)
