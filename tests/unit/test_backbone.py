"""Backbones and the weights they take from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from dist_scan.models.backbone import BackboneConfig, build_backbone, load_backbone, save_backbone


@pytest.mark.parametrize(
    ("config", "size", "dim"),
    [
        (dict(name="resnet_small", width=8), 16, 32),
        (dict(name="resnet18", stem="cifar"), 32, 512),
        (dict(name="resnet18", stem="stl"), 96, 512),
        (dict(name="resnet10t"), 32, 512),
    ],
)
def test_features_have_the_promised_width(config, size, dim) -> None:
    network = build_backbone(BackboneConfig(**config)).eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, dim) and network.num_features == dim


def test_stems_keep_the_published_resolution() -> None:
    sizes = {}
    for stem, size in (("cifar", 32), ("stl", 96), ("imagenet", 224)):
        network = build_backbone(BackboneConfig(name="resnet18", stem=stem)).eval()
        network.layer4.register_forward_hook(
            lambda m, i, o, stem=stem: sizes.update({stem: o.shape[-1]})
        )
        network(torch.randn(1, 3, size, size))
    assert sizes == {"cifar": 4, "stl": 7, "imagenet": 7}


def prefixed(prefix: str) -> dict:
    return {prefix + k: v for k, v in resnet18().state_dict().items()}


FILES = {
    "moco-cleaned": lambda: {"state_dict": prefixed("module.encoder_q.")},
    "moco-full": lambda: {
        "epoch": 3,
        "arch": "resnet18",
        "optimizer": {"state": {}},
        "state_dict": {
            **prefixed("module.encoder_k."),
            **prefixed("module.encoder_q."),
            "module.queue": torch.randn(8, 4),
            "module.queue_ptr": torch.zeros(1),
        },
    },
    "scan": lambda: {
        "model": {
            **{
                k.replace("downsample", "shortcut"): v
                for k, v in prefixed("backbone.").items()
                if ".fc." not in k
            },
            "cluster_head.0.weight": torch.randn(3, 512),
        },
        "head": 0,
    },
    "bare": lambda: {**prefixed("backbone."), "contrastive_head.0.weight": torch.randn(3, 512)},
    "plain": lambda: prefixed(""),
}


@pytest.mark.parametrize("kind", FILES)
def test_checkpoints_of_others_load(kind, tmp_path: Path) -> None:
    torch.manual_seed(5)
    tree = FILES[kind]()
    torch.save(tree, tmp_path / "w.pth")
    network = build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "w.pth")))
    flat = tree.get("state_dict") or tree.get("model") or tree
    wanted = (
        next(
            v
            for k, v in flat.items()
            if k.endswith("layer2.0.downsample.0.weight") and "encoder_k" not in k
        )
        if kind != "scan"
        else flat["backbone.layer2.0.shortcut.0.weight"]
    )
    assert torch.equal(network.layer2[0].downsample[0].weight, wanted)


def test_safetensors_load_and_misfits_say_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(resnet18().state_dict(), path)
    build_backbone(BackboneConfig(name="resnet18", checkpoint=str(path)))
    with pytest.raises(
        ValueError, match=r"conv1.weight \[64, 3, 7, 7\] instead of \[64, 3, 3, 3\].*stem"
    ):
        build_backbone(BackboneConfig(name="resnet18", stem="cifar", checkpoint=str(path)))
    with pytest.raises(ValueError, match="missing .*layer1.2.conv1.weight"):
        build_backbone(BackboneConfig(name="resnet34", checkpoint=str(path)))
    torch.save({"weights": "none"}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "x.pth")))
    (tmp_path / "y.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        build_backbone(BackboneConfig(name="resnet18", checkpoint=str(tmp_path / "y.pth")))


def test_saved_and_loaded_is_the_same_network(tmp_path: Path) -> None:
    config = BackboneConfig(name="resnet_small", width=4)
    network = build_backbone(config).eval()
    save_backbone(tmp_path, network, config)
    again, found = load_backbone(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    assert found == config and torch.equal(again.eval()(x), network(x))


def test_unknown_names_are_answered_with_a_near_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'resnet50'"):
        BackboneConfig(name="resnet-50")


def test_vgg_small_is_mmdcs_network_for_mnist() -> None:
    network = build_backbone(BackboneConfig(name="vgg_small", width=32)).eval()
    convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convs] == [32, 64, 128, 256] and all(
        c.kernel_size == (3, 3) and c.bias is None for c in convs
    )
    assert network.num_features == 1024 and network(torch.randn(2, 3, 32, 32)).shape == (2, 1024)
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
def test_sobel_sees_edges_only_and_is_published(settings, tmp_path: Path) -> None:
    from dist_scan.models.backbone import load_backbone, save_backbone

    config = BackboneConfig(sobel=True, **settings)
    network = build_backbone(config).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = network(x)
        assert features.shape == (2, network.num_features)
        inside = network[0](x)
        assert (
            inside.shape == (2, 2, 32, 32)
            and next(m for m in network[1].modules() if isinstance(m, torch.nn.Conv2d)).in_channels
            == 2
        )
        swapped = network(x[:, [2, 0, 1]])
        torch.testing.assert_close(swapped, features, atol=1e-4, rtol=1e-3)  # colour is gone
        assert inside[:, :, 1:-1, 1:-1].abs().max() > 0
        torch.testing.assert_close(
            network[0](x + 1)[:, :, 1:-1, 1:-1], inside[:, :, 1:-1, 1:-1], atol=1e-4, rtol=0
        )  # and so is brightness
        save_backbone(tmp_path, network, config)
        torch.testing.assert_close(load_backbone(tmp_path)[0].eval()(x), features)


def test_sobel_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="sobel: pixels are a baseline"):
        build_backbone(BackboneConfig(name="pixels", sobel=True))


# --- SCAN's own files (FIDELITY.md 1.1), laid out as its released code saves them ---------------------------------------------


def scan_file(path, head, heads: int = 3, legacy: bool = False, **more):
    """{model, head}: ClusteringModel's state_dict with CIFAR shortcuts and `heads` heads of 7 clusters on 512 features."""
    import numpy as np

    torch.manual_seed(1)
    network = build_backbone(BackboneConfig(name="resnet18", stem="cifar"))
    state = {
        f"backbone.{k.replace('downsample', 'shortcut')}": v
        for k, v in network.state_dict().items()
    }
    for i in range(heads):
        state |= {
            f"cluster_head.{i}.weight": torch.randn(7, 512),
            f"cluster_head.{i}.bias": torch.randn(7),
        }
    tree = {"model": state, "head": np.int64(head), **more} if head is not None else state
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    if (
        legacy
    ):  # torch 1.4 with numpy 1: another container, and numpy's old module name in the pickle
        data = path.read_bytes()
        assert head is None or data.count(b"cnumpy._core.multiarray\n") == 1
        path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return network.eval(), state


@pytest.mark.parametrize("legacy", [False, True])
def test_a_scan_file_gives_its_backbone_and_its_best_head(legacy, tmp_path: Path) -> None:
    from dist_scan.models.import_weights import read_cluster_head

    _, state = scan_file(tmp_path / "model.pth.tar", 2, legacy=legacy)
    head = read_cluster_head(tmp_path / "model.pth.tar")
    assert (head.number, head.num_heads) == (2, 3) and torch.equal(
        head.weight, state["cluster_head.2.weight"]
    )
    assert torch.equal(
        read_cluster_head(tmp_path / "model.pth.tar", 0).bias, state["cluster_head.0.bias"]
    )
    network = build_backbone(
        BackboneConfig(
            name="resnet18",
            stem="cifar",
            checkpoint=str(tmp_path / "model.pth.tar"),
            checkpoint_kind="scan",
        )
    )
    assert torch.equal(
        network.layer2[0].downsample[0].weight, state["backbone.layer2.0.shortcut.0.weight"]
    )


def test_a_self_labelled_file_has_one_head_and_others_must_be_chosen(tmp_path: Path) -> None:
    from dist_scan.models.import_weights import read_cluster_head

    scan_file(tmp_path / "one.pth.tar", None, heads=1)
    assert read_cluster_head(tmp_path / "one.pth.tar").number == 0
    scan_file(tmp_path / "three.pth.tar", None)
    with pytest.raises(
        ValueError, match="does not say which head is best.*allowed: cluster_head: 0, 1, 2"
    ):
        read_cluster_head(tmp_path / "three.pth.tar")
    torch.save({"backbone.conv1.weight": torch.zeros(1)}, tmp_path / "none.pth.tar")
    with pytest.raises(ValueError, match="holds no cluster head"):
        read_cluster_head(tmp_path / "none.pth.tar")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    from dist_scan.models.import_weights import read_cluster_head

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    scan_file(tmp_path / "evil.pth.tar", 1, more=Evil())
    with pytest.raises(ValueError, match="cannot be read safely"):
        read_cluster_head(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "written").exists()


def test_the_given_stage_publishes_a_scan_file_as_pretext_and_as_model(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from dist_scan.models.cluster_model import load_cluster_model
    from dist_scan.stages.given import GivenConfig, GivenStage
    from dist_scan.world.world import World

    network, state = scan_file(tmp_path / "model.pth.tar", 1)
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
    said = []
    context = SimpleNamespace(
        world=World(),
        out=tmp_path / "out",
        name="scan",
        log=said.append,
        run=SimpleNamespace(data=data),
    )
    GivenStage(GivenConfig(backbone=backbone, cluster_head="best"), context).run()
    model, images = load_cluster_model(tmp_path / "out").eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = network(images) @ state["cluster_head.1.weight"].T + state["cluster_head.1.bias"]
        torch.testing.assert_close(model(images), expected)
        assert torch.equal(load_backbone(tmp_path / "out")[0].eval()(images), network(images))
    assert said == ["scan: head 1 of 3, 7 clusters"]
    config = GivenConfig(backbone=BackboneConfig(name="resnet18", stem="cifar"), cluster_head=1)
    with pytest.raises(ValueError, match="no backbone.checkpoint to take it from"):
        config.check("scan", {})


@pytest.mark.parametrize(
    "name, entering, convolutions, parameters",
    [("alexnet_bn", 9216, 5, 58e6), ("vgg16_deep", 25088, 13, 134e6)],
)
def test_deepcluster_networks_have_the_published_shapes(
    name, entering, convolutions, parameters
) -> None:
    with torch.device("meta"):
        network = build_backbone(BackboneConfig(name=name, sobel=True)).eval()
        features = network(torch.empty(2, 3, 224, 224))
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert (
        features.shape == (2, 4096)
        and linear[0].in_features == entering
        and network.ends_before_relu
    )
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == convolutions
    assert next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels == 2
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.03)
    grids = [m.output_size for m in network.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    with torch.device("meta"):
        assert (
            network[1].features(torch.empty(1, 2, 224, 224)).shape[2] == grids[0]
        )  # the pool before the linear layers does nothing at 224 px


def test_deepcluster_networks_start_as_released_and_take_small_images() -> None:
    torch.manual_seed(0)
    network = build_backbone(BackboneConfig(name="alexnet_bn")).eval()
    assert network(torch.randn(1, 3, 64, 64)).min() < 0  # before the ReLU
    first, last = network.features.conv1[0], network.hidden[-1]
    assert float(first.weight.detach().std()) == pytest.approx(
        (2 / (11 * 11 * 96)) ** 0.5, rel=0.05
    ) and float(last.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert not first.bias.any() and not last.bias.any()


@pytest.mark.parametrize("name, smallest", [("alexnet_bn", 63), ("vgg16_deep", 32)])
def test_deepcluster_networks_name_the_smallest_image(name, smallest) -> None:
    with torch.device("meta"):
        network = build_backbone(BackboneConfig(name=name)).eval()
        assert network(torch.empty(2, 3, smallest, smallest)).shape == (2, 4096)
        with pytest.raises(
            ValueError, match=f"images of {smallest - 1} px .* allowed: {smallest} px or more"
        ):
            network(torch.empty(2, 3, smallest - 1, smallest))
        with pytest.raises(RuntimeError):  # torch's own words begin exactly there
            network.features(torch.empty(2, 3, smallest - 1, smallest - 1))
