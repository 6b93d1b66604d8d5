"""Weights from elsewhere: MoCo's released and full files, SCAN's, timm's, safetensors. Read safely, matched strictly."""

from __future__ import annotations

import pickle
from collections.abc import Callable
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
CLUSTER_HEAD = "cluster_head."
HEADS = ("fc.", "classifier.", "head.", "contrastive_head.", "cluster_head.", "projector.")


def _numbers() -> list[tuple[Callable, str]]:
    """What a numpy number in a pickle is made of, under numpy 1's and 2's names: SCAN's code saves the chosen head as np.argmin gave it."""
    scalar = np.int64(0).__reduce__()[0]
    kinds = [type(np.dtype(k)) for k in ("int32", "int64", "float32", "float64")]
    return [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")] + [
        (np.dtype, "numpy.dtype"),
        *((k, f"numpy.dtypes.{k.__name__}") for k in kinds),
    ]


def read_tree(path: str | Path) -> Any:
    """What a file of weights holds, read without running any code in it. Raises ValueError when it is not there or cannot be read so."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"checkpoint '{path}' does not exist; give the path of a local file (nothing is downloaded)"
        )
    try:
        with torch.serialization.safe_globals(_numbers()):
            return (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint '{path}' cannot be read safely: {str(error).splitlines()[0]}; "
            "give a file of plain tensors (torch.save of a state_dict, or .safetensors)"
        ) from None
    except Exception as error:  # safetensors has an error class of its own
        raise ValueError(f"checkpoint '{path}' cannot be read: {error}") from None


def read_state(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file by name, without `module.`. Raises ValueError when it is not there or holds no weights."""
    return _state(read_tree(path), path)


def _state(tree: Any, path: str | Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    found = (
        {k.removeprefix("module."): v for k, v in tree.items() if isinstance(v, Tensor)}
        if isinstance(tree, dict)
        else {}
    )
    if not found:
        raise ValueError(
            f"checkpoint '{path}' holds no weights (found: {_some(tree) if isinstance(tree, dict) else type(tree).__name__})"
        )
    return found


class ClusterHead(NamedTuple):
    """One head of a SCAN file: weight [C, D], bias [C], and which of how many it was."""

    weight: Tensor
    bias: Tensor
    number: int
    num_heads: int


def read_cluster_head(path: str | Path, number: int | None = None) -> ClusterHead:
    """A head of a file that SCAN's released code saved (FIDELITY.md 1.1): {model, head}, its training checkpoint (best_loss_head), or
    the bare state_dict of self-labelling with its one head. number: which; None: the one the file calls best. Raises ValueError."""
    tree = read_tree(path)
    state = _state(tree, path)
    found = sorted({int(k.split(".")[1]) for k in state if k.startswith(CLUSTER_HEAD)})
    if not found:
        raise ValueError(
            f"checkpoint '{path}' holds no cluster head ({CLUSTER_HEAD}0.weight ...; the file holds {_some(state)}); leave cluster_head out"
        )
    if number is None:
        named = [
            tree[k]
            for k in ("head", "best_loss_head")
            if isinstance(tree, dict) and tree.get(k) is not None
        ]
        number = int(named[0]) if named else found[0] if len(found) == 1 else -1
    if number not in found:
        raise ValueError(
            f"checkpoint '{path}' does not say which head is best, or has no head {number}; allowed: cluster_head: {', '.join(map(str, found))}"
        )
    weight, bias = (state.get(f"{CLUSTER_HEAD}{number}.{part}") for part in ("weight", "bias"))
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"checkpoint '{path}': {CLUSTER_HEAD}{number} is no linear layer with a weight [C, D] and a bias [C]"
        )
    return ClusterHead(weight.float(), bias.float(), number, len(found))


def backbone_part(state: dict[str, Tensor], kind: CheckpointKind) -> dict[str, Tensor]:
    """The backbone's tensors under torchvision's names: prefix dropped, SCAN's `shortcut` renamed, heads left out."""
    prefix = next((p for p in PREFIXES[kind] if any(k.startswith(p) for k in state)), None)
    if prefix is None:
        return {}
    part = {
        k.removeprefix(prefix).replace(".shortcut.", ".downsample."): v
        for k, v in state.items()
        if k.startswith(prefix)
    }
    return {k: v for k, v in part.items() if not k.startswith(HEADS)}


def load_into(backbone: nn.Module, path: str | Path, kind: CheckpointKind = "auto") -> None:
    """Fill the backbone. Every weight must be there with its shape and none left over; else ValueError says what was found."""
    state = read_state(path)
    part, wanted = backbone_part(state, kind), backbone.state_dict()
    missing = [k for k in wanted if k not in part and not k.endswith("num_batches_tracked")]
    left = [k for k in part if k not in wanted]
    shapes = [
        f"{k} {list(part[k].shape)} instead of {list(wanted[k].shape)}"
        for k in wanted
        if k in part and part[k].shape != wanted[k].shape
    ]
    if missing or left or shapes:
        raise ValueError(
            f"checkpoint '{path}' does not fit this backbone: missing {_some(missing)}; left over {_some(left)}; "
            f"other shapes {_some(shapes)}; the file holds {_some(state)}. Check name and stem "
            "(imagenet, cifar, stl) and checkpoint_kind (moco, scan, plain)"
        )
    backbone.load_state_dict(part, strict=False)


def _some(names: Any) -> str:
    names = list(names)
    return (
        f"{len(names)} ({', '.join(map(str, names[:4]))}{', ...' if len(names) > 4 else ''})"
        if names
        else "none"
    )
