"""Augmentation recipes by name, their settings, and their application to a batch of images.

The loader cuts the crops on the CPU (CropSpec), a Recipe changes colours and shapes on the device.
Both draw their numbers from hashes of (seed, epoch, row, view).

Sources: SCAN ("standard", "simclr", "randaugment" for self-labelling), MMDC, DeepCluster and
DeepCluster-v2 ("dcv2"), MoCo v1 and v2; docs/fidelity.md compares them with the released code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dist_scan.config.base import StrictModel, suggest
from dist_scan.config.data import DataConfig
from dist_scan.data.augment import colour, warp
from dist_scan.data.augment.crops import CropSpec
from dist_scan.data.augment.randaugment import randaugment
from dist_scan.data.hashing import uniform_draws

COLOUR = 301  # stream of random numbers, see data/hashing.py
NUM_DRAWS = 24
Draws = np.ndarray
"""[B, NUM_DRAWS] in [0, 1). Columns: 0-7 RandAugment, digits or rotation; 8 whether to jitter the
colours; 9-16 jitter; 17 greyscale; 18-19 blur; 20-23 cutout."""


@dataclass(frozen=True)
class RecipeSpec:
    """What a recipe does. Probabilities end in _p."""

    crop: Literal["random_resized", "random", "center"]
    scale: tuple[float, float] = (0.2, 1.0)
    """random_resized: fraction of the image's area."""
    flip: float = 0.0
    jitter: tuple[float, float, float, float] | None = None
    """Strength of brightness, contrast, saturation and hue, as in torchvision's ColorJitter."""
    jitter_p: float = 0.8
    grey_p: float = 0.0
    blur_p: float = 0.0
    first_augmentation: Literal["none", "randaugment", "digits"] = "none"
    """Before the colours. digits: a random affine map and contrast."""
    cutout_p: float = 0.0
    crop_fractions: tuple[float, ...] = ()
    """Side of the crop as a fraction of the image's shorter side; one of these is drawn."""
    degrees: float = 0.0
    """Largest angle of a rotation in either direction, uniform."""
    normalise: bool = True


STANDARD = RecipeSpec("random_resized", (0.08, 1.0), flip=0.5)
SIMCLR = RecipeSpec("random_resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey_p=0.2)
MMDC_CENTER = RecipeSpec("center", crop_fractions=(20 / 32,), normalise=False)
MMDC_MNIST_SIDES = (24 / 28, 20 / 28, 16 / 28)
DIGITS = RecipeSpec("center", first_augmentation="digits", cutout_p=0.5)
RECIPES: dict[str, RecipeSpec] = {
    "center": RecipeSpec("center"),
    "whole": RecipeSpec("center", crop_fractions=(1.0,)),
    "crop": RecipeSpec("random", flip=0.5),
    "standard": STANDARD,
    "simclr": SIMCLR,
    "randaugment": RecipeSpec("random", flip=0.5, first_augmentation="randaugment", cutout_p=1.0),
    "moco_v1": replace(SIMCLR, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0),
    "moco_v2": replace(SIMCLR, blur_p=0.5),
    "moco_cifar": replace(SIMCLR, scale=(0.08, 1.0)),
    "deepcluster": STANDARD,
    "dcv2": replace(SIMCLR, scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5),
    "mmdc": replace(
        MMDC_CENTER,
        crop="random",
        flip=0.5,
        jitter=(0.4, 0.4, 0.4, 0.125),
        jitter_p=1.0,
        grey_p=0.2,
    ),
    "mmdc_center": MMDC_CENTER,
    # Images whose quarter turns are classified
    "mmdc_rotation": replace(MMDC_CENTER, crop="random"),
    "mmdc_mnist": replace(
        MMDC_CENTER, crop="random", crop_fractions=MMDC_MNIST_SIDES, degrees=25.0
    ),
    "mmdc_mnist_center": replace(MMDC_CENTER, crop_fractions=MMDC_MNIST_SIDES[:1]),
    "digits": DIGITS,
    "digits_strong": replace(DIGITS, cutout_p=1.0),
}


class RecipeConfig(StrictModel):
    """A recipe by name, with changes. In YAML: `simclr`, or `{name: simclr, blur_p: 0.5}`."""

    name: str
    colour: Literal["exact", "fused"] = "exact"
    """fused: colour jitter as one 3x3 matrix: 10 times faster, approximate."""
    scale: tuple[float, float] | None = None
    """Smallest and largest fraction of the image's area in a random resized crop."""
    share: float | None = Field(default=None, gt=0, le=1)
    """mmdc: side of the crop as a fraction of the image's shorter side.

    20/32 for CIFAR and Tiny ImageNet, 64/96 for STL-10 and ImageNet-10.
    """
    degrees: float | None = Field(default=None, ge=0, le=180)
    """mmdc_mnist: largest angle of rotation; pixels from outside are black."""
    size: int | None = Field(default=None, ge=8)
    """Side of this view in pixels; default: data.size. Multi-crop has views of 160 and 96."""
    strength: float | None = Field(default=None, ge=0, le=1.25)
    """SimCLR's strength s of the colour jitter: brightness, contrast, saturation 0.8 s, hue 0.2 s.

    SCAN and MoCo v2: 0.5; dcv2: 1.
    """
    flip: float | None = Field(default=None, ge=0, le=1)
    blur_p: float | None = Field(default=None, ge=0, le=1)
    grey_p: float | None = Field(default=None, ge=0, le=1)
    cutout: int | None = Field(default=None, ge=0)
    """randaugment: the side of the cutout is 2 * (L // 2) pixels with L uniform in 1..cutout.

    Default: 16, 32, 75 at 32, 96, 224 pixels, interpolated in between. 0: no cutout.
    """

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in RECIPES:
            raise ValueError(
                f"no recipe '{name}'; allowed: {', '.join(RECIPES)}{suggest(name, RECIPES)}"
            )
        return name

    @field_validator("scale")
    @classmethod
    def _is_ordered(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"{scale}; allowed: two numbers with 0 < low <= high <= 1")
        return scale

    @model_validator(mode="after")
    def _has_effect(self) -> RecipeConfig:
        spec = RECIPES[self.name]
        effects = {
            "scale": spec.crop == "random_resized",
            "share": bool(spec.crop_fractions),
            "degrees": spec.degrees > 0,
            "strength": spec.jitter is not None,
            "cutout": spec.first_augmentation == "randaugment",
            "colour": spec.jitter is not None,
        }
        for setting, has_effect in effects.items():
            is_default = getattr(self, setting) == type(self).model_fields[setting].default
            if not is_default and not has_effect:
                raise ValueError(
                    f"{setting} has no effect on recipe '{self.name}'; "
                    "remove it, or use another recipe"
                )
        return self


@dataclass(frozen=True)
class Recipe:
    """Augments crops uint8 [B, S, S, 3] and returns float32 [B, 3, S, S], normalised."""

    spec: RecipeSpec
    crop: CropSpec
    mean: Tensor
    """[1, 3, 1, 1], like std."""
    std: Tensor
    fused: bool
    """Approximate colour jitter; see colour.jitter_fused."""
    max_cutout: int
    """Largest side of RandAugment's cutout in pixels."""

    def __call__(
        self, images: Tensor, index: np.ndarray, *, seed: int, epoch: int, view: int
    ) -> Tensor:
        """Augmented views of the dataset rows `index` [B].

        A view is a function of its image, its row, and (seed, epoch, view), not of the other images
        in the batch. Raises ValueError if images have another dtype or shape.
        """
        is_batch = images.ndim == 4 and images.shape[3] == 3 and len(index) == len(images)
        if images.dtype != torch.uint8 or not is_batch:
            raise ValueError(
                f"a recipe takes uint8 [B, S, S, 3] and B rows, got {images.dtype} "
                f"{list(images.shape)} and {len(index)} rows"
            )
        draws = uniform_draws(seed, epoch, index, view, NUM_DRAWS, COLOUR)
        x = self._augment_first(images.permute(0, 3, 1, 2).contiguous().float(), draws).div_(255)
        x = self._colour(x, draws)
        if self.spec.normalise:
            x = x.sub_(self.mean.to(x.device)).div_(self.std.to(x.device))
        return self._cutout(x, draws)

    def _augment_first(self, x: Tensor, draws: Draws) -> Tensor:
        """The first augmentation, or without one the rotation; x in 0..255."""
        if self.spec.first_augmentation == "randaugment":
            return randaugment(x, draws[:, :8])
        if self.spec.first_augmentation == "digits":
            return _augment_digits(x, draws)
        if self.spec.degrees:
            return _rotate(x, draws, self.spec.degrees)
        return x

    def _colour(self, x: Tensor, draws: Draws) -> Tensor:
        """Colour jitter, greyscale and blur, each of some images; x in 0..1."""
        spec = self.spec
        if spec.jitter is not None:
            rows = np.flatnonzero(draws[:, 8] < spec.jitter_p)
            jitter = colour.jitter_fused if self.fused else colour.jitter
            selected = torch.from_numpy(rows).to(x.device)
            if len(rows):
                x[selected] = jitter(x[selected], draws[rows, 9:17], spec.jitter)
        if spec.grey_p:
            x = colour.random_greyscale(x, draws[:, 17], spec.grey_p)
        if spec.blur_p:
            x = colour.random_blur(x, draws[:, 18:20], spec.blur_p)
        return x

    def _cutout(self, x: Tensor, draws: Draws) -> Tensor:
        """Set a square of some images to zero."""
        if not self.spec.cutout_p or not self.max_cutout:
            return x
        size = x.shape[2]
        if self.spec.first_augmentation == "digits":
            # Side uniform between 1/8 and 1/2 of the image
            side = 2 * np.rint(size * (1 / 8 + 3 / 8 * draws[:, 20]) / 2).astype(np.int64)
        else:
            # Side 2 * (L // 2) with L uniform in 1..max_cutout, as in SCAN's released code
            side = 2 * ((1 + np.floor(draws[:, 20] * self.max_cutout).astype(np.int64)) // 2)
        side = np.where(draws[:, 21] < self.spec.cutout_p, side, 0)
        row, column = np.floor(draws[:, 22:24].T * size).astype(np.int64)
        return colour.cutout(x, side, row, column)


def _augment_digits(x: Tensor, draws: Draws) -> Tensor:
    """Random affine map, then contrast with a factor of 0.5 to 1.5; x in 0..255."""
    x = warp.digits_affine(x, draws[:, :6])
    mean = colour.image_mean(x)
    contrast = colour.per_image(0.5 + draws[:, 6], x)
    return (mean + (x - mean) * contrast).clamp_(0, 255)


def _rotate(x: Tensor, draws: Draws, degrees: float) -> Tensor:
    """Rotate about the centre by an angle uniform in [-degrees, degrees)."""
    angles = degrees * (2 * draws[:, 0] - 1)
    return warp.warp_bilinear(x, warp.rotation(angles))


def build_recipe(
    config: RecipeConfig, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Recipe:
    """The recipe for views of `size` pixels, unless the config has a size.

    At 160 pixels or more, centre and random crops are of the image with its shorter side resized to
    256/224 of the view, as published for ImageNet.
    """
    # The named recipe with the changes of the config
    size = config.size or size
    names = ("scale", "degrees", "flip", "blur_p", "grey_p")
    changes: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.share is not None:
        changes["crop_fractions"] = (config.share,)
    if config.strength is not None:
        changes["jitter"] = tuple(config.strength * amount for amount in (0.8, 0.8, 0.8, 0.2))
    changes = {name: value for name, value in changes.items() if value is not None}
    spec = replace(RECIPES[config.name], **changes)
    # The crop on the CPU
    resize: int | tuple[int, ...] | None = None
    if spec.crop_fractions:
        resize = tuple(round(size / fraction) for fraction in spec.crop_fractions)
    elif spec.crop != "random_resized" and size >= 160:
        resize = round(size * 256 / 224)
    max_cutout = config.cutout
    if max_cutout is None:
        max_cutout = int(np.interp(size, (32, 96, 224), (16, 32, 75)))
    crop = CropSpec(spec.crop, size, scale=spec.scale, resize=resize, flip=spec.flip)
    per_channel = torch.tensor([mean, std], dtype=torch.float32).view(2, 1, 3, 1, 1)
    return Recipe(spec, crop, per_channel[0], per_channel[1], config.colour == "fused", max_cutout)


def resolution_warnings(recipes: Iterable[RecipeConfig], data: DataConfig) -> list[str]:
    """Warnings about recipes whose views do not suit the size of the stored images."""
    warnings = (resolution_warning(r, data.size, data.stored, data.resolution) for r in recipes)
    return [text for text in warnings if text]


def resolution_warning(config: RecipeConfig, size: int, stored: str, resolution: int) -> str:
    """Warning with a remedy if views show a small part of the stored images, or enlarge them.

    '' if the sizes fit. stored, resolution: see DataConfig.
    """
    recipe = build_recipe(config, size, (0.0,) * 3, (1.0,) * 3)
    spec, crop = recipe.spec, recipe.crop
    if spec.crop_fractions:
        return ""
    side = crop.size
    fitting = round(side * 256 / 224)
    adapts_to_image = spec.crop == "random_resized" or crop.resize is not None
    cuts = f"recipe '{config.name}' cuts {side} x {side} px out of the stored images"
    if stored == "original":
        if adapts_to_image:
            return ""
        return (
            f"{cuts}, whatever their size. To use whole images set data.stored: jpeg and "
            f"data.resolution: {fitting}"
        )
    if not adapts_to_image and resolution > fitting:
        return (
            f"{cuts}, of {resolution} px: {(side / resolution) ** 2:.0%} of a square image. "
            f"To use whole images set data.resolution: {fitting}"
        )
    if resolution < side:
        return (
            f"recipe '{config.name}' enlarges images stored with a shorter side of {resolution} px "
            f"to {side}. Set data.resolution: {fitting}, or a smaller data.size"
        )
    return ""
