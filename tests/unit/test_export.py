"""An exported model loads by the lines of docs/predict.md, literally, and says what the run's own model says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_scan.__main__ import main
from dist_scan.models.backbone import BackboneConfig, build_backbone
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.layers import FeatureNorm

DOCS = Path(__file__).resolve().parents[2] / "docs" / "predict.md"
SETTINGS = "name: made\nseed: 3\ndata: {train: {source: gone}, size: 64, resolution: 72, mean: [0.4, 0.5, 0.6], std: [0.2, 0.2, 0.3]}\nstages: {}\n"


def finished(folder: Path, normalise: str, clusters: int, **backbone) -> ClusterModel:
    """A run's folder as a finished one leaves it, with one cluster model of random weights."""
    torch.manual_seed(0)
    config = BackboneConfig(**backbone)
    network = build_backbone(config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    dim = network.num_features
    norm = FeatureNorm(
        normalise,
        dim,
        torch.randn(dim).numpy() if normalise == "standardise" else None,
        0.5 + torch.rand(dim).numpy() if normalise == "standardise" else None,
    )
    head = nn.Linear(dim, clusters)
    if normalise == "l2":
        head.weight.data.normal_(0, 5)  # features of unit length: else all clusters are alike
    model = ClusterModel(network, norm, head, config).eval()
    stage = folder / "stages" / "heads" / "0123456789abcdef"
    save_cluster_model(stage, model)
    (stage / "manifest.json").write_text(
        json.dumps(
            {
                "kind": "train",
                "config": {"method": {"kind": "scan"}},
                "inputs": {},
                "fingerprint": stage.name,
            }
        )
    )
    (folder / "config.yaml").write_text(SETTINGS)
    (folder / "DONE").write_text("")
    return model


def run_lines(lines: list[str], images) -> torch.Tensor:
    """What a user would type, in the exported folder."""
    import safetensors.torch  # noqa: F401
    import timm

    import dist_scan.models.cluster_model  # noqa: F401

    names = {
        "timm": timm,
        "torch": torch,
        "safetensors": safetensors,
        "dist_scan": dist_scan,
        "images": images,
    }
    with torch.no_grad():
        exec("\n".join(lines), names)  # noqa: S102
    return names["probability"]


def check(model, lines, size=64) -> None:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).softmax(1)
    assert (expected.max(1).values > 1.5 / expected.shape[1]).any()  # not all alike
    torch.testing.assert_close(run_lines(lines, images), expected, rtol=1e-4, atol=1e-6)


def test_the_three_lines_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = finished(tmp_path / "run", "standardise", 1000, name="resnet50")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path / "out")
    lines = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)[1].strip().splitlines()
    assert len(lines) == 3
    facts = json.loads(Path("model.json").read_text())
    assert facts["load"] == lines and all(line in capsys.readouterr().out for line in lines[:1])
    check(model, lines)
    assert (
        facts["input"]["size"] == 64
        and facts["input"]["resize_shorter_side"] == 72
        and facts["input"]["mean"] == [0.4, 0.5, 0.6]
    )
    assert (
        facts["backbone"] == "resnet50"
        and facts["normalise"] == "standardise"
        and facts["num_clusters"] == 1000
    )
    assert (
        facts["provenance"]["run"] == "made"
        and facts["provenance"]["stage"] == "heads"
        and facts["provenance"]["seed"] == 3
    )


@pytest.mark.parametrize(
    ("normalise", "backbone"),
    [
        ("none", dict(name="resnet18", stem="cifar")),
        ("l2", dict(name="resnet18", stem="stl")),
        ("standardise", dict(name="resnet10t")),
        ("l2", dict(name="vit_tiny_patch16_224")),
        ("standardise", dict(name="resnet_small", width=4)),
    ],
)
def test_the_lines_in_the_json_load_it(
    normalise, backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finished(tmp_path / "run", normalise, 5, **backbone)
    size = 224 if "vit" in backbone["name"] else 64
    (tmp_path / "run" / "config.yaml").write_text(SETTINGS.replace("size: 64", f"size: {size}"))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path / "out")
    check(model, json.loads(Path("model.json").read_text())["load"], size)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "run", "none", 5, name="resnet_small", width=4)
    (tmp_path / "there").mkdir()
    for words, expected in (
        (["run", "there"], "exists; give a folder that does not"),
        (["nowhere", "out"], "is not a run folder"),
        (["run", "out", "--stage", "pretext"], "allowed: --stage heads"),
    ):
        assert main(["export", str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:]]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "run" / "DONE").unlink()
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
        and "is not finished" in capsys.readouterr().err
    )
