"""Cutting views with FFCV's kernels: an image is decoded once and every view is cut from it.

The kernels (turbojpeg and OpenCV behind a C interface) are called from one numba function (cut.py) that holds no lock and knows no threads;
loader.py runs it on threads of its own. FFCV's Loader is not used: its randomness cannot be seeded, its iterator hangs on errors, its
thread pool aborts beside another (FFCV.md 2, 3, 6).
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

TESTED = "1.0.2"


@cache
def _library() -> ctypes.CDLL:
    """FFCV's compiled part, without importing FFCV (which loads its whole pipeline compiler)."""
    spec = importlib.util.find_spec("ffcv")
    if spec is None or version("ffcv") != TESTED:
        found = "none" if spec is None else version("ffcv")
        raise ImportError(
            f"ffcv {TESTED} is needed to read images (found: {found}); run launch/setup.sh, or: pip install ffcv=={TESTED}"
        )
    files = [
        f
        for folder in (
            Path(p) for p in [*spec.submodule_search_locations, Path(spec.origin).parent.parent]
        )
        for f in folder.glob("_libffcv*.so")
    ]
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
    library.imdecode.restype = ctypes.c_int
    library.resize.argtypes = [ctypes.c_int64] * 11
    library.resize.restype = None
    return library


def decodes(jpeg: bytes, height: int, width: int) -> bool:
    """Whether a JPEG decodes with the loader's own kernel without an error or a warning (neither torch nor numba is needed)."""
    pixels = np.empty(height * width * 3, np.uint8)
    return (
        _library().imdecode(
            jpeg,
            len(jpeg),
            height,
            width,
            pixels.ctypes.data,
            height,
            width,
            0,
            0,
            1,
            1,
            False,
            False,
        )
        == 0
    )


READ, ROT, DECODE = 1, 2, 3
PROBLEMS = {
    READ: "cannot be read: the file was cut, or its disk fails",
    ROT: "does not match its checksum: the file has rotted",
    DECODE: "does not decode",
}


@cache
def cutter():
    """cut(file, starts, sizes, sums, modes, heights, widths, boxes [n, V, 4], flips [n, V], stored, scratch, outs) -> (-1, 0), or the place
    of the first sample with a problem and which. `file` is a descriptor: a mapped file that is cut, or a disk that fails, would kill
    the process. `outs` is a tuple of V arrays [n, S, S, 3]. Compiled once per number of views, and kept on disk."""
    from llvmlite import binding

    library = _library()
    for name in ("imdecode", "resize"):
        binding.add_symbol(
            f"dist_scan_ffcv_{name}", ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        )
    from dist_scan.data.beton.crop_kernel import cut

    return cut
