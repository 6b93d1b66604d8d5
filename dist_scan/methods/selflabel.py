"""Self-labelling: a cluster model learns its own confident predictions on strongly augmented views.

Van Gansbeke et al., SCAN: Learning to Classify Images without Labels, ECCV 2020: Sec. 2.3 (loss,
stop at a plateau). The loss is ``losses.confident_cross_entropy``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.losses import confident_cross_entropy
from dist_scan.methods.base import Method, MethodInputs, NetworkConfig, StepResult
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.cluster_model import ClusterModel, load_cluster_model, save_cluster_model
from dist_scan.models.layers import MomentumCopy
from dist_scan.storage.atomic import write_json

MIN_USED_SHARE = 0.9
"""With a smaller share of clusters in use, the model may be collapsing."""


class SelfLabelConfig(NetworkConfig):
    """The paper's description and its released code differ about EMA: see ema_meaning."""

    kind: Literal["selflabel"] = "selflabel"
    threshold: float = Field(default=0.99, ge=0, lt=1)
    """The prediction of a weak view is a pseudo-label if its probability is above this."""
    class_balance: bool = True
    """Give every cluster in the batch the same weight (small sets: true; ImageNet: false)."""
    ema: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the moving average of the weights; null: no average."""
    ema_meaning: Literal["teacher", "released"] = "teacher"
    """teacher: the average makes the pseudo-labels and is published (the paper's idea). released:
    after each update the average replaces the trained network, which amounts to SGD with the
    learning rate times (1 - ema), and batch norm statistics stay as they were at the start."""
    plateau_epochs: int | None = Field(default=5, ge=1)
    """End training after this many epochs in a row in which the share of confident images has not
    risen by plateau_gain (the paper trains until their number plateaus, Sec. 2.3); null: train all
    epochs, as the released code does."""
    plateau_gain: float = Field(default=0.005, ge=0, lt=1)
    """Smallest rise that counts, as a share of the images seen in an epoch."""


class SelfLabelMethod(Method):
    """The first view is weakly, the second strongly augmented.

    A step without a confident image on any rank is skipped. Buffers count confident images per
    cluster: ``confident`` and ``seen`` in the current epoch, ``last_*`` in the last complete one.
    ``collapsing_epochs`` is the number of all epochs that looked like a collapse.
    """

    Config = SelfLabelConfig
    recipes = ("center", "randaugment")
    needs = ("images", "model")
    publishes = ("model",)
    config: SelfLabelConfig
    confident: Tensor
    seen: Tensor
    last_confident: Tensor
    last_seen: Tensor
    best_share: Tensor
    flat_epochs: Tensor
    collapsing_epochs: Tensor
    epochs: Tensor

    def __init__(self, config: SelfLabelConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.model = load_cluster_model(inputs.input_folders["model"])
        convert_batch_norm(self.model, config.bn_groups)
        self.teacher = self.ema_model = None
        if config.ema is not None and config.ema_meaning == "teacher":
            self.teacher = MomentumCopy(self.model, config.ema)
        if config.ema is not None and config.ema_meaning == "released":
            self.ema_model = MomentumCopy(self.model, config.ema)
        for name in ("confident", "last_confident"):
            self.register_buffer(name, torch.zeros(self.model.num_clusters, dtype=torch.int64))
        for name in ("seen", "last_seen", "flat_epochs", "collapsing_epochs", "epochs"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("best_share", torch.zeros((), dtype=torch.float64))

    def forward(self, batch: Batch) -> StepResult:
        weak, strong = batch.views
        # Pseudo-labels from the weak view, with batch norm in train mode as in the released code.
        labeller = self.model if self.teacher is None else self.teacher
        with torch.no_grad():
            weak_logits = labeller(weak)
        # Cross-entropy of the strong view to the confident pseudo-labels (Sec. 2.3).
        result = confident_cross_entropy(
            self.model(strong), weak_logits, self.config.threshold, self.config.class_balance
        )
        # Count here and not in end_step, which does not run in skipped steps.
        self.confident += result.per_cluster.long()
        self.seen += self.inputs.global_batch
        metrics = {
            "confident_share": result.num_confident / self.inputs.global_batch,
            "clusters_in_batch": (result.per_cluster > 0).sum(),
        }
        return StepResult(result.loss, metrics, skip=not bool(result.num_confident > 0))

    def end_step(self, batch: Batch, step: StepResult) -> None:
        if self.teacher is not None:
            self.teacher.update(self.model)
        if self.ema_model is not None:
            # Average the parameters, then load them and the initial buffers back into the model.
            self.ema_model.update(self.model)
            self.model.load_state_dict(self.ema_model.module.state_dict())

    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        # Move this epoch's counts to last_*.
        self.last_confident.copy_(self.confident)
        self.last_seen.copy_(self.seen)
        self.confident.zero_()
        self.seen.zero_()
        self.epochs += 1
        # Count the epochs of a plateau, and those that look like a collapse.
        share = self._confident_share()
        if share > float(self.best_share) + self.config.plateau_gain:
            self.best_share.fill_(share)
            self.flat_epochs.zero_()
        else:
            self.flat_epochs += 1
        self.collapsing_epochs += int(self._may_collapse())
        return {
            "confident_share": share,
            "clusters_used": self._used_share(),
            "largest_cluster": self._largest_share(),
        }

    def early_stop_reason(self) -> str:
        patience = self.config.plateau_epochs
        if patience is None or self.flat_epochs < patience:
            return ""
        return (
            f"the share of confident images has stayed at {self._confident_share():.1%} "
            f"(best {float(self.best_share):.1%}) for {patience} epochs; "
            "method.plateau_epochs: null trains all epochs"
        )

    def warning(self) -> str:
        if not self._may_collapse():
            return ""
        remedies = ["lower method.threshold"]
        if not self.config.class_balance:
            remedies.append("set method.class_balance: true")
        if self.config.ema is None:
            remedies.append("set method.ema")
        remedies.append("raise global_batch")
        return (
            f"self-labelling, epoch {int(self.epochs)}: {self._used_share():.0%} of the clusters "
            f"have confident images, the largest holds {self._largest_share():.0%} of them: the "
            f"model may be collapsing. In this stage, {', or '.join(remedies)}"
        )

    def _confident_share(self) -> float:
        """Share of the last epoch's images that were confident."""
        return float(self.last_confident.sum()) / max(int(self.last_seen), 1)

    def _used_share(self) -> float:
        """Share of the clusters that have a confident image."""
        return float((self.last_confident > 0).double().mean())

    def _largest_share(self) -> float:
        """Share of the confident images that are in the largest cluster."""
        return float(self.last_confident.max()) / max(int(self.last_confident.sum()), 1)

    def _may_collapse(self) -> bool:
        """True if clusters vanish or one of them takes most of the images."""
        largest_allowed = max(0.5, 5 / len(self.last_confident))
        return self._used_share() < MIN_USED_SHARE or self._largest_share() > largest_allowed

    def publish(self, out: Path) -> None:
        model = self.model if self.teacher is None else self.teacher.module
        assert isinstance(model, ClusterModel)
        save_cluster_model(out, model)
        write_json(
            out / "confident.json",
            {
                "threshold": self.config.threshold,
                "epoch": int(self.epochs),
                "images": int(self.last_seen),
                "confident_share": self._confident_share(),
                "per_cluster": self.last_confident.tolist(),
                "ended": self.early_stop_reason() or "after the last epoch",
                "collapsing_epochs": int(self.collapsing_epochs),
            },
        )
