"""The strict base model of all settings, and the error for invalid ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
FATAL_ERROR = 2
"""Exit code after an error that a new start would meet again, such as invalid settings."""


class ConfigError(ValueError):
    """Invalid input from the user; printed without a traceback."""


class StrictModel(BaseModel):
    """Base of all settings: strict about keys and types, and frozen.

    Attribute docstrings become descriptions in the JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            f"{name!r}; allowed: letters, digits, _, . and -, beginning with a letter or digit"
        )
    return name


Name = Annotated[
    str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": NAME_PATTERN})
]
"""A name that becomes a part of paths."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the closest of the allowed names, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), 1)
    return f"; did you mean '{close[0]}'?" if close else ""
