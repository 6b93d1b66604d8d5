"""FFCV's compiled functions: turbojpeg's decoder and OpenCV's resize behind a C interface.

They are called directly and FFCV itself is not imported. Its Loader draws from generators that
cannot be seeded per image, its iterator hangs after an error, and its thread pool aborts the
process when it meets another one.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

TESTED = "1.0.2"
SYMBOL_PREFIX = "dist_scan_ffcv_"


@cache
def load_library() -> ctypes.CDLL:
    """FFCV's shared library, without importing FFCV and its pipeline compiler.

    Raises ImportError if the tested version is not installed.
    """
    spec = importlib.util.find_spec("ffcv")
    if spec is None or spec.origin is None or version("ffcv") != TESTED:
        found = "none" if spec is None else version("ffcv")
        raise ImportError(
            f"ffcv {TESTED} is needed to read images (found: {found}); "
            f"run launch/setup.sh, or: pip install ffcv=={TESTED}"
        )
    package = Path(spec.origin).parent
    files = [*package.glob("_libffcv*.so"), *package.parent.glob("_libffcv*.so")]
    library = ctypes.CDLL(str(files[0]))
    library.imdecode.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_void_p,
        *[ctypes.c_uint32] * 6,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    return library


def register_symbols() -> None:
    """Make the functions known to LLVM by name.

    Compiled code that calls a name, not an address, can be cached on disk between processes.
    """
    from llvmlite import binding

    for name in ("imdecode", "resize"):
        address = ctypes.cast(getattr(load_library(), name), ctypes.c_void_p).value
        binding.add_symbol(SYMBOL_PREFIX + name, address)


def can_decode(jpeg: bytes, height: int, width: int) -> bool:
    """True if the loader's decoder reads a JPEG without an error or a warning."""
    pixels = np.empty(height * width * 3, np.uint8)
    source = (jpeg, len(jpeg), height, width)
    # No crop, no rescaling, no flip
    options = (height, width, 0, 0, 1, 1, False, False)
    return load_library().imdecode(*source, pixels.ctypes.data, *options) == 0
