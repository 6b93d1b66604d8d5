"""numba's compiler, with its results kept on disk. Import it late: numba takes a second."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core import types
from numba.extending import intrinsic


def compiled(**options) -> Callable:
    """njit without the interpreter's lock, kept on disk between processes where a cache can be written (compiling takes seconds, on every rank)."""

    def decorate(function: Callable) -> Callable:
        try:
            made = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # a read-only installation without a home
            return njit(nogil=True, **options)(function)
        keep = made._cache.save_overload

        def kept_if_possible(*compiled_one: Any) -> None:
            with suppress(OSError):  # a full disk: compiled again next time, no reason to end a run
                keep(*compiled_one)

        made._cache.save_overload = kept_if_possible
        return made

    return decorate


@intrinsic
def wide_vectors(typing_context):
    """At the head of a compiled function: vectors of 512 bits where the processor has them. LLVM prefers 256 even there, for the sake of processors
    that slowed down; beside matrix products, which take 512 anyway, exponentials are 1.3 to 1.8 times faster so."""

    def generate(context, builder, signature, arguments):
        set.add(
            builder.function.attributes, '"prefer-vector-width"="512"'
        )  # llvmlite's own add() knows only attributes without a value
        return context.get_dummy_value()

    return types.none(), generate
