"""What methods that train heads share: features, selection after an epoch, publication."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dist_scan.data.batch import HeldOut
from dist_scan.heads.linear import ClusterHeads
from dist_scan.heads.products import as_one_tensor
from dist_scan.heads.selection import HeadSelection, number_or_none
from dist_scan.models.backbone import BackboneConfig
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.layers import FeatureNorm, Normalise


class HeadFeatures(nn.Module):
    """Views -> normalised features [B, D].

    A view is images, which go through the network, or rows of a feature table (backbone None). A
    network that is not trained stays in eval mode and gets no gradient.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        dim: int,
        normalise: Normalise,
        mean: np.ndarray | None,
        std: np.ndarray | None,
        trained: bool,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(
                "heads need features of a known width: give a backbone, or a feature table"
            )
        if normalise == "standardise" and (mean is None or std is None):
            raise ValueError(
                "normalise: 'standardise' needs the mean and standard deviation of a feature "
                "table; allowed on images: none, l2"
            )
        self.trained = trained
        self.norm = FeatureNorm(normalise, dim, mean, std)
        self.backbone = None if backbone is None else backbone.requires_grad_(trained)

    def train(self, mode: bool = True) -> HeadFeatures:
        super().train(mode)
        if self.backbone is not None and not self.trained:
            self.backbone.eval()
        return self

    def forward(self, view: Tensor) -> Tensor:
        if self.backbone is not None:
            with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
                view = self.backbone(view)
        return self.norm(view)

    def pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Features of two views. Cached features that are halves of one tensor stay so."""
        both = as_one_tensor(first, second) if self.backbone is None else None
        if both is None:
            return self(first), self(second)
        first, second = self.norm(both).chunk(2)
        return first, second


class BestNetwork(nn.Module):
    """Copy of a network at the selected epoch, in buffers (so that checkpoints contain it)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, tensor in network.state_dict().items():
            self.register_buffer(_buffer_name(name), tensor.detach().clone())

    @torch.no_grad()
    def save(self, network: nn.Module) -> None:
        """Copy the network's weights into the buffers."""
        for name, tensor in network.state_dict().items():
            getattr(self, _buffer_name(name)).copy_(tensor)

    def restore(self, network: nn.Module) -> None:
        """Load the saved weights into the network."""
        names = network.state_dict()
        network.load_state_dict({name: getattr(self, _buffer_name(name)) for name in names})


def _buffer_name(name: str) -> str:
    """A buffer's name may not contain dots."""
    return name.replace(".", "__")


def select_epoch(
    epoch: int,
    heads: ClusterHeads,
    selection: HeadSelection,
    features: HeadFeatures,
    held_out: HeldOut | None,
    last_features: Tensor | None,
) -> tuple[dict[str, float], bool]:
    """Update the selection after an epoch. Collective. Returns (what to log, whether it improved).

    last_features: of the last step, to check for divergence. Raises ValueError if the heads have
    diverged (`HeadSelection.check_divergence`).
    """
    metrics: dict[str, float] = {}
    if last_features is not None:
        metrics = selection.check_divergence(heads, last_features)
    if held_out is None:
        selection.keep_newest(epoch, heads)
        return metrics, True
    device = heads.weight.device
    parts = [features(batch.views[0].to(device)) for batch in held_out.batches()]
    rows = torch.cat(parts) if parts else heads.weight.new_zeros(0, heads.weight.shape[1])
    held_out_metrics, is_best = selection.update(epoch, heads, rows, held_out.neighbours)
    return metrics | held_out_metrics, is_best


def publish_heads(
    out: Path,
    selection: HeadSelection,
    features: HeadFeatures,
    backbone: nn.Module | None,
    backbone_config: BackboneConfig | None,
) -> None:
    """Write the selected head of the first group as a cluster model, and all heads."""
    model = ClusterModel(backbone, features.norm, selection.selected_head(), backbone_config)
    save_cluster_model(
        out,
        model,
        best_head=int(selection.best_head[0]),
        best_epoch=int(selection.best_epoch[0]),
        held_out_loss=number_or_none(selection.best_loss[0]),
    )
    selection.publish(out)
