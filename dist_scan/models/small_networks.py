"""Small networks for images of 16 to 32 pixels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Strided 3x3 stem, then three one-block stages of width w, 2w and 4w.

    The quickstart's network for digits.
    """

    def __init__(self, width: int, channels: int = 3) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            BasicBlock(width, width), self._doubling_block(width), self._doubling_block(2 * width)
        )
        initialise_convolutions(self, "fan_out")

    @staticmethod
    def _doubling_block(width: int) -> nn.Module:
        from torchvision.models.resnet import BasicBlock

        shortcut = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width)
        )
        return BasicBlock(width, 2 * width, 2, shortcut)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.relu(self.bn1(self.conv1(images)))).mean((2, 3))


class SmallVGG(nn.Module):
    """MMDC's network for MNIST (Shiran and Weinshall, ICPR 2020), w = 32.

    Four stages of 3x3 convolution, batch norm, ReLU and 2x2 max-pool, of width w, 2w, 4w and 8w;
    then 2x2 cells of 8w features. 1024 features at 32 pixels, where the last pool is the identity.
    """

    def __init__(self, width: int, channels: int = 3) -> None:
        super().__init__()
        self.num_features = 4 * 8 * width
        widths = [channels, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(self._stage(before, after) for before, after in zip(widths, widths[1:])),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        initialise_convolutions(self, "fan_in")

    @staticmethod
    def _stage(channels: int, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def initialise_convolutions(network: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Kaiming normal weights for every convolution."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
