"""Random numbers as a pure function of integer keys, for example (seed, epoch, row, view).

There is no generator state: the same keys give the same number on every rank, in every thread and
after every restart. Each key is mixed into a 64-bit state with the finaliser of SplitMix64
(Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).

A stream is a key that separates the random numbers of one use from those of all others:

    0        stages/train.py           initial weights (torch's generators)
    1-2      engine/training_loop.py   torch's generators in an epoch and a step
    101-107  data/order.py             order, neighbours, cached views, held-out rows, samplers
    201      data/augment/crops.py     crops and flips
    301      data/augment/recipes.py   all other augmentations
    401-403  search/kmeans_init.py     first centroids
    501-502  methods/_clustering.py    seeds of the top layer and of k-means
    511-513  models/sphere_codes.py    MMDC's codes
"""

from __future__ import annotations

import numpy as np

INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB


def mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 on uint64 values, modulo 2^64."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """uint64 hash for each element of the broadcast keys; the order of the keys matters."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            key = np.asarray(key).astype(np.uint64)
            state = mix(state * np.uint64(MULTIPLIER_2) + key + np.uint64(INCREMENT))
    return state


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1) with 53 random bits for each element of the broadcast keys."""
    return (hash_keys(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_draws(
    seed: int, epoch: int, index: np.ndarray, view: int, count: int, stream: int
) -> np.ndarray:
    """[B, count] float64 in [0, 1) for one view of the dataset rows `index` [B].

    `stream` is a constant of the caller (see above): draws of different streams are independent.
    """
    return uniform(seed, stream, epoch, index[:, None], view, np.arange(count))
