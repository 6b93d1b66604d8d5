"""Linear probes: a linear classifier on each layer of a frozen network.

Zhang, Isola and Efros, Colorful Image Colorization, ECCV 2016; DeepCluster, Table 1. The probe is a
Method, so that the engine trains, saves and resumes it. It reads labels, so it lives here and no
train stage can name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_scan.data.batch import Batch
from dist_scan.losses import at_least_fp32
from dist_scan.methods.base import Method, MethodConfig, MethodInputs, StepResult
from dist_scan.storage.tensors import save_tensors

OUTPUT = "features"
"""Layer name of the network's own output."""


class LayerProbesConfig(MethodConfig):
    """Layers to probe."""

    kind: Literal["probes"] = "probes"
    layers: tuple[str, ...] = (OUTPUT,)
    """Names of modules, or unique endings of them; "features" is the network's output."""
    most_features: int = 9600
    """A layer's map is averaged down to the largest square grid with at most this many values."""


class LayerProbes(Method):
    """One linear classifier per layer, trained together; they share no parameters."""

    recipes = ("crop",)
    config: LayerProbesConfig

    def __init__(
        self, config: LayerProbesConfig, inputs: MethodInputs, labels: Tensor, sample: Tensor
    ) -> None:
        """labels [N] int64, -1 if an image is not visited; sample: images, to measure widths."""
        super().__init__(config, inputs)
        assert inputs.backbone is not None
        self.backbone = inputs.backbone.requires_grad_(False).eval()
        self.labels = labels
        self.num_classes = int(labels.max()) + 1
        self.layer_outputs: dict[str, Tensor] = {}
        for name in config.layers:
            if name != OUTPUT:
                find_module(self.backbone, name).register_forward_hook(self._store_output_as(name))
        # A pass over the sample shows the width of each layer.
        with torch.no_grad():
            widths = [features.shape[1] for features in self._layer_features(sample)]
        heads = [nn.Linear(width, self.num_classes) for width in widths]
        for head in heads:
            nn.init.normal_(head.weight, 0, 0.01)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def _store_output_as(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.layer_outputs[name] = output

        return hook

    def train(self, mode: bool = True) -> LayerProbes:
        super().train(mode)
        self.backbone.eval()
        return self

    def _layer_features(self, images: Tensor) -> list[Tensor]:
        """Pooled features [b, width] of each layer."""
        with torch.no_grad():
            self.layer_outputs[OUTPUT] = self.backbone(images)
        features = [
            pool_to_grid(self.layer_outputs[name], self.config.most_features)
            for name in self.config.layers
        ]
        self.layer_outputs.clear()
        return features

    def logits(self, images: Tensor) -> list[Tensor]:
        """Logits [b, num_classes] of each layer's probe."""
        logits = []
        for head, features in zip(self.heads, self._layer_features(images)):
            assert isinstance(head, nn.Linear)
            logits.append(head(features.to(head.weight.dtype)))
        return logits

    def forward(self, batch: Batch) -> StepResult:
        labels = self.labels[batch.index].to(batch.views[0].device)
        losses = []
        metrics = {}
        for name, logits in zip(self.config.layers, self.logits(batch.views[0])):
            losses.append(F.cross_entropy(at_least_fp32(logits), labels))
            metrics[f"accuracy_{name}"] = (logits.argmax(1) == labels).double().mean()
        # No parameter is shared, so the sum trains every probe as if it were alone.
        return StepResult(torch.stack(losses).sum(), metrics)

    def publish(self, out: Path) -> None:
        """Write the classifiers into probes.safetensors."""
        save_tensors(out / "probes.safetensors", self.heads.state_dict())


def pool_to_grid(features: Tensor, max_values: int) -> Tensor:
    """[b, C, H, W] averaged down to the largest g x g grid with C g g <= max_values, flat.

    [b, D] is returned as it is.
    """
    if features.ndim == 2:
        return features
    grid = max(1, int((max_values / features.shape[1]) ** 0.5 + 1e-9))
    return F.adaptive_avg_pool2d(features, min(grid, *features.shape[2:])).flatten(1)


def find_module(network: nn.Module, name: str) -> nn.Module:
    """The module of this name, or the only one whose dotted name ends in it.

    Raises ValueError if there is none, or more than one.
    """
    modules = dict(network.named_modules())
    matches = [key for key in modules if key == name]
    matches = matches or [key for key in modules if key.endswith(f".{name}")]
    if len(matches) == 1:
        return modules[matches[0]]
    problem = "matches no module"
    if matches:
        problem = f"matches {len(matches)} modules ({', '.join(matches[:4])})"
    outer = [key for key in modules if key and key.count(".") <= 2]
    listed = ", ".join(outer[:40]) + (", ..." if len(outer) > 40 else "")
    raise ValueError(
        f"layers: '{name}' {problem} of this network; allowed: {OUTPUT}, or one of {listed}"
    )


def ten_crops(images: Tensor, size: int) -> Iterator[Tensor]:
    """Corners and centre of [b, 3, S, S] and their mirror images, each [b, 3, size, size].

    Only two views if S equals size. The centre comes last.
    """
    margin = images.shape[2] - size
    corners = [(0, 0), (0, margin), (margin, 0), (margin, margin)]
    for top, left in [*corners, (margin // 2, margin // 2)] if margin else [(0, 0)]:
        view = images[:, :, top : top + size, left : left + size]
        yield view
        yield view.flip(3)


@torch.inference_mode()
def count_correct(
    probes: LayerProbes, images: Tensor, labels: Tensor, size: int, ten_crop: bool
) -> Tensor:
    """Number [layers] int64 of the images [b, 3, S, S] that each layer's probe gets right.

    By the mean probability over ten crops, or by the centre crop alone.
    """
    # Views to average over.
    crops = list(ten_crops(images, size))
    if not ten_crop:
        # The centre without its mirror image.
        crops = crops[-2:-1]
    # Sum of the probabilities over the views, per layer.
    sums: list[Tensor] = []
    for crop in crops:
        probabilities = [at_least_fp32(logits).softmax(1) for logits in probes.logits(crop)]
        sums = [total + p for total, p in zip(sums, probabilities)] if sums else probabilities
    return torch.stack([(total.argmax(1) == labels).sum() for total in sums])
