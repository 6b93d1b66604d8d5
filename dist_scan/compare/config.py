"""Settings of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from dist_scan.config import Name, StrictModel, read_settings, validate_settings


class MemberConfig(StrictModel):
    """One config of a comparison."""

    config: str
    """A run's YAML file, relative to the comparison's."""
    overrides: tuple[str, ...] = ()
    """Settings to change in it: dotted.path=value, as on a launcher's command line."""


class ComparisonConfig(StrictModel):
    """Members (configs), each run per seed in OUT/<member>-seed<N>, and the rows of the table."""

    name: Name
    seeds: tuple[int, ...] = Field(min_length=1)
    members: dict[str, MemberConfig] = Field(min_length=1)
    rows: dict[str, str] = Field(min_length=1)
    """Rows of the table: name -> result to show, MEMBER.SUBJECT.

    SUBJECT is one of the `subjects` of the member's evaluate stage.
    """
    baseline: str
    """Name of the row that the others are compared with."""

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"{list(seeds)}; allowed: different numbers, none negative")
        return seeds

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.baseline not in self.rows:
            allowed = ", ".join(self.rows)
            raise ValueError(f"baseline: '{self.baseline}' is not a row; allowed: {allowed}")
        for row, result in self.rows.items():
            member, _ = split_result(result)
            if member not in self.members:
                allowed = ", ".join(f"{name}.SUBJECT" for name in self.members)
                raise ValueError(
                    f"rows.{row}: '{result}' does not begin with a member; allowed: {allowed}"
                )
        return self


def split_result(result: str) -> tuple[str, str]:
    """Member and subject of MEMBER.SUBJECT."""
    member, _, subject = result.partition(".")
    return member, subject


def read_comparison(path: Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Read, override and validate a comparison. Raises ConfigError."""
    return validate_settings(ComparisonConfig, read_settings(path, overrides), str(path))
