"""An exported model, loaded by the lines of docs/predict.md, predicts what the run's model does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_scan.__main__ import main
from dist_scan.models.backbone import BackboneConfig, build_backbone
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.layers import FeatureNorm, Normalise
from tests.support.launches import ROOT

DOCS = ROOT / "docs" / "predict.md"
SETTINGS = """
name: made
seed: 3
data:
  train: {source: gone}
  size: 64
  resolution: 72
  mean: [0.4, 0.5, 0.6]
  std: [0.2, 0.2, 0.3]
stages: {}
"""
MANIFEST = {
    "kind": "train",
    "config": {"method": {"kind": "scan"}},
    "inputs": {},
    "fingerprint": "0123456789abcdef",
}


def write_finished_run(
    folder: Path, normalise: Normalise, num_clusters: int, backbone: dict[str, Any]
) -> ClusterModel:
    """The folder of a finished run with one cluster model, of random weights."""
    torch.manual_seed(0)
    config = BackboneConfig(**backbone)
    network = build_backbone(config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    dim = network.num_features
    mean, std = torch.randn(dim).numpy(), 0.5 + torch.rand(dim).numpy()
    is_standardised = normalise == "standardise"
    norm = FeatureNorm(normalise, dim, *((mean, std) if is_standardised else ()))
    head = nn.Linear(dim, num_clusters)
    if normalise == "l2":
        # Features have unit length: with small weights all probabilities would be alike.
        nn.init.normal_(head.weight, 0, 5)
    model = ClusterModel(network, norm, head, config).eval()
    stage = folder / "stages" / "heads" / MANIFEST["fingerprint"]
    save_cluster_model(stage, model)
    (stage / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "config.yaml").write_text(SETTINGS)
    (folder / "stages.json").write_text(json.dumps({"heads": MANIFEST["fingerprint"]}))
    (folder / "DONE").write_text("")
    return model


def probability_by(lines: list[str], images: Tensor) -> Tensor:
    """The result of Python lines that a user would type in the exported folder."""
    import safetensors.torch
    import timm

    import dist_scan.models.cluster_model

    names = {
        "timm": timm,
        "torch": torch,
        "safetensors": safetensors,
        "dist_scan": dist_scan,
        "images": images,
    }
    with torch.no_grad():
        exec("\n".join(lines), names)
    return names["probability"]


def check_equal(model: ClusterModel, lines: list[str], size: int = 64) -> None:
    """The lines give the probabilities of the run's model."""
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).softmax(1)
    num_clusters = expected.shape[1]
    assert (expected.max(1).values > 1.5 / num_clusters).any(), "the probabilities are all alike"
    torch.testing.assert_close(probability_by(lines, images), expected, rtol=1e-4, atol=1e-6)


def test_the_lines_of_the_documentation_load_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_finished_run(tmp_path / "run", "standardise", 1000, {"name": "resnet50"})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path / "out")
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert found is not None
    lines = found[1].strip().splitlines()
    assert len(lines) == 3
    check_equal(model, lines)
    assert lines[0] in capsys.readouterr().out
    description = json.loads(Path("model.json").read_text())
    assert description["load"] == lines
    assert description["backbone"] == "resnet50"
    assert description["normalise"] == "standardise"
    assert description["num_clusters"] == 1000
    assert description["input"]["size"] == 64
    assert description["input"]["resize_shorter_side"] == 72
    assert description["input"]["mean"] == [0.4, 0.5, 0.6]
    expected = {"run": "made", "seed": 3, "stage": "heads"}
    assert expected.items() <= description["provenance"].items()


@pytest.mark.parametrize(
    ("normalise", "backbone", "size"),
    [
        ("none", {"name": "resnet18", "stem": "cifar"}, 64),
        ("l2", {"name": "resnet18", "stem": "stl"}, 64),
        ("standardise", {"name": "resnet10t"}, 64),
        ("l2", {"name": "vit_tiny_patch16_224"}, 224),
        ("standardise", {"name": "resnet_small", "width": 4}, 64),
    ],
)
def test_the_lines_in_model_json_load_the_model(
    normalise: Normalise,
    backbone: dict[str, Any],
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    model = write_finished_run(run, normalise, 5, backbone)
    (run / "config.yaml").write_text(SETTINGS.replace("size: 64", f"size: {size}"))
    assert main(["export", str(run), str(out)]) == 0
    monkeypatch.chdir(out)
    check_equal(model, json.loads((out / "model.json").read_text())["load"], size)


def test_errors_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    write_finished_run(tmp_path / "run", "none", 5, {"name": "resnet_small", "width": 4})
    (tmp_path / "existing").mkdir()
    for arguments, message in (
        ([run, str(tmp_path / "existing")], "exists; give a folder that does not"),
        ([str(tmp_path / "nowhere"), out], "is not a run folder"),
        ([run, out, "--stage", "pretext"], "allowed: --stage heads"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run" / "DONE").unlink()
    assert main(["export", run, out]) == 2
    assert "is not finished" in capsys.readouterr().err
