"""Features that heads are trained on, and a copy of the network that computed them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dist_scan.heads.products import as_one_tensor
from dist_scan.models.layers import FeatureNorm, Normalise


class HeadFeatures(nn.Module):
    """Views -> normalised features [B, D].

    A view is images, which go through the network, or rows of a feature table (backbone None). A
    network that is not trained stays in eval mode and gets no gradient.
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
                "normalise: 'standardise' needs the mean and standard deviation of a feature "
                "table; allowed on images: none, l2"
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
        """Features of two views. Cached features that are halves of one tensor are not copied."""
        both = as_one_tensor(first, second) if self.backbone is None else None
        if both is None:
            return self(first), self(second)
        first, second = self.norm(both).chunk(2)
        return first, second


class BestNetwork(nn.Module):
    """Copy of a network at the selected epoch, in buffers (so that checkpoints contain it)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, tensor in network.state_dict().items():
            self.register_buffer(_buffer_name(name), tensor.detach().clone())

    @torch.no_grad()
    def save(self, network: nn.Module) -> None:
        """Copy the network's weights into the buffers."""
        for name, tensor in network.state_dict().items():
            getattr(self, _buffer_name(name)).copy_(tensor)

    def restore(self, network: nn.Module) -> None:
        """Load the saved weights into the network."""
        names = network.state_dict()
        network.load_state_dict({name: getattr(self, _buffer_name(name)) for name in names})


def _buffer_name(name: str) -> str:
    """A buffer's name may not contain dots."""
    return name.replace(".", "__")
