"""Real images and features beside a checkout, in ../shared/data or $DIST_SCAN_SHARED_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"
ROOT = Path(os.environ.get("DIST_SCAN_SHARED_DATA", DEFAULT))


def shared_data(name: str) -> Path:
    """Path of a shared file or folder; skips the test if this machine does not have it."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data or $DIST_SCAN_SHARED_DATA")
    return path
