"""What heads reach on given features: k-means, SCAN (chosen head, consensus, every head) and TEMI, over seeds, one JSON line per row.

    python -m benchmarks.heads_accuracy FEATURES.npz --seeds 3

The file holds `features` [N, D] and `labels` [N]; labels are read for the scores at the end and for nothing before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.rows import emit
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import EpochPlan, FeatureFeed, NeighbourSampler, held_out_features
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.engine.optimizer import OptimizerConfig, build_optimizer
from dist_scan.engine.precision import seed_step, set_determinism
from dist_scan.evaluate.metrics import evaluate_assignment
from dist_scan.heads.selection import PublishedHeads
from dist_scan.methods.base import Method, MethodInputs, method_class
from dist_scan.search.kmeans import kmeans
from dist_scan.search.neighbours import mine_neighbours
from dist_scan.search.options import KMeansOptions
from dist_scan.world.world import current

NEEDS = "data:imagenet50-val-moco128.npz"
SETTINGS = {
    "scan": {
        "method": {"entropy_weight": 5.0, "normalise": "standardise"},
        "optimizer": {"kind": "sgd", "lr": 0.05},
    },
    "temi": {
        "method": {"normalise": "l2", "temperature": 0.1, "momentum": 0.98},
        "optimizer": {"kind": "adam", "lr": 0.01},
    },
}
HELD_OUT_NEIGHBOURS = 5  # as SCAN's released configs choose


def train(
    kind: str, table: FeatureTable, neighbours: NeighbourTable, args: argparse.Namespace, seed: int
) -> Method:
    """A method's heads after args.epochs epochs, with its choice made on all rows and their five nearest."""
    cls, settings = method_class(kind), SETTINGS[kind]
    config = cls.Config(
        kind=kind, num_clusters=args.clusters, num_heads=args.heads, **settings["method"]
    )
    feed = FeatureFeed(
        table,
        EpochPlan(
            np.arange(table.num_rows),
            args.batch,
            seed,
            current(),
            neighbours=NeighbourSampler(neighbours),
        ),
        current().device,
    )
    mean, std = table.mean_and_std()
    seed_step(seed, 0, 0)
    method = cls(
        config,
        MethodInputs(
            num_images=table.num_rows,
            global_batch=args.batch,
            seed=seed,
            on_features=True,
            feature_dim=table.dim,
            feature_mean=mean,
            feature_std=std,
        ),
    )
    optimizer = build_optimizer(OptimizerConfig(**settings["optimizer"]), method.parameter_groups())
    rows = np.arange(table.num_rows)
    held = held_out_features(
        table, rows, neighbours.rows(rows)[0][:, :HELD_OUT_NEIGHBOURS], current()
    )
    for epoch in range(args.epochs):
        for batch in feed.batches(epoch):
            step = method(batch)
            step.loss.backward()
            optimizer.step()
            method.end_step(batch, step)
            optimizer.zero_grad(set_to_none=True)
        method.end_epoch(epoch, held)
    return method


def assignments(method: Method, table: FeatureTable, folder: Path) -> dict[str, np.ndarray]:
    """Clusters of every row by what the method publishes: the chosen head, the consensus, and each head."""
    method.publish(folder)
    kept, number = PublishedHeads(folder), method.heads.sizes[0]
    features = method.features(torch.from_numpy(table.rows(np.arange(table.num_rows))).float())
    out = {f"head{h}": kept.logits(h, features) for h in range(len(kept.sizes))}
    out = {
        "chosen": out[f"head{kept.selected[0]}"],
        "consensus": kept.consensus(number, features),
        **out,
    }
    return {name: x.argmax(1).numpy() for name, x in out.items()}


def one_seed(
    seed: int,
    args: argparse.Namespace,
    table: FeatureTable,
    neighbours: NeighbourTable,
    labels: np.ndarray,
    folder: Path,
) -> dict[str, dict]:
    """Scores by row name."""
    found = {}
    if "kmeans" in args.methods:
        found["kmeans"] = evaluate_assignment(
            kmeans(table, args.clusters, KMeansOptions(restarts=5, seed=seed)).assignment,
            labels,
            args.clusters,
        )
    for kind in (k for k in args.methods if k in SETTINGS):
        began = time.process_time()
        method = train(kind, table, neighbours, args, seed)
        seconds = time.process_time() - began
        scores = {
            n: evaluate_assignment(a, labels, args.clusters)
            for n, a in assignments(method, table, folder).items()
        }
        heads = [scores.pop(n) for n in list(scores) if n.startswith("head")]
        scores["mean_head"] = {
            k: float(np.mean([h[k] for h in heads])) for k in ("acc", "nmi", "ari")
        }
        scores["best_head_by_label"] = max(heads, key=lambda h: h["acc"])
        loss, stable, acc = (
            method.choice.losses.numpy(),
            method.choice.stability.numpy(),
            np.array([h["acc"] for h in heads]),
        )
        scores["chosen"] |= {
            "epoch": int(method.choice.best_epoch[0]),
            "cpu_s": round(seconds, 1),
            "corr_acc_loss": float(np.corrcoef(acc, loss)[0, 1]),
            "corr_acc_stability": float(np.corrcoef(acc, stable)[0, 1]),
        }
        found |= {f"{kind} {name}": value for name, value in scores.items()}
    return found


def main() -> None:
    """Train, score, print mean and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["kmeans", "scan", "temi"],
        choices=["kmeans", "scan", "temi"],
    )
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KIND.PART.NAME=VALUE", help="scan.optimizer.lr=0.1"
    )
    args = parser.parse_args()
    for text in args.set:
        path, value = text.split("=")
        kind, part, name = path.split(".")
        SETTINGS[kind][part][name] = json.loads(value) if value[0] in "0123456789-[" else value
    set_determinism()
    with np.load(args.npz) as data, tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "features.npy", data["features"])
        table, labels = (
            FeatureTable.from_npy(Path(folder) / "features.npy", Path(folder) / "table", 4),
            data["labels"],
        )
        neighbours = mine_neighbours(table, Path(folder) / "neighbours", args.neighbours)
        runs = []
        for seed in range(args.seeds):
            runs.append(one_seed(seed, args, table, neighbours, labels, Path(folder) / "heads"))
    for name in runs[0]:
        row = {"row": name, "seeds": args.seeds}
        for key in [
            k
            for k, v in runs[0][name].items()
            if isinstance(v, float | int) and not isinstance(v, bool)
        ]:
            values = [run[name][key] for run in runs if run[name].get(key) is not None]
            row[key] = round(float(np.mean(values)), 4)
            if key in ("acc", "nmi", "ari"):
                row[f"{key}_spread"] = (
                    round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
                )
        emit(row)


if __name__ == "__main__":
    main()
