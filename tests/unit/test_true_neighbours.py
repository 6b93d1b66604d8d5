"""Options of SCAN's ablation: false neighbours removed, and no neighbours (K = 0)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_scan.data.feed import NeighbourSampler
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.stages.true_neighbours import keep_true

LABELS = np.array([0, 0, 0, 1, 1, -1, 2])
IDS = np.array(
    [
        [1, 3, 2, 4],
        [3, 4, 5, 6],
        [0, 1, 3, 4],
        [4, 0, 1, 2],
        [3, 5, 6, 0],
        [0, 1, 2, 3],
        [5, 0, 1, 2],
    ]
)
SCORES = np.linspace(1, 0, 28).reshape(7, 4)


def test_neighbours_with_the_same_label_stay_in_order() -> None:
    ids, scores = keep_true(np.arange(7), IDS, SCORES, LABELS)
    assert ids.tolist() == [
        [1, 2, 1, 2],
        [1, 1, 1, 1],
        [0, 1, 0, 1],
        [4, 4, 4, 4],
        [3, 3, 3, 3],
        [5, 5, 5, 5],
        [6, 6, 6, 6],
    ]
    assert np.array_equal(scores[0], SCORES[0, [0, 2, 0, 2]])
    assert (scores[[1, 5, 6]] == 1).all()
    part, _ = keep_true(np.arange(2, 4), IDS[2:4], SCORES[2:4], LABELS)
    assert np.array_equal(part, ids[2:4])


def make_sampler(folder: Path, num_neighbours: int | None) -> NeighbourSampler:
    table = NeighbourTable.create(folder, (7, 4), 2)
    for shard in range(2):
        rows = slice(*table.shard_range(shard))
        table.write_shard(shard, IDS[rows], SCORES[rows])
    return NeighbourSampler(NeighbourTable.open(folder), num_neighbours)


def test_with_zero_neighbours_an_image_is_paired_with_itself(tmp_path: Path) -> None:
    rows = np.arange(7)
    sampler = make_sampler(tmp_path, 0)
    assert all(np.array_equal(sampler.draw(rows, 0, epoch), rows) for epoch in range(20))


def test_a_neighbour_is_drawn_from_the_first_k(tmp_path: Path) -> None:
    rows = np.arange(7)
    for num_neighbours, expected in ((None, 4), (4, 4), (2, 2)):
        sampler = make_sampler(tmp_path, num_neighbours)
        drawn = np.stack([sampler.draw(rows, 0, epoch) for epoch in range(200)])
        assert all(set(drawn[:, row]) == set(IDS[row, :expected]) for row in rows)
