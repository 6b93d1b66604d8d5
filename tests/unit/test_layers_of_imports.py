"""The import direction, read from the sources: no layer looks up, and heavy libraries have one door each."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVEL = {"launch": 10, "commands": 9, "run": 9, "finished": 8, "pipeline": 8, "stages": 7, "engine": 6, "evaluate": 6, "methods": 5, "models": 4, "losses": 4, "head_step": 4, "head_clusters": 4, "head_kernel": 4, "head_loops": 4, "head_products": 4,
         "banks": 4, "search": 4, "data": 4, "world": 2, "artefacts": 2, "progress": 2, "sections": 0, "compiled": 0, "config": 1, "settings": 0}
DOORS = {"faiss": ("dist_scan/search/index.py",), "ffcv": ("dist_scan/data/beton/",), "submitit": ("launch/",), "triton": ("dist_scan/head_kernel.py",),
         "torch.distributed": ("dist_scan/world/",), "torch.nn.parallel": ("dist_scan/world/",)}
FILES = sorted([*(ROOT / "dist_scan").rglob("*.py"), *(ROOT / "launch").glob("*.py")])


def imported(path: Path) -> list[str]:
    """Every module a file imports, at the top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[:-node.level]
                base = ".".join([*package, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{a.name}" for a in node.names)]
    return found


def layer(parts: tuple[str, ...]) -> int | None:
    name = parts[0] if parts[0] == "launch" else (parts[1] if len(parts) > 1 else None)
    return LEVEL.get(name) if name else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_layer_looks_up(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = layer(parts)
    if own is None:
        assert parts[-1] in ("__init__", "__main__"), f"{path} belongs to no layer: add its folder to LEVEL"
        return
    for module in imported(path):
        if module.split(".")[0] in ("dist_scan", "launch"):
            other = layer(tuple(module.split(".")))
            assert other is None or other <= own, f"{path.relative_to(ROOT)} (level {own}) imports {module} (level {other})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_have_one_door(path):
    name = str(path.relative_to(ROOT))
    for module in imported(path):
        for library, doors in DOORS.items():
            if module == library or module.startswith(library + "."):
                assert name.startswith(doors), f"{name} imports {module}; only {doors} may"


def test_modules_and_functions_stay_short():
    long = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > 300:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.name}: {node.name}")
    assert not long
