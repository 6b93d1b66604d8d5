"""Contents of the report, collected from the folders of all stages of a run."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_scan.config import dump
from dist_scan.data.assignments import Assignments
from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.data.beton.format import read_labels, read_metadata
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.evaluate.metrics import checked_contingency_table, confusion, hungarian
from dist_scan.evaluate.prototypes import find_prototypes, low_confidence
from dist_scan.monitoring.log import read_rows
from dist_scan.monitoring.profile import TIMING_FILE
from dist_scan.report.html import Anchor, Cluster, Report
from dist_scan.stages._report_config import ReportConfig
from dist_scan.stages.base import Context
from dist_scan.stages.evaluate import EvaluateConfig
from dist_scan.storage.artifacts import MANIFEST

MAX_CLUSTERS = 100
IMAGES_PER_CLUSTER = 10
NUM_ANCHORS = 12
NEIGHBOURS_PER_ANCHOR = 10
IMAGE_BATCH = 64
MEMORY_KEYS = ("peak_host_bytes", "peak_gpu_bytes")


class ReportContents:
    """The contents of a report on the stages in `context.folders`."""

    def __init__(self, context: Context, config: ReportConfig) -> None:
        self.context = context
        self.config = config
        self.beton = context.beton()

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The content of evaluate.json."""
        return _read_json(self.context.inputs["evaluate"] / "evaluate.json")

    @cached_property
    def assignments(self) -> dict[str, Assignments]:
        """The assignments of every subject by its name in the report."""
        evaluate = self.context.run.stages[self.config.evaluate]
        assert isinstance(evaluate, EvaluateConfig)
        folders = self.context.folders
        return {name: Assignments.load(folders[s]) for name, s in evaluate.subjects.items()}

    @property
    def best(self) -> Assignments:
        """The assignments whose clusters are shown."""
        return self.assignments[self.config.best]

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of each image [N]; -1 for none."""
        return read_labels(self.beton)

    @cached_property
    def label_names(self) -> list[str]:
        """Name of each class; its number if the source has no names."""
        names = read_metadata(self.beton).get("class_names")
        return list(names) if names else [str(c) for c in range(self.evaluation["num_classes"])]

    def summary(self) -> dict[str, Any]:
        """The content of report.json."""
        stages = self._stages()
        others = {key: value for key, value in self.evaluation.items() if key != "subjects"}
        return {
            **self.evaluation["subjects"],
            **others,
            "best": self.config.best,
            "stage_seconds": {stage["name"]: stage["seconds"] for stage in stages},
            "stage_memory": {
                stage["name"]: {key: stage[key] for key in MEMORY_KEYS} for stage in stages
            },
            "stage_timing": self._timings(),
        }

    def report(self) -> Report:
        """The content of report.html."""
        run, evaluation = self.context.run, self.evaluation
        return Report(
            title=f"{run.name}: {evaluation['num_images']:,} images",
            best=self.config.best,
            summary=evaluation["subjects"],
            stages=self._stages(),
            timings=self._timings(),
            curves=self._curves(),
            cluster_sizes=self._cluster_sizes(),
            confusion=self._confusion(),
            label_names=self.label_names,
            heads=(evaluation.get("heads") or {}).get("heads", []),
            clusters=self._clusters(),
            num_clusters=self.best.num_clusters,
            neighbours=self._anchors(),
            neighbour_purity=evaluation.get("neighbour_purity"),
            warnings=self._warnings(),
            data=self._data(),
            config_yaml=dump(run),
            environment={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": str(self.context.world.device),
            },
        )

    def _stage_files(self, name: str) -> dict[str, Path]:
        """The files of this name in the folders of the stages, by stage."""
        files = {stage: folder / name for stage, folder in self.context.folders.items()}
        return {stage: file for stage, file in files.items() if file.is_file()}

    def _stages(self) -> list[dict[str, Any]]:
        """Name, kind, seconds, fingerprint and peak memory of every stage, this one last."""
        manifests = {s: _read_json(file) for s, file in self._stage_files(MANIFEST).items()}
        this = {"kind": "report", "seconds": 0.0, "fingerprint": self.context.out.name}
        manifests[self.context.name] = this
        return [
            {
                "name": name,
                "kind": manifest["kind"],
                "state": "done",
                "seconds": manifest["seconds"],
                "fingerprint": manifest["fingerprint"],
                **{key: manifest.get(key) for key in MEMORY_KEYS},
            }
            for name, manifest in manifests.items()
        ]

    def _timings(self) -> dict[str, dict[str, Any]]:
        """timing.json by stage that trained."""
        return {s: _read_json(file) for s, file in self._stage_files(TIMING_FILE).items()}

    def _curves(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of metrics.jsonl by stage that trained."""
        logs = self.context.run.run_dir / "logs"
        files = {stage: logs / f"{stage}.metrics.jsonl" for stage in self.context.folders}
        return {stage: read_rows(file) for stage, file in files.items() if file.exists()}

    def _cluster_sizes(self) -> dict[str, np.ndarray]:
        """Images per cluster by subject; for self-labelling, confident images in the last epoch."""
        sizes = {
            name: np.bincount(found.cluster, minlength=found.num_clusters)
            for name, found in self.assignments.items()
        }
        for stage, file in self._stage_files("confident.json").items():
            sizes[f"confident_in_{stage}"] = np.array(_read_json(file)["per_cluster"])
        return sizes

    def _confusion(self) -> np.ndarray | None:
        if not self.evaluation["num_labelled"]:
            return None
        num_classes = self.evaluation["num_classes"]
        table = checked_contingency_table(
            self.best.cluster, self.labels, self.best.num_clusters, num_classes
        )
        return confusion(table, hungarian(table))

    def _warnings(self) -> list[str]:
        return [
            f"{stage}: {text}"
            for stage, file in self._stage_files("warnings.json").items()
            for text in _read_json(file)
        ]

    def _data(self) -> dict[str, Any]:
        counts = {k: self.evaluation[k] for k in ("num_images", "num_labelled", "num_classes")}
        return counts | {
            "bad_images": read_metadata(self.beton).get("num_bad", 0),
            "source": self.context.run.data.splits()[self.config.images].source,
        }

    def _centre_crops(self, rows: Iterable[int]) -> dict[int, np.ndarray]:
        """Centre crops [S, S, 3] uint8 by row."""
        unique_rows = np.unique(np.fromiter(rows, np.int64))
        if not len(unique_rows):
            return {}
        loader, _ = self.context.open_images((RecipeConfig(name="center"),), IMAGE_BATCH)
        crops = {}
        for index, views in loader.batches(unique_rows, 0):
            for row, crop in zip(index, views[0]):
                crops[int(row)] = crop.numpy().copy()
        return crops

    def _clusters(self) -> list[Cluster]:
        """The largest clusters with prototypes and the least confident images."""
        cluster, probability = self.best.cluster, self.best.probability
        if probability is None or self.config.features is None:
            return []
        table = FeatureTable.open(self.context.inputs["features"])
        sizes = np.bincount(cluster, minlength=self.best.num_clusters)
        largest = np.sort(np.argsort(-sizes, kind="stable")[:MAX_CLUSTERS])
        shown = [int(k) for k in largest if sizes[k]]
        prototypes = find_prototypes(
            cluster,
            probability,
            lambda rows: table.rows(rows, 0).astype(np.float32),
            self.best.num_clusters,
            only=shown,
        )
        least_confident = low_confidence(cluster, probability, IMAGES_PER_CLUSTER)
        crops = self._centre_crops(i for k in shown for i in prototypes[k] + least_confident[k])
        found = []
        for k in shown:
            members = cluster == k
            label, label_share = self._majority_label(members)
            found.append(
                Cluster(
                    id=k,
                    size=int(sizes[k]),
                    prototypes=[crops[i] for i in prototypes[k]],
                    low_confidence=[crops[i] for i in least_confident[k]],
                    label=label,
                    label_share=label_share,
                    confidence=float(probability[members].mean()),
                )
            )
        return found

    def _majority_label(self, members: np.ndarray) -> tuple[str | None, float | None]:
        """(most frequent label of a boolean mask of images [N], its share); None if unlabelled."""
        known = self.labels[members & (self.labels >= 0)]
        if not len(known):
            return None, None
        counts = np.bincount(known)
        return self.label_names[int(counts.argmax())], float(counts.max() / len(known))

    def _label_name(self, row: int) -> str | None:
        label = self.labels[row]
        return self.label_names[label] if label >= 0 else None

    def _anchors(self) -> list[Anchor]:
        """Sample images with their nearest neighbours."""
        if self.config.neighbours is None:
            return []
        table = NeighbourTable.open(self.context.inputs["neighbours"])
        rng = np.random.default_rng(self.config.seed_images)
        rows = rng.permutation(table.num_rows)[:NUM_ANCHORS]
        ids, scores = table.rows(rows)
        ids, scores = ids[:, :NEIGHBOURS_PER_ANCHOR], scores[:, :NEIGHBOURS_PER_ANCHOR]
        crops = self._centre_crops([*rows.tolist(), *ids.reshape(-1).tolist()])
        return [
            Anchor(
                image=crops[row],
                neighbours=[crops[i] for i in neighbours],
                scores=row_scores,
                label=self._label_name(row),
                neighbour_labels=[self._label_name(i) for i in neighbours],
            )
            for row, neighbours, row_scores in zip(rows.tolist(), ids.tolist(), scores.tolist())
        ]


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())
