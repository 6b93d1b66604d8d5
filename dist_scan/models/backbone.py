"""Backbones: images [B, 3, S, S] -> features [B, num_features].

torchvision's ResNets, timm's models, DeepCluster's networks, small ones, or the pixels themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from dist_scan.config import StrictModel, suggest
from dist_scan.models.deepcluster_networks import alexnet_bn, vgg16_deep
from dist_scan.models.import_weights import CheckpointKind, load_into
from dist_scan.models.layers import Projector, Sobel
from dist_scan.models.small_networks import SmallResNet, SmallVGG, initialise_convolutions
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
NOT_IN_TIMM = ("resnet_small", "vgg_small", "alexnet_bn", "vgg16_deep", "pixels")
"""Networks that timm does not have."""

Stem = Literal["imagenet", "cifar", "stl"]


class BackboneConfig(StrictModel):
    """The network that computes features, and the file of its initial weights."""

    name: str
    """resnet18 ... resnet152 (torchvision's layout, which MoCo and SCAN use), any timm name,
    resnet_small, vgg_small (MMDC's for MNIST), alexnet_bn and vgg16_deep (DeepCluster's, 224 px),
    or pixels.
    """
    stem: Stem = "imagenet"
    """ResNets: 7x7 stride 2 and max-pool (imagenet); 3x3 stride 1 without pool (cifar, 32 px); 3x3
    stride 1 and 2x2 max-pool (stl, 96 px, and MMDC at any size)."""
    width: int = Field(default=32, ge=1)
    """resnet_small, vgg_small: channels of the first stage; each further stage doubles them."""
    sobel: bool = False
    """Replace the colours by two edge maps: a fixed Sobel filter before the network (DeepCluster;
    an option of MMDC).
    """
    checkpoint: str | None = None
    """A local file of weights; nothing is ever downloaded."""
    checkpoint_kind: CheckpointKind = "auto"
    """Naming of the file's weights; auto looks for encoder_q, then backbone, then plain names."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        if name in RESNETS or name in NOT_IN_TIMM:
            return name
        import timm

        if not timm.is_model(name):
            known = [*NOT_IN_TIMM, *RESNETS]
            hint = suggest(name, [*known, *timm.list_models()])
            raise ValueError(
                f"no backbone '{name}'; allowed: {', '.join(known)}, or a timm name{hint}"
            )
        return name


class EdgeNetwork(nn.Sequential):
    """A network that sees Sobel's two edge maps of an image instead of its colours."""

    def __init__(self, network: Any) -> None:
        super().__init__(Sobel(), network)
        self.num_features = network.num_features
        self.ends_before_relu = getattr(network, "ends_before_relu", False)


class Pixels(nn.Module):
    """The normalised image itself, flattened: a baseline.

    Its width depends on the image, so num_features is 0.
    """

    num_features = 0

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def build_backbone(config: BackboneConfig) -> nn.Module:
    """A network with `.num_features`, new or with the weights of config.checkpoint.

    Raises ValueError if settings contradict each other or the checkpoint does not fit.
    """
    if config.sobel and config.name == "pixels":
        raise ValueError("sobel: the backbone `pixels` takes no Sobel filter; remove sobel")
    if config.stem != "imagenet" and config.name not in RESNETS:
        raise ValueError(
            f"stem: '{config.stem}' is for {', '.join(RESNETS)}, not {config.name}; remove it"
        )
    network = _new_network(config, channels=2 if config.sobel else 3)
    if config.checkpoint is not None:
        load_into(network, config.checkpoint, config.checkpoint_kind)
    return EdgeNetwork(network) if config.sobel else network


def _new_network(config: BackboneConfig, channels: int) -> nn.Module:
    if config.name in RESNETS:
        return _resnet(config, channels)
    if config.name == "alexnet_bn":
        return alexnet_bn(channels)
    if config.name == "vgg16_deep":
        return vgg16_deep(channels)
    if config.name == "resnet_small":
        return SmallResNet(config.width, channels)
    if config.name == "vgg_small":
        return SmallVGG(config.width, channels)
    if config.name == "pixels":
        return Pixels()
    import timm

    return timm.create_model(config.name, pretrained=False, num_classes=0, in_chans=channels)


def _resnet(config: BackboneConfig, channels: int) -> nn.Module:
    # Imported here because it takes five seconds, and a config is read without it.
    from torchvision.models import resnet

    network = getattr(resnet, config.name)(weights=None)
    network.num_features = network.fc.in_features
    network.fc = nn.Identity()
    adapt_stem(network, config.stem, channels)
    return network


def adapt_stem(network: Any, stem: Stem, channels: int = 3) -> None:
    """Replace a ResNet's first layers to suit the size and the channels of its images."""
    if stem == "imagenet" and channels == 3:
        return
    if stem == "imagenet":
        network.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    else:
        network.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(2, 2, padding=1)
    initialise_convolutions(network.conv1, "fan_out")


# --- published backbones ---------------------------------------------------------------------


def without_checkpoint(config: BackboneConfig) -> BackboneConfig:
    """The config without its checkpoint: a published backbone has its own weights."""
    return config.model_copy(update={"checkpoint": None, "checkpoint_kind": "auto"})


def save_backbone(
    out_dir: Path, backbone: Any, config: BackboneConfig, projector: nn.Module | None = None
) -> None:
    """Write backbone.safetensors, backbone.json and, if given, projector.safetensors."""
    out_dir.mkdir(parents=True, exist_ok=True)
    save_tensors(out_dir / "backbone.safetensors", backbone.state_dict())
    if projector is not None:
        save_tensors(out_dir / "projector.safetensors", projector.state_dict())
    settings = without_checkpoint(config).model_dump(mode="json")
    write_json(
        out_dir / "backbone.json", {"backbone": settings, "num_features": backbone.num_features}
    )


def load_backbone(path: Path) -> tuple[nn.Module, BackboneConfig]:
    """The network that `save_backbone` wrote, and its config."""
    metadata = path / "backbone.json"
    if not metadata.is_file():
        raise ValueError(
            f"{path} holds no backbone (no backbone.json); name a stage that publishes one "
            "(a pretext, or `given`)"
        )
    config = BackboneConfig.model_validate(json.loads(metadata.read_text())["backbone"])
    network = build_backbone(config)
    network.load_state_dict(load_tensors(path / "backbone.safetensors"))
    return network, config


def load_projector(path: Path) -> nn.Module:
    """The projector (features -> projections) published with a backbone.

    Raises ValueError if the stage published none.
    """
    file = path / "projector.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{path} holds no projector; set projection: false, or name a pretext that has one "
            "(simclr, moco)"
        )
    tensors = load_tensors(file)
    weights = [tensors[name] for name in sorted(tensors) if name.endswith("weight")]
    projector = Projector(
        in_dim=weights[0].shape[1],
        out_dim=weights[-1].shape[0],
        mlp=len(weights) > 1,
        hidden_dim=weights[0].shape[0],
    )
    projector.load_state_dict(tensors)
    return projector


def load_embedder(path: Path, projection: bool = False) -> nn.Module:
    """The published backbone, followed by its projector on request."""
    backbone, _ = load_backbone(path)
    return nn.Sequential(backbone, load_projector(path)) if projection else backbone
