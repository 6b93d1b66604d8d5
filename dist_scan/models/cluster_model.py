"""A cluster model: backbone, feature normalisation and one linear head; what SCAN and self-labelling publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_scan.models.backbone import (
    BackboneConfig,
    build_backbone,
    plain,
)
from dist_scan.models.layers import FeatureNorm, Normalise
from dist_scan.storage.atomic import write_json
from dist_scan.storage.tensors import load_tensors, save_tensors


class ClusterModel(nn.Module):
    """images [B, 3, S, S] -> logits [B, num_clusters]. backbone may be None: features only."""

    def __init__(
        self,
        backbone: nn.Module | None,
        norm: FeatureNorm,
        head: nn.Linear,
        backbone_config: BackboneConfig | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.norm, self.head, self.backbone_config = (
            backbone,
            norm,
            head,
            backbone_config,
        )

    @property
    def num_clusters(self) -> int:
        return self.head.out_features

    def from_features(self, features: Tensor) -> Tensor:
        """Features [B, D], as the backbone makes them -> logits [B, num_clusters], in fp32 or better also under autocast: bf16 logits
        are off by 8e-2, and self-labelling asks whether a probability is above 0.99."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(self.norm(features).to(self.head.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        if self.backbone is None:
            raise ValueError(
                "this cluster model was made from a feature table without a backbone: it takes features (from_features); "
                "give the heads stage `backbone:` to publish one that takes images"
            )
        return self.from_features(self.backbone(images))


def save_cluster_model(out_dir: Path, model: ClusterModel, **facts: Any) -> None:
    """Write cluster.safetensors (backbone.*, norm.*, head.*) and cluster.json into out_dir. facts: whatever else is known (JSON)."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    config = model.backbone_config if model.backbone is not None else None
    if model.backbone is not None and config is None:
        raise ValueError(
            "a cluster model with a backbone needs its backbone_config, or nobody can load it again"
        )
    save_tensors(out_dir / "cluster.safetensors", model.state_dict())
    write_json(
        out_dir / "cluster.json",
        {
            **facts,
            "backbone": None if config is None else plain(config).model_dump(mode="json"),
            "normalise": model.norm.kind,
            "num_clusters": model.num_clusters,
            "feature_dim": model.head.in_features,
        },
    )


def add_facts(out_dir: Path, **facts: Any) -> None:
    """More facts (JSON) into the cluster.json of a folder, such as `input` and `provenance`; nothing when it holds no cluster model."""
    file = Path(out_dir) / "cluster.json"
    if file.is_file():
        write_json(file, json.loads(file.read_text()) | facts)


def load_cluster_model(path: Path) -> ClusterModel:
    """What save_cluster_model wrote. Raises ValueError when the folder holds none."""
    path = Path(path)
    if not (path / "cluster.json").is_file():
        raise ValueError(
            f"{path} holds no cluster model (no cluster.json); name a stage that trains scan or selflabel"
        )
    facts = json.loads((path / "cluster.json").read_text())
    config = BackboneConfig.model_validate(facts["backbone"]) if facts["backbone"] else None
    normalise: Normalise = facts["normalise"]
    model = ClusterModel(
        build_backbone(config) if config else None,
        FeatureNorm(normalise, facts["feature_dim"]),
        nn.Linear(facts["feature_dim"], facts["num_clusters"]),
        config,
    )
    model.load_state_dict(load_tensors(path / "cluster.safetensors"))
    return model
