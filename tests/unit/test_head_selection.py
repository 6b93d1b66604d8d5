"""Selection of heads without labels: stability, consensus, selection over epochs, divergence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.heads.consensus import consensus, stability
from dist_scan.heads.linear import ClusterHeads
from dist_scan.heads.selection import PATIENCE, HeadSelection, PublishedHeads
from dist_scan.search.matching import match_clusters

RNG = np.random.default_rng(0)


def test_matching_undoes_a_renaming_despite_noise() -> None:
    reference, names = RNG.integers(0, 7, 500), RNG.permutation(7)
    other = np.argsort(names)[reference]
    other[:60] = RNG.integers(0, 7, 60)
    assert (match_clusters(reference, other, 7) == names).all()
    with_empty_clusters = match_clusters(reference, np.zeros(500, int), 7)
    assert sorted(with_empty_clusters) == list(range(7)), "one-to-one"


def test_a_head_that_disagrees_is_the_least_stable() -> None:
    a = RNG.integers(0, 5, 300)
    found = stability([a, (a + 1) % 5, RNG.integers(0, 5, 300)], 5)
    assert found[0] == found[1] > 0.4
    assert abs(found[2]) < 0.05
    assert np.isnan(stability([a], 5)[0])


def test_consensus_is_the_mean_in_the_clusters_of_the_reference() -> None:
    logits = torch.randn(20, 4)
    names = torch.tensor([2, 0, 3, 1])
    renamed = logits[:, names]  # its cluster c is the reference's names[c]
    mappings = [torch.arange(4), names]
    torch.testing.assert_close(consensus([logits, renamed], mappings), logits.softmax(1))
    scaled = [logits * 3, renamed * 0.1]
    expected = (scaled[0].softmax(1) + scaled[1].softmax(1)[:, names.argsort()]) / 2
    torch.testing.assert_close(consensus(scaled, mappings), expected)


def make_confident(heads: ClusterHeads, head: int) -> None:
    with torch.no_grad():
        heads.weight[heads.slices[head]] *= 30


def test_each_number_of_clusters_selects_its_own_epoch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads, x = ClusterHeads(8, (4, 6), 2), torch.randn(40, 8)
    selection = HeadSelection(heads)
    # Each row is its own neighbour, so that confident heads have the lower loss.
    neighbours = np.arange(40)[:, None]
    make_confident(heads, 1)
    make_confident(heads, 2)
    metrics, improved = selection.update(0, heads, x, neighbours)
    assert improved
    assert metrics["best_head"] == 1
    assert selection.best_head.tolist() == [1, 2]
    assert selection.best_epoch.tolist() == [0, 0]
    # In the next epoch only the second group improves.
    first = heads.weight.detach().clone()
    with torch.no_grad():
        heads.weight[heads.slices[0]] = 0
        heads.weight[heads.slices[1]] = 0
    make_confident(heads, 2)
    assert not selection.update(1, heads, x, neighbours)[1]
    assert selection.best_epoch.tolist() == [0, 1]
    torch.testing.assert_close(selection.best_weight[:8], first[:8])
    torch.testing.assert_close(selection.best_weight[8:], heads.weight[8:])
    # What is published
    selection.publish(tmp_path)
    published, table = PublishedHeads(tmp_path), json.loads((tmp_path / "heads.json").read_text())
    assert [row["selected"] for row in table["heads"]] == [False, True, True, False]
    assert table["sizes"] == [4, 4, 6, 6]
    torch.testing.assert_close(published.logits(2, x), selection.selected_head(1)(x))
    for num_clusters in (4, 6):
        mean = published.consensus(num_clusters, x)
        assert mean.shape == (40, num_clusters)
        assert torch.allclose(mean.sum(1), torch.ones(40))
    with pytest.raises(ValueError, match="allowed: 4, 6"):
        published.consensus(5, x)


@pytest.mark.parametrize("num_rows", [0, 12])
def test_an_epoch_without_a_finite_loss_is_an_error_and_selects_nothing(num_rows: int) -> None:
    """Without held-out rows, or with NaN in their features, the loss of every head is NaN."""
    heads = ClusterHeads(8, 4, 2)
    selection = HeadSelection(heads)
    features, neighbours = torch.full((num_rows, 8), torch.nan), np.zeros((num_rows, 3), np.int64)
    with pytest.raises(
        ValueError,
        match=f"epoch 3: .* every head is NaN.*{num_rows} held-out images.*held_out_share",
    ):
        selection.update(2, heads, features, neighbours)
    assert selection.best_epoch.tolist() == [-1]


def test_without_held_out_rows_the_newest_heads_are_published_without_consensus(
    tmp_path: Path,
) -> None:
    heads = ClusterHeads(8, 4, 2)
    selection = HeadSelection(heads)
    make_confident(heads, 1)
    selection.keep_newest(3, heads)
    selection.publish(tmp_path)
    published, x = PublishedHeads(tmp_path), torch.eye(8)
    torch.testing.assert_close(published.logits(1, x), heads.head_logits(1, x).detach())
    table = json.loads((tmp_path / "heads.json").read_text())
    assert table["best_epoch"] == 3
    assert table["heads"][0] == {
        "head": 0,
        "num_clusters": 4,
        "held_out_loss": None,
        "stability": None,
        "selected": True,
    }
    with pytest.raises(ValueError, match="held_out_share"):
        published.consensus(4, x)


def test_collapsed_and_diverged_heads_stop_training_with_the_remedy() -> None:
    torch.manual_seed(0)
    heads, x = ClusterHeads(8, 4, 2), torch.randn(50, 8)
    selection = HeadSelection(heads)
    metrics = selection.check_health(heads, x)
    assert 0 < metrics["largest_logit"] < 10
    assert metrics["largest_cluster"] < 0.9
    # One collapsed head of two is allowed: it will not be selected.
    with torch.no_grad():
        heads.bias[0] += 30
    assert selection.check_health(heads, x)["largest_cluster"] < 0.9
    assert selection.collapsed == 0
    with torch.no_grad():
        heads.bias[5] += 30
    for _ in range(PATIENCE - 1):
        selection.check_health(heads, x)
    resumed = HeadSelection(heads)
    resumed.load_state_dict(selection.state_dict())
    for each in (selection, resumed):
        with pytest.raises(ValueError, match="collapsed.*lr.*standardise"):
            each.check_health(heads, x)
    with torch.no_grad():
        heads.weight *= 1e6
    with pytest.raises(ValueError, match="diverged.*lr"):
        selection.check_health(heads, x)
    heads.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        selection.check_health(heads, x)


def test_collapsed_epochs_are_counted_in_a_row() -> None:
    heads, x = ClusterHeads(8, 4, 1), torch.randn(50, 8)
    selection = HeadSelection(heads)
    for bias in (30.0, 30.0, 0.0, 30.0, 30.0):
        heads.bias.data = torch.tensor([bias, 0, 0, 0])
        selection.check_health(heads, x)
    assert selection.collapsed == 2
