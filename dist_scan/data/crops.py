"""What the decoder cuts out of an image, per view. The numbers come from hashing.py; decode.py does the cutting."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CropSpec:
    """One view's geometry. Output is [size, size, 3] uint8.

    random_resized: area uniform in `scale`, log-uniform aspect in `ratio`, ten tries, then centre (torchvision's RandomResizedCrop).
    random: a uniform crop of `size`, no padding, after the shorter side is brought to `resize` (if given).
    center: the centre crop of `size` after the shorter side is brought to `resize` (if given).
    flip: probability of a horizontal flip.
    """

    kind: Literal["random_resized", "random", "center"]
    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: int | None = None
    flip: float = 0.0
