"""Settings from YAML files and `a.b=value` overrides.

YAML as version 1.2 reads it: `3e-2` is a float, `no` is a string; duplicate keys are an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dist_scan.config.base import ConfigError

INT = re.compile(r"^[-+]?[0-9]+$")
FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
)
BOOL = re.compile(r"^(?:true|false|True|False)$")
TAG = "tag:yaml.org,2002:"
REPLACED = tuple(TAG + name for name in ("bool", "float", "int", "timestamp"))


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers and booleans of YAML 1.2 and without duplicate keys."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(TAG + "bool", BOOL, list("tfTF"))
_Loader.add_implicit_resolver(TAG + "int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """A mapping with distinct string keys."""
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
        if key_node.tag == TAG + "merge":
            raise ConfigError(f"{where}: merge keys (<<) are not supported; write the settings out")
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise ConfigError(
                f"{where}: the key {key!r} is not a string; put quotes around it, or remove it"
            )
        if key in found:
            raise ConfigError(f"{where}: the key '{key}' is given twice; keep one")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(TAG + "map", _mapping)
_Loader.add_constructor(TAG + "int", lambda loader, node: int(node.value))
_Loader.add_constructor(TAG + "float", lambda loader, node: float(node.value))


def read_yaml(text: str, name: str = "<text>") -> Any:
    """Parse one YAML document. Raises ConfigError with the line of an error."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}{_describe(error)}") from None


def _describe(error: yaml.YAMLError) -> str:
    """Line and problem, without the name of the file, which PyYAML's own text repeats."""
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    # A ReaderError has a reason, all others have a problem and perhaps the context of it.
    problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
    context = getattr(error, "context", None)
    return f"{line}: not valid YAML: {f'{context}, ' if context else ''}{problem}"


def override(tree: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply `a.b.c=value` to raw settings, in place; values are YAML, `a.b=` removes the key."""
    for assignment in assignments:
        dotted, equals, value = assignment.partition("=")
        *parents, last = dotted.split(".")
        if not equals or not all((*parents, last)):
            raise ConfigError(
                f"override '{assignment}': expected dotted.path=value (stages.heads.epochs=5)"
            )
        block = tree
        for depth, key in enumerate(parents, 1):
            block = block.setdefault(key, {})
            if not isinstance(block, dict):
                raise ConfigError(
                    f"override '{assignment}': {'.'.join(parents[:depth])} is {block!r}, "
                    "not a block of settings"
                )
        if value == "":
            block.pop(last, None)
        else:
            block[last] = read_yaml(value, f"override {dotted}")


def read_settings(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Raw settings of a file, overridden; `name` is the file's if not given. Raises ConfigError."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"config '{path}' {problem}{_other_files(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        raise ConfigError(f"config '{path}' is not UTF-8 text; save it as UTF-8") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a block of settings, got {type(tree).__name__}")
    tree.setdefault("name", path.stem)
    override(tree, overrides)
    return tree


def _other_files(path: Path) -> str:
    """Hint for a missing file: the YAML files near it, or the shipped one of that name."""
    folder = path if path.is_dir() else path.parent
    near = sorted(file.name for file in folder.glob("[!.]*.yaml"))
    if near:
        return f"; there are: {', '.join(near)}"
    shipped = Path(__file__).parents[2] / path
    if shipped.is_file():
        return f"; give {shipped}"
    return f" (searched in {path.parent.absolute()})"


def dump(settings: BaseModel) -> str:
    """Settings with all defaults as YAML; reading it gives equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
