"""What comes from outside is never executed, and nobody outside can reach a run on one machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dist_scan.engine.checkpoint import CheckpointError, CheckpointStore
from dist_scan.storage.artifacts import sha256_of
from dist_scan.storage.atomic import write_json
from tests.support.ranks import run_ranks

LISTEN, LOOPBACK = "0A", "0100007F"


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2, lambda text: None)
    store.save(1, {"position": {"step": 1}}, {})
    folder = tmp_path / "checkpoints" / "step-000000001"
    torch.save({"position": Attack(tmp_path / "ran")}, folder / "state.pt")
    file = folder / "state.pt"
    write_json(
        folder / "manifest.json",
        {
            "step": 1,
            "world_size": 1,
            "files": {file.name: {"sha256": sha256_of(file), "size": file.stat().st_size}},
        },
    )
    with pytest.raises(CheckpointError, match="bad-step-000000001"):
        store.load(torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    torch.load(folder.with_name(f"bad-{folder.name}") / file.name, weights_only=False)
    assert (tmp_path / "ran").exists(), "the attack itself works"


def listening() -> set[str]:
    """Addresses (as /proc/net writes them) on which this process listens."""
    own = {
        os.readlink(f"/proc/self/fd/{fd}")[8:-1]
        for fd in os.listdir("/proc/self/fd")
        if _is_socket(fd)
    }
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN and words[9] in own:
                found.add(words[1].split(":")[0])
    return found


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:  # the folder's own
        return False


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's /proc")
def test_ranks_of_one_machine_listen_on_the_loopback_interface_alone() -> None:
    assert run_ranks(listening, 2)[0] == {LOOPBACK}, "rank 0 holds the rendezvous and a gloo socket"
