"""Methods on tiny networks, and the comparison of one rank with several.

Functions import dist_scan.methods when they run: a rank's process imports this module first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

if TYPE_CHECKING:
    from dist_scan.methods.base import Method, MethodInputs

FEATURE_DIM = 16
"""Width of the features of the tiny network."""


def tiny_inputs(num_images: int, global_batch: int, seed: int, **changes: Any) -> MethodInputs:
    """Inputs with a fresh network, the same on every rank."""
    from dist_scan.methods.base import MethodInputs
    from dist_scan.models.backbone import BackboneConfig, build_backbone

    torch.manual_seed(0)
    config = BackboneConfig(name="resnet_small", width=4)
    inputs = MethodInputs(
        num_images=num_images,
        global_batch=global_batch,
        seed=seed,
        feature_dim=FEATURE_DIM,
        backbone=build_backbone(config),
        backbone_config=config,
    )
    return replace(inputs, **changes)


def make_method(kind: str, settings: Mapping[str, Any], inputs: MethodInputs) -> Method:
    from dist_scan.methods.base import method_class

    cls = method_class(kind)
    return cls(cls.Config(kind=kind, **settings), inputs)


def write_cluster_model(folder: Path, num_clusters: int = 4) -> Path:
    """Publish an untrained cluster model into a folder; returns the folder."""
    from dist_scan.models.backbone import BackboneConfig, build_backbone
    from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
    from dist_scan.models.layers import FeatureNorm

    config = BackboneConfig(name="resnet_small", width=4)
    norm, head = FeatureNorm("none", FEATURE_DIM), nn.Linear(FEATURE_DIM, num_clusters)
    save_cluster_model(folder, ClusterModel(build_backbone(config), norm, head, config))
    return folder


def local_slice(num_rows: int) -> slice:
    """This rank's contiguous part of the rows of a global batch."""
    from dist_scan.world.world import current

    rank, world_size = current().rank, current().world_size
    return slice(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)


def update(method: Method, network: Callable, optimizer: torch.optim.Optimizer, batch: Any) -> Any:
    """One update through `network` (the method, or DDP around it); returns the step."""
    from dist_scan.models.batch_norm import sync_running_stats

    optimizer.zero_grad()
    step = network(batch)
    step.loss.backward()
    optimizer.step()
    method.end_step(batch, step)
    sync_running_stats(method)
    return step


def gradients(method: Method) -> dict[str, np.ndarray]:
    """Gradients by parameter name."""
    return {
        name: p.grad.numpy().copy() for name, p in method.named_parameters() if p.grad is not None
    }


def state_arrays(method: Method) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in method.state_dict().items()}


def assert_close(actual: ArrayLike, expected: ArrayLike, what: str) -> None:
    """Equal to 1e-6 of the largest expected value."""
    scale = max(float(np.abs(expected).max()), 1e-3) if np.size(expected) else 1.0
    difference = np.abs(np.subtract(actual, expected)).max() if np.size(expected) else 0.0
    is_close = np.allclose(actual, expected, rtol=1e-6, atol=1e-6 * scale, equal_nan=True)
    assert is_close, f"{what}: {difference} of {scale}"


def assert_all_close(
    actual: Mapping[str, ArrayLike], expected: Mapping[str, ArrayLike], what: str
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, f"{what} {name}")
