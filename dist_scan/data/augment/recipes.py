"""Augmentation recipes by name. The decoder cuts (CropSpec), the device colours; both draw from hashes of (seed, epoch, index, view).

FIDELITY.md 1.3 (SCAN's standard, simclr, ours = randaugment), 2.3 (MMDC), 3 (DeepCluster v1, v2), 4 (MoCo v1, v2), QUICKSTART.md (digits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dist_scan.config import DataConfig, StrictModel, suggest
from dist_scan.data.augment import colour, warp
from dist_scan.data.augment.crops import CropSpec
from dist_scan.data.augment.randaugment import randaugment
from dist_scan.data.hashing import uniform_draws

COLOUR = 301  # this use's stream of the hash
NUM_DRAWS = 24
Draws = np.ndarray  # [B, NUM_DRAWS] in [0, 1)


@dataclass(frozen=True)
class RecipeSpec:
    """What a recipe name stands for."""

    crop: Literal["random_resized", "random", "center"]
    scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.0
    jitter: tuple[float, float, float, float] | None = None
    jitter_p: float = 0.8
    grey_p: float = 0.0
    blur_p: float = 0.0
    special: Literal["none", "randaugment", "digits"] = "none"
    cutout_p: float = 0.0
    share: tuple[float, ...] = ()
    """Side of the crop as a share of the image's shorter side: one of these."""
    degrees: float = 0.0
    """Turned by an angle uniform between minus and plus this."""
    normalise: bool = True


SCAN_JITTER = (0.4, 0.4, 0.4, 0.1)
RECIPES: dict[str, RecipeSpec] = {
    "center": RecipeSpec("center"),
    "whole": RecipeSpec("center", share=(1.0,)),
    "crop": RecipeSpec("random", flip=0.5),
    "standard": RecipeSpec("random_resized", (0.08, 1.0), flip=0.5),
    "simclr": RecipeSpec("random_resized", flip=0.5, jitter=SCAN_JITTER, grey_p=0.2),
    "randaugment": RecipeSpec("random", flip=0.5, special="randaugment", cutout_p=1.0),
    "moco_v1": RecipeSpec(
        "random_resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grey_p=0.2
    ),
    "moco_v2": RecipeSpec("random_resized", flip=0.5, jitter=SCAN_JITTER, grey_p=0.2, blur_p=0.5),
    "moco_cifar": RecipeSpec(
        "random_resized", (0.08, 1.0), flip=0.5, jitter=SCAN_JITTER, grey_p=0.2
    ),
    "deepcluster": RecipeSpec("random_resized", (0.08, 1.0), flip=0.5),
    "dcv2": RecipeSpec(
        "random_resized", (0.08, 1.0), flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), grey_p=0.2, blur_p=0.5
    ),
    "mmdc": RecipeSpec(
        "random",
        flip=0.5,
        jitter=(0.4, 0.4, 0.4, 0.125),
        jitter_p=1.0,
        grey_p=0.2,
        share=(20 / 32,),
        normalise=False,
    ),
    "mmdc_center": RecipeSpec("center", share=(20 / 32,), normalise=False),
    "mmdc_rotation": RecipeSpec(
        "random", share=(20 / 32,), normalise=False
    ),  # of the images whose quarter turns are told apart
    "mmdc_mnist": RecipeSpec(
        "random", share=(24 / 28, 20 / 28, 16 / 28), degrees=25.0, normalise=False
    ),
    "mmdc_mnist_center": RecipeSpec("center", share=(24 / 28,), normalise=False),
    "digits": RecipeSpec("center", special="digits", cutout_p=0.5),
    "digits_strong": RecipeSpec("center", special="digits", cutout_p=1.0),
}


class RecipeConfig(StrictModel):
    """A recipe: a name, or a name with changes. In YAML `simclr` and `{name: simclr, blur_p: 0.5}` are both right."""

    name: str
    colour: Literal["exact", "fused"] = "exact"
    """fused: colour jitter as one 3x3 matrix, 10 times faster, not to the letter."""
    scale: tuple[float, float] | None = None
    """Smallest and largest share of the image's area in a random resized crop."""
    share: float | None = Field(default=None, gt=0, le=1)
    """mmdc: the side of the crop as a share of the shorter side: 20/32 (CIFAR, Tiny ImageNet), 64/96 (STL-10, ImageNet-10)."""
    degrees: float | None = Field(default=None, ge=0, le=180)
    """mmdc_mnist: largest angle by which the crop is turned; what comes in from outside is black."""
    size: int | None = Field(default=None, ge=8)
    """Pixels of this view; left out: data.size. Multi-crop has views of 160 and 96."""
    strength: float | None = Field(default=None, ge=0, le=1.25)
    """Of the colour jitter, as SimCLR counts: brightness, contrast, saturation .8 of it, hue .2 of it. SCAN and MoCo v2: 0.5; dcv2: 1."""
    flip: float | None = Field(default=None, ge=0, le=1)
    blur_p: float | None = Field(default=None, ge=0, le=1)
    grey_p: float | None = Field(default=None, ge=0, le=1)
    cutout: int | None = Field(default=None, ge=0)
    """randaugment: the hole's side is 2 * (L // 2) with L uniform over 1..cutout pixels; left out: 16, 32, 75 at 32, 96, 224 px, in
    between in proportion; 0: no hole."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in RECIPES:
            raise ValueError(
                f"unknown recipe '{name}'; allowed: {', '.join(RECIPES)}{suggest(name, RECIPES)}"
            )
        return name

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale {scale}: allowed: two numbers with 0 < low <= high <= 1")
        return scale

    @model_validator(mode="after")
    def _has_effect(self) -> RecipeConfig:
        look = RECIPES[self.name]
        applies = {
            "scale": look.crop == "random_resized",
            "share": bool(look.share),
            "degrees": look.degrees > 0,
            "strength": look.jitter is not None,
            "cutout": look.special == "randaugment",
        }
        idle = [
            setting
            for setting, does in applies.items()
            if getattr(self, setting) is not None and not does
        ]
        idle += ["colour"] * (self.colour == "fused" and look.jitter is None)
        if idle:
            raise ValueError(
                f"recipe '{self.name}' has nothing that {idle[0]} could change; leave it out, or take another recipe"
            )
        return self


class Recipe:
    """images uint8 [B, S, S, 3] as the decoder cut them -> float32 [B, 3, S, S], coloured and normalised."""

    def __init__(
        self,
        look: RecipeSpec,
        crop: CropSpec,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        fused: bool,
        hole: int,
    ) -> None:
        self.look, self.crop, self.fused, self.hole = look, crop, fused, hole
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (mean, std)
        )

    def __call__(
        self, images: Tensor, index: np.ndarray, *, seed: int, epoch: int, view: int
    ) -> Tensor:
        """A function of each image, its row `index` [B], and (seed, epoch, view); not of the batch around it. Raises ValueError."""
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[3] != 3
            or len(index) != len(images)
        ):
            raise ValueError(
                f"a recipe takes uint8 [B, S, S, 3] and B rows, got {images.dtype} {list(images.shape)} and {len(index)} rows"
            )
        draws = uniform_draws(seed, epoch, np.asarray(index), view, NUM_DRAWS, COLOUR)
        x = self._special(images.permute(0, 3, 1, 2).contiguous().float(), draws).div_(255)
        x = self._colour(x, draws)
        if self.look.normalise:
            x = x.sub_(self.mean.to(x.device)).div_(self.std.to(x.device))
        return self._cutout(x, draws)

    def _special(self, x: Tensor, draws: Draws) -> Tensor:
        if self.look.special == "randaugment":
            return randaugment(x, draws[:, :8])
        if self.look.special == "digits":
            x = warp.digits_affine(x, draws[:, :6])
            mean = colour.image_mean(x)
            return (mean + (x - mean) * colour.column(0.5 + draws[:, 6], x)).clamp_(0, 255)
        return warp.turn(x, self.look.degrees * (2 * draws[:, 0] - 1)) if self.look.degrees else x

    def _colour(self, x: Tensor, draws: Draws) -> Tensor:
        look = self.look
        if look.jitter is not None:
            rows = np.flatnonzero(draws[:, 8] < look.jitter_p)
            apply: Callable = colour.jitter_fused if self.fused else colour.jitter
            at = torch.from_numpy(rows).to(x.device)
            if len(rows):
                x[at] = apply(x[at], draws[rows, 9:17], look.jitter)
        if look.grey_p:
            x = colour.greyscale(x, draws[:, 17], look.grey_p)
        return colour.blur(x, draws[:, 18:20], look.blur_p) if look.blur_p else x

    def _cutout(self, x: Tensor, draws: Draws) -> Tensor:
        if not self.look.cutout_p or not self.hole:
            return x
        size = x.shape[2]
        if self.look.special == "digits":  # side 1/8 to 1/2 of the image
            side = 2 * np.rint(size * (1 / 8 + 3 / 8 * draws[:, 20]) / 2).astype(np.int64)
        else:  # L uniform over 1..hole, side 2 * (L // 2), as released
            side = 2 * ((1 + np.floor(draws[:, 20] * self.hole).astype(np.int64)) // 2)
        side = np.where(draws[:, 21] < self.look.cutout_p, side, 0)
        return colour.cutout(
            x,
            side,
            np.floor(draws[:, 22] * size).astype(np.int64),
            np.floor(draws[:, 23] * size).astype(np.int64),
        )


def build_recipe(
    config: RecipeConfig, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Recipe:
    """The recipe for views of `size` pixels. Centre and random crops of large images are of the 256/224 enlarged one, as published."""
    base, size = RECIPES[config.name], config.size or size
    changes = {
        k: getattr(config, k)
        for k in ("scale", "share", "degrees", "flip", "blur_p", "grey_p")
        if getattr(config, k) is not None
    }
    if config.share is not None:
        changes["share"] = (config.share,)
    if config.strength is not None:
        changes["jitter"] = tuple(config.strength * amount for amount in (0.8, 0.8, 0.8, 0.2))
    look = RecipeSpec(**{**base.__dict__, **changes})
    if look.share:
        resize = tuple(round(size / share) for share in look.share)
    else:
        resize = None if look.crop == "random_resized" or size < 160 else round(size * 256 / 224)
    hole = (
        config.cutout
        if config.cutout is not None
        else int(np.interp(size, (32, 96, 224), (16, 32, 75)))
    )
    crop = CropSpec(look.crop, size, scale=look.scale, resize=resize, flip=look.flip)
    return Recipe(look, crop, mean, std, config.colour == "fused", hole)


def resolution_warnings(recipes: Iterable[RecipeConfig], data: DataConfig) -> list[str]:
    """What these recipes show of the stored images that is seldom wanted."""
    found = [
        resolution_warning(recipe, data.size, data.stored, data.resolution) for recipe in recipes
    ]
    return [text for text in found if text]


def resolution_warning(config: RecipeConfig, size: int, stored: str, resolution: int) -> str:
    """What views of images stored like this (see DataConfig) show that is seldom meant, and the way out; '' when the numbers fit."""
    crop, look = build_recipe(config, size, (0.0,) * 3, (1.0,) * 3).crop, RECIPES[config.name]
    fits = round(crop.size * 256 / 224)
    if look.share or (stored == "original" and (look.crop == "random_resized" or crop.resize)):
        return ""
    if stored == "original" or (
        crop.resize is None and look.crop != "random_resized" and resolution > fits
    ):
        seen = (
            "whatever their size"
            if stored == "original"
            else f"of {resolution} px: {(crop.size / resolution) ** 2:.0%} of a square image"
        )
        way = (
            f"data.resolution: {fits}"
            if stored != "original"
            else f"data.stored: jpeg and data.resolution: {fits}"
        )
        return f"recipe '{config.name}' cuts {crop.size} x {crop.size} px out of the stored images, {seen}. To see them whole give {way}"
    if resolution < crop.size:
        return f"recipe '{config.name}' enlarges images stored with a shorter side of {resolution} px to {crop.size}. Give data.resolution: {fits}, or a smaller data.size"
    return ""
