"""Linear probes: as good as scikit-learn's logistic regression on the same features; which layers, which crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from dist_scan.data.batch import Batch
from dist_scan.engine.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from dist_scan.evaluate.linear_probe import (
    LayerProbes,
    ProbesConfig,
    found_module,
    pooled,
    probe_hits,
    ten_crops,
)
from dist_scan.methods.base import MethodInputs
from dist_scan.models.backbone import BackboneConfig, build_backbone

LAYERS = ("layers.0", "layers.1", "features")


@pytest.fixture(scope="module")
def digits():
    """(images [1797, 3, 16, 16], labels); the first 1200 are for training."""
    images = torch.from_numpy(load_digits().images / 16).float()[:, None].expand(-1, 3, -1, -1)
    return nn.functional.interpolate(images, 16) - 0.3, torch.from_numpy(load_digits().target)


def make(labels, images, layers=LAYERS):
    torch.manual_seed(0)
    config = BackboneConfig(name="resnet_small", width=8)
    inputs = MethodInputs(
        len(labels), 100, 0, 0, backbone=build_backbone(config), backbone_config=config
    )
    return LayerProbes(ProbesConfig(layers=layers, most_features=256), inputs, labels, images[:2])


def test_it_reaches_logistic_regression_on_the_same_features(digits) -> None:
    images, labels = digits
    probes = make(labels, images).train()
    before = {k: v.clone() for k, v in probes.backbone.state_dict().items()}
    features = [f.detach() for f in probes._layers(images)]
    config, schedule = (
        OptimizerConfig(lr=1.0, weight_decay=1e-5),
        ScheduleConfig(kind="inverse_sqrt", decay=1e-3),
    )
    optimizer = build_optimizer(config, probes.parameter_groups())
    look, probes._layers = (
        probes._layers,
        lambda rows: [f[rows] for f in features],
    )  # the network is frozen: its features once are enough
    for step in range(12 * 100):
        if step % 12 == 0:
            order = torch.randperm(1200)
        index = order[step % 12 * 100 : step % 12 * 100 + 100]
        set_learning_rate(optimizer, learning_rate(config.lr, schedule, step, 12, 100))
        probes(Batch(index, (index,), 0, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    probes._layers = look
    probes.eval()
    ours = probe_hits(probes, images[1200:], labels[1200:], 16, False).double() / 597
    for name, mine, x in zip(LAYERS, ours.tolist(), features):
        theirs = (
            LogisticRegression(C=100, max_iter=1000)
            .fit(x[:1200], labels[:1200])
            .score(x[1200:], labels[1200:])
        )
        margin = (
            0.08 if name == "features" else 0.02
        )  # pooled features of an untrained network hardly differ: SGD is slow on them
        assert theirs > 0.6 and mine > theirs - margin, (
            f"{name}: {mine:.3f}, logistic regression {theirs:.3f}"
        )
    assert all(torch.equal(v, before[k]) for k, v in probes.backbone.state_dict().items())


def test_layers_are_found_by_their_end_and_named_when_not() -> None:
    network = build_backbone(BackboneConfig(name="alexnet_bn", sobel=True))
    assert found_module(network, "conv3") is network[1].features.conv3
    with pytest.raises(
        ValueError,
        match="'conv9' is no module of this network; allowed: features, or one of .*conv1",
    ):
        found_module(network, "conv9")
    with pytest.raises(ValueError, match="end of 5 modules"):
        found_module(
            nn.ModuleDict({f"a{i}": nn.ModuleDict({"x": nn.ReLU()}) for i in range(5)}), "x"
        )


@pytest.mark.parametrize(
    "channels, grid, width", [(96, 55, 9600), (256, 27, 9216), (384, 13, 9600), (256, 13, 9216)]
)
def test_maps_are_pooled_to_the_published_widths(channels, grid, width) -> None:
    assert pooled(torch.zeros(1, channels, grid, grid), 9600).shape == (1, width)


def test_ten_crops_are_the_corners_the_centre_and_their_mirror_images() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6).expand(2, 3, 6, 6)
    crops = list(ten_crops(image, 4))
    assert (
        len(crops) == 10
        and torch.equal(crops[0], image[:, :, :4, :4])
        and torch.equal(crops[6], image[:, :, 2:, 2:])
    )
    assert (
        torch.equal(crops[8], image[:, :, 1:5, 1:5])
        and torch.equal(crops[9], crops[8].flip(3))
        and len(list(ten_crops(image, 6))) == 2
    )


def test_each_probe_is_trained_as_if_it_were_alone(digits) -> None:
    images, labels = digits
    index = torch.arange(50)
    together, alone = make(labels, images), make(labels, images, ("features",))
    alone.heads[0].load_state_dict(together.heads[2].state_dict())
    for probes in (together, alone):
        probes(Batch(index, (images[index],), 0, 0)).loss.backward()
    torch.testing.assert_close(together.heads[2].weight.grad, alone.heads[0].weight.grad)
    assert np.isfinite(float(together.heads[0].weight.grad.sum()))
