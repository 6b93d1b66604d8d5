"""SCAN's heads on cached and on fresh views: accuracy and CPU seconds, one JSON line a row.

    python -m benchmarks.views                    # the digits, with the quickstart's pretext
    python -m benchmarks.views configs/cifar10.yaml --seeds 3 data.train.source=TRAIN.parquet

Variants: features of centre crops, of V = 1, 2, 4, 8 random views, and fresh views in every step.
For each seed the config's pretext and neighbours are made once. Heads with the same settings are
then trained on views of the pretext's own recipe; they are selected and scored by centre crops.
Rows are means and standard deviations over seeds. CPU seconds are of one thread: computing the
features (bank_cpu_s), and training the heads (heads_cpu_s; of fresh views with the forward passes
through the network). Labels are used for the scores only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import ROOT, emit, over_seeds
from dist_scan.config import read_settings, validate_settings
from dist_scan.engine.precision import set_determinism
from dist_scan.engine.stop import StopFlag
from dist_scan.pipeline import Pipeline
from dist_scan.run_config import CompleteRunConfig
from dist_scan.storage.atomic import write_json
from dist_scan.world.world import current

QUICK = [
    "--seeds",
    "1",
    "--views",
    "1",
    "2",
    "--epochs",
    "2",
    "--batch",
    "60",
    "data.train.limit=300",
    "stages.pretext.epochs=1",
    "stages.pretext.network.width=8",
]
CONFIG_STAGES = ("pretext", "features", "neighbours")
"""Stages that are taken from the config."""
SCORES = ("acc", "nmi", "ari", "consensus_acc", "mean_head_acc", "held_out_loss")
NUM_SHARDS = 4


def variants(views: Sequence[int]) -> list[str]:
    """Names of the variants, which are the rows."""
    return ["centre", *(f"views_{count}" for count in views), "fresh"]


def num_forward_passes(variant: str, epochs: int) -> int:
    """Forward passes through the network for each image."""
    if variant == "fresh":
        return 2 * epochs
    return 1 if variant == "centre" else int(variant.removeprefix("views_"))


def num_clusters(config: Mapping[str, Any]) -> int:
    """That of the first method in a config that has one."""
    methods = (stage.get("method", {}) for stage in config["stages"].values())
    return next(method["num_clusters"] for method in methods if "num_clusters" in method)


def embed_stages(recipe: Any, views: Sequence[int]) -> dict[str, Any]:
    """The features of every variant that is cached."""
    centre = {"kind": "embed", "backbone": "pretext", "num_shards": NUM_SHARDS}
    random_views = {
        f"views_{count}": centre | {"views": count, "recipe": recipe} for count in views
    }
    return {"centre": centre} | random_views


def head_stages(
    variant: str, recipe: Any, clusters: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Training, assignments and scores of one variant."""
    heads = f"heads_{variant}"
    method = {
        "kind": "scan",
        "num_clusters": clusters,
        "num_heads": args.heads,
        "normalise": "l2",
    }
    inputs: dict[str, Any] = {"features": variant, "held_out_features": "centre"}
    if variant == "fresh":
        inputs = {"images": "train", "recipes": [recipe, recipe]}
        method["train_backbone"] = False
    train = {
        "kind": "train",
        **inputs,
        "backbone": "pretext",
        "neighbours": "neighbours",
        "optimizer": {"kind": "sgd", "lr": args.lr},
        "epochs": args.epochs,
        "global_batch": args.batch,
        "held_out_share": 0.1,
        "method": method,
    }
    subjects = {"chosen": f"chosen_{variant}", "consensus": f"consensus_{variant}"}
    return {
        heads: train,
        subjects["chosen"]: {"kind": "assign", "model": heads, "features": "centre"},
        subjects["consensus"]: {"kind": "consensus", "model": heads, "features": "centre"},
        f"evaluate_{variant}": {"kind": "evaluate", "heads": heads, "subjects": subjects},
    }


def stages(config: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Stages of a run: the config's pretext and neighbours, and those of every variant."""
    recipe = config["stages"]["pretext"]["recipes"][0]
    run_stages = {name: config["stages"][name] for name in CONFIG_STAGES}
    run_stages |= embed_stages(recipe, args.views)
    for variant in variants(args.views):
        run_stages |= head_stages(variant, recipe, num_clusters(config), args)
    return run_stages


class StageCpuTimes:
    """CPU seconds of this process by stage, read off the lines that a pipeline logs.

    Kept in a file, so that a resumed run has those of its earlier starts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self.stage = ""
        self.began = 0.0

    def __call__(self, line: str) -> None:
        """Read a line of the pipeline."""
        name, _, text = line.partition(": ")
        if not text.startswith(("starts (", "resumes (")):
            return
        self.end_stage()
        self.stage = name
        self.began = time.process_time()
        if text.startswith("starts"):  # an earlier start may have had other settings
            self.seconds.pop(name, None)

    def end_stage(self) -> None:
        """Add the time of the stage that began last."""
        if self.stage:
            took = time.process_time() - self.began
            self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + took
            write_json(self.path, self.seconds)
        self.stage = ""


def run_seed(
    config: Mapping[str, Any], seed: int, args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, float]]:
    """Scores and costs by variant."""
    settings = {
        **config,
        "seed": seed,
        "stages": stages(config, args),
        "runtime": {"run_dir": str(folder), "workers": 1, "device": args.device},
    }
    run = validate_settings(CompleteRunConfig, settings)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    cpu_times = StageCpuTimes(folder / "cpu.json")
    try:
        folders = Pipeline(run, current(), StopFlag(), cpu_times).run()
    finally:
        cpu_times.end_stage()
    results = {}
    for variant in variants(args.views):
        evaluation = json.loads((folders[f"evaluate_{variant}"] / "evaluate.json").read_text())
        heads, subjects = evaluation["heads"], evaluation["subjects"]
        results[variant] = {
            **{name: subjects["chosen"][name] for name in ("acc", "nmi", "ari")},
            "consensus_acc": subjects["consensus"]["acc"],
            "mean_head_acc": float(np.mean([head["acc"] for head in heads["heads"]])),
            "held_out_loss": heads["best_loss"],
            "best_epoch": heads["best_epoch"],
            "num_images": evaluation["num_images"],
            "bank_cpu_s": cpu_times.seconds.get(variant, 0.0),
            "heads_cpu_s": cpu_times.seconds[f"heads_{variant}"],
        }
    return results


def make_row(
    variant: str, seeds: Sequence[Mapping[str, float]], args: argparse.Namespace
) -> dict[str, Any]:
    """The row of one variant from the results of all seeds."""
    row: dict[str, Any] = {
        "row": variant,
        "seeds": len(seeds),
        "num_images": int(seeds[0]["num_images"]),
        "epochs": args.epochs,
        "heads": args.heads,
        "lr": args.lr,
        "batch": args.batch,
        "passes": num_forward_passes(variant, args.epochs),
    }
    for name in seeds[0]:
        if name not in row:
            fields = over_seeds([seed[name] for seed in seeds], name)
            row |= fields if name in SCORES else {name: fields[name]}
    return row


def main() -> None:
    """Run all variants with all seeds and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "config",
        nargs="?",
        default=str(ROOT / "configs" / "quickstart.yaml"),
        help="with stages pretext, features and neighbours",
    )
    parser.add_argument(
        "overrides", nargs="*", help="of the config, as launchers take them: data.train.limit=5000"
    )
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dir",
        help="folder of the runs: the same command resumes an interrupted one there (default: a "
        "temporary folder)",
    )
    args = parser.parse_intermixed_args()
    if "=" in args.config:  # no config was given, and this is an override
        args.overrides = [args.config, *args.overrides]
        args.config = parser.get_default("config")
    set_determinism()
    torch.set_num_threads(1)
    config = read_settings(Path(args.config), args.overrides)
    seeds = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(run_seed(config, seed, args, Path(args.dir or folder) / f"seed{seed}"))
    for variant in variants(args.views):
        row = make_row(variant, [results[variant] for results in seeds], args)
        emit({**row, "data": config["name"]})


if __name__ == "__main__":
    main()
