"""DeepCluster's two networks: AlexNet and VGG-16, both with batch norm and with two fully connected layers (Caron et al. 2018, Sec. 3.4).

Their features are what comes out of the last linear layer, before its ReLU: clustering works better there (FIDELITY.md 3). A classifier on
top applies the ReLU first (`ends_before_relu`). Parts keep the names of the layers that linear probes look at: conv1, conv2, ...
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

HIDDEN = 4096


class DeepNet(nn.Module):
    """images [B, channels, S, S] -> features [B, 4096] before the ReLU. Made for 224 px; other sizes are pooled to the same grid.

    Raises ValueError for images so small that nothing is left after the pools.
    """

    ends_before_relu: ClassVar[bool] = True
    num_features = HIDDEN

    def __init__(
        self,
        layers: dict[str, nn.Module],
        channels: int,
        grid: int,
        first_dropout: bool,
        smallest: int,
    ) -> None:
        super().__init__()
        self.smallest = smallest
        self.features = nn.Sequential()
        for name, layer in layers.items():
            self.features.add_module(name, layer)
        self.pool = nn.AdaptiveAvgPool2d(grid)  # the identity at 224 px
        self.hidden = nn.Sequential(
            *[nn.Dropout(0.5)] * first_dropout,
            nn.Linear(channels * grid * grid, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(HIDDEN, HIDDEN),
        )
        for module in self.modules():
            initialise(module)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"images of {min(images.shape[2:])} px are too small for this network; allowed: {self.smallest} px or more (it was made for "
                "224). Raise data.size, or take resnet18 with stem: cifar"
            )
        return self.hidden(self.pool(self.features(images)).flatten(1))


def initialise(module: nn.Module) -> None:
    """Convolutions N(0, 2 / (k k out)), linear layers N(0, 0.01), no bias: as released."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(
            module.weight,
            0,
            math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)),
        )
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _convolution(
    channels: int, width: int, kernel: int, stride: int = 1, padding: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, stride, padding),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def alexnet_bn(channels: int = 3) -> DeepNet:
    """96-256-384-384-256 with batch norm in the place of local response normalisation; 9216 numbers enter the first linear layer."""
    return DeepNet(
        {
            "conv1": _convolution(channels, 96, 11, 4, 2),
            "pool1": nn.MaxPool2d(3, 2),
            "conv2": _convolution(96, 256, 5, 1, 2),
            "pool2": nn.MaxPool2d(3, 2),
            "conv3": _convolution(256, 384, 3),
            "conv4": _convolution(384, 384, 3),
            "conv5": _convolution(384, 256, 3),
            "pool5": nn.MaxPool2d(3, 2),
        },
        256,
        6,
        first_dropout=True,
        smallest=63,
    )


def vgg16_deep(channels: int = 3) -> DeepNet:
    """The thirteen convolutions of VGG-16 with batch norm; 25088 numbers enter the first linear layer."""
    layers: dict[str, nn.Module] = {}
    before, number = channels, 0
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for _ in range(depth):
            number += 1
            layers[f"conv{number}"] = _convolution(before, width, 3)
            before = width
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    return DeepNet(layers, 512, 7, first_dropout=False, smallest=32)
