"""numba's compiler with a cache on disk. Import it late: numba takes a second."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from numba import njit
from numba.core import types
from numba.extending import intrinsic


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """Decorator: `numba.njit` that releases the interpreter's lock and caches its code on disk.

    Compiling takes seconds on every rank. Where no cache can be written the function still works.
    """

    def decorate(function: Callable) -> Callable:
        try:
            dispatcher = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba finds no folder for a cache: read-only installation, no home
            return njit(nogil=True, **options)(function)
        save_overload = dispatcher._cache.save_overload

        def save_if_possible(*overload: Any) -> None:
            with suppress(OSError):  # a full disk: the next process compiles again
                save_overload(*overload)

        dispatcher._cache.save_overload = save_if_possible
        return dispatcher

    return decorate


def _wide_vectors(typing_context: Any) -> tuple[Any, Callable]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # llvmlite's own add() accepts only attributes without a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


wide_vectors = cast(Callable[[], None], intrinsic(_wide_vectors))
"""Call first in a compiled function: use vectors of 512 bits where the processor has them.

LLVM prefers 256 bits, because some processors lower their clock for 512. Next to matrix products,
which use 512 bits anyway, this makes exponentials 1.3 to 1.8 times faster.
"""
