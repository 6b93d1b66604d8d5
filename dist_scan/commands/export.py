"""Take a finished run's model out of its folder: weights and how to use them, for plain timm and torch (docs/predict.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_scan.config import ConfigError

CLOSE = 1e-4  # probabilities of the exported network and of the run's model: one float32 rounding of the head apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from, where to."""
    parser.add_argument("run", metavar="RUN", help="a finished run's folder (runs/NAME)")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument(
        "--stage", help="whose model (default: the one behind what the report calls best)"
    )


def main(args: argparse.Namespace) -> int:
    """Write OUT/model.safetensors and OUT/model.json."""
    from dist_scan.finished_run import open_finished

    done, out = open_finished(args.run), Path(args.out)
    if out.exists():
        raise ConfigError(f"'{out}' exists; give a folder that does not, or remove it")
    stage, assign = done.chosen(args.stage)
    lines = export(done, stage, assign, out)
    print(f"{out}: the model of stage {stage}. To use it from there:\n  " + "\n  ".join(lines))
    return 0


def export(done, stage: str, assign: str | None, out: Path) -> list[str]:
    """The exported folder of one stage's model; returns the Python that loads it."""
    from dist_scan.data.images import input_description
    from dist_scan.finished_run import recipe_of
    from dist_scan.models.backbone import save_tensors
    from dist_scan.models.cluster_model import load_cluster_model, save_cluster_model
    from dist_scan.models.timm_export import (
        in_house,
        largest_difference,
        loading_lines,
        plain_network,
    )
    from dist_scan.storage.atomic import write_json

    model = load_cluster_model(done.stages[stage].path).eval()
    config, lines = model.backbone_config, loading_lines(model)
    recipe = recipe_of(done, assign)
    facts = {
        "backbone": config.name,
        "stem": config.stem,
        "num_clusters": model.num_clusters,
        "feature_dim": model.head.in_features,
        "normalise": model.norm.kind,
        "input": input_description(recipe, done.run),
        "load": lines,
        "provenance": provenance(done, stage),
    }
    if in_house(model):
        save_cluster_model(out, model, input=facts["input"], provenance=facts["provenance"])
    else:
        network = plain_network(model)
        apart = largest_difference(model, network, done.run.data.size)
        if apart > CLOSE:
            raise ValueError(
                f"timm's {config.name} with these weights gives other probabilities (by {apart:.2g}) than the run's model; "
                f"load {done.stages[stage].path} with dist_scan.models.cluster_model.load_cluster_model instead"
            )
        out.mkdir(parents=True)
        save_tensors(out / "model.safetensors", network.state_dict())
    write_json(out / "model.json", facts)
    return lines


def provenance(done, stage: str) -> dict:
    """Which run, stage and settings made it."""
    import torch

    manifest = done.stages[stage].manifest
    return {
        "run": done.run.name,
        "seed": done.run.seed,
        "stage": stage,
        "fingerprint": manifest["fingerprint"],
        "method": manifest["config"].get("method"),
        "torch": torch.__version__,
    }
