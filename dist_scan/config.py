"""Configuration: a strict base, YAML with no surprises, dotted overrides, and `kind` -> class by file name.

A config is validated whole before any work. Every error names the path, the value, what is allowed and the way out.
Each class of settings lives with its owner (a method, a stage, the loader); this file only knows how to read them.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, create_model, model_validator

from dist_scan.settings import ConfigError, RuntimeConfig, SlurmConfig, StrictModel

STAGE_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"  # it becomes a folder's name


class RunConfig(StrictModel):
    """One run: data, the stages in order, and how this machine runs them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    data: Any
    stages: dict[str, Any]
    runtime: RuntimeConfig = RuntimeConfig()
    slurm: SlurmConfig = SlurmConfig()
    """What launch/slurm.py asks Slurm for; no part of a run's meaning."""

    @property
    def run_dir(self) -> Path:
        return Path(self.runtime.run_dir or Path("runs") / self.name)

    @model_validator(mode="after")
    def _stages_fit(self):
        """References between stages point backwards, and each stage agrees with what it refers to."""
        seen: dict[str, Any] = {
            f"beton_{split}": None
            for split in ("train", "val")
            if getattr(self.data, split, None) is not None
        }
        for name, stage in self.stages.items():
            if not re.fullmatch(STAGE_NAME, name) or name in seen:
                raise ValueError(
                    f"stages: '{name}' cannot be a stage's name; allowed: letters, digits, _ and -, not beton_train or beton_val"
                )
            for role, target in stage.inputs().items():
                if target not in seen and target.startswith("beton_"):
                    raise ValueError(
                        f"stages.{name}.{role}: '{target.removeprefix('beton_')}', but data.{target.removeprefix('beton_')} is not given; add it"
                    )
                if target not in seen:
                    raise ValueError(
                        f"stages.{name}.{role}: '{target}' is no earlier stage; "
                        f"allowed: {', '.join(s for s in seen if seen[s]) or 'none (it is the first)'}. Name one, or move it before '{name}'."
                    )
            stage.check_inputs(name, seen)
            stage.check(name, self, seen)
            seen[name] = stage
        return self


# --- kinds -----------------------------------------------------------------------------------------------------------


def kinds(package: str) -> list[str]:
    """The kinds there are: the modules of a package that hold one (base and private ones do not)."""
    module = importlib.import_module(package)
    return sorted(
        m.name
        for m in pkgutil.iter_modules(module.__path__)
        if m.name != "base" and not m.name.startswith("_")
    )


def kind_class(package: str, kind: str) -> type:
    """The class of a kind: `moco` is the one class with a `Config` defined in <package>/moco.py."""
    if kind not in kinds(package):
        close = difflib.get_close_matches(kind, kinds(package), 1)
        raise ConfigError(
            f"unknown kind '{kind}'{f' (did you mean {close[0]}?)' if close else ''}; there are: {', '.join(kinds(package))}"
        )
    module = importlib.import_module(f"{package}.{kind}")
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == module.__name__ and hasattr(c, "Config")
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{package}/{kind}.py must define exactly one class with a Config, found {[c.__name__ for c in found]}"
        )
    if (
        found[0].Config.model_fields["kind"].default != kind
    ):  # by which errors know whose settings they list
        raise ConfigError(
            f'{package}/{kind}.py: {found[0].Config.__name__} needs a line that names its kind: `kind: Literal["{kind}"] = "{kind}"`'
        )
    return found[0]


def one_of(package: str) -> Any:
    """A type for pydantic: the settings of any kind in a package, told apart by `kind:`."""
    names = kinds(package)

    def kind_of(value: Any) -> str | None:
        return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)

    members = [Annotated[kind_class(package, name).Config, Tag(name)] for name in names]
    if len(members) == 1:
        return kind_class(package, names[0]).Config
    return Annotated[Union[tuple(members)], Discriminator(kind_of)]  # noqa: UP007 (members are known at run time only)


@cache
def run_config_class() -> type[RunConfig]:
    """RunConfig with the types of its parts filled in from their owners (a layer above: looked up by name)."""
    data = importlib.import_module("dist_scan.data.sources.base").DataConfig
    stages = one_of("dist_scan.stages")
    return create_model(
        "RunConfig", __base__=RunConfig, data=(data, ...), stages=(dict[str, stages], ...)
    )


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans (`3e-2` is a float, `no` is a word); a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, rx)
        for tag, rx in rules
        if tag
        not in (
            "tag:yaml.org,2002:bool",
            "tag:yaml.org,2002:float",
            "tag:yaml.org,2002:int",
            "tag:yaml.org,2002:timestamp",
        )
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        where = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{where}: merge keys (<<) are not read; write the settings out")
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise ConfigError(
                f"{where}: the key {key!r} is no name; allowed: words. Put quotes around it, or remove it"
            )
        if key in seen:
            raise ConfigError(f"{where}: the key '{key}' is given twice; keep one")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def read_yaml(text: str, name: str = "<text>") -> Any:
    """Parse one YAML document. Raises ConfigError with the line of a mistake."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None


def override(tree: dict, assignments: list[str]) -> dict:
    """Apply `a.b.c=value` to the raw tree, before validation; values are YAML. `a.b=` (nothing) removes the key."""
    for text in assignments:
        dotted, equals, value = text.partition("=")
        if not equals or not all(dotted.split(".")):
            raise ConfigError(
                f"override '{text}': expected dotted.path=value, as in stages.heads.epochs=5"
            )
        *parents, last = dotted.split(".")
        node = tree
        for i, key in enumerate(parents):
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
            if not isinstance(node, dict):
                raise ConfigError(
                    f"override '{text}': {'.'.join(parents[: i + 1])} is {node!r}, not a block of settings"
                )
        if value == "":
            node.pop(last, None)
        else:
            node[last] = read_yaml(value, f"override {dotted}")
    return tree


def tuples(value: Any) -> Any:
    """Lists become tuples: settings are frozen, and strict validation does not turn one into the other."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def validate(tree: Any, name: str = "config") -> RunConfig:
    """A validated RunConfig from a raw tree. Raises ConfigError that lists every mistake, one per line."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected a block of settings, got {type(tree).__name__}")
    tree = tuples(tree)
    cls = run_config_class()
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = "\n".join("  " + _explain(e, tree, cls) for e in error.errors())
        raise ConfigError(
            f"{name}: {error.error_count()} mistake{'s' * (error.error_count() > 1)}\n{lines}"
        ) from None


def load(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read, override, validate. Raises ConfigError (missing file, bad YAML, or the list of mistakes)."""
    path = Path(path)
    if not path.is_file():
        around = path if path.is_dir() else path.parent
        near = sorted(p.name for p in around.glob("*.yaml")) if around.is_dir() else []
        shipped = Path(__file__).parents[1] / path
        hint = (
            f"; there are: {', '.join(near)}"
            if near
            else f"; give {shipped}"
            if shipped.is_file()
            else f" (looked in {path.parent.absolute()})"
        )
        raise ConfigError(
            f"config '{path}' {'is a folder' if path.is_dir() else 'does not exist'}{hint}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        raise ConfigError(f"config '{path}' is no text in UTF-8; save it as such") from None
    tree = read_yaml(text, str(path))
    if isinstance(tree, dict):
        tree.setdefault("name", path.stem)
        override(tree, list(overrides))
    return validate(tree, str(path))


# --- errors ----------------------------------------------------------------------------------------------------------


def _real_path(loc: tuple, tree: Any) -> tuple[str, Any]:
    """The path as written by the user (the tags of unions dropped) and the value found there."""
    parts: list[str] = []
    node = tree
    for i, part in enumerate(loc):
        if isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue  # the tag that pydantic puts into the path
        parts.append(str(part))
        node = node[part] if isinstance(node, (dict, tuple)) and _has(node, part) else None
    return ".".join(parts), node


def _has(node: Any, part: Any) -> bool:
    return part in node if isinstance(node, dict) else isinstance(part, int) and part < len(node)


def _owner_fields(loc: tuple, cls: type) -> list[str]:
    """Names of the settings beside the one at loc, found by walking the schema."""
    schema = cls.model_json_schema()
    node: dict = schema
    for part in loc[:-1]:
        node = _resolve(node, schema)
        options = node.get("oneOf") or node.get("anyOf")
        if options:
            mapping = node.get("discriminator", {}).get("mapping", {})
            hits = [_resolve(o, schema) for o in options]
            named = [
                h for h in hits if h.get("properties", {}).get("kind", {}).get("const") == part
            ]
            if part in mapping or named:
                node = named[0] if named else _resolve({"$ref": mapping[part]}, schema)
                continue
            node = next((h for h in hits if part in h.get("properties", {})), hits[0])
        node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
    node = _resolve(node, schema)
    if "anyOf" in node:
        node = next(
            (_resolve(o, schema) for o in node["anyOf"] if "properties" in _resolve(o, schema)),
            node,
        )
    return list(node.get("properties", {}))


def _resolve(node: dict, schema: dict) -> dict:
    ref = node.get("$ref") if isinstance(node, dict) else None
    return (
        reduce(lambda at, key: at[key], ref.removeprefix("#/").split("/"), schema) if ref else node
    )


def _explain(error: dict, tree: Any, cls: type) -> str:
    """One line for one mistake: path, value, what is allowed, remedy."""
    path, value = _real_path(error["loc"], tree)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        fields = _owner_fields(error["loc"], cls)
        close = difflib.get_close_matches(str(error["loc"][-1]), fields, 1)
        hint = f"; did you mean '{close[0]}'?" if close else "; remove it"
        return f"{path}: unknown setting (value {value!r}); allowed: {', '.join(fields)}{hint}"
    if kind == "missing":
        return f"{path}: missing; it must be given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        allowed = (error.get("ctx") or {}).get("expected_tags", "")
        found = value.get("kind") if isinstance(value, dict) else value
        close = difflib.get_close_matches(str(found), re.findall(r"'(\w+)'", allowed), 1)
        return f"{path}.kind: {found!r} is no kind there is; allowed: {allowed.replace(chr(39), '')}{f'; did you mean {close[0]}?' if close else ''}"
    return f"{path}: {message} (value {value!r})" if path else message


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that loads again to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
