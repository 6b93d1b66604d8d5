"""Validation of raw settings, with errors that name path, value, what is allowed and the remedy."""

from __future__ import annotations

import reprlib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dist_scan.config.base import ConfigError, suggest

Model = TypeVar("Model", bound=BaseModel)
UNKNOWN_KIND = ("union_tag_invalid", "union_tag_not_found")
NO_VALUE_SUFFIX = ("value_error", "missing", "extra_forbidden", *UNKNOWN_KIND)
"""Types of errors after whose message the value is not repeated.

value_error comes from our validators, which name the value where it helps.
"""


def validate_settings(model: type[Model], tree: Any, name: str = "config") -> Model:
    """A validated model from raw settings.

    name: source of the settings, for the message. Raises ConfigError with one line per error.
    """
    tree = _lists_to_tuples(tree)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {line}" for line in _explain(error, tree, model)]
        count = f"{len(lines)} error{'s' if len(lines) > 1 else ''}"
        raise ConfigError("\n".join([f"{name}: {count}", *lines])) from None


def _lists_to_tuples(value: Any) -> Any:
    """Raw settings with tuples for lists, which strict validation does not convert."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def _explain(error: ValidationError, tree: Any, model: type[BaseModel]) -> list[str]:
    """One line for each invalid setting: path, value, what is allowed, remedy."""
    found: dict[str, tuple[str, str]] = {}
    for details in error.errors():
        path = _user_path(details["loc"], tree)
        message = _message(details, model)
        value = "" if details["type"] in NO_VALUE_SUFFIX else f" (value {details['input']!r})"
        if path in found:  # a union of types: there is an error for each of them
            message = f"{found[path][0]} or {message.removeprefix('Input should be ')}"
        found[path] = message, value
    return [
        f"{path}{': ' if path else ''}{message}{value}" for path, (message, value) in found.items()
    ]


def _message(error: ErrorDetails, model: type[BaseModel]) -> str:
    """What is wrong, what is allowed, and the remedy."""
    if error["type"] == "extra_forbidden":
        blocks = _blocks(error["loc"][:-1], model)
        allowed = [name for block in blocks for name in block["properties"]]
        hint = suggest(str(error["loc"][-1]), allowed) or "; remove it"
        value = reprlib.repr(error["input"])
        return f"unknown setting (value {value}); allowed: {', '.join(allowed)}{hint}"
    if error["type"] in UNKNOWN_KIND:
        kind = error["ctx"].get("tag")
        allowed = [block["properties"]["kind"]["const"] for block in _blocks(error["loc"], model)]
        if kind is None:
            return f"kind is missing; allowed: {', '.join(allowed)}"
        return f"unknown kind '{kind}'; allowed: {', '.join(allowed)}{suggest(kind, allowed)}"
    if error["type"] == "missing":
        return "missing; add it"
    return error["msg"].removeprefix("Value error, ")


def _user_path(loc: tuple[int | str, ...], tree: Any) -> str:
    """The path as the user wrote it: pydantic also lists the kind chosen from a union."""
    parts = []
    for part in loc:
        if isinstance(tree, dict):
            if part not in tree and part == tree.get("kind"):
                continue
            tree = tree.get(part)
        elif isinstance(tree, tuple) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        else:  # a value: what follows names a type that was tried
            break
        parts.append(str(part))
    return ".".join(parts)


def _blocks(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[dict[str, Any]]:
    """JSON schemas of the blocks of settings that are allowed at loc: several for a union."""
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
