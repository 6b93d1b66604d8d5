"""DeepCluster's networks: AlexNet and VGG-16 with batch norm (Caron et al., ECCV 2018, Sec. 3.4).

Both end in two fully connected layers. Features are the output of the last linear layer before its
ReLU, because clustering works better there; a classifier on top applies the ReLU first
(`ends_before_relu`). Convolutions are named conv1, conv2, ... as linear probes refer to them.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

HIDDEN = 4096


class DeepClusterNet(nn.Module):
    """Images [B, channels, S, S] -> features [B, 4096] before the ReLU.

    Made for 224 px; other sizes are pooled to the same grid. Raises ValueError for images so small
    that nothing is left after the pools.
    """

    ends_before_relu = True
    num_features = HIDDEN

    def __init__(
        self,
        layers: dict[str, nn.Module],
        channels: int,
        grid: int,
        min_size: int,
        first_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.min_size = min_size
        self.features = nn.Sequential()
        for name, layer in layers.items():
            self.features.add_module(name, layer)
        # The identity at 224 px
        self.pool = nn.AdaptiveAvgPool2d(grid)
        hidden: list[nn.Module] = [nn.Dropout(0.5)] if first_dropout else []
        hidden += [
            nn.Linear(channels * grid * grid, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(HIDDEN, HIDDEN),
        ]
        self.hidden = nn.Sequential(*hidden)
        for module in self.modules():
            initialise(module)

    def forward(self, images: Tensor) -> Tensor:
        size = min(images.shape[2:])
        if size < self.min_size:
            raise ValueError(
                f"images of {size} px are too small for this network; allowed: {self.min_size} px "
                "or more (it was made for 224). Raise data.size, or take resnet18 with stem: cifar"
            )
        return self.hidden(self.pool(self.features(images)).flatten(1))


def initialise(module: nn.Module) -> None:
    """As released: convolutions N(0, 2 / (k k out)), linear layers N(0, 0.01), biases 0."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        nn.init.normal_(module.weight, 0, math.sqrt(2 / (height * width * module.out_channels)))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _convolution(
    channels: int, width: int, kernel: int, stride: int = 1, padding: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, stride, padding),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def alexnet_bn(channels: int = 3) -> DeepClusterNet:
    """96-256-384-384-256 channels, with batch norm instead of local response normalisation.

    The first linear layer has 9216 inputs.
    """
    layers = {
        "conv1": _convolution(channels, 96, 11, 4, 2),
        "pool1": nn.MaxPool2d(3, 2),
        "conv2": _convolution(96, 256, 5, 1, 2),
        "pool2": nn.MaxPool2d(3, 2),
        "conv3": _convolution(256, 384, 3),
        "conv4": _convolution(384, 384, 3),
        "conv5": _convolution(384, 256, 3),
        "pool5": nn.MaxPool2d(3, 2),
    }
    return DeepClusterNet(layers, channels=256, grid=6, min_size=63, first_dropout=True)


def vgg16_deep(channels: int = 3) -> DeepClusterNet:
    """The thirteen convolutions of VGG-16; the first linear layer has 25088 inputs."""
    layers: dict[str, nn.Module] = {}
    number = 0
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for _ in range(depth):
            number += 1
            layers[f"conv{number}"] = _convolution(channels, width, 3)
            channels = width
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    return DeepClusterNet(layers, channels=512, grid=7, min_size=32)
