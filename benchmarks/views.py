"""What cached views give and cost: SCAN's heads on a bank of centre crops, of V = 1, 2, 4, 8 random views, and on fresh views at every step.

    python -m benchmarks.views                                   # the digits, with the quickstart's pretext
    python -m benchmarks.views configs/cifar10.yaml --seeds 3 data.train.source=TRAIN.parquet ...

Per seed a config's pretext and neighbours are made once; then heads with the same settings, on views made by the pretext's own recipe, are
chosen on and scored by centre crops. One JSON line per row, mean and spread over seeds; CPU seconds of one thread: filling the bank,
and training the heads (fresh: the network's forward passes too). Labels are read for the scores and for nothing before.
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

from benchmarks.rows import ROOT, emit
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
KEPT = ("pretext", "features", "neighbours")  # of the config; the rest is ours
SCORES = ("acc", "nmi", "ari", "consensus_acc", "mean_head_acc", "held_out_loss")


def arms(views: Sequence[int]) -> list[str]:
    """Names of the rows."""
    return ["centre", *(f"views_{v}" for v in views), "fresh"]


def stages(tree: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The config's pretext and neighbours, and for every arm its bank, heads, scores."""
    recipe = tree["stages"]["pretext"]["recipes"][0]
    clusters = next(
        s["method"]["num_clusters"]
        for s in tree["stages"].values()
        if "num_clusters" in s.get("method", {})
    )
    found = {name: tree["stages"][name] for name in KEPT}
    found["centre"] = {"kind": "embed", "backbone": "pretext", "num_shards": 4}
    found |= {
        f"views_{v}": {
            "kind": "embed",
            "backbone": "pretext",
            "views": v,
            "recipe": recipe,
            "num_shards": 4,
        }
        for v in args.views
    }
    for arm in arms(args.views):
        source = (
            {"features": arm, "held_out_features": "centre"}
            if arm != "fresh"
            else {"images": "train", "recipes": [recipe, recipe]}
        )
        method = {
            "kind": "scan",
            "num_clusters": clusters,
            "num_heads": args.heads,
            "normalise": "l2",
        }
        found[f"heads_{arm}"] = {
            "kind": "train",
            **source,
            "backbone": "pretext",
            "neighbours": "neighbours",
            "optimizer": {"kind": "sgd", "lr": args.lr},
            "epochs": args.epochs,
            "global_batch": args.batch,
            "held_out_share": 0.1,
            "method": method | ({"train_backbone": False} if arm == "fresh" else {}),
        }
        found[f"chosen_{arm}"] = {"kind": "assign", "model": f"heads_{arm}", "features": "centre"}
        found[f"consensus_{arm}"] = {
            "kind": "consensus",
            "model": f"heads_{arm}",
            "features": "centre",
        }
        found[f"evaluate_{arm}"] = {
            "kind": "evaluate",
            "heads": f"heads_{arm}",
            "subjects": {"chosen": f"chosen_{arm}", "consensus": f"consensus_{arm}"},
        }
    return found


class Watch:
    """What a pipeline says to: CPU seconds of this process (all its threads) by stage, kept in a file over starts."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.began = path, "", 0.0
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def __call__(self, text: str) -> None:
        name, _, rest = text.partition(": ")
        if rest.startswith(("starts (", "resumes (")):
            self.close()
            self.name, self.began = name, time.process_time()
            if rest.startswith("starts"):  # not what an earlier start with other settings took
                self.seconds.pop(name, None)

    def close(self) -> None:
        """The stage that was begun last has ended."""
        if self.name:
            self.seconds[self.name] = (
                self.seconds.get(self.name, 0.0) + time.process_time() - self.began
            )
            write_json(self.path, self.seconds)
        self.name = ""


def one_seed(
    tree: Mapping[str, Any], seed: int, args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, float]]:
    """Scores and costs by arm."""
    run = validate_settings(
        CompleteRunConfig,
        {
            **tree,
            "seed": seed,
            "stages": stages(tree, args),
            "runtime": {"run_dir": str(folder), "workers": 1, "device": args.device},
        },
    )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    watch = Watch(folder / "cpu.json")
    try:
        folders = Pipeline(run, current(), StopFlag(), watch).run()
    finally:
        watch.close()
    found = {}
    for arm in arms(args.views):
        facts = json.loads((folders[f"evaluate_{arm}"] / "evaluate.json").read_text())
        heads, chosen = facts["heads"], facts["subjects"]["chosen"]
        found[arm] = {
            **{k: chosen[k] for k in ("acc", "nmi", "ari")},
            "consensus_acc": facts["subjects"]["consensus"]["acc"],
            "mean_head_acc": float(np.mean([h["acc"] for h in heads["heads"]])),
            "held_out_loss": heads["best_loss"],
            "best_epoch": heads["best_epoch"],
            "num_images": facts["num_images"],
            "bank_cpu_s": watch.seconds.get(arm, 0.0),
            "heads_cpu_s": watch.seconds[f"heads_{arm}"],
        }
    return found


def row(arm: str, seeds: Sequence[Mapping[str, float]], args: argparse.Namespace) -> dict[str, Any]:
    """Means and spreads over seeds; `passes`: forward passes through the network for each image."""
    values = {k: np.array([s[k] for s in seeds], float) for k in seeds[0]}
    fixed = {
        "row": arm,
        "seeds": len(seeds),
        "num_images": int(values.pop("num_images")[0]),
        "epochs": args.epochs,
        "heads": args.heads,
        "lr": args.lr,
        "batch": args.batch,
        "passes": 2 * args.epochs
        if arm == "fresh"
        else 1
        if arm == "centre"
        else int(arm.removeprefix("views_")),
    }
    for key, each in values.items():
        fixed[key] = round(float(each.mean()), 4)
        if key in SCORES and len(each) > 1:
            fixed[f"{key}_spread"] = round(float(each.std(ddof=1)), 4)
    return fixed


def main() -> None:
    """Every arm of every seed, then the rows."""
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
        help="where the runs are kept: the same command goes on there when it was stopped (default: nothing is kept)",
    )
    args = parser.parse_intermixed_args()
    if "=" in args.config:
        args.overrides, args.config = [args.config, *args.overrides], parser.get_default("config")
    set_determinism()
    torch.set_num_threads(1)
    tree = read_settings(Path(args.config), args.overrides)
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one_seed(tree, seed, args, Path(args.dir or folder) / f"seed{seed}"))
    for arm in arms(args.views):
        emit({**row(arm, [run[arm] for run in runs], args), "data": tree["name"]})


if __name__ == "__main__":
    main()
