"""Self-labelling: a cluster model learns its own confident predictions on strongly augmented views (SCAN paper, Sec. 2.3)."""
from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.losses import confident_cross_entropy
from dist_scan.methods.base import Given, Method, MethodConfig, Step
from dist_scan.models.cluster import load_cluster_model, save_cluster_model
from dist_scan.models.layers import MomentumCopy, check_groups, convert_batch_norm
from dist_scan.world.world import current


class SelfLabelConfig(MethodConfig):
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
    bn_groups: int = Field(default=1, ge=1)

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Batch norm's groups, the ranks and the batch must fit."""
        check_groups(self.bn_groups, world_size, global_batch)


class SelfLabel(Method):
    """Views: weak, strong. A step in which nobody is confident on any rank is skipped."""

    Config = SelfLabelConfig
    recipes = ("center", "randaugment")

    def __init__(self, config: SelfLabelConfig, given: Given):
        super().__init__(config, given)
        if given.on_features:
            raise ValueError("selflabel augments images: give the stage `images:`, not `features:`")
        if "model" not in given.inputs:
            raise ValueError("selflabel starts from a cluster model: give the stage `model:` (a stage that trains scan)")
        self.model = convert_batch_norm(load_cluster_model(given.inputs["model"]), config.bn_groups)
        meaning = config.ema_meaning if config.ema is not None else "none"
        self.teacher = MomentumCopy(self.model, config.ema) if meaning == "teacher" else None
        self.shadow = MomentumCopy(self.model, config.ema) if meaning == "released" else None
        num_clusters = self.model.num_clusters
        self.register_buffer("confident", torch.zeros(num_clusters, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Step:
        weak, strong = batch.views
        with torch.no_grad():
            weak_logits = self.model(weak) if self.teacher is None else self.teacher(weak)  # train mode, as released
        found = confident_cross_entropy(self.model(strong), weak_logits, self.config.threshold, self.config.class_balance)
        share = found.count / self.given.global_batch
        return Step(found.loss, {"confident_share": share, "clusters_in_batch": (found.per_class > 0).sum()},
                    {"per_class": found.per_class}, skip=not bool(found.count > 0))

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        self.confident += step.keep["per_class"].long()
        self.seen += self.given.global_batch
        if self.teacher is not None:
            self.teacher.update(self.model)
        if self.shadow is not None:  # parameters averaged, buffers as they were at the start, all loaded back
            self.shadow.update(self.model)
            self.model.load_state_dict(self.shadow.module.state_dict())

    @torch.no_grad()
    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        """Shares over the epoch's pseudo-labels; warns when clusters vanish."""
        total = int(self.confident.sum())
        used = float((self.confident > 0).double().mean())
        largest = float(self.confident.max()) / total if total else 0.0
        values = {"confident_share": total / max(int(self.seen), 1), "clusters_used": used, "largest_cluster": largest}
        if current().rank == 0 and (total == 0 or used < 0.9 or largest > max(0.5, 5 / len(self.confident))):
            warnings.warn(f"self-labelling, epoch {epoch + 1}: {used:.0%} of the clusters have confident images, the largest holds "
                          f"{largest:.0%} of them: it may be collapsing. Lower method.threshold, set class_balance: true, use ema, "
                          "or a larger global_batch", stacklevel=2)
        self.confident.zero_()
        self.seen.zero_()
        return values

    def publish(self, out: Path) -> None:
        save_cluster_model(out, self.model if self.teacher is None else self.teacher.module)
