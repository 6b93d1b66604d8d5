"""Small layers: projector, momentum copy, feature normalisation, Sobel filter."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_scan.losses import at_least_fp32

Normalise = Literal["none", "l2", "standardise"]
"""Features as they are, of unit length, or with mean 0 and standard deviation 1 per dimension."""


class Projector(nn.Sequential):
    """Features [B, D] -> projections [B, out_dim], not normalised.

    mlp: Linear, ReLU, Linear (SCAN, MoCo v2), with a batch norm after the first layer on request;
    else one Linear layer (MoCo v1).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        mlp: bool = True,
        hidden_dim: int | None = None,
        batch_norm: bool = False,
    ) -> None:
        if not mlp:
            super().__init__(nn.Linear(in_dim, out_dim))
            return
        hidden = hidden_dim or in_dim
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        super().__init__(
            nn.Linear(in_dim, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, out_dim)
        )


class MomentumCopy(nn.Module):
    """Exponential moving average of a module's parameters.

    Its batch norm statistics come from its own forward passes, as in MoCo.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """copy = decay * copy + (1 - decay) * source, over parameters."""
        torch._foreach_lerp_(
            list(self.module.parameters()), list(source.parameters()), 1 - self.decay
        )


class FeatureNorm(nn.Module):
    """Normalisation of features [B, D]; `standardise` uses mean and std [D]."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        kind: Normalise,
        dim: int,
        mean: np.ndarray | None = None,
        std: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind == "standardise":
            center = torch.zeros(dim) if mean is None else torch.tensor(mean, dtype=torch.float32)
            scale = torch.ones(dim) if std is None else torch.tensor(std, dtype=torch.float32)
            self.register_buffer("mean", center)
            # A dimension that never varies must not be divided by almost 0: its scale is at least
            # 1e-4 of the mean scale.
            self.register_buffer("std", scale.clamp(min=max(1e-6, 1e-4 * float(scale.mean()))))

    def forward(self, features: Tensor) -> Tensor:
        if self.kind == "none":
            return features
        features = at_least_fp32(features)
        if self.kind == "l2":
            return F.normalize(features, dim=1)
        return (features - self.mean) / self.std


class Sobel(nn.Module):
    """Normalised images [B, 3, S, S] -> edge maps [B, 2, S, S].

    The mean of the channels, then two fixed 3x3 filters (DeepCluster; Caron et al., ECCV 2018).
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        x = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        self.register_buffer("filters", torch.stack([x, x.T])[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images.mean(1, keepdim=True), self.filters.to(images.dtype), padding=1)
