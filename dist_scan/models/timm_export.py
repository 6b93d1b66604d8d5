"""A cluster model as others load it: timm's own network, its classifier our head, the feature normalisation folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_scan.models.backbone import OWN, RESNETS, BackboneConfig
from dist_scan.models.cluster_model import ClusterModel

STEM_LINES = {
    "imagenet": [],
    "cifar": [
        "network.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)",
        "network.maxpool = torch.nn.Identity()",
    ],
    "stl": [
        "network.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)",
        "network.maxpool = torch.nn.MaxPool2d(2, 2, padding=1)",
    ],
}


def plain_network(model: ClusterModel) -> nn.Module:
    """timm's network with the weights of `model`: images [B, 3, S, S] -> logits [B, num_clusters] (normalise none and standardise).

    With l2 the classifier wants features of unit length (see loading_lines). Raises ValueError for a network timm does not have.
    """
    network = _timm_network(_config(model), model.num_clusters)
    name = _classifier_name(network, model)
    weight, bias = folded_head(model)
    wanted = {**model.backbone.state_dict(), f"{name}.weight": weight, f"{name}.bias": bias}
    missing, left = network.load_state_dict(wanted, strict=False)
    if missing or left:
        raise ValueError(
            f"backbone '{_config(model).name}' has other weights with a classifier than without (missing {missing[:3]}, left over {left[:3]}); "
            "it cannot be exported as one network: load it with dist_scan.models.cluster_model.load_cluster_model"
        )
    return network.eval()


def folded_head(model: ClusterModel) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]) of the head on features as the backbone makes them: W((f - mean)/std) + b = (W/std) f + (b - (W/std) mean),
    in float64, rounded once."""
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    if model.norm.kind == "standardise":
        weight = weight / model.norm.std.double()
        bias = bias - weight @ model.norm.mean.double()
    return weight.float(), bias.float()


def loading_lines(model: ClusterModel) -> list[str]:
    """Python that loads an exported folder (the current one) and uses it, given `images`: plain timm, torch and safetensors. A backbone of
    our own (in_house) is loaded with dist_scan."""
    if in_house(model):
        return [
            'model = dist_scan.models.cluster_model.load_cluster_model(".")',
            "probability = model.eval()(images).softmax(1)",
        ]
    config, name = (
        _config(model),
        _classifier_name(_timm_network(_config(model), model.num_clusters), model),
    )
    use = "network.eval()(images)"
    if model.norm.kind == "l2":
        use = f"network.{name}(torch.nn.functional.normalize(network.forward_head(network.eval().forward_features(images), pre_logits=True)))"
    return [
        f'network = timm.create_model("{config.name}", num_classes={model.num_clusters})',
        *STEM_LINES[config.stem],
        'network.load_state_dict(safetensors.torch.load_file("model.safetensors"))',
        f"probability = {use}.softmax(1)",
    ]


def in_house(model: ClusterModel) -> bool:
    """Whether the backbone is one that timm does not have."""
    return _config(model).name in OWN


def _config(model: ClusterModel) -> BackboneConfig:
    if model.backbone is None or model.backbone_config is None:
        raise ValueError(
            "this cluster model holds no backbone, only a head for features; give the heads stage `backbone:` and train again"
        )
    return model.backbone_config


def _timm_network(config: BackboneConfig, num_clusters: int) -> nn.Module:
    import timm

    network = timm.create_model(config.name, pretrained=False, num_classes=num_clusters)
    if config.name in RESNETS and config.stem != "imagenet":
        network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity() if config.stem == "cifar" else nn.MaxPool2d(2, 2, padding=1)
    return network


def _classifier_name(network: nn.Module, model: ClusterModel) -> str:
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.in_features != model.head.in_features:
        raise ValueError(
            f"backbone '{_config(model).name}' has no single linear classifier in timm; "
            "load the stage's folder with dist_scan.models.cluster_model.load_cluster_model"
        )
    return next(name for name, module in network.named_modules() if module is classifier)


@torch.inference_mode()
def largest_difference(model: ClusterModel, network: nn.Module, size: int) -> float:
    """How far the exported network's probabilities lie from the model's on four images of noise of this size."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = network.forward_head(network.eval().forward_features(images), pre_logits=True)
    features = nn.functional.normalize(features) if model.norm.kind == "l2" else features
    return float(
        (network.get_classifier()(features).softmax(1) - model.eval()(images).softmax(1))
        .abs()
        .max()
    )
