"""Normalised mutual information of two assignments against the one of their contingency table."""

from __future__ import annotations

import numpy as np
import pytest

from dist_scan.evaluate.metrics import checked_contingency_table, nmi
from dist_scan.search.agreement import assignment_nmi


@pytest.mark.parametrize("k", [2, 30])
def test_assignment_nmi_is_the_geometric_nmi(k: int) -> None:
    rng = np.random.default_rng(k)
    first = rng.choice(k, 3000, p=rng.dirichlet(np.ones(k)))
    second = np.where(rng.random(3000) < 0.6, first, rng.integers(0, 2 * k, 3000))
    table = checked_contingency_table(first, second, k, 2 * k)
    expected = nmi(table, "geometric")
    assert assignment_nmi(first, second) == pytest.approx(expected, abs=1e-12)
    assert assignment_nmi(first * 7 + 3, second) == pytest.approx(expected, abs=1e-12)
    assert abs(expected - nmi(table, "arithmetic")) > 1e-6


def test_edge_cases() -> None:
    a = np.array([0, 0, 1, 1])
    assert assignment_nmi(a, 1 - a) == 1.0
    assert assignment_nmi(a, np.zeros(4, int)) == 0.0
    assert assignment_nmi(np.append(a, -1), np.append(a, 3)) == 1.0
    with pytest.raises(ValueError, match="no row has a cluster in both"):
        assignment_nmi(np.array([-1, 0]), np.array([0, -1]))
    with pytest.raises(ValueError, match="shape"):
        assignment_nmi(a, a[:2])
