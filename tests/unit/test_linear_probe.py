"""Linear probes: as good as scikit-learn's logistic regression; which layers, which crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

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
    LayerProbesConfig,
    count_correct,
    find_module,
    pool_to_grid,
    ten_crops,
)
from dist_scan.methods.base import MethodInputs
from dist_scan.models.backbone import BackboneConfig, build_backbone

LAYERS = ("layers.0", "layers.1", "features")
NUM_TRAIN = 1200


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 16, 16] and labels; the first NUM_TRAIN are for training."""
    images = torch.from_numpy(load_digits().images / 16).float()[:, None].expand(-1, 3, -1, -1)
    return nn.functional.interpolate(images, 16) - 0.3, torch.from_numpy(load_digits().target)


def make_probes(labels: Tensor, images: Tensor, layers: tuple[str, ...] = LAYERS) -> LayerProbes:
    torch.manual_seed(0)
    config = BackboneConfig(name="resnet_small", width=8)
    inputs = MethodInputs(
        num_images=len(labels),
        global_batch=100,
        seed=0,
        backbone=build_backbone(config),
        backbone_config=config,
    )
    return LayerProbes(
        LayerProbesConfig(layers=layers, most_features=256), inputs, labels, images[:2]
    )


def train_on_features(probes: LayerProbes, features: list[Tensor]) -> None:
    """100 epochs of 12 steps. The network is frozen, so features are computed only once."""
    config = OptimizerConfig(lr=1.0, weight_decay=1e-5)
    schedule = ScheduleConfig(kind="inverse_sqrt", decay=1e-3)
    optimizer = build_optimizer(config, probes.parameter_groups())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "_layer_features", lambda rows: [f[rows] for f in features])
        for step in range(12 * 100):
            if step % 12 == 0:
                order = torch.randperm(NUM_TRAIN)
            index = order[step % 12 * 100 : step % 12 * 100 + 100]
            set_learning_rate(optimizer, learning_rate(config.lr, schedule, step, 12, 100))
            probes(Batch(index, (index,), 0, step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_probes_are_as_good_as_logistic_regression(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    probes = make_probes(labels, images).train()
    before = {k: v.clone() for k, v in probes.backbone.state_dict().items()}
    features = [f.detach() for f in probes._layer_features(images)]
    train_on_features(probes, features)
    test_images, test_labels = images[NUM_TRAIN:], labels[NUM_TRAIN:]
    correct = count_correct(probes.eval(), test_images, test_labels, 16, ten_crop=False)
    accuracy = (correct.double() / len(test_labels)).tolist()
    for name, ours, x in zip(LAYERS, accuracy, features):
        regression = LogisticRegression(C=100, max_iter=1000).fit(x[:NUM_TRAIN], labels[:NUM_TRAIN])
        theirs = regression.score(x[NUM_TRAIN:], test_labels)
        # SGD is slow on the pooled output of an untrained network, which hardly varies.
        margin = 0.08 if name == "features" else 0.02
        assert theirs > 0.6, name
        assert ours > theirs - margin, f"{name}: {ours:.3f}, logistic regression {theirs:.3f}"
    assert all(torch.equal(v, before[k]) for k, v in probes.backbone.state_dict().items())


def test_layers_are_found_by_the_end_of_their_name() -> None:
    network = build_backbone(BackboneConfig(name="alexnet_bn", sobel=True))
    assert find_module(network, "conv3") is network[1].features.conv3
    with pytest.raises(
        ValueError,
        match="'conv9' matches no module of this network; allowed: features, or one of .*conv1",
    ):
        find_module(network, "conv9")
    ambiguous = nn.ModuleDict({f"a{i}": nn.ModuleDict({"x": nn.ReLU()}) for i in range(5)})
    with pytest.raises(ValueError, match="matches 5 modules"):
        find_module(ambiguous, "x")


@pytest.mark.parametrize(
    "channels, grid, width", [(96, 55, 9600), (256, 27, 9216), (384, 13, 9600), (256, 13, 9216)]
)
def test_maps_are_pooled_to_the_published_widths(channels: int, grid: int, width: int) -> None:
    assert pool_to_grid(torch.zeros(1, channels, grid, grid), 9600).shape == (1, width)


def test_ten_crops_are_corners_centre_and_their_mirror_images() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6).expand(2, 3, 6, 6)
    crops = list(ten_crops(image, 4))
    assert len(crops) == 10
    assert torch.equal(crops[0], image[:, :, :4, :4])
    assert torch.equal(crops[6], image[:, :, 2:, 2:])
    assert torch.equal(crops[8], image[:, :, 1:5, 1:5])
    assert torch.equal(crops[9], crops[8].flip(3))
    assert len(list(ten_crops(image, 6))) == 2


def test_each_probe_is_trained_as_if_it_were_alone(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    index = torch.arange(50)
    together = make_probes(labels, images)
    alone = make_probes(labels, images, ("features",))
    alone.heads[0].load_state_dict(together.heads[2].state_dict())
    for probes in (together, alone):
        probes(Batch(index, (images[index],), 0, 0)).loss.backward()
    torch.testing.assert_close(together.heads[2].weight.grad, alone.heads[0].weight.grad)
    assert np.isfinite(float(together.heads[0].weight.grad.sum()))
