"""Backbones and the weights they take from elsewhere."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from dist_scan.models.backbone import BackboneConfig, build_backbone, load_backbone, save_backbone


@pytest.mark.parametrize(("config", "size", "dim"), [
    (dict(name="resnet_small", width=8), 16, 32), (dict(name="resnet18", stem="cifar"), 32, 512), (dict(name="resnet18", stem="stl"), 96, 512),
    (dict(name="resnet10t"), 32, 512)])
def test_features_have_the_promised_width(config, size, dim):
    network = build_backbone(BackboneConfig(**config)).eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, dim) and network.num_features == dim


def test_stems_keep_the_published_resolution():
    sizes = {}
    for stem, size in (("cifar", 32), ("stl", 96), ("imagenet", 224)):
        network = build_backbone(BackboneConfig(name="resnet18", stem=stem)).eval()
        network.layer4.register_forward_hook(lambda m, i, o, stem=stem: sizes.update({stem: o.shape[-1]}))
        network(torch.randn(1, 3, size, size))
    assert sizes == {"cifar": 4, "stl": 7, "imagenet": 7}


def prefixed(prefix: str) -> dict:
    return {prefix + k: v for k, v in resnet18().state_dict().items()}


FILES = {
    "moco-cleaned": lambda: {"state_dict": prefixed("module.encoder_q.")},
    "moco-full": lambda: {"epoch": 3, "arch": "resnet18", "optimizer": {"state": {}},
                          "state_dict": {**prefixed("module.encoder_k."), **prefixed("module.encoder_q."),
                                         "module.queue": torch.randn(8, 4), "module.queue_ptr": torch.zeros(1)}},
    "scan": lambda: {"model": {**{k.replace("downsample", "shortcut"): v for k, v in prefixed("backbone.").items() if ".fc." not in k},
                               "cluster_head.0.weight": torch.randn(3, 512)}, "head": 0},
    "bare": lambda: {**prefixed("backbone."), "contrastive_head.0.weight": torch.randn(3, 512)},
    "plain": lambda: prefixed(""),
}


@pytest.mark.parametrize("kind", FILES)
def test_checkpoints_of_others_load(kind, tmp_path):
    torch.manual_seed(5)
    tree = FILES[kind]()
    torch.save(tree, tmp_path / "w.pth")
    network = build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "w.pth")))
    flat = tree.get("state_dict") or tree.get("model") or tree
    wanted = next(v for k, v in flat.items() if k.endswith("layer2.0.downsample.0.weight") and "encoder_k" not in k
                  ) if kind != "scan" else flat["backbone.layer2.0.shortcut.0.weight"]
    assert torch.equal(network.layer2[0].downsample[0].weight, wanted)


def test_safetensors_load_and_misfits_say_what_was_found(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(resnet18().state_dict(), path)
    build_backbone(BackboneConfig(name="resnet18", checkpoint=str(path)))
    with pytest.raises(ValueError, match=r"conv1.weight \[64, 3, 7, 7\] instead of \[64, 3, 3, 3\].*stem"):
        build_backbone(BackboneConfig(name="resnet18", stem="cifar", checkpoint=str(path)))
    with pytest.raises(ValueError, match="missing .*layer1.2.conv1.weight"):
        build_backbone(BackboneConfig(name="resnet34", checkpoint=str(path)))
    torch.save({"weights": "none"}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "x.pth")))
    (tmp_path / "y.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "y.pth")))


def test_saved_and_loaded_is_the_same_network(tmp_path):
    config = BackboneConfig(name="resnet_small", width=4)
    network = build_backbone(config).eval()
    save_backbone(tmp_path, network, config)
    again, found = load_backbone(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    assert found == config and torch.equal(again.eval()(x), network(x))


def test_unknown_names_are_answered_with_a_near_one():
    with pytest.raises(ValueError, match="did you mean resnet50"):
        BackboneConfig(name="resnet-50")


@pytest.mark.parametrize("name, entering, convolutions, parameters", [("alexnet_bn", 9216, 5, 58e6), ("vgg16_deep", 25088, 13, 134e6)])
def test_deepcluster_networks_have_the_published_shapes(name, entering, convolutions, parameters):
    with torch.device("meta"):
        network = build_backbone(BackboneConfig(name=name, sobel=True)).eval()
        features = network(torch.empty(2, 3, 224, 224))
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert features.shape == (2, 4096) and linear[0].in_features == entering and network.ends_before_relu
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == convolutions
    assert next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels == 2
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.03)
    grids = [m.output_size for m in network.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    with torch.device("meta"):
        assert network[1].features(torch.empty(1, 2, 224, 224)).shape[2] == grids[0]  # the pool before the linear layers does nothing at 224 px


def test_deepcluster_networks_start_as_released_and_take_small_images():
    torch.manual_seed(0)
    network = build_backbone(BackboneConfig(name="alexnet_bn")).eval()
    assert network(torch.randn(1, 3, 64, 64)).min() < 0  # before the ReLU
    first, last = network.features.conv1[0], network.hidden[-1]
    assert float(first.weight.detach().std()) == pytest.approx((2 / (11 * 11 * 96)) ** 0.5, rel=0.05) and float(last.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert not first.bias.any() and not last.bias.any()
