"""Classes found by file name: `kind: moco` selects the class in methods/moco.py."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, ClassVar, Union

from pydantic import Discriminator, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema

from dist_scan.config.base import ConfigError, StrictModel, suggest


class KindConfig(StrictModel):
    """Settings of one kind; a subclass names its file: `kind: Literal["moco"] = "moco"`."""

    kind: str


class Kind:
    """Base of the classes that `kind:` selects; each file of a package has one with a Config."""

    Config: ClassVar[type[KindConfig]]


def kinds(package: ModuleType) -> list[str]:
    """Names of the kinds in a package: its modules, except `base` and private ones."""
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def kind_class(package: ModuleType, kind: str) -> type[Kind]:
    """The class of a kind: the only Kind with a Config that `package/<kind>.py` defines.

    Raises ConfigError for an unknown kind and for a module that breaks this rule.
    """
    names = kinds(package)
    if kind not in names:
        raise ConfigError(
            f"unknown kind '{kind}'; allowed: {', '.join(names)}{suggest(kind, names)}"
        )
    module = importlib.import_module(f"{package.__name__}.{kind}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Kind)
        and value.__module__ == module.__name__
        and hasattr(value, "Config")
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{package.__name__}.{kind} must define exactly one class with a Config, "
            f"found {[cls.__name__ for cls in found]}"
        )
    config = found[0].Config
    if config.model_fields["kind"].default != kind:
        raise ConfigError(
            f"{package.__name__}.{kind}: {config.__name__} needs a line that names its kind: "
            f'`kind: Literal["{kind}"] = "{kind}"`'
        )
    return found[0]


@dataclass(frozen=True)
class AnyKind:
    """Type annotation for the settings of any kind: `Annotated[MethodConfig, AnyKind(methods)]`.

    pydantic validates the value as the settings that its `kind` selects.
    """

    package: ModuleType

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        members = tuple(
            Annotated[kind_class(self.package, kind).Config, Tag(kind)]
            for kind in kinds(self.package)
        )
        any_member: Any = Union[members]  # noqa: UP007  members are known at run time only
        return handler.generate_schema(Annotated[any_member, Discriminator(_kind_of)])


def _kind_of(value: object) -> str | None:
    """The `kind` of raw settings or of a validated model."""
    if isinstance(value, dict):
        return value.get("kind")
    return value.kind if isinstance(value, KindConfig) else None
