"""Assignments meet labels, for the first and only time."""
from __future__ import annotations

