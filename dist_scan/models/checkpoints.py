"""Weights from elsewhere: MoCo's released and full files, SCAN's, timm's, safetensors. Read safely, matched strictly."""
from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CheckpointKind = Literal["auto", "moco", "scan", "plain"]
PREFIXES = {"moco": ("encoder_q.",), "scan": ("backbone.",), "plain": ("",), "auto": ("encoder_q.", "backbone.", "")}
HEADS = ("fc.", "classifier.", "head.", "contrastive_head.", "cluster_head.", "projector.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file by name, without `module.`. Raises ValueError when it is not there or holds no weights."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint '{path}' does not exist; give the path of a local file (nothing is downloaded)")
    try:
        tree: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint '{path}' cannot be read safely: {str(error).splitlines()[0]}; "
                         "give a file of plain tensors (torch.save of a state_dict, or .safetensors)") from None
    except Exception as error:  # safetensors has an error class of its own
        raise ValueError(f"checkpoint '{path}' cannot be read: {error}") from None
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    found = {k.removeprefix("module."): v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, dict) else {}
    if not found:
        raise ValueError(f"checkpoint '{path}' holds no weights (found: {_some(tree) if isinstance(tree, dict) else type(tree).__name__})")
    return found


def backbone_part(state: dict[str, Tensor], kind: CheckpointKind) -> dict[str, Tensor]:
    """The backbone's tensors under torchvision's names: prefix dropped, SCAN's `shortcut` renamed, heads left out."""
    prefix = next((p for p in PREFIXES[kind] if any(k.startswith(p) for k in state)), None)
    if prefix is None:
        return {}
    part = {k.removeprefix(prefix).replace(".shortcut.", ".downsample."): v for k, v in state.items() if k.startswith(prefix)}
    return {k: v for k, v in part.items() if not k.startswith(HEADS)}


def load_into(backbone: nn.Module, path: str | Path, kind: CheckpointKind = "auto") -> None:
    """Fill the backbone. Every weight must be there with its shape and none left over; else ValueError says what was found."""
    state = read_state(path)
    part, wanted = backbone_part(state, kind), backbone.state_dict()
    missing = [k for k in wanted if k not in part and not k.endswith("num_batches_tracked")]
    left = [k for k in part if k not in wanted]
    shapes = [f"{k} {list(part[k].shape)} instead of {list(wanted[k].shape)}" for k in wanted if k in part and part[k].shape != wanted[k].shape]
    if missing or left or shapes:
        raise ValueError(f"checkpoint '{path}' does not fit this backbone: missing {_some(missing)}; left over {_some(left)}; "
                         f"other shapes {_some(shapes)}; the file holds {_some(state)}. Check name and stem "
                         "(imagenet, cifar, stl) and checkpoint_kind (moco, scan, plain)")
    backbone.load_state_dict(part, strict=False)


def _some(names: Any) -> str:
    names = list(names)
    return f"{len(names)} ({', '.join(map(str, names[:4]))}{', ...' if len(names) > 4 else ''})" if names else "none"
