"""SCAN: an image and its neighbour belong to one cluster, and all clusters are used.

Van Gansbeke et al., SCAN: Learning to Classify Images without Labels, ECCV 2020: Sec. 2.2 and Eq. 2
(loss). ``ScanMethod.forward`` computes the loss by ``scan_heads_loss`` of ``heads/autograd.py``,
which has the formula; its readable form is ``losses.scan_loss``. The draw of a neighbour, and the
released code's self-pairs, are settings of the train stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.heads.autograd import scan_heads_loss
from dist_scan.heads.features import BestNetwork
from dist_scan.heads.linear import NumClusters, head_sizes
from dist_scan.heads.split_clusters import scan_clusters_loss
from dist_scan.losses import ScanTerms
from dist_scan.methods._heads import HeadsMethod
from dist_scan.methods.base import MethodInputs, NetworkConfig, StepResult
from dist_scan.models.layers import Normalise
from dist_scan.world.world import current

SHARDED_STATE = ("heads.weight", "heads.bias", "selection.best_weight", "selection.best_bias")
"""State of which a rank holds only some rows, if heads or clusters are split over ranks."""


class ScanConfig(NetworkConfig):
    """The defaults are for small sets; ImageNet: num_heads 10, train_backbone false."""

    kind: Literal["scan"] = "scan"
    num_clusters: NumClusters
    """One number, or several ([500, 1000, 2000]): num_heads heads of each. Later stages use the
    first by default."""
    num_heads: int = Field(default=1, ge=1)
    entropy_weight: float = Field(default=5.0, ge=0)
    """Weight lambda of the entropy in Eq. 2, for training. Heads and epochs are selected with
    weight 1, as in the released code."""
    normalise: Normalise = "standardise"
    """Normalisation of the features. The learning rate depends on their scale: 30 on raw ResNet-50
    features is not 30 on standardised ones."""
    train_backbone: bool = True
    """On images: train the network too (small sets); false: only the heads, with the network in
    eval mode (ImageNet)."""

    def partitionable_heads(self) -> tuple[int, ...]:
        """All heads: they, and the clusters of one head, can be split over ranks."""
        return head_sizes(self.num_clusters, self.num_heads)


class ScanMethod(HeadsMethod):
    """Linear heads on features of a frozen network or of one that is trained with them.

    A trained network is published as it was at the selected epoch.
    """

    Config = ScanConfig
    config: ScanConfig

    def __init__(self, config: ScanConfig, inputs: MethodInputs) -> None:
        trains_backbone = config.train_backbone and not inputs.on_features
        if trains_backbone and not isinstance(config.num_clusters, int):
            raise ValueError(
                f"num_clusters: {list(config.num_clusters)} with a trained network: each number "
                "would select its own epoch; give one number, or set train_backbone: false"
            )
        super().__init__(
            config,
            inputs,
            config.num_clusters,
            config.num_heads,
            config.normalise,
            trains_backbone,
        )
        self.best_network = BestNetwork(inputs.network(config)) if trains_backbone else None
        if self.heads.row_sharding is not None:
            self.sharded_state = dict.fromkeys(SHARDED_STATE, self.heads.row_sharding)

    def forward(self, batch: Batch) -> StepResult:
        # Features of the images and of one random neighbour of each.
        anchors, neighbours = self.features.pair(batch.views[0], batch.views[-1])
        self.last_features = self._local_rows(anchors.detach())
        # Eq. 2 for every head: -mean log <p, q> - entropy_weight * H(mean p), with p and q the
        # softmax of anchor and neighbour. Heads are independent, so their losses are summed.
        terms = self._loss_terms(anchors, neighbours)
        loss = terms.total.sum()
        num_parts = 1
        if self.heads.partition == "heads":
            # Ranks have different heads: the mean of their losses must be the sum over all heads,
            # with the gradient of this rank's own sum.
            num_parts = current().world_size
            loss = loss + (num_parts - 1) * loss.detach()
        # Log total, consistency and entropy, each as the mean over heads; the training loop logs
        # the sum of the totals as `loss`.
        metrics = {
            name: value.detach().sum() * num_parts / len(self.heads.sizes)
            for name, value in terms._asdict().items()
        }
        return StepResult(loss, metrics)

    def _local_rows(self, features_BD: Tensor) -> Tensor:
        """This rank's rows, also if every rank has the whole global batch."""
        if self.heads.partition == "batch":
            return features_BD
        return features_BD.tensor_split(current().world_size)[current().rank]

    def _loss_terms(self, anchors_BD: Tensor, neighbours_BD: Tensor) -> ScanTerms:
        """Terms [H] of Eq. 2, for this rank's part of the batch, the heads or their clusters."""
        heads, entropy_weight = self.heads, self.config.entropy_weight
        if heads.partition == "clusters":
            return scan_clusters_loss(
                anchors_BD,
                neighbours_BD,
                heads.weight,
                heads.bias,
                heads.sizes,
                heads.local_sizes,
                entropy_weight,
            )
        return scan_heads_loss(
            anchors_BD,
            neighbours_BD,
            heads.weight,
            heads.bias,
            [size for size in heads.local_sizes if size > 0],
            entropy_weight,
            whole_batch=heads.partition == "heads",
        )

    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        # Select head and epoch by the held-out loss; store the network of the best epoch.
        metrics, is_best = self.select(epoch, self.heads, held_out)
        if is_best and self.best_network is not None:
            assert self.features.backbone is not None
            self.best_network.save(self.features.backbone)
        return metrics

    def prepare_publish(self) -> None:
        self.selection.gather()

    def publish(self, out: Path) -> None:
        if self.best_network is not None:
            assert self.features.backbone is not None
            self.best_network.restore(self.features.backbone)
        super().publish(out)
