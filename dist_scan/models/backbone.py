"""Backbones: images [B, 3, S, S] -> features [B, num_features]. torchvision's ResNets, timm's models, a small one, or the pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from dist_scan.config import StrictModel, suggest
from dist_scan.models.deepcluster_networks import alexnet_bn, vgg16_deep
from dist_scan.models.import_weights import CheckpointKind, load_into
from dist_scan.models.layers import Projector, Sobel
from dist_scan.storage.atomic import write_json
from dist_scan.storage.tensors import load_tensors, save_tensors

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
OWN = ("resnet_small", "vgg_small", "alexnet_bn", "vgg16_deep", "pixels")
DEEP = {"alexnet_bn": alexnet_bn, "vgg16_deep": vgg16_deep}


class BackboneConfig(StrictModel):
    """Which network makes features."""

    name: str
    """resnet18 ... resnet152 (torchvision's layout, which MoCo and SCAN use), any timm name, resnet_small, vgg_small (MMDC's for MNIST),
    alexnet_bn and vgg16_deep (DeepCluster's, 224 px), or pixels."""
    stem: Literal["imagenet", "cifar", "stl"] = "imagenet"
    """ResNets: 7x7 stride 2 and max-pool; 3x3 stride 1 without (32 px); 3x3 stride 1 and 2x2 max-pool (96 px, and MMDC at any size)."""
    width: int = Field(default=32, ge=1)
    """resnet_small, vgg_small: channels of the first stage (then twice, four times ...)."""
    sobel: bool = False
    """Two edge maps in the place of the colours: a fixed Sobel filter before the network (DeepCluster; an option of MMDC)."""
    checkpoint: str | None = None
    """A local file of weights; nothing is ever downloaded."""
    checkpoint_kind: CheckpointKind = "auto"
    """Whose names the file uses; auto looks for encoder_q, then backbone, then plain names."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in RESNETS or name in OWN:
            return name
        import timm

        if not timm.is_model(name):
            known = [*RESNETS, *OWN, *timm.list_models()]
            raise ValueError(
                f"unknown backbone '{name}'; allowed: {', '.join([*OWN, *RESNETS])}, "
                f"or a timm name{suggest(name, known)}"
            )
        return name


class SmallResNet(nn.Module):
    """Three one-block stages of width w, 2w, 4w after a strided 3x3 stem: enough for 16 to 32 px (the quickstart's digits)."""

    def __init__(self, width: int, channels: int = 3) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            BasicBlock(width, width), self._wider(width), self._wider(2 * width)
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _wider(width: int) -> nn.Module:
        from torchvision.models.resnet import BasicBlock

        shortcut = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width)
        )
        return BasicBlock(width, 2 * width, 2, shortcut)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.relu(self.bn1(self.conv1(images)))).mean((2, 3))


class SmallVGG(nn.Module):
    """Four stages of 3x3 convolution, batch norm, ReLU and 2x2 max-pool, of width w, 2w, 4w, 8w; then 2x2 cells of 8w features (MMDC's
    network for MNIST, w = 32: 1024 features at 32 px, where the last pool is the identity)."""

    def __init__(self, width: int, channels: int = 3) -> None:
        super().__init__()
        self.num_features = 4 * 8 * width
        widths = [channels, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(self._stage(a, b) for a, b in zip(widths, widths[1:])),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_in", nonlinearity="relu")

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


class Edges(nn.Sequential):
    """A network that sees Sobel's two edge maps of the image instead of its colours."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(Sobel(), network)
        self.num_features = network.num_features
        self.ends_before_relu = getattr(network, "ends_before_relu", False)


class Pixels(nn.Module):
    """The normalised image itself, flattened: the baseline. Its width depends on the image; num_features is 0."""

    num_features = 0

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def _resnet(config: BackboneConfig, channels: int) -> nn.Module:
    from torchvision.models import (
        resnet,  # here: it costs five seconds, and reading a config needs none of it
    )

    network = getattr(resnet, config.name)(weights=None)
    network.num_features, network.fc = network.fc.in_features, nn.Identity()
    if config.stem != "imagenet" or channels != 3:
        network.conv1 = (
            nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
            if config.stem == "imagenet"
            else nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        )
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if config.stem != "imagenet":
        network.maxpool = nn.Identity() if config.stem == "cifar" else nn.MaxPool2d(2, 2, padding=1)
    return network


def build_backbone(config: BackboneConfig) -> nn.Module:
    """A network with `.num_features`, fresh or from config.checkpoint. Raises ValueError when the file does not fit."""
    if config.sobel and config.name == "pixels":
        raise ValueError("sobel: pixels are a baseline of the image itself; remove it")
    if config.stem != "imagenet" and config.name not in RESNETS:
        raise ValueError(
            f"stem: '{config.stem}' is for {', '.join(RESNETS)}, not {config.name}; remove it"
        )
    channels = 2 if config.sobel else 3
    if config.name in RESNETS:
        network: nn.Module = _resnet(config, channels)
    elif config.name in DEEP:
        network = DEEP[config.name](channels)
    elif config.name in OWN:
        network = (
            Pixels()
            if config.name == "pixels"
            else {"resnet_small": SmallResNet, "vgg_small": SmallVGG}[config.name](
                config.width, channels
            )
        )
    else:
        import timm

        network = timm.create_model(config.name, pretrained=False, num_classes=0, in_chans=channels)
    if config.checkpoint is not None:
        load_into(network, config.checkpoint, config.checkpoint_kind)
    return Edges(network) if config.sobel else network


def plain(config: BackboneConfig) -> BackboneConfig:
    """The config without its checkpoint: what is published carries its own weights."""
    return config.model_copy(update={"checkpoint": None, "checkpoint_kind": "auto"})


def save_backbone(
    out_dir: Path, backbone: nn.Module, config: BackboneConfig, projector: nn.Module | None = None
) -> None:
    """Write backbone.safetensors and backbone.json (and projector.safetensors, for mining after the MLP) into out_dir."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_tensors(out_dir / "backbone.safetensors", backbone.state_dict())
    if projector is not None:
        save_tensors(out_dir / "projector.safetensors", projector.state_dict())
    write_json(
        out_dir / "backbone.json",
        {"backbone": plain(config).model_dump(mode="json"), "num_features": backbone.num_features},
    )


def load_backbone(path: Path) -> tuple[nn.Module, BackboneConfig]:
    """The network that save_backbone wrote, and its config."""
    facts = Path(path) / "backbone.json"
    if not facts.is_file():
        raise ValueError(
            f"{path} holds no backbone (no backbone.json); name a stage that publishes one (a pretext, or `given`)"
        )
    config = BackboneConfig.model_validate(json.loads(facts.read_text())["backbone"])
    network = build_backbone(config)
    network.load_state_dict(load_tensors(Path(path) / "backbone.safetensors"))
    return network, config


def load_projector(path: Path) -> nn.Module:
    """The projector published beside a backbone: features -> projections. Raises ValueError when the stage published none."""
    file = Path(path) / "projector.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{path} holds no projector; set projection: false, or name a pretext that has one (simclr, moco)"
        )
    tensors = load_tensors(file)
    weights = [tensors[k] for k in sorted(k for k in tensors if k.endswith("weight"))]
    projector = Projector(
        weights[0].shape[1],
        weights[-1].shape[0],
        mlp=len(weights) > 1,
        hidden_dim=weights[0].shape[0],
    )
    projector.load_state_dict(tensors)
    return projector


def load_embedder(path: Path, projection: bool = False) -> nn.Module:
    """What an embed stage sends images through: the published backbone, with its projector behind it if asked for."""
    backbone = load_backbone(path)[0]
    return nn.Sequential(backbone, load_projector(path)) if projection else backbone
