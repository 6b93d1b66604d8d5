"""Backbones and the weights they take from other projects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18

from dist_scan.models.backbone import BackboneConfig, build_backbone, load_backbone, save_backbone
from dist_scan.models.cluster_model import load_cluster_model
from dist_scan.models.import_weights import read_cluster_head
from dist_scan.stages.pretrained import PretrainedConfig, PretrainedStage
from dist_scan.world.world import World


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    "settings, size, dim",
    [
        (dict(name="resnet_small", width=8), 16, 32),
        (dict(name="resnet18", stem="cifar"), 32, 512),
        (dict(name="resnet18", stem="stl"), 96, 512),
        (dict(name="resnet10t"), 32, 512),
    ],
)
def test_features_have_the_promised_width(settings: dict[str, Any], size: int, dim: int) -> None:
    network = build_backbone(BackboneConfig(**settings)).eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, dim)
    assert network.num_features == dim


@pytest.mark.parametrize(
    "stem, size, last", [("cifar", 32, 4), ("stl", 96, 7), ("imagenet", 224, 7)]
)
def test_stems_keep_the_published_resolution(stem: str, size: int, last: int) -> None:
    network = build_backbone(BackboneConfig(name="resnet18", stem=stem)).eval()
    sizes: list[int] = []
    network.layer4.register_forward_hook(lambda module, x, out: sizes.append(out.shape[-1]))
    network(torch.randn(1, 3, size, size))
    assert sizes == [last]


def test_saved_and_loaded_is_the_same_network(tmp_path: Path) -> None:
    config = BackboneConfig(name="resnet_small", width=4)
    network = build_backbone(config).eval()
    save_backbone(tmp_path, network, config)
    loaded, loaded_config = load_backbone(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    assert loaded_config == config
    assert torch.equal(loaded.eval()(x), network(x))


def test_an_unknown_name_suggests_the_closest_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'resnet50'"):
        BackboneConfig(name="resnet-50")


def test_vgg_small_is_mmdcs_network_for_mnist() -> None:
    network = build_backbone(BackboneConfig(name="vgg_small", width=32)).eval()
    layers = convolutions(network)
    assert [layer.out_channels for layer in layers] == [32, 64, 128, 256]
    assert all(layer.kernel_size == (3, 3) and layer.bias is None for layer in layers)
    assert network.num_features == 1024
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 1024)
    assert network(torch.randn(2, 3, 48, 48)).shape == (2, 1024), "2 x 2 cells at any size"


@pytest.mark.parametrize(
    "settings",
    [
        dict(name="vgg_small", width=4),
        dict(name="resnet_small", width=4),
        dict(name="resnet18", stem="stl"),
        dict(name="resnet18"),
        dict(name="resnet10t"),
    ],
)
def test_sobel_networks_see_edges_only_and_can_be_published(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = BackboneConfig(sobel=True, **settings)
    network = build_backbone(config).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = network(x)
        assert features.shape == (2, network.num_features)
        edges = network[0](x)
        assert edges.shape == (2, 2, 32, 32)
        assert convolutions(network[1])[0].in_channels == 2
        # Neither colour nor brightness matters.
        torch.testing.assert_close(network(x[:, [2, 0, 1]]), features, atol=1e-4, rtol=1e-3)
        inside = edges[:, :, 1:-1, 1:-1]
        assert inside.abs().max() > 0
        brighter = network[0](x + 1)[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(brighter, inside, atol=1e-4, rtol=0)
        save_backbone(tmp_path, network, config)
        torch.testing.assert_close(load_backbone(tmp_path)[0].eval()(x), features)


def test_sobel_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="sobel: the backbone `pixels` takes no"):
        build_backbone(BackboneConfig(name="pixels", sobel=True))


# --- weights of other projects ---------------------------------------------------------------


def with_prefix(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in resnet18().state_dict().items()}


def moco_checkpoint() -> dict[str, Any]:
    return {
        "epoch": 3,
        "arch": "resnet18",
        "optimizer": {"state": {}},
        "state_dict": {
            **with_prefix("module.encoder_k."),
            **with_prefix("module.encoder_q."),
            "module.queue": torch.randn(8, 4),
            "module.queue_ptr": torch.zeros(1),
        },
    }


def scan_model() -> dict[str, Any]:
    backbone = {
        name.replace("downsample", "shortcut"): value
        for name, value in with_prefix("backbone.").items()
        if ".fc." not in name
    }
    return {"model": {**backbone, "cluster_head.0.weight": torch.randn(3, 512)}, "head": 0}


FILES: Mapping[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "moco-cleaned": (
        lambda: {"state_dict": with_prefix("module.encoder_q.")},
        "module.encoder_q.layer2.0.downsample.0.weight",
    ),
    "moco-full": (moco_checkpoint, "module.encoder_q.layer2.0.downsample.0.weight"),
    "scan": (scan_model, "backbone.layer2.0.shortcut.0.weight"),
    "bare": (
        lambda: {**with_prefix("backbone."), "contrastive_head.0.weight": torch.randn(3, 512)},
        "backbone.layer2.0.downsample.0.weight",
    ),
    "plain": (lambda: with_prefix(""), "layer2.0.downsample.0.weight"),
}
"""By kind: content of the file, and its name for the weight layer2.0.downsample.0."""


@pytest.mark.parametrize("kind", FILES)
def test_checkpoints_of_other_projects_load(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    make_content, name = FILES[kind]
    content = make_content()
    torch.save(content, tmp_path / "w.pth")
    network = build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "w.pth")))
    state = content.get("state_dict") or content.get("model") or content
    assert torch.equal(network.layer2[0].downsample[0].weight, state[name])


def test_safetensors_load_and_other_shapes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(resnet18().state_dict(), path)
    build_backbone(BackboneConfig(name="resnet18", checkpoint=str(path)))
    with pytest.raises(
        ValueError, match=r"conv1.weight \[64, 3, 7, 7\] instead of \[64, 3, 3, 3\].*stem"
    ):
        build_backbone(BackboneConfig(name="resnet18", stem="cifar", checkpoint=str(path)))
    with pytest.raises(ValueError, match="missing .*layer1.2.conv1.weight"):
        build_backbone(BackboneConfig(name="resnet34", checkpoint=str(path)))


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": "none"}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "x.pth")))
    (tmp_path / "y.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "y.pth")))


def save_scan_file(
    path: Path, head: int | None, heads: int = 3, legacy: bool = False, **more: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Write a file as SCAN's released code saves it; returns (network, state dict in the file).

    {model, head} with CIFAR shortcuts and heads of 7 clusters on 512 features; the bare state dict
    if head is None. legacy: as torch 1.4 and NumPy 1 wrote it.
    """
    torch.manual_seed(1)
    network = build_backbone(BackboneConfig(name="resnet18", stem="cifar"))
    state = {
        f"backbone.{name.replace('downsample', 'shortcut')}": value
        for name, value in network.state_dict().items()
    }
    for i in range(heads):
        state[f"cluster_head.{i}.weight"] = torch.randn(7, 512)
        state[f"cluster_head.{i}.bias"] = torch.randn(7)
    content = state if head is None else {"model": state, "head": np.int64(head), **more}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy:
        # Another container, and NumPy's old module name in the pickle
        data = path.read_bytes()
        assert head is None or data.count(b"cnumpy._core.multiarray\n") == 1
        path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return network.eval(), state


@pytest.mark.parametrize("legacy", [False, True])
def test_a_scan_file_gives_its_backbone_and_its_best_head(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar"
    _, state = save_scan_file(path, 2, legacy=legacy)
    head = read_cluster_head(path)
    assert (head.number, head.num_heads) == (2, 3)
    assert torch.equal(head.weight, state["cluster_head.2.weight"])
    assert torch.equal(read_cluster_head(path, 0).bias, state["cluster_head.0.bias"])
    config = BackboneConfig(
        name="resnet18", stem="cifar", checkpoint=str(path), checkpoint_kind="scan"
    )
    weight = build_backbone(config).layer2[0].downsample[0].weight
    assert torch.equal(weight, state["backbone.layer2.0.shortcut.0.weight"])


def test_the_only_head_of_a_file_is_read_without_a_number(tmp_path: Path) -> None:
    save_scan_file(tmp_path / "one.pth.tar", None, heads=1)
    assert read_cluster_head(tmp_path / "one.pth.tar").number == 0
    save_scan_file(tmp_path / "three.pth.tar", None)
    with pytest.raises(
        ValueError, match="does not say which head is best.*allowed: cluster_head: 0, 1, 2"
    ):
        read_cluster_head(tmp_path / "three.pth.tar")
    with pytest.raises(ValueError, match="has no head 3.*allowed: cluster_head: 0, 1, 2"):
        read_cluster_head(tmp_path / "three.pth.tar", 3)
    torch.save({"backbone.conv1.weight": torch.zeros(1)}, tmp_path / "none.pth.tar")
    with pytest.raises(ValueError, match="holds no cluster head"):
        read_cluster_head(tmp_path / "none.pth.tar")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class WritesAFile:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "written"), "w")

    save_scan_file(tmp_path / "evil.pth.tar", 1, more=WritesAFile())
    with pytest.raises(ValueError, match="cannot be read safely"):
        read_cluster_head(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "written").exists()


def test_the_given_stage_publishes_a_scan_file_as_backbone_and_as_cluster_model(
    tmp_path: Path,
) -> None:
    network, state = save_scan_file(tmp_path / "model.pth.tar", 1)
    backbone = BackboneConfig(
        name="resnet18", stem="cifar", checkpoint=str(tmp_path / "model.pth.tar")
    )
    data = SimpleNamespace(
        size=32,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        stored="raw",
        resolution=32,
        max_side=64,
        quality=90,
    )
    logged: list[str] = []
    context = SimpleNamespace(
        world=World(),
        out=tmp_path / "out",
        name="scan",
        log=logged.append,
        run=SimpleNamespace(data=data),
    )
    PretrainedStage(PretrainedConfig(backbone=backbone, cluster_head="best"), context).run()
    model, images = load_cluster_model(tmp_path / "out").eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = network(images)
        logits = features @ state["cluster_head.1.weight"].T + state["cluster_head.1.bias"]
        torch.testing.assert_close(model(images), logits)
        assert torch.equal(load_backbone(tmp_path / "out")[0].eval()(images), features)
    assert logged == ["scan: head 1 of 3, 7 clusters"]


def test_a_cluster_head_needs_a_checkpoint() -> None:
    backbone = BackboneConfig(name="resnet18", stem="cifar")
    config = PretrainedConfig(backbone=backbone, cluster_head=1)
    with pytest.raises(ValueError, match="there is no backbone.checkpoint"):
        config.check_settings("scan", {})


# --- DeepCluster's networks ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, inputs, num_convolutions, num_parameters",
    [("alexnet_bn", 9216, 5, 58e6), ("vgg16_deep", 25088, 13, 134e6)],
)
def test_deepcluster_networks_have_the_published_shapes(
    name: str, inputs: int, num_convolutions: int, num_parameters: float
) -> None:
    with torch.device("meta"):
        network = build_backbone(BackboneConfig(name=name, sobel=True)).eval()
        features = network(torch.empty(2, 3, 224, 224))
        last_map = network[1].features(torch.empty(1, 2, 224, 224))
    assert features.shape == (2, 4096)
    first_linear = next(m for m in network.modules() if isinstance(m, nn.Linear))
    assert first_linear.in_features == inputs
    assert network.ends_before_relu
    assert len(convolutions(network)) == num_convolutions
    assert convolutions(network)[0].in_channels == 2
    found_parameters = sum(p.numel() for p in network.parameters())
    assert found_parameters == pytest.approx(num_parameters, rel=0.03)
    pool = next(m for m in network.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    assert last_map.shape[2] == pool.output_size, "the last pool is the identity at 224 px"


def test_deepcluster_networks_start_as_released_and_take_small_images() -> None:
    torch.manual_seed(0)
    network = build_backbone(BackboneConfig(name="alexnet_bn")).eval()
    assert network(torch.randn(1, 3, 64, 64)).min() < 0, "features come before the ReLU"
    first, last = network.features.conv1[0], network.hidden[-1]
    conv_std = (2 / (11 * 11 * 96)) ** 0.5
    assert float(first.weight.detach().std()) == pytest.approx(conv_std, rel=0.05)
    assert float(last.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert not first.bias.any()
    assert not last.bias.any()


@pytest.mark.parametrize("name, smallest", [("alexnet_bn", 63), ("vgg16_deep", 32)])
def test_deepcluster_networks_name_the_smallest_image(name: str, smallest: int) -> None:
    message = f"images of {smallest - 1} px .* allowed: {smallest} px or more"
    with torch.device("meta"):
        network = build_backbone(BackboneConfig(name=name)).eval()
        assert network(torch.empty(2, 3, smallest, smallest)).shape == (2, 4096)
        with pytest.raises(ValueError, match=message):
            network(torch.empty(2, 3, smallest - 1, smallest))
        # PyTorch's own error begins at exactly this size.
        with pytest.raises(RuntimeError):
            network.features(torch.empty(2, 3, smallest - 1, smallest - 1))
