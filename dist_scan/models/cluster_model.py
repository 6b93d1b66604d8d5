"""A cluster model: backbone, feature normalisation and one linear head.

It is what SCAN, TEMI, MMDC and self-labelling publish.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_scan.models.backbone import BackboneConfig, build_backbone, without_checkpoint
from dist_scan.models.layers import FeatureNorm
from dist_scan.storage.atomic import write_json
from dist_scan.storage.tensors import load_tensors, save_tensors


class ClusterModel(nn.Module):
    """Images [B, 3, S, S] -> logits [B, num_clusters]; without a backbone, features only."""

    def __init__(
        self,
        backbone: nn.Module | None,
        norm: FeatureNorm,
        head: nn.Linear,
        backbone_config: BackboneConfig | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = norm
        self.head = head
        self.backbone_config = backbone_config

    @property
    def num_clusters(self) -> int:
        return self.head.out_features

    def from_features(self, features: Tensor) -> Tensor:
        """Features [B, D] of the backbone -> logits [B, num_clusters], in float32 or better.

        Also under autocast: bfloat16 logits are off by 8e-2, and self-labelling compares
        probabilities with 0.99.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self.head(self.norm(features).to(self.head.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        if self.backbone is None:
            raise ValueError(
                "this cluster model was trained on a feature table without a backbone: it takes "
                "features (from_features); give the heads stage `backbone:` to publish one that "
                "takes images"
            )
        return self.from_features(self.backbone(images))


def save_cluster_model(out_dir: Path, model: ClusterModel, **metadata: Any) -> None:
    """Write cluster.safetensors (backbone.*, norm.*, head.*) and cluster.json into out_dir.

    metadata: more entries for cluster.json.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    backbone_settings = None
    if model.backbone_config is not None:
        backbone_settings = without_checkpoint(model.backbone_config).model_dump(mode="json")
    save_tensors(out_dir / "cluster.safetensors", model.state_dict())
    write_json(
        out_dir / "cluster.json",
        {
            **metadata,
            "backbone": backbone_settings,
            "normalise": model.norm.kind,
            "num_clusters": model.num_clusters,
            "feature_dim": model.head.in_features,
        },
    )


def add_metadata(out_dir: Path, **metadata: Any) -> None:
    """Add entries to the cluster.json of a folder; no effect if it holds no cluster model."""
    file = out_dir / "cluster.json"
    if file.is_file():
        write_json(file, json.loads(file.read_text()) | metadata)


def load_cluster_model(path: Path) -> ClusterModel:
    """What `save_cluster_model` wrote. Raises ValueError if the folder holds none."""
    path = Path(path)
    if not (path / "cluster.json").is_file():
        raise ValueError(
            f"{path} holds no cluster model (no cluster.json); name a stage that trains scan or "
            "selflabel"
        )
    metadata = json.loads((path / "cluster.json").read_text())
    dim, num_clusters = metadata["feature_dim"], metadata["num_clusters"]
    config = BackboneConfig.model_validate(metadata["backbone"]) if metadata["backbone"] else None
    model = ClusterModel(
        build_backbone(config) if config else None,
        FeatureNorm(metadata["normalise"], dim),
        nn.Linear(dim, num_clusters),
        config,
    )
    model.load_state_dict(load_tensors(path / "cluster.safetensors"))
    return model
