"""Validation of raw settings, with errors that name path, value, what is allowed and the remedy."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dist_scan.config.base import ConfigError
from dist_scan.config.kinds import suggest

Model = TypeVar("Model", bound=BaseModel)


def validate_settings(model: type[Model], tree: Any, name: str = "config") -> Model:
    """A validated model from raw settings.

    Raises ConfigError that lists every error on a line of its own; `name` says where they are from.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected a block of settings, got {type(tree).__name__}")
    tree = _lists_to_tuples(tree)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        count = error.error_count()
        lines = [f"{name}: {count} error{'s' if count > 1 else ''}"]
        lines += [f"  {explain(details, tree, model)}" for details in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _lists_to_tuples(value: Any) -> Any:
    """Settings are frozen, so their sequences are tuples; strict validation converts nothing."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def explain(error: ErrorDetails, tree: Any, model: type[BaseModel]) -> str:
    """One line for one error of pydantic: path, value, what is allowed, remedy.

    The message of a validator of ours (type value_error) already holds the value.
    """
    path, value = _user_path(error["loc"], tree), error["input"]
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        siblings = [
            name for block in _blocks(error["loc"][:-1], model) for name in block["properties"]
        ]
        hint = suggest(str(error["loc"][-1]), siblings) or "; remove it"
        return f"{path}: unknown setting (value {value!r}); allowed: {', '.join(siblings)}{hint}"
    if kind == "missing":
        return f"{path}: missing; it must be given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = error["ctx"].get("tag")
        kinds = [block["properties"]["kind"]["const"] for block in _blocks(error["loc"], model)]
        problem = "missing" if tag is None else f"'{tag}' is unknown"
        return f"{path}.kind: {problem}; allowed: {', '.join(kinds)}{suggest(str(tag), kinds)}"
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message} (value {value!r})"


def _user_path(loc: tuple[int | str, ...], tree: Any) -> str:
    """The path as the user wrote it: pydantic's, without the kinds that it inserts after a union."""
    parts = []
    for part in loc:
        if isinstance(tree, dict) and part not in tree and part == tree.get("kind"):
            continue
        parts.append(str(part))
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, tuple) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            tree = None
    return ".".join(parts)


def _blocks(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[dict[str, Any]]:
    """JSON schemas of the blocks of settings that may stand at loc: several for a union."""
    schema = model.model_json_schema()
    options = [schema]
    for part in loc:
        options = _descend(options, part, schema)
    return [option for option in options if "properties" in option]


def _descend(
    options: list[dict[str, Any]], part: int | str, schema: dict[str, Any]
) -> list[dict[str, Any]]:
    """The schemas below `part` of a path: a kind of a union, a field, a key or an index."""
    if len(options) > 1:
        for option in options:
            if option.get("properties", {}).get("kind", {}).get("const") == part:
                return [option]
    for option in options:
        node = option.get("properties", {}).get(part)
        node = node or option.get("additionalProperties") or option.get("items")
        if node:
            members = node.get("oneOf") or node.get("anyOf") or [node]
            return [_resolve(member, schema) for member in members]
    return []


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The definition that a schema refers to, or the schema itself."""
    name = node.get("$ref", "").removeprefix("#/$defs/")
    return schema["$defs"][name] if name else node
