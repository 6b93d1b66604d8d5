"""Self-labelling: a cluster model learns its own confident predictions on strongly augmented views (SCAN paper, Sec. 2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.losses import confident_cross_entropy
from dist_scan.methods.base import Method, MethodInputs, NetworkConfig, Step
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.cluster_model import load_cluster_model, save_cluster_model
from dist_scan.models.layers import MomentumCopy
from dist_scan.storage.atomic import write_json


class SelfLabelConfig(NetworkConfig):
    """The paper's words and the released code differ about EMA: see ema_meaning."""

    kind: Literal["selflabel"] = "selflabel"
    threshold: float = Field(default=0.99, ge=0, lt=1)
    """A weak view's prediction counts above this probability."""
    class_balance: bool = True
    """Each cluster present counts equally (small sets: on; ImageNet: off)."""
    ema: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the average of weights; null: none."""
    ema_meaning: Literal["teacher", "released"] = "teacher"
    """teacher: the average makes the pseudo-labels and is published (the paper's idea). released: after each update the trained
    network is replaced by the average, which is plain SGD at (1 - ema) times the learning rate with frozen batch norm buffers."""
    plateau_epochs: int | None = Field(default=5, ge=1)
    """End before the last epoch once so many epochs in a row have not raised the share of confident images by plateau_gain (the paper
    trains until their number plateaus, Sec. 2.3); null: always all epochs, as the released code does."""
    plateau_gain: float = Field(default=0.005, ge=0, lt=1)
    """Of all images seen in an epoch; less is a plateau."""


class SelfLabelMethod(Method):
    """Views: weak, strong. A step in which nobody is confident on any rank is skipped."""

    Config = SelfLabelConfig
    recipes = ("center", "randaugment")
    needs = ("images", "model")
    publishes = ("model",)

    def __init__(self, config: SelfLabelConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.model = convert_batch_norm(
            load_cluster_model(inputs.input_folders["model"]), config.bn_groups
        )
        meaning = config.ema_meaning if config.ema is not None else "none"
        self.teacher = MomentumCopy(self.model, config.ema) if meaning == "teacher" else None
        self.shadow = MomentumCopy(self.model, config.ema) if meaning == "released" else None
        for name, shape, kind in (
            ("confident", (self.model.num_clusters,), torch.int64),
            ("seen", (), torch.int64),
            ("last_confident", (self.model.num_clusters,), torch.int64),
            ("last_seen", (), torch.int64),
            ("best_share", (), torch.float64),
            ("flat_epochs", (), torch.int64),
            ("collapsing_epochs", (), torch.int64),
            ("epochs", (), torch.int64),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind))

    def forward(self, batch: Batch) -> Step:
        weak, strong = batch.views
        with torch.no_grad():
            weak_logits = (
                self.model(weak) if self.teacher is None else self.teacher(weak)
            )  # train mode, as released
        found = confident_cross_entropy(
            self.model(strong), weak_logits, self.config.threshold, self.config.class_balance
        )
        self.confident += (
            found.per_class.long()
        )  # here and not in end_step: a step that is skipped has been seen too
        self.seen += self.inputs.global_batch
        share = found.count / self.inputs.global_batch
        return Step(
            found.loss,
            {"confident_share": share, "clusters_in_batch": (found.per_class > 0).sum()},
            skip=not bool(found.count > 0),
        )

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        if self.teacher is not None:
            self.teacher.update(self.model)
        if (
            self.shadow is not None
        ):  # parameters averaged, buffers as they were at the start, all loaded back
            self.shadow.update(self.model)
            self.model.load_state_dict(self.shadow.module.state_dict())

    @torch.no_grad()
    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        """Shares over the epoch's images; remembers whether it is a plateau, and whether clusters vanish."""
        self.last_confident.copy_(self.confident)
        self.last_seen.copy_(self.seen)
        self.confident.zero_()
        self.seen.zero_()
        self.epochs += 1
        share = self._share()
        if share > float(self.best_share) + self.config.plateau_gain:
            self.best_share.fill_(share)
            self.flat_epochs.zero_()
        else:
            self.flat_epochs += 1
        self.collapsing_epochs += int(self._collapsing())
        return {
            "confident_share": share,
            "clusters_used": self._used(),
            "largest_cluster": self._largest(),
        }

    def early_stop_reason(self) -> str:
        wait = self.config.plateau_epochs
        if wait is None or self.flat_epochs < wait:
            return ""
        return (
            f"the share of confident images has stayed at {self._share():.1%} (best {float(self.best_share):.1%}) for {wait} epochs; "
            "method.plateau_epochs: null trains all epochs"
        )

    def warning(self) -> str:
        if not self._collapsing():
            return ""
        c = self.config
        ways = [
            "lower method.threshold",
            *["set method.class_balance: true"] * (not c.class_balance),
            *["set method.ema"] * (c.ema is None),
            "raise global_batch",
        ]
        return (
            f"self-labelling, epoch {int(self.epochs)}: {self._used():.0%} of the clusters have confident images, the largest holds "
            f"{self._largest():.0%} of them: it may be collapsing. Of this stage's settings: {', or '.join(ways)}"
        )

    def _share(self) -> float:
        """Of the last epoch's images, those that were confident."""
        return float(self.last_confident.sum()) / max(int(self.last_seen), 1)

    def _used(self) -> float:
        """Share of the clusters that have a confident image."""
        return float((self.last_confident > 0).double().mean())

    def _largest(self) -> float:
        """Share of the confident images that are in the largest cluster."""
        return float(self.last_confident.max()) / max(int(self.last_confident.sum()), 1)

    def _collapsing(self) -> bool:
        return self._used() < 0.9 or self._largest() > max(0.5, 5 / len(self.last_confident))

    def publish(self, out: Path) -> None:
        save_cluster_model(out, self.model if self.teacher is None else self.teacher.module)
        write_json(
            out / "confident.json",
            {
                "threshold": self.config.threshold,
                "epoch": int(self.epochs),
                "images": int(self.last_seen),
                "confident_share": self._share(),
                "per_cluster": self.last_confident.tolist(),
                "ended": self.early_stop_reason() or "after the last epoch",
                "collapsing_epochs": int(self.collapsing_epochs),
            },
        )
