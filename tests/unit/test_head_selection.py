"""Choosing heads without labels: alignment, consensus, stability, the choice over epochs, and the
stop when heads diverge.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.heads.consensus import consensus, stability
from dist_scan.heads.linear import ClusterHeads
from dist_scan.heads.selection import HeadSelection, PublishedHeads
from dist_scan.search.matching import match_clusters

RNG = np.random.default_rng(0)


def test_alignment_undoes_a_renaming_and_bears_noise() -> None:
    reference, names = RNG.integers(0, 7, 500), RNG.permutation(7)
    other = np.argsort(names)[reference]
    other[:60] = RNG.integers(0, 7, 60)
    assert (match_clusters(reference, other, 7) == names).all()
    assert sorted(match_clusters(reference, np.zeros(500, int), 7)) == list(
        range(7)
    )  # one-to-one also with empty clusters


def test_the_odd_head_out_is_the_least_stable() -> None:
    a = RNG.integers(0, 5, 300)
    found = stability([a, (a + 1) % 5, RNG.integers(0, 5, 300)], 5)
    assert found[0] == found[1] > 0.4 and abs(found[2]) < 0.05
    assert np.isnan(stability([a], 5)[0])


def test_the_consensus_is_the_mean_in_the_reference_clusters() -> None:
    logits = torch.randn(20, 4)
    names = torch.tensor([2, 0, 3, 1])
    renamed = logits[:, names]  # its cluster c is the reference's names[c]
    torch.testing.assert_close(
        consensus([logits, renamed], [torch.arange(4), names]), logits.softmax(1)
    )
    noisy = [logits * 3, renamed * 0.1]
    expected = (noisy[0].softmax(1) + noisy[1].softmax(1)[:, names.argsort()]) / 2
    torch.testing.assert_close(consensus(noisy, [torch.arange(4), names]), expected)


def sharp(heads: ClusterHeads, head: int) -> None:
    with torch.no_grad():
        heads.weight[heads.rows(head)] *= 30


def test_each_number_of_clusters_keeps_its_own_epoch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads, x = ClusterHeads(8, (4, 6), 2), torch.randn(40, 8)
    choice, neighbours = (
        HeadSelection(heads),
        np.arange(40)[:, None],
    )  # each its own neighbour: sure heads have the lower loss
    sharp(heads, 1)
    sharp(heads, 2)
    values, better = choice.update(0, heads, x, neighbours)
    assert (
        better
        and values["best_head"] == 1
        and choice.best_head.tolist() == [1, 2]
        and choice.best_epoch.tolist() == [0, 0]
    )
    first = heads.weight.detach().clone()
    with torch.no_grad():
        heads.weight[heads.rows(0)] = 0
        heads.weight[heads.rows(1)] = 0
    sharp(heads, 2)
    assert not choice.update(1, heads, x, neighbours)[1]
    assert choice.best_epoch.tolist() == [0, 1]
    torch.testing.assert_close(choice.kept_weight[:8], first[:8])
    torch.testing.assert_close(choice.kept_weight[8:], heads.weight[8:])
    choice.publish(tmp_path)
    kept, facts = PublishedHeads(tmp_path), json.loads((tmp_path / "heads.json").read_text())
    assert [h["chosen"] for h in facts["heads"]] == [False, True, True, False] and facts[
        "sizes"
    ] == [4, 4, 6, 6]
    torch.testing.assert_close(kept.logits(2, x), choice.selected_head(1)(x))
    for number in (4, 6):
        mean = kept.consensus(number, x)
        assert mean.shape == (40, number) and torch.allclose(mean.sum(1), torch.ones(40))
    with pytest.raises(ValueError, match="there are: 4, 6"):
        kept.consensus(5, x)


@pytest.mark.parametrize("rows", [0, 12])
def test_nothing_to_choose_by_is_said_and_the_first_weights_are_not_published(rows) -> None:
    """No held-out row, or features that are no numbers: the loss of every head is NaN."""
    heads = ClusterHeads(8, 4, 2)
    choice = HeadSelection(heads)
    with pytest.raises(
        ValueError,
        match=f"epoch 3: no head's held-out loss is a number .{rows} held-out images.*held_out_share",
    ):
        choice.update(2, heads, torch.full((rows, 8), torch.nan), np.zeros((rows, 3), np.int64))
    assert choice.best_epoch.tolist() == [-1]


def test_without_held_out_rows_the_newest_is_kept_and_there_is_no_consensus(tmp_path: Path) -> None:
    heads = ClusterHeads(8, 4, 2)
    choice = HeadSelection(heads)
    sharp(heads, 1)
    choice.keep_newest(3, heads)
    choice.publish(tmp_path)
    torch.testing.assert_close(
        PublishedHeads(tmp_path).logits(1, torch.eye(8)),
        heads.head_logits(1, torch.eye(8)).detach(),
    )
    facts = json.loads((tmp_path / "heads.json").read_text())
    assert facts["best_epoch"] == 3 and facts["heads"][0] == {
        "head": 0,
        "num_clusters": 4,
        "held_out_loss": None,
        "stability": None,
        "chosen": True,
    }
    with pytest.raises(ValueError, match="held_out_share"):
        PublishedHeads(tmp_path).consensus(4, torch.eye(8))


def test_heads_that_diverge_stop_with_the_remedy() -> None:
    torch.manual_seed(0)
    heads, x = ClusterHeads(8, 4, 2), torch.randn(50, 8)
    choice = HeadSelection(heads)
    fine = choice.check_divergence(heads, x)
    assert 0 < fine["largest_logit"] < 10 and fine["largest_cluster"] < 0.9
    with torch.no_grad():
        heads.bias[0] += 30
    assert (
        choice.check_divergence(heads, x)["largest_cluster"] < 0.9 and choice.collapsed == 0
    )  # one head of two may fail: it is not chosen
    with torch.no_grad():
        heads.bias[5] += 30
    choice.check_divergence(heads, x)
    choice.check_divergence(heads, x)
    resumed = HeadSelection(heads)
    resumed.load_state_dict(choice.state_dict())
    for each in (choice, resumed):
        with pytest.raises(ValueError, match="collapsed.*lr.*standardise"):
            each.check_divergence(heads, x)
    with torch.no_grad():
        heads.weight *= 1e6
    with pytest.raises(ValueError, match="diverged.*lr"):
        choice.check_divergence(heads, x)
    heads.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        choice.check_divergence(heads, x)


def test_a_passing_collapse_is_forgotten() -> None:
    heads, x = ClusterHeads(8, 4, 1), torch.randn(50, 8)
    choice = HeadSelection(heads)
    for bias in (30.0, 30.0, 0.0, 30.0, 30.0):
        heads.bias.data = torch.tensor([bias, 0, 0, 0])
        choice.check_divergence(heads, x)
    assert choice.collapsed == 2
