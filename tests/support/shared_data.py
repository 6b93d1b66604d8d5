"""Real images and features that lie beside a checkout (../shared/data, or $DIST_SCAN_SHARED_DATA). Tests skip without them and say so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(
    os.environ.get("DIST_SCAN_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)


def shared_data(name: str) -> Path:
    """The path of a shared file or folder; skips the test when it is not on this machine."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data or $DIST_SCAN_SHARED_DATA")
    return path
