"""The numba function that reads, verifies, decodes and crops stored images.

Import it late: numba takes a second, and FFCV's functions are loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from dist_scan.compiled import compiled
from dist_scan.data.beton.ffcv_library import SYMBOL_PREFIX, register_symbols
from dist_scan.data.encode import JPEG

READ_FAILED, WRONG_CHECKSUM, DECODE_FAILED = 1, 2, 3
PROBLEMS = {
    READ_FAILED: "cannot be read: the file was truncated, or its disk fails",
    WRONG_CHECKSUM: "does not match its checksum: the file has changed on disk",
    DECODE_FAILED: "cannot be decoded",
}

register_symbols()
# Any: numba's annotations describe the type of a function, not its calls.
imdecode: Any = types.ExternalFunction(
    SYMBOL_PREFIX + "imdecode",
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
resize: Any = types.ExternalFunction(SYMBOL_PREFIX + "resize", types.void(*[types.int64] * 11))
pread: Any = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@compiled()
def checksum(stored: np.ndarray, size: int) -> np.uint64:
    """format.checksum of the first `size` bytes; `stored` has room for whole words of 8 bytes."""
    words = (size + 7) // 8
    stored[size : 8 * words] = 0
    total = np.uint64(0)
    for i, word in enumerate(stored[: 8 * words].view(np.uint64)):
        total += word * np.uint64(2 * i + 1)
    return total


@compiled()
def flip_columns(view: np.ndarray) -> None:
    """Flip an image [H, W, 3] horizontally, in place."""
    for y in range(view.shape[0]):
        for x in range(view.shape[1] // 2):
            for c in range(3):
                other = view.shape[1] - 1 - x
                view[y, x, c], view[y, other, c] = view[y, other, c], view[y, x, c]


@compiled()
def crop_views(
    file: int,
    images: np.ndarray,
    boxes: np.ndarray,
    flips: np.ndarray,
    stored: np.ndarray,
    decoded: np.ndarray,
    outs: tuple[np.ndarray, ...],
) -> tuple[int, int]:
    """Write V views of n stored images to `outs`; each image is read and decoded once.

    file: a file descriptor. A memory-mapped file that is truncated, or on a disk that fails, would
    kill the process.
    images: [n] format.STORED_IMAGE.
    boxes [n, V, 4], flips [n, V]: see crops.crop_boxes.
    stored, decoded: buffers for the largest stored and the largest decoded image.
    outs: V arrays uint8 [n, S_v, S_v, 3].

    Returns (-1, 0), or the first image that failed and its problem (a key of PROBLEMS).
    """
    for i in range(len(images)):
        # Read and verify
        image = images[i]
        height, width = image.height, image.width
        if pread(file, stored.ctypes.data, image.size, image.start) != image.size:
            return i, READ_FAILED
        if checksum(stored, image.size) != image.checksum:
            return i, WRONG_CHECKSUM
        # Decode a JPEG; raw pixels are used where they are
        source = stored.ctypes.data
        if image.mode == JPEG:
            source = decoded.ctypes.data
            failed = imdecode(
                stored.ctypes.data,
                image.size,
                height,
                width,
                source,
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
                return i, DECODE_FAILED
        # Crop, resize and flip each view
        for v, out in enumerate(outs):
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
                flip_columns(view)
    return -1, 0
