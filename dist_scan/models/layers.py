"""Small layers: projector, momentum copy, feature normalisation, Sobel."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Normalise = Literal["none", "l2", "standardise"]


class Projector(nn.Sequential):
    """features [B, D] -> projections [B, out_dim], not normalised. mlp: Linear(D, hidden) ReLU Linear (SCAN's and MoCo v2's, no
    batch norm unless asked); otherwise one Linear (MoCo v1)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        mlp: bool = True,
        hidden_dim: int | None = None,
        batch_norm: bool = False,
    ) -> None:
        hidden = hidden_dim or in_dim
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        super().__init__(
            *(
                [
                    nn.Linear(in_dim, hidden),
                    *norm,
                    nn.ReLU(inplace=True),
                    nn.Linear(hidden, out_dim),
                ]
                if mlp
                else [nn.Linear(in_dim, out_dim)]
            )
        )


class MomentumCopy(nn.Module):
    """An average of a module's parameters over steps. Its batch norm buffers come from its own forwards, as in MoCo."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(module).requires_grad_(False), decay

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
    """features [B, D] -> the same shape: as they are, of unit length, or standardised per dimension by mean and std [D]."""

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
            # A dimension that never varies must not be blown up: its scale stays near the others'.
            self.register_buffer("std", scale.clamp(min=max(1e-6, 1e-4 * float(scale.mean()))))

    def forward(self, features: Tensor) -> Tensor:
        if self.kind == "none":
            return features
        features = (
            features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
        )
        return (
            F.normalize(features, dim=1) if self.kind == "l2" else (features - self.mean) / self.std
        )


class Sobel(nn.Module):
    """Normalised images [B, 3, S, S] -> edges [B, 2, S, S]: the mean of the channels, then two fixed 3 x 3 filters (DeepCluster)."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        self.register_buffer("filters", torch.stack([x, x.T])[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images.mean(1, keepdim=True), self.filters.to(images.dtype), padding=1)
