"""Export the model of a finished run: weights for plain timm and torch, and how to use them."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_scan.config import ConfigError
from dist_scan.data.images import input_description
from dist_scan.finished_run import FinishedRun, ModelChoice
from dist_scan.models.cluster_model import load_cluster_model, save_cluster_model
from dist_scan.models.timm_export import (
    is_in_house,
    largest_difference,
    loading_lines,
    to_timm_network,
)
from dist_scan.storage.atomic import write_json
from dist_scan.storage.tensors import save_tensors

TOLERANCE = 1e-4
"""Largest difference of a probability: the head is rounded to float32 once more than in the run."""


def export_model(run: FinishedRun, choice: ModelChoice, out: Path) -> list[str]:
    """Write a new folder with model.json and the weights; returns the Python lines that load it.

    A backbone of timm is written as one timm network with the head as its classifier. Raises
    ValueError if that network gives other probabilities than the run's model.
    """
    if out.exists():
        raise ConfigError(f"'{out}' exists; give a folder that does not, or remove it")
    stage = run.artifacts[choice.stage]
    model = load_cluster_model(stage.path).eval()
    backbone = model.backbone_config
    assert backbone is not None, "choose_model returns models with a backbone"
    lines = loading_lines(model)
    provenance = run.provenance(choice.stage) | {
        "method": stage.manifest["config"].get("method"),
        "torch": torch.__version__,
    }
    description = {
        "backbone": backbone.name,
        "stem": backbone.stem,
        "num_clusters": model.num_clusters,
        "feature_dim": model.head.in_features,
        "normalise": model.norm.kind,
        "input": input_description(run.recipe(choice.assign), run.config),
        "load": lines,
        "provenance": provenance,
    }
    if is_in_house(model):
        save_cluster_model(out, model, input=description["input"], provenance=provenance)
    else:
        network = to_timm_network(model)
        difference = largest_difference(model, network, run.config.data.size)
        if difference > TOLERANCE:
            raise ValueError(
                f"timm's {backbone.name} with these weights gives other probabilities (by "
                f"{difference:.2g}) than the run's model; load {stage.path} with "
                "dist_scan.models.cluster_model.load_cluster_model instead"
            )
        out.mkdir(parents=True)
        save_tensors(out / "model.safetensors", network.state_dict())
    write_json(out / "model.json", description)
    return lines
