"""Evaluation: compares assignments with labels; without labels, only their sizes.

Besides, only `probe` and the diagnostic `true_neighbours` read labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.data.assignments import Assignments
from dist_scan.data.beton.format import read_labels
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.evaluate.metrics import (
    checked_contingency_table,
    cluster_health,
    evaluate_assignment,
    neighbour_purity,
    nmi,
)
from dist_scan.stages.base import Stage
from dist_scan.storage.artifacts import MANIFEST
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import barrier

PURITY_AT = (1, 5, 20, 50)
"""Numbers of neighbours for which the purity is reported."""
HEAD_SCORES = ("acc", "nmi", "ari", "many_to_one")


class EvaluateConfig(StageConfig):
    """Settings of the evaluation: `subjects` are the rows of the report's table."""

    kind: Literal["evaluate"] = "evaluate"
    images: Images = "train"
    subjects: dict[str, str]
    """Name in the report -> stage that published assignments.

    Kinds kmeans, assign, consensus, or a train stage whose method publishes clusters.
    """
    neighbours: Ref | None = None
    """Also measure how many of these neighbours have the image's label."""
    heads: Ref | None = None
    """A stage that trained heads, whose table of heads is shown."""

    def publishes(self) -> tuple[str, ...]:
        """Scores, for the report."""
        return ("evaluation",)

    def inputs(self) -> dict[str, str]:
        """The subjects are inputs too."""
        subjects = {f"subjects.{name}": stage for name, stage in self.subjects.items()}
        return super().inputs() | subjects


class EvaluateStage(Stage[EvaluateConfig]):
    """Writes evaluate.json."""

    Config = EvaluateConfig

    def run(self) -> None:
        """Rank 0 evaluates: a contingency table of 1.28M labels takes 14 ms."""
        if self.context.world.rank == 0:
            write_json(self.context.out / "evaluate.json", self._evaluate())
        barrier()

    def _evaluate(self) -> dict[str, Any]:
        """The content of evaluate.json."""
        labels = read_labels(self.context.beton())
        num_labelled = int((labels >= 0).sum())
        results: dict[str, Any] = {
            "num_images": len(labels),
            "num_labelled": num_labelled,
            "num_classes": int(labels.max()) + 1 if num_labelled else 0,
            "subjects": {name: self._subject(name, labels) for name in self.config.subjects},
        }
        if self.config.neighbours is not None:
            results["neighbour_purity"] = self._neighbour_purity(labels)
        if self.config.heads is not None:
            results["heads"] = self._heads(labels)
        return results

    def _subject(self, name: str, labels: np.ndarray) -> dict[str, Any]:
        """Scores of one assignment [N] against labels [N], and statistics that need no labels."""
        folder = self.context.inputs[f"subjects.{name}"]
        assignments = Assignments.load(folder)
        if len(assignments.cluster) != len(labels):
            raise ValueError(
                f"stages.{self.context.name}.subjects.{name}: stage "
                f"'{self.config.subjects[name]}' assigned {len(assignments.cluster)} images, but "
                f"'{self.config.images}' has {len(labels)}; evaluate it on its own split"
            )
        num_clusters = assignments.num_clusters
        sizes = np.bincount(assignments.cluster, minlength=num_clusters)
        return {
            **evaluate_assignment(assignments.cluster, labels, num_clusters, assignments.top),
            "seconds": round(total_seconds(folder), 1),
            "num_clusters": num_clusters,
            **cluster_health(sizes),
            **history_scores(folder, labels),
        }

    def _neighbour_purity(self, labels: np.ndarray) -> dict[str, float | None] | None:
        table = NeighbourTable.open(self.context.inputs["neighbours"])
        if not (labels >= 0).any():
            return None
        ids = table.rows(np.arange(table.num_rows))[0]
        counts = [k for k in PURITY_AT if k <= table.num_neighbours]
        return {str(k): neighbour_purity(ids, labels, k) for k in counts}

    def _heads(self, labels: np.ndarray) -> Any:
        """The table of heads; with scores of each if a subject is a consensus of these heads."""
        folder = self.context.inputs["heads"]
        if not (folder / "heads.json").is_file():
            return None
        table = json.loads((folder / "heads.json").read_text())
        for name in self.config.subjects:
            subject = self.context.inputs[f"subjects.{name}"]
            if not _is_consensus_of(subject, folder):
                continue
            with np.load(subject / "heads.npz") as arrays:
                heads = zip(table["heads"], arrays["cluster"], arrays["sizes"])
                for row, cluster, num_clusters in heads:
                    scores = evaluate_assignment(cluster, labels, int(num_clusters))
                    row |= {key: scores[key] for key in HEAD_SCORES if scores.get(key) is not None}
            break
        return table


def _is_consensus_of(subject: Path, heads: Path) -> bool:
    """True if a subject's folder has the clusters of every head in a folder of heads."""
    if not (subject / "heads.npz").is_file():
        return False
    model = _read_manifest(subject)["inputs"].get("model", "")
    return (subject / model).resolve() == heads.resolve()


def history_scores(folder: Path, labels: np.ndarray) -> dict[str, Any]:
    """NMI with the labels of the clusters of every epoch, if the method has recorded them.

    DeepCluster's Figure 2a; the geometric NMI, as in its paper.
    """
    path = folder / "history.npz"
    if not path.is_file() or not (labels >= 0).any():
        return {}
    with np.load(path) as arrays:
        epochs, clusters = arrays["epoch"], arrays["cluster"]
    scores = {}
    for epoch, cluster in zip(epochs.tolist(), clusters):
        rows = cluster >= 0
        if rows.any():
            num_clusters = int(cluster.max()) + 1
            table = checked_contingency_table(
                cluster[rows], labels[rows], num_clusters, int(labels.max()) + 1
            )
            scores[epoch] = nmi(table, "geometric")
    return {
        "history": {
            "epoch": list(scores),
            "nmi": list(scores.values()),
            "nmi_variant": "geometric",
        }
    }


def total_seconds(folder: Path) -> float:
    """Seconds of the stage in a folder and of all stages that it depends on, each counted once."""
    seconds: dict[Path, float] = {}

    def visit(path: Path) -> None:
        if path in seconds:
            return
        manifest = _read_manifest(path)
        seconds[path] = manifest["seconds"]
        for other in manifest["inputs"].values():
            visit((path / other).resolve())

    visit(folder.resolve())
    return sum(seconds.values())


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())
