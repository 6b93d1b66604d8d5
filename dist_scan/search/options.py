"""Options of neighbour search and k-means.

Only light imports: commands check their options before they import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["cosine", "inner_product", "l2"]
KMeansInit = Literal["kmeans++", "random"]

MAX_SEED = 2**63 - 1


def check_option(name: str, value: object, is_valid: bool, allowed: str) -> None:
    """Raise ValueError unless the value of an option is valid."""
    if not is_valid:
        raise ValueError(f"{name}: {value}; allowed: {allowed}")


def check_num_clusters(num_clusters: int, num_rows: int, name: str = "num_clusters") -> None:
    """Raise ValueError, which names the setting or flag, unless every cluster can have a row."""
    is_valid = 1 <= num_clusters <= num_rows
    check_option(name, num_clusters, is_valid, f"1 to {num_rows}, the number of rows")


def check_num_neighbours(num_neighbours: int, num_rows: int, name: str = "num_neighbours") -> None:
    """Raise ValueError, which names the setting or flag, unless every row has so many others."""
    is_valid = 1 <= num_neighbours < num_rows
    check_option(name, num_neighbours, is_valid, f"1 to {num_rows - 1}, the other rows")


@dataclass(frozen=True)
class NeighbourOptions:
    """Options of `search_neighbours`. Raises ValueError for a value out of range."""

    metric: Metric = "cosine"
    """l2: scores are negative squared distances, so that larger is nearer for every metric."""
    view: int = 0
    """View of the feature table to search in."""
    chunk_rows: int = 65_536
    """Database rows broadcast and searched at a time; 4,096 took 2.8 times as long."""
    queries_per_round: int = 65_536
    """Query rows that a rank holds at a time; a single shard may have more."""

    def __post_init__(self) -> None:
        metrics = get_args(Metric)
        check_option("metric", self.metric, self.metric in metrics, ", ".join(metrics))
        for name in ("chunk_rows", "queries_per_round"):
            check_option(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")


@dataclass(frozen=True)
class KMeansOptions:
    """Options of `kmeans`. Raises ValueError for a value out of range."""

    iterations: int = 100
    """Most iterations of one restart."""
    tolerance: float = 0.0
    """Stop when the objective falls by less than this fraction; 0: when no assignment changes."""
    init: KMeansInit = "kmeans++"
    restarts: int = 1
    """Runs from different initial centroids, of which the one with the lowest objective is kept."""
    spherical: bool = False
    """Spherical k-means: rows and centroids have unit length."""
    normalise: bool = False
    """Scale rows to unit length first."""
    seed: int = 0
    view: int = 0
    """View of the feature table to cluster."""

    def __post_init__(self) -> None:
        inits = get_args(KMeansInit)
        for name in ("iterations", "restarts"):
            check_option(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_option(
            "tolerance", self.tolerance, 0 <= self.tolerance < 1, "at least 0 and less than 1"
        )
        check_option("seed", self.seed, 0 <= self.seed <= MAX_SEED, "0 to 2^63 - 1")
        check_option("init", self.init, self.init in inits, ", ".join(inits))


NEIGHBOUR_DEFAULTS = NeighbourOptions()
KMEANS_DEFAULTS = KMeansOptions()
