"""A cluster model as others load it: timm's network, with our head as its classifier.

The normalisation of the features is folded into the classifier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_scan.models.backbone import NOT_IN_TIMM, RESNETS, BackboneConfig, adapt_stem
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
"""Python that does what `backbone.adapt_stem` does, for users without this package."""


def to_timm_network(model: ClusterModel) -> Any:
    """timm's network with the weights of `model`: images [B, 3, S, S] -> logits [B, num_clusters].

    If features are normalised by l2, the classifier expects features of unit length (see
    `loading_lines`). Raises ValueError for a network that timm does not have.
    """
    config = _backbone_config(model)
    network = _timm_network(config, model.num_clusters)
    classifier = _classifier_name(network, model)
    # The backbone's weights, and the head as the classifier
    weight, bias = fold_normalisation(model)
    assert model.backbone is not None, "a model with a backbone_config has a backbone"
    state = {
        **model.backbone.state_dict(),
        f"{classifier}.weight": weight,
        f"{classifier}.bias": bias,
    }
    missing, left_over = network.load_state_dict(state, strict=False)
    if missing or left_over:
        raise ValueError(
            f"backbone '{config.name}' has other weights with a classifier than without (missing "
            f"{missing[:3]}, left over {left_over[:3]}); it cannot be exported as one network: "
            "load it with dist_scan.models.cluster_model.load_cluster_model"
        )
    return network.eval()


def fold_normalisation(model: ClusterModel) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]) of the head on features that are not standardised.

    W (f - mean) / std + b = (W / std) f + (b - (W / std) mean), in float64, rounded once.
    """
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    if model.norm.kind == "standardise":
        weight = weight / model.norm.std.double()
        bias = bias - weight @ model.norm.mean.double()
    return weight.float(), bias.float()


def loading_lines(model: ClusterModel) -> list[str]:
    """Python that loads an exported folder (the current one) and applies it to `images`.

    Uses timm, torch and safetensors only; backbones that timm lacks are loaded with dist_scan.
    """
    if is_in_house(model):
        return [
            'model = dist_scan.models.cluster_model.load_cluster_model(".")',
            "probability = model.eval()(images).softmax(1)",
        ]
    config = _backbone_config(model)
    logits = "network.eval()(images)"
    if model.norm.kind == "l2":
        classifier = _classifier_name(_timm_network(config, model.num_clusters), model)
        features = "network.forward_head(network.eval().forward_features(images), pre_logits=True)"
        logits = f"network.{classifier}(torch.nn.functional.normalize({features}))"
    return [
        f'network = timm.create_model("{config.name}", num_classes={model.num_clusters})',
        *STEM_LINES[config.stem],
        'network.load_state_dict(safetensors.torch.load_file("model.safetensors"))',
        f"probability = {logits}.softmax(1)",
    ]


def is_in_house(model: ClusterModel) -> bool:
    """True if timm does not have the backbone."""
    return _backbone_config(model).name in NOT_IN_TIMM


@torch.inference_mode()
def largest_difference(model: ClusterModel, network: Any, size: int) -> float:
    """Largest difference of a probability between model and exported network.

    On four images of noise, size by size pixels.
    """
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = network.forward_head(network.eval().forward_features(images), pre_logits=True)
    if model.norm.kind == "l2":
        features = nn.functional.normalize(features)
    exported = network.get_classifier()(features).softmax(1)
    return float((exported - model.eval()(images).softmax(1)).abs().max())


def _backbone_config(model: ClusterModel) -> BackboneConfig:
    if model.backbone is None or model.backbone_config is None:
        raise ValueError(
            "this cluster model holds no backbone, only a head for features; give the heads stage "
            "`backbone:` and train again"
        )
    return model.backbone_config


def _timm_network(config: BackboneConfig, num_clusters: int) -> Any:
    import timm

    network = timm.create_model(config.name, pretrained=False, num_classes=num_clusters)
    if config.name in RESNETS:
        adapt_stem(network, config.stem)
    return network


def _classifier_name(network: Any, model: ClusterModel) -> str:
    """Name of the network's linear classifier, which the head replaces."""
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.in_features != model.head.in_features:
        raise ValueError(
            f"backbone '{_backbone_config(model).name}' has no single linear classifier in timm; "
            "load the stage's folder with dist_scan.models.cluster_model.load_cluster_model"
        )
    return next(name for name, module in network.named_modules() if module is classifier)
