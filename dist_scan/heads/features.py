"""What methods that train heads share: features from a frozen or trained network or from a table,
and what is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_scan.data.batch import HeldOut
from dist_scan.heads.linear import ClusterHeads
from dist_scan.heads.products import as_one_tensor
from dist_scan.heads.selection import HeadSelection, number_or_none
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.layers import FeatureNorm, Normalise


class HeadFeatures(nn.Module):
    """Views -> features [B, D] as the heads see them: images through the network (in eval mode and
    without gradient unless it is trained), rows of a feature table as they are; then the
    normalisation.
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
                "normalise: 'standardise' needs the mean and standard deviation of a feature table; allowed on images: none, l2"
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
        """Both views' features; cached ones that lie one above the other stay so."""
        both = as_one_tensor(first, second) if self.backbone is None else None
        return (self(first), self(second)) if both is None else self.norm(both).chunk(2)


class BestNetwork(nn.Module):
    """A trained network as it was at the chosen epoch, as buffers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, tensor in network.state_dict().items():
            self.register_buffer(name.replace(".", "__"), tensor.detach().clone())

    @torch.no_grad()
    def save(self, network: nn.Module) -> None:
        """Keep it as it is now."""
        for name, tensor in network.state_dict().items():
            getattr(self, name.replace(".", "__")).copy_(tensor)

    def restore(self, network: nn.Module) -> None:
        """Load what was kept into it."""
        network.load_state_dict(
            {name: getattr(self, name.replace(".", "__")) for name in network.state_dict()}
        )


def select_epoch(
    epoch: int,
    heads: ClusterHeads,
    choice: HeadSelection,
    features: HeadFeatures,
    held_out: HeldOut | None,
    last: Tensor | None,
) -> tuple[dict[str, float], bool]:
    """(what to log, whether this epoch is kept) after an epoch. Collective; `last`: features of
    the last step, for the check.

    Raises ValueError when the heads have diverged (see HeadSelection.check)."""
    values = {} if last is None else choice.check_divergence(heads, last)
    if held_out is None:
        choice.keep_newest(epoch, heads)
        return values, True
    device = heads.weight.device
    mine = [features(b.views[0].to(device)) for b in held_out.batches()]
    rows = torch.cat(mine) if mine else heads.weight.new_zeros(0, heads.weight.shape[1])
    chosen, better = choice.update(epoch, heads, rows, held_out.neighbours)
    return {**values, **chosen}, better


def publish_heads(
    out: Path,
    choice: HeadSelection,
    features: HeadFeatures,
    backbone: nn.Module | None,
    backbone_config: Any,
) -> None:
    """The chosen head as a cluster model (of the first number of clusters), and all heads as they
    were kept.
    """
    head = choice.selected_head()
    save_cluster_model(
        out,
        ClusterModel(backbone, features.norm, head, backbone_config),
        best_head=int(choice.best_head[0]),
        best_epoch=int(choice.best_epoch[0]),
        held_out_loss=number_or_none(choice.best_loss[0]),
    )
    choice.publish(out)
