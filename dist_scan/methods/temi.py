"""TEMI: student heads learn from teacher heads by the pointwise mutual information of neighbours.

Adaloglou et al., Exploring the Limits of Deep Image Clustering using Pretrained Models, BMVC 2023:
Sec. 3 (loss, weights of pairs, running mean of the teacher). The readable form of the loss is
``losses.temi_loss``; training uses its fused form for linear heads.

The heads of the paper are two-layer networks and its loss is a mean over heads; here heads are
linear and their losses are summed, as for SCAN.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.heads.autograd import TemiObjective, mean_probabilities, temi_heads_loss
from dist_scan.heads.linear import ClusterHeads, NumClusters
from dist_scan.heads.products import concatenate_views
from dist_scan.methods._heads import HeadsMethod
from dist_scan.methods.base import MethodConfig, MethodInputs, ParameterGroup, StepResult
from dist_scan.models.layers import MomentumCopy, Normalise


class TemiConfig(MethodConfig):
    """The defaults are the paper's."""

    kind: Literal["temi"] = "temi"
    num_clusters: NumClusters
    """One number, or several: num_heads heads of each. All heads share the weights of pairs."""
    num_heads: int = Field(default=10, ge=1)
    beta: float = Field(default=0.6, gt=0, le=1)
    """Exponent of the probabilities. 1 is plain mutual information, which leaves clusters empty;
    0.5 makes all clusters equally large."""
    temperature: float = Field(default=0.1, gt=0)
    """Temperature of student and teacher. Published heads are divided by it."""
    teacher_momentum: float = Field(default=0.996, ge=0, lt=1)
    """Momentum of the teacher."""
    marginal_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the running mean of the teacher's probabilities. The mean includes the current
    batch, as in the released code."""
    normalise: Normalise = "standardise"
    """Normalisation of the features."""


class TemiMethod(HeadsMethod):
    """The teacher's heads are selected by SCAN's held-out loss (entropy weight 1) and published."""

    Config = TemiConfig
    config: TemiConfig
    marginal: Tensor

    def __init__(self, config: TemiConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs, config.num_clusters, config.num_heads, config.normalise)
        self.teacher = MomentumCopy(self.heads, config.teacher_momentum)
        uniform = [torch.full((size,), 1 / size) for size in self.heads.sizes]
        self.register_buffer("marginal", torch.cat(uniform))

    def forward(self, batch: Batch) -> StepResult:
        # Features of the images and of one random neighbour of each.
        first, second = self.features.pair(batch.views[0], batch.views[-1])
        self.last_features = first.detach()
        # The teacher sees both views, without gradient.
        teacher_log_p, marginal = self._teacher(concatenate_views(first, second))
        # Weighted pointwise mutual information per head; losses are summed.
        heads = self.heads
        objective = TemiObjective(
            teacher_log_p,
            marginal.split(heads.sizes),
            self.config.beta,
            self.config.temperature,
        )
        losses = temi_heads_loss(first, second, heads.weight, heads.bias, heads.sizes, objective)
        # Logged `total` is the mean over heads; the loop logs the sum as `loss`.
        metrics = {"total": losses.detach().mean()}
        return StepResult(losses.sum(), metrics, {"marginal": marginal})

    @torch.no_grad()
    def _teacher(self, features_XD: Tensor) -> tuple[list[Tensor], Tensor]:
        """The teacher's log-probabilities [X, C] per head, and the running mean [S] of all heads.

        The running mean includes this batch; ``end_step`` stores it.
        """
        log_p = [
            (logits / self.config.temperature).log_softmax(1)
            for logits in self.teacher(features_XD)
        ]
        sums = [each.exp().sum(0) for each in log_p]
        means, _ = mean_probabilities(sums, len(features_XD))
        return log_p, torch.lerp(torch.cat(means), self.marginal, self.config.marginal_momentum)

    def end_step(self, batch: Batch, step: StepResult) -> None:
        self.marginal.copy_(step.for_end_step["marginal"])
        # teacher = momentum * teacher + (1 - momentum) * student
        self.teacher.update(self.heads)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(list(self.heads.parameters()))]

    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        # Published heads have no temperature: it is folded into their weights.
        heads = copy.deepcopy(self.teacher.module)
        assert isinstance(heads, ClusterHeads)
        for tensor in heads.parameters():
            tensor.div_(self.config.temperature)
        metrics, _ = self.select(epoch, heads, held_out)
        return metrics
