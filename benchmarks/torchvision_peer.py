"""The peer of the image benchmarks: Pillow and torchvision on JPEGs in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from dist_scan.data.augment.recipes import RecipeSpec
from dist_scan.data.beton.format import read_image_table

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MIN_SIGMA, MAX_SIGMA = 0.1, 2.0
"""Of the blur, in pixels."""
Transform = Callable[[Any], Any]


def stored_jpegs(path: Path) -> list[bytes]:
    """The JPEGs that are stored in a .beton."""
    images = read_image_table(path)
    data = path.read_bytes()
    starts = images["start"].tolist()
    return [data[start : start + size] for start, size in zip(starts, images["size"].tolist())]


class Views(torch.utils.data.Dataset):
    """Views of JPEGs in memory, each cut and augmented anew."""

    def __init__(self, jpegs: Sequence[bytes], transform: Transform, num_views: int) -> None:
        self.jpegs = jpegs
        self.transform = transform
        self.num_views = num_views

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(self.jpegs[i])).convert("RGB")
        return [self.transform(image) for _ in range(self.num_views)]


def blur(image: Image.Image) -> Image.Image:
    """The image blurred with a random sigma."""
    sigma = float(np.random.uniform(MIN_SIGMA, MAX_SIGMA))
    return image.filter(ImageFilter.GaussianBlur(sigma))


def colour_transform(spec: RecipeSpec) -> Transform | None:
    """Colours, conversion and normalisation after the crop; None where torchvision lacks them."""
    if spec.first_augmentation != "none" or not spec.normalise:
        return None
    steps: list[Transform] = []
    if spec.jitter:
        steps.append(transforms.RandomApply([transforms.ColorJitter(*spec.jitter)], spec.jitter_p))
    if spec.grey_p:
        steps.append(transforms.RandomGrayscale(spec.grey_p))
    if spec.blur_p:
        steps.append(transforms.RandomApply([transforms.Lambda(blur)], spec.blur_p))
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(steps)
