"""NMI of two assignments against the one from a dense table."""

from __future__ import annotations

import numpy as np
import pytest

from dist_scan.evaluate.metrics import contingency, nmi
from dist_scan.search.agreement import mutual_information


@pytest.mark.parametrize("k", [2, 30])
def test_it_is_the_geometric_nmi(k) -> None:
    rng = np.random.default_rng(k)
    first = rng.choice(k, 3000, p=rng.dirichlet(np.ones(k)))
    second = np.where(rng.random(3000) < 0.6, first, rng.integers(0, 2 * k, 3000))
    expected = nmi(contingency(first, second, k, 2 * k), "geometric")
    assert mutual_information(first, second) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(first * 7 + 3, second) == pytest.approx(expected, abs=1e-12)
    assert abs(expected - nmi(contingency(first, second, k, 2 * k), "arithmetic")) > 1e-6


def test_edges() -> None:
    a = np.array([0, 0, 1, 1])
    assert mutual_information(a, 1 - a) == 1.0 and mutual_information(a, np.zeros(4, int)) == 0.0
    assert mutual_information(np.append(a, -1), np.append(a, 3)) == 1.0
    with pytest.raises(ValueError, match="no row has a cluster in both"):
        mutual_information(np.array([-1, 0]), np.array([0, -1]))
    with pytest.raises(ValueError, match="shape"):
        mutual_information(a, a[:2])
