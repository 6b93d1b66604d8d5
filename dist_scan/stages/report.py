"""The files for users: report.html, report.json, assignments.parquet and summary.txt."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_scan.data.assignments import Assignments
from dist_scan.data.beton.format import read_names
from dist_scan.stages._report_config import ReportConfig
from dist_scan.stages.base import Stage
from dist_scan.storage.atomic import write_atomic, write_json, write_text
from dist_scan.world.collectives import barrier


class ReportStage(Stage[ReportConfig]):
    """Writes the four files; nothing here changes a result."""

    Config = ReportConfig
    user_files = ("report.html", "report.json", "assignments.parquet", "summary.txt")

    def run(self) -> None:
        """Rank 0 writes."""
        if self.context.world.rank == 0:
            self._write()
        barrier()

    def _write(self) -> None:
        # Imported here because matplotlib takes half a second.
        from dist_scan.report.html import summary_table, write_report
        from dist_scan.stages._report_contents import ReportContents

        out = self.context.out
        contents = ReportContents(self.context, self.config)
        write_report(contents.report(), out / "report.html")
        write_json(out / "report.json", contents.summary())
        write_text(out / "summary.txt", summary_table(contents.evaluation["subjects"]) + "\n")
        export_assignments(
            out / "assignments.parquet", contents.best, read_names(contents.beton), contents.labels
        )


def export_assignments(
    path: Path, assignments: Assignments, names: list[str], labels: np.ndarray
) -> None:
    """Write name, index and cluster of every image as parquet.

    With probability and top_clusters if they are known, and label if any image has one (labels [N],
    -1 for none).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "name": pa.array(names),
        "index": pa.array(np.arange(len(assignments.cluster))),
        "cluster": pa.array(assignments.cluster.astype(np.int32)),
    }
    if assignments.probability is not None:
        columns["probability"] = pa.array(assignments.probability)
    if assignments.top is not None:
        columns["top_clusters"] = pa.FixedSizeListArray.from_arrays(
            pa.array(assignments.top.reshape(-1)), assignments.top.shape[1]
        )
    if (labels >= 0).any():
        columns["label"] = pa.array(labels, mask=labels < 0)
    table = pa.table(columns)
    write_atomic(path, lambda file: pq.write_table(table, file))
