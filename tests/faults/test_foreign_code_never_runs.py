"""Code in a file is never executed, and no other machine can connect to a run on one machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dist_scan.engine.checkpoint import CheckpointError, CheckpointStore
from dist_scan.storage.artifacts import sha256_of
from dist_scan.storage.atomic import write_json
from tests.support.ranks import run_ranks

LISTEN_STATE, LOOPBACK = "0A", "0100007F"
"""As /proc/net/tcp writes them."""


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2, lambda text: None)
    store.save(1, {"train_state": {"step": 1}}, {})
    folder = tmp_path / "checkpoints" / "step-000000001"
    file = folder / "state.pt"
    torch.save({"train_state": Attack(tmp_path / "ran")}, file)
    info = {"sha256": sha256_of(file), "size": file.stat().st_size}
    manifest = {"step": 1, "world_size": 1, "files": {file.name: info}}
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="bad-step-000000001"):
        store.load(torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    torch.load(folder.with_name(f"bad-{folder.name}") / file.name, weights_only=False)
    assert (tmp_path / "ran").exists(), "the attack itself works"


def listening_addresses() -> set[str]:
    """The addresses (as /proc/net/tcp writes them) on which this process listens."""
    sockets = set(map(_socket_inode, os.listdir("/proc/self/fd")))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN_STATE and fields[9] in sockets:
                found.add(fields[1].split(":")[0])
    return found


def _socket_inode(descriptor: str) -> str | None:
    """Inode of a socket; None for other file descriptors."""
    try:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # the descriptor with which the folder was listed
        return None
    if not target.startswith("socket:["):
        return None
    return target.removeprefix("socket:[").removesuffix("]")


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's /proc")
def test_ranks_of_one_machine_listen_on_the_loopback_interface_only() -> None:
    # Rank 0 has the rendezvous and a gloo socket.
    assert run_ranks(listening_addresses, 2)[0] == {LOOPBACK}
