"""Assignments meet labels, for the first and only time. Without labels: what can be said without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.data.assignments import Assignments
from dist_scan.stages.base import Stage
from dist_scan.stages.beton import beton_path
from dist_scan.storage.artifacts import MANIFEST
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import barrier

PURITY_AT = (1, 5, 20, 50)


class EvaluateConfig(StageConfig):
    """`subjects` names what is compared: the keys of report.json and the rows of the table."""

    kind: Literal["evaluate"] = "evaluate"
    images: Images = "train"
    subjects: dict[str, str]
    """Name in the report -> stage that published assignments (kmeans, assign)."""
    neighbours: Ref | None = None
    """Also measure how many neighbours share the anchor's label."""
    heads: Ref | None = None
    """The stage of the heads, whose per-head table is shown."""

    def publishes(self) -> tuple[str, ...]:
        return ("evaluation",)

    def inputs(self) -> dict[str, str]:
        """The subjects are references too."""
        return super().inputs() | {
            f"subjects.{name}": stage for name, stage in self.subjects.items()
        }


class EvaluateStage(Stage):
    """Writes evaluate.json."""

    Config = EvaluateConfig

    def run(self) -> None:
        """Rank 0 works: everything comes from one contingency table per subject (14 ms at 1.28M labels)."""
        if self.context.world.rank == 0:
            write_json(self.context.out / "evaluate.json", self._facts())
        barrier()

    def _facts(self) -> dict[str, Any]:
        from dist_scan.data.beton.format import read_labels

        labels = read_labels(beton_path(self.context.inputs["images"]))
        subjects = {name: self._subject(name, labels) for name in self.config.subjects}
        facts: dict[str, Any] = {
            "num_images": len(labels),
            "num_labelled": int((labels >= 0).sum()),
            "num_classes": int(labels.max()) + 1 if (labels >= 0).any() else 0,
            "subjects": subjects,
        }
        if self.config.neighbours is not None:
            facts["neighbour_purity"] = self._neighbour_purity(labels)
        if self.config.heads is not None:
            facts["heads"] = self._heads(labels)
        return facts

    def _subject(self, name: str, labels: np.ndarray) -> dict[str, Any]:
        """All scores of one assignment; label-free health always."""
        from dist_scan.evaluate.metrics import cluster_health, evaluate_assignment

        stage = self.config.subjects[name]
        found = Assignments.load(self.context.inputs[f"subjects.{name}"])
        if len(found.cluster) != len(labels):
            raise ValueError(
                f"stages.{self.context.name}.subjects.{name}: stage '{stage}' assigned {len(found.cluster)} images, "
                f"'{self.config.images}' has {len(labels)}; evaluate it on the split it was made from"
            )
        sizes = np.bincount(found.cluster, minlength=found.num_clusters)
        scores = evaluate_assignment(found.cluster, labels, found.num_clusters, found.top)
        return {
            **scores,
            "seconds": round(chain_seconds(self.context.inputs[f"subjects.{name}"]), 1),
            "num_clusters": found.num_clusters,
            **cluster_health(sizes),
            **self._history(name, labels),
        }

    def _history(self, name: str, labels: np.ndarray) -> dict[str, Any]:
        """Agreement with the labels of every clustering that a method kept (DeepCluster's Figure 2a): geometric NMI, as in its paper."""
        from dist_scan.evaluate.metrics import contingency, nmi

        path = self.context.inputs[f"subjects.{name}"] / "history.npz"
        if not path.is_file() or not (labels >= 0).any():
            return {}
        with np.load(path) as kept:
            epochs, clusters = kept["epoch"], kept["cluster"]
        held = (clusters >= 0).any(1)
        epochs, clusters = epochs[held], clusters[held]
        tables = (
            contingency(c[c >= 0], labels[c >= 0], int(c.max()) + 1, int(labels.max()) + 1)
            for c in clusters
        )
        return {
            "history": {
                "epoch": epochs.tolist(),
                "nmi": [nmi(t, "geometric") for t in tables],
                "nmi_variant": "geometric",
            }
        }

    def _neighbour_purity(self, labels: np.ndarray) -> dict[str, float] | None:
        from dist_scan.data.neighbour_table import NeighbourTable
        from dist_scan.evaluate.metrics import neighbour_purity

        table = NeighbourTable.open(self.context.inputs["neighbours"])
        if not (labels >= 0).any():
            return None
        ids = table.rows(np.arange(table.num_rows))[0]
        return {
            str(k): neighbour_purity(ids, labels, k) for k in PURITY_AT if k <= table.num_neighbours
        }

    def _heads(self, labels: np.ndarray) -> Any:
        """The heads' table; with every head's scores when a subject is a consensus stage of these heads on this split."""
        from dist_scan.evaluate.metrics import evaluate_assignment

        folder = self.context.inputs["heads"]
        if not (folder / "heads.json").is_file():
            return None
        table = json.loads((folder / "heads.json").read_text())
        for file in (
            self.context.inputs[f"subjects.{name}"] / "heads.npz" for name in self.config.subjects
        ):
            if not file.is_file():
                continue
            model = json.loads((file.parent / MANIFEST).read_text())["inputs"].get("model", "")
            if (file.parent / model).resolve() != folder.resolve():
                continue
            with np.load(file) as every:
                for row, cluster, number in zip(table["heads"], every["cluster"], every["sizes"]):
                    scores = evaluate_assignment(cluster, labels, int(number))
                    row |= {
                        key: scores[key]
                        for key in ("acc", "nmi", "ari", "many_to_one")
                        if scores.get(key) is not None
                    }
            break
        return table


def chain_seconds(folder: Path) -> float:
    """Seconds of the stage in a folder and of everything it stands on, each counted once."""
    seen: dict[Path, float] = {}

    def visit(path: Path) -> None:
        if path in seen:
            return
        manifest = json.loads((path / MANIFEST).read_text())
        seen[path] = manifest["seconds"]
        for other in manifest["inputs"].values():
            visit((path / other).resolve())

    visit(Path(folder).resolve())
    return sum(seen.values())
