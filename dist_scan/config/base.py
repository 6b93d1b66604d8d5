"""The strict base model of all settings, and the error for invalid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

FATAL_ERROR = 2
"""Exit code after an error that a new start would meet again, such as invalid settings."""


class ConfigError(ValueError):
    """Invalid input from the user; printed without a traceback."""


class StrictModel(BaseModel):
    """Base of all settings: unknown keys are refused, values are not coerced, instances are frozen.

    Attribute docstrings become descriptions in the JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def suggest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the closest of the allowed names, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), 1)
    return f"; did you mean '{close[0]}'?" if close else ""
