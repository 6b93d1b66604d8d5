"""Randomness as a function: uniform numbers from (seed, epoch, index, view), never from a generator's state.

Counter-based: each key is mixed in with SplitMix64's finaliser (Steele et al., OOPSLA 2014). numpy and numba give the
same bits, so crops cut in the decoder and colours drawn for the device come from one definition.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
M1, M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 arrays (wraps around)."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(M1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(M2)
    return x ^ (x >> np.uint64(31))


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """One uint64 per broadcast element of the keys; the order of the keys matters."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = mix(
                state * np.uint64(M2) + np.asarray(key).astype(np.uint64) + np.uint64(GOLDEN)
            )
    return state


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1) per broadcast element of the keys (53 bits)."""
    return (hash_keys(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_draws(
    seed: int, epoch: int, index: np.ndarray, view: int, count: int, stream: int = 0
) -> np.ndarray:
    """[B, count] float64 in [0, 1) for image rows `index` [B]. `stream` keeps users apart (crop, colour, pairs...)."""
    return uniform(seed, stream, epoch, np.asarray(index)[:, None], view, np.arange(count)[None, :])
