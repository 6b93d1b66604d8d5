"""Scores of a contingency table against scikit-learn, SciPy and brute force."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn import metrics as sk

from dist_scan.evaluate import metrics as m
from dist_scan.evaluate.expected_mutual_information import expected_mutual_information
from dist_scan.search.agreement import adjusted_rand_index


def random_clusters(
    n: int, clusters: int, classes: int, seed: int = 0, agree: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster and label [n]; classes are unbalanced, the share `agree` of clusters follows them."""
    rng = np.random.default_rng(seed)
    label = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 2.0)))
    return np.where(rng.random(n) < agree, label % clusters, rng.integers(0, clusters, n)), label


CASES = {
    "equal": random_clusters(3000, 10, 10),
    "more clusters": random_clusters(3000, 40, 7, 1),
    "more classes": random_clusters(3000, 6, 25, 2),
    "chance": random_clusters(2000, 8, 8, 3, agree=0.0),
    "one cluster": (np.zeros(50, int), np.arange(50) % 5),
    "one class": (np.arange(50) % 5, np.zeros(50, int)),
    "one of each": (np.zeros(50, int), np.zeros(50, int)),
    "perfect": (np.arange(60) % 6, (np.arange(60) + 2) % 6),
    "singletons": (np.arange(12), np.arange(12)),
    "singletons against pairs": (np.arange(12), np.arange(12) // 2),
    "one image": (np.zeros(1, int), np.zeros(1, int)),
    "different sizes": (
        np.r_[np.zeros(900, int), np.arange(1, 101)],
        np.r_[np.arange(50), np.zeros(950, int)],
    ),
    "empty clusters": (random_clusters(500, 4, 4)[0] * 3, random_clusters(500, 4, 4)[1] * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_scikit_learn(name: str) -> None:
    cluster, label = CASES[name]
    table = m.checked_contingency_table(
        cluster, label, int(cluster.max()) + 3, int(label.max()) + 2
    )
    for average in ("arithmetic", "geometric"):
        # With one cluster or class the geometric mean is 0: see the test below.
        if average == "geometric" and name.startswith("one c"):
            continue
        expected = sk.normalized_mutual_info_score(label, cluster, average_method=average)
        assert m.nmi(table, average) == pytest.approx(expected, abs=1e-12)
    # 0/0 with one cluster or class: scikit-learn's answer depends on rounding.
    if not name.startswith("one c"):
        expected = sk.adjusted_mutual_info_score(label, cluster)
        assert m.ami(table) == pytest.approx(expected, abs=1e-12)
    expected = sk.adjusted_rand_score(label, cluster)
    assert adjusted_rand_index(table) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["one cluster", "one class"])
def test_one_cluster_or_one_class_scores_zero(name: str) -> None:
    cluster, label = CASES[name]
    table = m.checked_contingency_table(cluster, label, 5, 5)
    assert m.nmi(table, "arithmetic") == m.nmi(table, "geometric") == 0.0
    assert adjusted_rand_index(table) == 0.0
    assert abs(m.ami(table)) < 1e-12


def test_singleton_clusters_and_classes_score_one() -> None:
    table = m.checked_contingency_table(np.arange(12), np.arange(12), 12, 12)
    assert m.ami(table) == pytest.approx(1.0)
    assert m.nmi(table) == pytest.approx(1.0)
    assert adjusted_rand_index(table) == 1.0


@pytest.mark.parametrize("n, rows, columns", [(400, 3, 4), (5000, 60, 30), (300, 150, 2)])
def test_expected_mutual_information_equals_the_literal_sum(
    n: int, rows: int, columns: int
) -> None:
    from scipy.stats import hypergeom

    cluster, label = random_clusters(n, rows, columns, 7)
    a, b = np.bincount(cluster), np.bincount(label)
    expected = 0.0
    for x in a[a > 0]:
        for y in b[b > 0]:
            k = np.arange(max(1, x + y - n), min(x, y) + 1)
            expected += float((hypergeom.pmf(k, n, x, y) * k / n * np.log(n * k / (x * y))).sum())
    assert expected_mutual_information(a, b) == pytest.approx(expected, abs=1e-11)


def test_hungarian_equals_the_best_of_all_permutations() -> None:
    cluster, label = random_clusters(300, 5, 5, 3, agree=0.3)
    table = m.checked_contingency_table(cluster, label, 5, 5)
    best = max(sum(table[i, p[i]] for i in range(5)) for p in permutations(range(5)))
    assert m.accuracy(table) == best / 300


def test_clusters_without_a_class_count_as_wrong() -> None:
    table = np.array([[5, 0], [4, 0], [0, 3], [0, 1]])
    assert m.hungarian(table).tolist() == [0, -1, 1, -1]
    assert m.accuracy(table) == 8 / 13 and m.purity(table) == 1.0
    assert m.scores(table)["many_to_one"] == 1.0 and m.scores(table[[0, 2]])["many_to_one"] is None
    assert m.hungarian(table.T).tolist() == [0, 2] and m.accuracy(table.T) == 8 / 13


def test_confusion_by_hand() -> None:
    table = np.array([[5, 1], [4, 0], [0, 3]])
    assert m.confusion(table, np.array([0, -1, 1])).tolist() == [[5, 0, 4], [1, 3, 0]]


def test_top_k_uses_the_same_matching() -> None:
    mapping, top = np.array([2, -1, 0, 1]), np.array([[0, 1], [1, 3], [2, 0], [1, -1], [3, 2]])
    assert m.top_k_accuracy(top, np.array([2, 1, 1, 0, -1]), mapping) == 2 / 4
    cluster, label = random_clusters(1000, 6, 6)
    table = m.checked_contingency_table(cluster, label, 6, 6)
    assert m.top_k_accuracy(cluster[:, None], label, m.hungarian(table)) == m.accuracy(table)


def test_unknown_labels_are_ignored() -> None:
    cluster, label = random_clusters(500, 5, 5)
    hidden = label.copy()
    hidden[::3] = -1
    known = hidden >= 0
    assert (
        m.checked_contingency_table(cluster, hidden, 5, 5)
        == m.checked_contingency_table(cluster[known], label[known], 5, 5)
    ).all()
    assert m.evaluate_assignment(cluster, hidden, 5)["num_labelled"] == known.sum()


def test_without_labels_every_score_is_none() -> None:
    cluster = np.arange(20) % 4
    found = m.evaluate_assignment(cluster, np.full(20, -1), 4, np.stack([cluster] * 5, 1))
    assert found.pop("nmi_variant") == "arithmetic" and found.pop("num_labelled") == 0
    assert set(found.values()) == {None} and {"acc", "top5", "ami"} <= set(found)
    assert m.neighbour_purity(np.zeros((20, 3), int), np.full(20, -1), 3) is None


@pytest.mark.parametrize(
    "cluster, label, named",
    [
        ([0, 4], [0, 0], "cluster contains 4"),
        ([0, -1], [0, 0], "cluster contains -1"),
        ([0, 1], [0, 9], "label contains 9"),
        ([0], [0, 1], "shape"),
    ],
)
def test_invalid_ids_are_named_in_the_error(
    cluster: list[int], label: list[int], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        m.checked_contingency_table(np.array(cluster), np.array(label), 4, 3)


def test_nmi_variants_differ_for_unbalanced_classes() -> None:
    label = np.repeat([0, 1], [950, 50])
    table = m.checked_contingency_table(np.arange(1000) // 25, label, 40, 2)
    assert m.nmi(table, "geometric") > m.nmi(table, "arithmetic") + 0.04


def test_cluster_health_shows_a_collapse() -> None:
    balanced = m.cluster_health(np.full(10, 7))
    assert balanced["used_share"] == 1
    assert balanced["balance"] == pytest.approx(1)
    assert balanced["largest_share"] == pytest.approx(0.1)
    collapsed = m.cluster_health(np.array([100, 0, 0, 0]))
    assert collapsed == {"used_share": 0.25, "largest_share": 1.0, "entropy": 0.0, "balance": 0.0}
    assert m.cluster_health(np.zeros(3, int))["used_share"] == 0


def test_neighbour_purity_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    label, ids = np.array([0, 0, 1, -1]), np.array([[1, 2], [0, 3], [0, 1], [0, 1]])
    assert m.neighbour_purity(ids, label, 1) == 2 / 3
    assert m.neighbour_purity(ids, label, 2) == 2 / 5
    monkeypatch.setattr(m, "CHUNK", 2)
    assert m.neighbour_purity(ids, label, 2) == 2 / 5
    with pytest.raises(ValueError, match="allowed: 1 to 2"):
        m.neighbour_purity(ids, label, 3)
