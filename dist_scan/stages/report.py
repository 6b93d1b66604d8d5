"""Everything a person looks at: report.html, report.json, assignments.parquet and the table at the end of a run."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from dist_scan.config import dump
from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.data.assignments import Assignments
from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.monitoring.log import read_rows
from dist_scan.monitoring.profile import TIMING_FILE
from dist_scan.stages.base import Stage
from dist_scan.stages.beton import beton_path
from dist_scan.storage.artifacts import MANIFEST
from dist_scan.storage.atomic import write_atomic, write_json, write_text
from dist_scan.world.collectives import barrier

CLUSTERS, PER_CLUSTER, ANCHORS, SHOWN_NEIGHBOURS = 100, 10, 12, 10


class ReportConfig(StageConfig):
    """What is shown. `best` is the subject whose clusters are browsed and exported."""

    kind: Literal["report"] = "report"
    images: Images = "train"
    evaluate: Ref
    best: str
    features: Ref | None = None
    """Features for prototypes (FIDELITY.md 1.10)."""
    neighbours: Ref | None = None
    seed_images: int = Field(default=0, ge=0)
    """Which sample images are shown with their neighbours."""

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """`best` is one of the evaluated subjects."""
        subjects = getattr(earlier.get(self.evaluate), "subjects", {})
        if self.best not in subjects:
            raise ValueError(
                f"stages.{name}.best: '{self.best}' is no subject of '{self.evaluate}'; allowed: {', '.join(subjects)}"
            )


class ReportStage(Stage):
    """Rank 0 draws; nothing here changes a result."""

    Config = ReportConfig
    user_files = ("report.html", "report.json", "assignments.parquet", "summary.txt")

    def run(self) -> None:
        """Write the four files."""
        if self.context.world.rank == 0:
            self._write()
        barrier()

    def _write(self) -> None:
        from dist_scan.report.html import summary_table, write_report

        out = self.context.out
        write_report(self._report(), out / "report.html")
        stages = self._stages()
        plain = {k: v for k, v in self.facts.items() if k != "subjects"}
        write_json(
            out / "report.json",
            {
                **self.facts["subjects"],
                **plain,
                "best": self.config.best,
                "stage_seconds": {s["name"]: s["seconds"] for s in stages},
                "stage_memory": {
                    s["name"]: {k: s[k] for k in ("peak_host_bytes", "peak_gpu_bytes")}
                    for s in stages
                },
                "stage_timing": self._timings(),
            },
        )
        write_text(out / "summary.txt", summary_table(self.facts["subjects"]) + "\n")
        self._export()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """evaluate.json."""
        return json.loads((self.context.inputs["evaluate"] / "evaluate.json").read_text())

    @cached_property
    def assignments(self) -> dict[str, Assignments]:
        """Every subject's, by name."""
        subjects = self.context.run.stages[self.config.evaluate].subjects
        return {
            name: Assignments.load(self.context.folders[stage]) for name, stage in subjects.items()
        }

    @cached_property
    def labels(self) -> np.ndarray:
        """[N], -1 unknown."""
        from dist_scan.data.beton.format import read_labels

        return read_labels(beton_path(self.context.inputs["images"]))

    @cached_property
    def label_names(self) -> list[str]:
        """Of the classes; numbers when the source gave none."""
        from dist_scan.data.beton.format import read_metadata

        names = read_metadata(beton_path(self.context.inputs["images"])).get("class_names")
        return list(names) if names else [str(c) for c in range(self.facts["num_classes"])]

    def _stages(self) -> list[dict[str, Any]]:
        rows = []
        for name, folder in {**self.context.folders, self.context.name: None}.items():
            manifest = (
                json.loads((folder / MANIFEST).read_text())
                if folder
                else {"kind": "report", "seconds": 0.0, "fingerprint": self.context.out.name}
            )
            rows.append(
                {
                    "name": name,
                    "kind": manifest["kind"],
                    "state": "done",
                    "seconds": manifest["seconds"],
                    "fingerprint": manifest["fingerprint"],
                    "peak_host_bytes": manifest.get("peak_host_bytes"),
                    "peak_gpu_bytes": manifest.get("peak_gpu_bytes"),
                }
            )
        return rows

    def _timings(self) -> dict[str, dict[str, Any]]:
        """timing.json of every training, by stage."""
        return {
            name: json.loads((folder / TIMING_FILE).read_text())
            for name, folder in self.context.folders.items()
            if (folder / TIMING_FILE).is_file()
        }

    def _report(self):
        from dist_scan.report.html import Report

        c, facts, run = self.context, self.facts, self.context.run
        counts = {
            name: np.bincount(a.cluster, minlength=a.num_clusters)
            for name, a in self.assignments.items()
        }
        return Report(
            title=f"{run.name}: {facts['num_images']:,} images",
            best=self.config.best,
            summary=facts["subjects"],
            stages=self._stages(),
            timings=self._timings(),
            curves={
                name: read_rows(run.run_dir / "logs" / f"{name}.metrics.jsonl")
                for name in c.folders
                if (run.run_dir / "logs" / f"{name}.metrics.jsonl").exists()
            },
            cluster_sizes=counts | self._confident(),
            confusion=self._confusion(),
            label_names=self.label_names,
            heads=self._heads(),
            clusters=self._clusters(),
            num_clusters=self.assignments[self.config.best].num_clusters,
            neighbours=self._anchors(),
            neighbour_purity=facts.get("neighbour_purity"),
            warnings=self._warnings(),
            data={k: facts[k] for k in ("num_images", "num_labelled", "num_classes")}
            | self._data_facts(),
            config_yaml=dump(run),
            environment={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": str(c.world.device),
            },
        )

    def _data_facts(self) -> dict[str, Any]:
        from dist_scan.data.beton.format import read_metadata

        facts = read_metadata(beton_path(self.context.inputs["images"]))
        return {
            "bad_images": facts.get("num_bad", 0),
            "source": self.context.run.data.splits()[self.config.images].source,
        }

    def _confusion(self) -> np.ndarray | None:
        from dist_scan.evaluate.metrics import confusion, contingency, hungarian

        if not self.facts["num_labelled"]:
            return None
        best = self.assignments[self.config.best]
        table = contingency(best.cluster, self.labels, best.num_clusters, self.facts["num_classes"])
        return confusion(table, hungarian(table))

    def _heads(self) -> list[dict[str, Any]]:
        heads = self.facts.get("heads") or []
        return heads.get("heads", []) if isinstance(heads, dict) else heads

    def _warnings(self) -> list[str]:
        found = []
        for name, folder in self.context.folders.items():
            path = folder / "warnings.json"
            if path.is_file():
                found += [f"{name}: {text}" for text in json.loads(path.read_text())]
        return found

    def _confident(self) -> dict[str, np.ndarray]:
        """Confident images per cluster in the last epoch of every self-labelling: what is drawn beside the sizes."""
        files = {name: folder / "confident.json" for name, folder in self.context.folders.items()}
        return {
            f"confident_in_{name}": np.array(json.loads(file.read_text())["per_cluster"])
            for name, file in files.items()
            if file.is_file()
        }

    def _pictures(self, rows: list[int]) -> dict[int, np.ndarray]:
        """Centre crops [S, S, 3] uint8 of these rows, by row."""
        from dist_scan.data.images import open_images

        wanted = np.unique(np.asarray(rows, np.int64))
        if not len(wanted):
            return {}
        c = self.context
        loader, _ = open_images(
            beton_path(c.inputs["images"]), (RecipeConfig(name="center"),), 64, c.run, c.world
        )
        return {
            int(i): view.numpy().copy()
            for index, views in loader.batches(wanted, 0)
            for i, view in zip(index, views[0])
        }

    def _clusters(self) -> list:
        from dist_scan.evaluate.prototypes import find_prototypes, low_confidence
        from dist_scan.report.html import Cluster

        best = self.assignments[self.config.best]
        if best.probability is None or self.config.features is None:
            return []
        sizes = np.bincount(best.cluster, minlength=best.num_clusters)
        shown = np.sort(np.argsort(-sizes, kind="stable")[:CLUSTERS])
        prototypes = find_prototypes(
            best.cluster, best.probability, self._feature_rows, best.num_clusters, only=shown
        )
        unsure = low_confidence(best.cluster, best.probability, PER_CLUSTER)
        pictures = self._pictures(
            [i for k in shown for i in [*prototypes.get(k, []), *unsure.get(k, [])]]
        )
        out = []
        for k in (int(k) for k in shown if sizes[k]):
            label, share = self._majority(best.cluster == k)
            out.append(
                Cluster(
                    k,
                    int(sizes[k]),
                    [pictures[i] for i in prototypes.get(k, [])],
                    [pictures[i] for i in unsure.get(k, [])],
                    label,
                    share,
                    float(best.probability[best.cluster == k].mean()),
                )
            )
        return out

    def _feature_rows(self, rows: np.ndarray) -> np.ndarray:
        from dist_scan.data.feature_table import FeatureTable

        return (
            FeatureTable.open(self.context.inputs["features"])
            .rows(np.asarray(rows), 0)
            .astype(np.float32)
        )

    def _majority(self, members: np.ndarray) -> tuple[str | None, float | None]:
        known = self.labels[members & (self.labels >= 0)]
        if not len(known):
            return None, None
        counts = np.bincount(known)
        return self.label_names[int(counts.argmax())], float(counts.max() / len(known))

    def _anchors(self) -> list:
        from dist_scan.data.neighbour_table import NeighbourTable
        from dist_scan.report.html import Anchor

        if self.config.neighbours is None:
            return []
        table = NeighbourTable.open(self.context.inputs["neighbours"])
        rows = np.random.default_rng(self.config.seed_images).permutation(table.num_rows)[:ANCHORS]
        ids, scores = (x[:, :SHOWN_NEIGHBOURS] for x in table.rows(rows))
        pictures = self._pictures([*rows, *ids.reshape(-1)])
        name = lambda i: self.label_names[self.labels[i]] if self.labels[i] >= 0 else None  # noqa: E731
        return [
            Anchor(
                pictures[int(r)],
                [pictures[int(i)] for i in near],
                [float(s) for s in score],
                name(r),
                [name(i) for i in near],
            )
            for r, near, score in zip(rows, ids, scores)
        ]

    def _export(self) -> None:
        """assignments.parquet: name, index, cluster, probability, the top clusters, label if any."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from dist_scan.data.beton.format import read_names

        best = self.assignments[self.config.best]
        columns = {
            "name": pa.array(read_names(beton_path(self.context.inputs["images"]))),
            "index": pa.array(np.arange(len(best.cluster))),
            "cluster": pa.array(best.cluster.astype(np.int32)),
        }
        if best.probability is not None:
            columns["probability"] = pa.array(best.probability)
        if best.top is not None:
            columns["top_clusters"] = pa.FixedSizeListArray.from_arrays(
                pa.array(best.top.reshape(-1)), best.top.shape[1]
            )
        if self.facts["num_labelled"]:
            columns["label"] = pa.array(self.labels, mask=self.labels < 0)
        table = pa.table(columns)
        write_atomic(self.context.out / "assignments.parquet", lambda f: pq.write_table(table, f))
