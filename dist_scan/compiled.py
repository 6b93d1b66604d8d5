"""numba's compiler, with its results kept on disk. Import it late: numba takes a second."""
from __future__ import annotations

from collections.abc import Callable

from numba import njit


def compiled(**options) -> Callable:
    """njit without the interpreter's lock, kept on disk between processes where a cache can be written (compiling takes seconds, on every rank)."""
    def decorate(function: Callable) -> Callable:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # a read-only installation without a home
            return njit(nogil=True, **options)(function)
    return decorate
