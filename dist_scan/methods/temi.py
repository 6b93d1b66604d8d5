"""TEMI: student heads learn from averaged teacher heads by pointwise mutual information of neighbours (Adaloglou et al., BMVC 2023)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.heads.autograd import mean_probabilities, temi_heads_loss
from dist_scan.heads.features import HeadFeatures, publish_heads, select_epoch
from dist_scan.heads.linear import ClusterHeads, NumClusters
from dist_scan.heads.products import concatenate_views
from dist_scan.heads.selection import HeadSelection
from dist_scan.methods.base import Method, MethodConfig, MethodInputs, ParameterGroup, Step
from dist_scan.models.layers import MomentumCopy, Normalise


class TemiConfig(MethodConfig):
    """The paper's values as defaults; its heads are small networks, ours are linear, on the same bank as SCAN's."""

    kind: Literal["temi"] = "temi"
    num_clusters: NumClusters
    """One number, or several: num_heads heads of each, all of which share the weights of pairs."""
    num_heads: int = Field(default=10, ge=1)
    beta: float = Field(default=0.6, gt=0, le=1)
    """1 is plain mutual information, which leaves clusters empty; 0.5 makes them all equally large."""
    temperature: float = Field(default=0.1, gt=0)
    """Of student and teacher alike. It is folded into the heads that are published."""
    momentum: float = Field(default=0.996, ge=0, lt=1)
    """Of the teacher."""
    marginal_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean of the teacher's probabilities; the batch at hand is in it, as in the released code."""
    normalise: Normalise = "standardise"


class TemiMethod(Method):
    """The teacher's heads are chosen (as SCAN's are, by the held-out loss with entropy weight 1) and published."""

    Config = TemiConfig
    recipes = ("simclr", "simclr")
    publishes = ("model",)
    uses_neighbours = True

    def __init__(self, config: TemiConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.features = HeadFeatures(
            None if inputs.on_features else inputs.backbone,
            inputs.feature_dim,
            config.normalise,
            inputs.feature_mean,
            inputs.feature_std,
            trained=False,
        )
        self.heads = ClusterHeads(inputs.feature_dim, config.num_clusters, config.num_heads)
        self.teacher = MomentumCopy(self.heads, config.momentum)
        self.register_buffer(
            "marginal", torch.cat([torch.full((c,), 1 / c) for c in self.heads.sizes])
        )
        self.choice = HeadSelection(self.heads)
        self._last = None  # features of the last step, for the check after the epoch: nothing is remembered over epochs

    def forward(self, batch: Batch) -> Step:
        first, second = self.features.pair(batch.views[0], batch.views[-1])
        self._last = first.detach()
        log_p, marginal = self._teacher(concatenate_views(first, second))
        losses = temi_heads_loss(
            first,
            second,
            self.heads.weight,
            self.heads.bias,
            self.heads.sizes,
            log_p,
            marginal.split(self.heads.sizes),
            self.config.beta,
            self.config.temperature,
        )
        return Step(losses.sum(), {"total": losses.detach().mean()}, {"marginal": marginal})

    @torch.no_grad()
    def _teacher(self, features_XD: Tensor) -> tuple[list[Tensor], Tensor]:
        """Log-probabilities [X, C] per head, and the running marginal [S] with this batch in it."""
        log_p = [
            (logits / self.config.temperature).log_softmax(1)
            for logits in self.teacher(features_XD)
        ]
        means, _ = mean_probabilities([each.exp() for each in log_p])
        return log_p, torch.lerp(torch.cat(means), self.marginal, self.config.marginal_momentum)

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        self.marginal.copy_(step.keep["marginal"])
        self.teacher.update(self.heads)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(list(self.heads.parameters()))]

    @torch.no_grad()
    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        heads = copy.deepcopy(self.teacher.module)
        for tensor in heads.parameters():
            tensor.div_(self.config.temperature)
        values, _ = select_epoch(epoch, heads, self.choice, self.features, held_out, self._last)
        self._last = None
        return values

    def publish(self, out: Path) -> None:
        publish_heads(
            out, self.choice, self.features, self.inputs.backbone, self.inputs.backbone_config
        )
