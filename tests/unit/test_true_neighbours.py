"""False neighbours removed, and K = 0: what SCAN's ablation switches pair an image with."""

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


def test_only_neighbours_of_the_same_label_stay_in_order() -> None:
    ids, scores = keep_true(np.arange(7), IDS, SCORES, LABELS)
    assert ids.tolist() == [
        [1, 2, 1, 2],
        [1, 1, 1, 1],
        [0, 1, 0, 1],
        [4] * 4,
        [3] * 4,
        [5] * 4,
        [6] * 4,
    ]
    assert np.array_equal(scores[0], SCORES[0, [0, 2, 0, 2]]) and (scores[[1, 5, 6]] == 1).all()
    part, _ = keep_true(np.arange(2, 4), IDS[2:4], SCORES[2:4], LABELS)
    assert np.array_equal(part, ids[2:4])


def sampler(tmp_path: Path, k: int | None) -> NeighbourSampler:
    table = NeighbourTable.create(tmp_path, 7, 4, 2)
    for shard in range(2):
        table.write_shard(
            shard, IDS[slice(*table.shard_range(shard))], SCORES[slice(*table.shard_range(shard))]
        )
    return NeighbourSampler(NeighbourTable.open(tmp_path), k)


def test_zero_neighbours_pair_an_image_with_itself_and_none_means_all(tmp_path: Path) -> None:
    rows = np.arange(7)
    assert all(np.array_equal(sampler(tmp_path, 0).draw(rows, 0, e), rows) for e in range(20))
    for k, wanted in ((None, 4), (4, 4), (2, 2)):
        drawn = np.stack([sampler(tmp_path, k).draw(rows, 0, e) for e in range(200)])
        assert all(set(drawn[:, r]) == set(IDS[r, :wanted]) for r in rows)
