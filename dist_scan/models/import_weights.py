"""Weights of other projects: MoCo's and SCAN's released files, timm's, safetensors.

Files are read without running code in them, and every weight must match.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CheckpointKind = Literal["auto", "moco", "scan", "plain"]

PREFIXES = {
    "moco": ("encoder_q.",),
    "scan": ("backbone.",),
    "plain": ("",),
    "auto": ("encoder_q.", "backbone.", ""),
}
"""Prefixes of the backbone's weights by kind of file; the first that occurs is used."""

CLUSTER_HEAD = "cluster_head."
HEADS = ("fc.", "classifier.", "head.", "contrastive_head.", "cluster_head.", "projector.")
"""Prefixes of weights that do not belong to the backbone."""


def read_file(path: str | Path) -> Any:
    """Content of a file of weights, read without running any code in it.

    Raises ValueError if the file does not exist or cannot be read without running code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"checkpoint '{path}' does not exist; "
            "give the path of a local file (nothing is downloaded)"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_numpy_number_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise a dozen types
        raise ValueError(
            f"checkpoint '{path}' cannot be read safely: {str(error).splitlines()[0]}; "
            "give a file of plain tensors (torch.save of a state_dict, or .safetensors)"
        ) from None


def _numpy_number_types() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Types that a pickled NumPy number consists of, under the names of NumPy 1 and 2.

    SCAN's released code saves the best head as np.argmin returned it.
    """
    scalar: Any = np.int64(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("int32", "int64", "float32", "float64")]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (np.dtype, "numpy.dtype"),
        *((dtype, f"numpy.dtypes.{dtype.__name__}") for dtype in dtypes),
    ]


def _state_dict(content: Any, path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file by name, without `module.`. Raises ValueError if there are none."""
    # MoCo and SCAN wrap the state dict in a training checkpoint.
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    found = type(content).__name__
    state = {}
    if isinstance(content, dict):
        found = _summary(content)
        state = {
            name.removeprefix("module."): value
            for name, value in content.items()
            if isinstance(value, Tensor)
        }
    if not state:
        raise ValueError(f"checkpoint '{path}' holds no weights (found: {found})")
    return state


class ClusterHead(NamedTuple):
    """One head of a SCAN file."""

    weight: Tensor
    """[C, D]"""
    bias: Tensor
    """[C]"""
    number: int
    """Index of the head in the file."""
    num_heads: int


def read_cluster_head(path: str | Path, number: int | None = None) -> ClusterHead:
    """A head of a file that SCAN's released code saved.

    The file is {model, head}, a training checkpoint with best_loss_head, or the bare state_dict of
    self-labelling with its one head. number: index of the head; None for the one the file calls
    best. Raises ValueError if there is no such head.
    """
    content = read_file(path)
    state = _state_dict(content, path)
    heads = sorted({int(name.split(".")[1]) for name in state if name.startswith(CLUSTER_HEAD)})
    if not heads:
        raise ValueError(
            f"checkpoint '{path}' holds no cluster head ({CLUSTER_HEAD}0.weight ...; the file "
            f"holds {_summary(state)}); leave cluster_head out"
        )
    if number is None:
        number = _best_head(content, heads)
    if number not in heads:
        problem = "does not say which head is best" if number is None else f"has no head {number}"
        raise ValueError(
            f"checkpoint '{path}' {problem}; allowed: cluster_head: {', '.join(map(str, heads))}"
        )
    weight = state.get(f"{CLUSTER_HEAD}{number}.weight")
    bias = state.get(f"{CLUSTER_HEAD}{number}.bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"checkpoint '{path}': {CLUSTER_HEAD}{number} is not a linear layer with a weight "
            "[C, D] and a bias [C]"
        )
    return ClusterHead(weight.float(), bias.float(), number, len(heads))


def _best_head(content: Any, heads: list[int]) -> int | None:
    """The head that a file calls best, or its only one; None if it does not say."""
    for key in ("head", "best_loss_head"):
        if isinstance(content, dict) and content.get(key) is not None:
            return int(content[key])
    return heads[0] if len(heads) == 1 else None


def load_into(backbone: nn.Module, path: str | Path, kind: CheckpointKind = "auto") -> None:
    """Load a file's weights into a backbone.

    Raises ValueError if a weight is missing, left over or of another shape.
    """
    state = _state_dict(read_file(path), path)
    weights, expected = backbone_weights(state, kind), backbone.state_dict()
    # num_batches_tracked is missing in old files and has no effect.
    missing = [
        name
        for name in expected
        if name not in weights and not name.endswith("num_batches_tracked")
    ]
    left_over = [name for name in weights if name not in expected]
    other_shapes = [
        f"{name} {list(weights[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or left_over or other_shapes:
        raise ValueError(
            f"checkpoint '{path}' does not fit this backbone: missing {_summary(missing)}; "
            f"left over {_summary(left_over)}; other shapes {_summary(other_shapes)}; the file "
            f"holds {_summary(state)}. Check name and stem (imagenet, cifar, stl) and "
            "checkpoint_kind (moco, scan, plain)"
        )
    backbone.load_state_dict(weights, strict=False)


def backbone_weights(state: dict[str, Tensor], kind: CheckpointKind) -> dict[str, Tensor]:
    """The backbone's weights under torchvision's names: without prefix and heads.

    SCAN's `shortcut` is torchvision's `downsample`.
    """
    for prefix in PREFIXES[kind]:
        weights = {
            name.removeprefix(prefix).replace(".shortcut.", ".downsample."): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        if weights:
            return {name: value for name, value in weights.items() if not name.startswith(HEADS)}
    return {}


def _summary(names: Collection[Any]) -> str:
    """Number of names and the first four of them."""
    if not names:
        return "none"
    first = ", ".join([str(name) for name in names][:4])
    return f"{len(names)} ({first}{', ...' if len(names) > 4 else ''})"
