"""Tables that a search writes and continues after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dist_scan.data.sharded_table import ShardedTable
from dist_scan.world.collectives import on_every_rank
from dist_scan.world.world import current

Table = TypeVar("Table", bound=ShardedTable)


def open_or_create(
    table_class: type[Table],
    out: Path,
    settings: Mapping[str, Any],
    create: Callable[[], object],
) -> Table:
    """The table in `out`; `create()` makes it on every disk that has none. Collective.

    `settings` is what the table must have been made with: a subset of its metadata. Raises
    ValueError on all ranks when `out` holds a table with other settings.
    """

    def create_if_missing() -> None:
        if not (out / "table.json").exists():
            create()

    def open_checked() -> Table:
        table = table_class.open(out)
        found = {name: table.metadata.get(name) for name in settings}
        if found != settings:
            raise ValueError(
                f"{out} holds a table made from other features or with other settings: {found} "
                f"instead of {settings}; give another folder, or remove it"
            )
        return table

    # Rank 0 first: on a shared file system the other ranks then find its table.
    on_every_rank(lambda: create_if_missing() if current().rank == 0 else None)
    on_every_rank(create_if_missing)
    return on_every_rank(open_checked)
