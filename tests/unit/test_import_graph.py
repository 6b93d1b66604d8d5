"""The import graph, read from the sources: layers import downwards, there are no cycles, and heavy
libraries are imported in one place each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVEL = {
    "launch": 10,
    "commands": 10,
    "run": 9,
    "compare": 8,
    "export": 8,
    "finished_run": 8,
    "prediction": 8,
    "pipeline": 8,
    "preflight": 8,
    "run_config": 8,
    "stages": 7,
    "engine": 6,
    "report": 6,
    "methods": 5,
    "evaluate": 5,
    "losses": 4,
    "heads": 4,
    "search": 4,
    "models": 4,
    "data": 3,
    "world": 2,
    "storage": 2,
    "monitoring": 2,
    "config": 1,
    "compiled": 0,
}
"""The layer of each folder or top-level module; a module imports from its own layer or below."""
ONLY_IMPORTED_IN = {
    "faiss": ("dist_scan/search/index.py",),
    "ffcv": ("dist_scan/data/beton/",),
    "submitit": ("launch/",),
    "triton": ("dist_scan/heads/gpu_kernels.py",),
    "torch.distributed": ("dist_scan/world/",),
    "torch.nn.parallel": ("dist_scan/world/",),
}
FILES = sorted([*(ROOT / "dist_scan").rglob("*.py"), *(ROOT / "launch").glob("*.py")])


def module_name(path: Path) -> str:
    """Dotted name of a source file; a package for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside functions.

    Strings passed to ``import_module`` count as imports.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            for argument in node.args:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value)


def internal_imports(name: str) -> set[str]:
    """Modules of this project that a module imports (packages only where a name of theirs is)."""
    names = {m for m in imported(MODULES[name]) if m in MODULES and m != name}
    used_through_submodule = {m for m in names if any(n.startswith(m + ".") for n in names)}
    return names - used_through_submodule


def level(name: str) -> int | None:
    """The layer of a module; None for the package itself and its entry point."""
    parts = name.split(".")
    key = parts[0] if parts[0] == "launch" else ".".join(parts[1:2])
    return LEVEL.get(key)


@pytest.mark.parametrize("name", MODULES)
def test_layers_import_downwards(name: str) -> None:
    own = level(name)
    if own is None:
        assert name in ("dist_scan", "dist_scan.__main__"), f"{name} has no layer: add it to LEVEL"
        return
    for other in internal_imports(name):
        other_level = level(other)
        assert other_level is None or other_level <= own, (
            f"{name} (layer {own}) imports {other} (layer {other_level})"
        )


def test_there_are_no_import_cycles() -> None:
    """Imports inside functions count: they hide a cycle, they do not remove it."""
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in finished:
            for other in sorted(internal_imports(name)):
                visit(other, (*trail, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_are_imported_in_one_place(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for module in imported(path):
        for library, places in ONLY_IMPORTED_IN.items():
            if module == library or module.startswith(library + "."):
                assert name.startswith(places), f"{name} imports {module}; allowed: {places}"
