"""Accuracy of k-means, SCAN's and TEMI's heads on given features, over seeds; one JSON line a row.

    python -m benchmarks.heads_accuracy FEATURES.npz --seeds 3

Rows of a method: its selected head, the consensus, the mean over heads, and the head that labels
would select. The file has features [N, D] and labels [N]; labels are used for the scores only.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import emit, over_seeds
from benchmarks.search_rows import write_rows
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import EpochPlan, FeatureFeed, NeighbourSampler, held_out_features
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.engine.precision import seed_step, set_determinism
from dist_scan.engine.training_loop import TrainingLoopConfig, TrainJob, train
from dist_scan.evaluate.metrics import evaluate_assignment
from dist_scan.heads.selection import PublishedHeads
from dist_scan.methods.base import Method, MethodInputs, method_class
from dist_scan.monitoring.bottleneck import TrainingSetup
from dist_scan.search.kmeans import kmeans
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import KMeansOptions
from dist_scan.world.world import current

NEEDS = "data:imagenet50-val-moco128.npz"
Settings = dict[str, dict[str, dict[str, Any]]]
"""By kind of method and part."""
SETTINGS: Settings = {
    "scan": {
        "method": {"entropy_weight": 5.0, "normalise": "standardise"},
        "optimizer": {"kind": "sgd", "lr": 0.05},
    },
    "temi": {
        "method": {"normalise": "l2", "temperature": 0.1, "momentum": 0.98},
        "optimizer": {"kind": "adam", "lr": 0.01},
    },
}
HELD_OUT_NEIGHBOURS = 5
"""Neighbours that the selection of heads uses, as in SCAN's released configs."""
SCORES = ("acc", "nmi", "ari")
Scores = dict[str, float]


class Experiment:
    """The data and settings that all seeds share."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        with np.load(args.npz) as data:
            self.labels = data["labels"]
            self.table: FeatureTable = write_rows(folder / "features", data["features"])
        self.neighbours: NeighbourTable = search_neighbours(
            self.table, folder / "neighbours", args.neighbours
        )
        self.args = args
        self.folder = folder
        self.settings = override(SETTINGS, args.set)

    def run_seed(self, seed: int) -> dict[str, Scores]:
        """Scores by name of the row."""
        scores: dict[str, Scores] = {}
        for kind in self.args.methods:
            if kind == "kmeans":
                options = KMeansOptions(restarts=5, seed=seed)
                result = kmeans(self.table, self.args.clusters, options)
                scores[kind] = self.evaluate(result.assignment)
            else:
                method_scores = self.run_method(kind, seed)
                scores |= {f"{kind} {name}": values for name, values in method_scores.items()}
        return scores

    def run_method(self, kind: str, seed: int) -> dict[str, Scores]:
        """Scores of the heads of one method."""
        begin = time.process_time()
        method = self.train(kind, seed)
        cpu_s = time.process_time() - begin
        logits = self.published_logits(method)
        heads = [self.evaluate(head_logits) for head_logits in logits["heads"]]
        selected = self.evaluate(logits["selected"])
        accuracies = np.array([head["acc"] for head in heads])
        selection = method.choice
        selected |= {
            "epoch": int(selection.best_epoch[0]),
            "cpu_s": round(cpu_s, 1),
            "corr_acc_loss": correlation(accuracies, selection.losses.numpy()),
            "corr_acc_stability": correlation(accuracies, selection.stability.numpy()),
        }
        return {
            "chosen": selected,
            "consensus": self.evaluate(logits["consensus"]),
            "mean_head": {k: float(np.mean([head[k] for head in heads])) for k in SCORES},
            "best_head_by_label": max(heads, key=lambda head: head["acc"]),
        }

    def train(self, kind: str, seed: int) -> Method:
        """Train the heads of a method; all rows are held out for the selection of heads."""
        args, settings = self.args, self.settings[kind]
        world = current()
        rows = np.arange(self.table.num_rows)
        plan = EpochPlan(
            rows, args.batch, seed, world, neighbours=NeighbourSampler(self.neighbours)
        )
        mean, std = self.table.mean_and_std()
        inputs = MethodInputs(
            num_images=self.table.num_rows,
            global_batch=args.batch,
            seed=seed,
            on_features=True,
            feature_dim=self.table.dim,
            feature_mean=mean,
            feature_std=std,
        )
        cls = method_class(kind)
        sizes = {"num_clusters": args.clusters, "num_heads": args.heads}
        config = cls.Config(kind=kind, **sizes, **settings["method"])
        seed_step(seed, 0, 0)
        method = cls(config, inputs)
        nearest = self.neighbours.rows(rows)[0][:, :HELD_OUT_NEIGHBOURS]
        with tempfile.TemporaryDirectory() as folder:
            job = TrainJob(
                method=method,
                feed=FeatureFeed(self.table, plan, world.device),
                settings=TrainingLoopConfig(optimizer=settings["optimizer"], epochs=args.epochs),
                run_dir=Path(folder),
                out=Path(folder),
                setup=TrainingSetup(args.batch),
                seed=seed,
                log=lambda text: None,
                held_out=held_out_features(self.table, rows, nearest, world),
            )
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                train(job)
        return method

    def published_logits(self, method: Method) -> dict[str, Any]:
        """Logits of all rows by what the method publishes: selected, consensus, and all heads."""
        folder = self.folder / "heads"
        method.publish(folder)
        published = PublishedHeads(folder)
        rows = self.table.rows(np.arange(self.table.num_rows))
        features = method.features(torch.from_numpy(rows).float())
        heads = [published.logits(h, features) for h in range(len(published.sizes))]
        return {
            "selected": heads[published.selected[0]],
            "consensus": published.consensus(published.sizes[0], features),
            "heads": heads,
        }

    def evaluate(self, assignment: np.ndarray | torch.Tensor) -> Scores:
        """Scores of an assignment [N], or of the most probable clusters by logits [N, C]."""
        if isinstance(assignment, torch.Tensor):
            assignment = assignment.argmax(1).numpy()
        return evaluate_assignment(assignment, self.labels, self.args.clusters)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation coefficient of two vectors."""
    return float(np.corrcoef(first, second)[0, 1])


def override(settings: Settings, overrides: list[str]) -> Settings:
    """Settings with KIND.PART.NAME=VALUE replaced; numbers and lists are JSON."""
    settings = copy.deepcopy(settings)
    for text in overrides:
        path, value = text.split("=")
        kind, part, name = path.split(".")
        is_json = value[0] in "0123456789-["
        settings[kind][part][name] = json.loads(value) if is_json else value
    return settings


def emit_row(name: str, seeds: list[Scores]) -> None:
    """Print the means over seeds, and the spread of the main scores."""
    row: dict[str, Any] = {"row": name, "seeds": len(seeds)}
    for key, value in seeds[0].items():
        if isinstance(value, bool) or not isinstance(value, float | int):
            continue
        values = [scores[key] for scores in seeds if scores.get(key) is not None]
        fields = over_seeds(values, key)
        row |= fields if key in SCORES else {key: fields[key]}
    emit(row)


def main() -> None:
    """Train and score all methods with all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    methods = ["kmeans", *SETTINGS]
    parser.add_argument("npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KIND.PART.NAME=VALUE", help="scan.optimizer.lr=0.1"
    )
    args = parser.parse_args()
    set_determinism()
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(args, Path(folder))
        seeds = [experiment.run_seed(seed) for seed in range(args.seeds)]
    for name in seeds[0]:
        emit_row(name, [scores[name] for scores in seeds])


if __name__ == "__main__":
    main()
