"""The examples of CONTRIBUTING.md work as they are printed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from dist_scan.data.beton.format import read_labels
from dist_scan.data.beton.write import write_beton
from tests.support.images import data_config, encode_image, make_image
from tests.support.launches import LOCAL, ROOT, environment

EXAMPLE = re.compile(r"^`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A file name on a line of its own, then a block of code: the file's content."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all example files."""
    folder = tmp_path_factory.mktemp("examples")
    for name, text in EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def load_module(path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_and_stage_run_from_their_config(examples: Path, tmp_path: Path) -> None:
    lines = []
    for name in ("methods", "stages"):
        folder = str(examples / "dist_scan" / name)
        lines += [f"import dist_scan.{name}", f"dist_scan.{name}.__path__.append({folder!r})"]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    config = examples / "configs" / "invariant.yaml"
    done = subprocess.run(
        [*LOCAL, str(config), f"runtime.run_dir={tmp_path / 'run'}"],
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    (norms,) = (tmp_path / "run").glob("stages/norms/*/norms.json")
    assert json.loads(norms.read_text())["mean"] > 0
    assert list((tmp_path / "run").glob("stages/steady/*/manifest.json"))


def test_source_reads_an_archive_and_fills_a_beton(examples: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for i in range(6):
            target.writestr(f"class{i % 2}/{i}.png", encode_image(make_image(i)))
        target.writestr("class0/readme.txt", "not an image")
    module = load_module(examples / "dist_scan" / "data" / "sources" / "zip_archive.py")
    source = module.ZipSource(archive)
    assert len(source) == 6
    assert source.class_names == ["class0", "class1"]
    assert source.fingerprint() == module.ZipSource(archive).fingerprint()
    out = tmp_path / "images.beton"
    assert write_beton(source, out, data_config(archive), show_progress=False).num_images == 6
    assert read_labels(out).tolist() == [0, 0, 0, 1, 1, 1]


def test_benchmark_prints_its_rows(examples: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(examples / "benchmarks" / "argsort.py"), "--rounds", "2", "--compare"],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    assert all(row["benchmark"] == "argsort" and row["full_s"] > 0 for row in rows)
