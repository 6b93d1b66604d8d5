"""Parts that SCAN and TEMI share: linear heads on features, their selection and publication."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dist_scan.data.batch import HeldOut
from dist_scan.heads.features import HeadFeatures
from dist_scan.heads.linear import ClusterHeads, NumClusters
from dist_scan.heads.selection import HeadSelection, number_or_none
from dist_scan.methods.base import Method, MethodConfig, MethodInputs
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.layers import Normalise


class HeadsMethod(Method):
    """Trains several linear heads at once on features of images and their neighbours.

    For each number of clusters, the head and epoch with the lowest held-out loss are published;
    without held-out rows the first head of the last epoch.
    """

    recipes = ("simclr", "simclr")
    publishes = ("model",)
    uses_neighbours = True

    def __init__(
        self,
        config: MethodConfig,
        inputs: MethodInputs,
        num_clusters: NumClusters,
        num_heads: int,
        normalise: Normalise,
        trains_backbone: bool = False,
    ) -> None:
        super().__init__(config, inputs)
        self.features = HeadFeatures(
            None if inputs.on_features else inputs.backbone,
            inputs.feature_dim,
            normalise,
            inputs.feature_mean,
            inputs.feature_std,
            trains_backbone,
        )
        self.heads = ClusterHeads(
            inputs.feature_dim, num_clusters, num_heads, inputs.head_partition
        )
        self.selection = HeadSelection(self.heads)
        # Features of the last step, for `check_health` after the epoch; not saved.
        self.last_features: Tensor | None = None

    def select(
        self, epoch: int, heads: ClusterHeads, held_out: HeldOut | None
    ) -> tuple[dict[str, float], bool]:
        """Update the selection after an epoch. Collective.

        Returns what to log, and whether the epoch is the best so far. Raises ValueError if the
        heads have diverged or collapsed (``HeadSelection.check_health``).
        """
        # Check for divergence and collapse on the features of the last step.
        metrics: dict[str, float] = {}
        if self.last_features is not None:
            metrics = self.selection.check_health(heads, self.last_features)
            self.last_features = None
        # Without held-out rows the newest epoch is the best.
        if held_out is None:
            self.selection.keep_newest(epoch, heads)
            return metrics, True
        # Features of this rank's held-out rows, and the held-out loss of all heads.
        device = heads.weight.device
        parts = [self.features(batch.views[0].to(device)) for batch in held_out.batches()]
        rows = torch.cat(parts) if parts else heads.weight.new_zeros(0, heads.weight.shape[1])
        held_out_metrics, is_best = self.selection.update(epoch, heads, rows, held_out.neighbours)
        return metrics | held_out_metrics, is_best

    def publish(self, out: Path) -> None:
        """Write the selected head of the first number of clusters as a model, and all heads."""
        backbone, config = self.inputs.backbone, self.inputs.backbone_config
        head = self.selection.selected_head()
        save_cluster_model(
            out,
            ClusterModel(backbone, self.features.norm, head, config),
            best_head=int(self.selection.best_head[0]),
            best_epoch=int(self.selection.best_epoch[0]),
            held_out_loss=number_or_none(self.selection.best_loss[0]),
        )
        self.selection.publish(out)
