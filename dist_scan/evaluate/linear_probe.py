"""Linear probes: how well labels can be read off each layer of a frozen network (Zhang et al. 2016; DeepCluster, Table 1; FIDELITY.md 3).

A Method like any other, so that the engine trains, saves and resumes it; but it reads labels, so it lives here and no config can name it
in a train stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_scan.data.batch import Batch
from dist_scan.losses import at_least_fp32
from dist_scan.methods.base import Method, MethodConfig, MethodInputs, Step
from dist_scan.models.backbone import save_tensors

LAST = "features"  # the network's own output


class ProbesConfig(MethodConfig):
    """layers: names of modules, or their unique endings; `features` is the network's output."""

    kind: Literal["probes"] = "probes"
    layers: tuple[str, ...] = (LAST,)
    most_features: int = 9600
    """A layer's map is averaged down to the largest square grid with at most so many numbers."""


class LayerProbes(Method):
    """One linear classifier per layer, all trained at once: they share nothing but the pass through the network."""

    recipes = ("crop",)

    def __init__(
        self, config: ProbesConfig, inputs: MethodInputs, labels: Tensor, sample: Tensor
    ) -> None:
        """labels [N] int64, -1 never visited; sample: a batch of images, to see how wide layers are."""
        super().__init__(config, inputs)
        self.backbone = inputs.backbone.requires_grad_(False).eval()
        self.labels, self.num_classes = labels, int(labels.max()) + 1
        self.caught: dict[str, Tensor] = {}
        for name in config.layers:
            if name != LAST:
                found_module(self.backbone, name).register_forward_hook(self._catcher(name))
        with torch.no_grad():
            widths = [f.shape[1] for f in self._layers(sample)]
        self.heads = nn.ModuleList(nn.Linear(width, self.num_classes) for width in widths)
        for head in self.heads:
            nn.init.normal_(head.weight, 0, 0.01)
            nn.init.zeros_(head.bias)

    def _catcher(self, name: str):
        def catch(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.caught[name] = output

        return catch

    def train(self, mode: bool = True) -> LayerProbes:
        super().train(mode)
        self.backbone.eval()
        return self

    def _layers(self, images: Tensor) -> list[Tensor]:
        """Per layer [b, width], pooled and flat."""
        with torch.no_grad():
            self.caught[LAST] = self.backbone(images)
        found = [
            pooled(self.caught[name], self.config.most_features) for name in self.config.layers
        ]
        self.caught.clear()
        return found

    def logits(self, images: Tensor) -> list[Tensor]:
        """Per layer [b, num_classes]."""
        return [head(f.to(head.weight.dtype)) for head, f in zip(self.heads, self._layers(images))]

    def forward(self, batch: Batch) -> Step:
        labels = self.labels[batch.index].to(batch.views[0].device)
        logits = [at_least_fp32(x) for x in self.logits(batch.views[0])]
        losses = torch.stack([F.cross_entropy(x, labels) for x in logits])
        hits = {
            f"accuracy_{name}": (x.argmax(1) == labels).double().mean()
            for name, x in zip(self.config.layers, logits)
        }
        return Step(
            losses.sum(), hits
        )  # no parameter is shared: the sum trains each as if it were alone

    def publish(self, out: Path) -> None:
        """probes.safetensors: the classifiers."""
        save_tensors(out / "probes.safetensors", self.heads.state_dict())


def pooled(features: Tensor, most: int) -> Tensor:
    """[b, C, H, W] averaged down to the largest grid g x g with C g g <= most, flat; [b, D] as it is."""
    if features.ndim == 2:
        return features
    grid = max(1, int((most / features.shape[1]) ** 0.5 + 1e-9))
    return F.adaptive_avg_pool2d(features, min(grid, *features.shape[2:])).flatten(1)


def found_module(network: nn.Module, name: str) -> nn.Module:
    """The module of this name, or the one whose dotted name ends in it. Raises ValueError when there is none, or more."""
    modules = dict(network.named_modules())
    hits = [k for k in modules if k == name] or [k for k in modules if k.endswith(f".{name}")]
    if len(hits) != 1:
        outer = [k for k in modules if k and k.count(".") <= 2]
        raise ValueError(
            f"layers: '{name}' is {'no module' if not hits else f'the end of {len(hits)} modules ({hits[:4]})'} of this network; "
            f"allowed: {LAST}, or one of {', '.join(outer[:40])}{', ...' if len(outer) > 40 else ''}"
        )
    return modules[hits[0]]


def ten_crops(images: Tensor, size: int) -> Iterator[Tensor]:
    """Corners and centre of [b, 3, S, S], and their mirror images, each [b, 3, size, size]. Of a square of `size` itself: two views."""
    room = images.shape[2] - size
    places = (
        [(0, 0), (0, room), (room, 0), (room, room), (room // 2, room // 2)] if room else [(0, 0)]
    )
    for top, left in places:
        view = images[:, :, top : top + size, left : left + size]
        yield view
        yield view.flip(3)


@torch.inference_mode()
def probe_hits(probes: LayerProbes, images: Tensor, labels: Tensor, size: int, ten: bool) -> Tensor:
    """How many of the images [b, 3, S, S] each layer's probe names rightly [layers] int64: of the mean probability over the crops, or the centre."""
    crops: Sequence[Tensor] = list(ten_crops(images, size))
    if not ten:
        crops = crops[-2:-1]
    sums = [0.0] * len(probes.heads)
    for crop in crops:
        sums = [total + at_least_fp32(x).softmax(1) for total, x in zip(sums, probes.logits(crop))]
    return torch.stack([(total.argmax(1) == labels).sum() for total in sums])
