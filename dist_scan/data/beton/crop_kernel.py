"""The numba function that reads, checks, decodes and cuts images. Import it late, through decode.cutter(): it needs FFCV's kernels by name.

They are named, not held by address: what is compiled can then be kept on disk, which saves every rank of every start five seconds.
"""

from __future__ import annotations

import numpy as np
from numba import types

from dist_scan.compiled import compiled
from dist_scan.data.beton.decode import DECODE, READ, ROT

imdecode = types.ExternalFunction(
    "dist_scan_ffcv_imdecode",
    types.int32(
        types.uintp,
        types.uint64,
        types.uint32,
        types.uint32,
        types.uintp,
        *[types.uint32] * 6,
        types.uint8,
        types.uint8,
    ),
)
resize = types.ExternalFunction("dist_scan_ffcv_resize", types.void(*[types.int64] * 11))
pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@compiled()
def checksum(stored, size):
    """format.py's, of the first `size` bytes; `stored` is longer by at least a word."""
    words = (size + 7) // 8
    stored[size : 8 * words] = 0
    total = np.uint64(0)
    for i, word in enumerate(stored[: 8 * words].view(np.uint64)):
        total += word * np.uint64(2 * i + 1)
    return total


@compiled()
def cut(file, starts, sizes, sums, modes, heights, widths, boxes, flips, stored, scratch, outs):
    """See decode.cutter()."""
    for i in range(len(starts)):
        height, width = heights[i], widths[i]
        if pread(file, stored.ctypes.data, sizes[i], starts[i]) != sizes[i]:
            return i, READ
        if checksum(stored, sizes[i]) != sums[i]:
            return i, ROT
        if modes[i] == 0:
            failed = imdecode(
                stored.ctypes.data,
                sizes[i],
                height,
                width,
                scratch.ctypes.data,
                height,
                width,
                0,
                0,
                1,
                1,
                0,
                0,
            )
            if failed != 0:
                return i, DECODE
            source = scratch.ctypes.data
        else:
            source = stored.ctypes.data
        v = 0
        for out in outs:
            view = out[i]
            top, left, h, w = boxes[i, v, 0], boxes[i, v, 1], boxes[i, v, 2], boxes[i, v, 3]
            resize(
                0,
                source,
                height,
                width,
                top,
                top + h,
                left,
                left + w,
                view.ctypes.data,
                view.shape[0],
                view.shape[1],
            )
            if flips[i, v]:
                for y in range(view.shape[0]):
                    for x in range(view.shape[1] // 2):
                        for c in range(3):
                            other = view.shape[1] - 1 - x
                            view[y, x, c], view[y, other, c] = view[y, other, c], view[y, x, c]
            v += 1
    return -1, 0
