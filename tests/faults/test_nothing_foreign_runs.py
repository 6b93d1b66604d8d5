"""Data from outside is never executed, and ranks on one machine cannot be reached from outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_scan.engine.checkpoint import CheckpointError, CheckpointStore
from dist_scan.storage.artifacts import sha256_of
from dist_scan.storage.atomic import write_json
from tests.support.ranks import run_ranks

LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""
LOOPBACK = "0100007F"
"""The address 127.0.0.1 in /proc/net/tcp."""


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2, lambda text: None)
    store.save(1, {"position": {"step": 1}}, {})
    folder = tmp_path / "checkpoints" / "step-000000001"
    file = folder / "state.pt"
    torch.save({"position": Attack(tmp_path / "executed")}, file)
    entry = {"sha256": sha256_of(file), "size": file.stat().st_size}
    write_json(folder / "manifest.json", {"step": 1, "world_size": 1, "files": {file.name: entry}})
    with pytest.raises(CheckpointError, match="bad-step-000000001"):
        store.load(torch.device("cpu"))
    assert not (tmp_path / "executed").exists()
    # The attack works if the file is unpickled.
    torch.load(folder.with_name(f"bad-{folder.name}") / file.name, weights_only=False)
    assert (tmp_path / "executed").exists()


def listening_addresses() -> set[str]:
    """Addresses on which this process listens, as /proc/net writes them."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the folder itself is closed by now
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith("socket:["):
                inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                addresses.add(fields[1].split(":")[0])
    return addresses


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's /proc")
def test_ranks_of_one_machine_listen_on_the_loopback_interface_only() -> None:
    """Rank 0 holds the rendezvous and a gloo socket."""
    assert run_ranks(listening_addresses, 2)[0] == {LOOPBACK}
