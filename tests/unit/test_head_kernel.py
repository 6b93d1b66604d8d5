"""Triton's kernels of the head step: run by Triton's interpreter on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be checked here")
CASES = Path(__file__).with_name("head_kernel_cases.py")


def test_the_interpreter_gives_what_pytorch_gives() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env=env,
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0 and "12 passed" in found.stdout, (
        found.stdout[-5000:] + found.stderr[-2000:]
    )


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dist_scan.heads import gpu_kernels as k
pointers = lambda *names: dict.fromkeys(names, "*fp32")
sources = [
    (k._row_stats, pointers("logits", "top_of", "total_of") | {"C": "i32"}, {"BLOCK": 1024}),
    (k._column_sums, pointers("logits", "top_of", "total_of", "sums") | {"b": "i32", "C": "i32"}, {"PER_SUM": 512, "ROWS": 16, "BLOCK": 128}),
    (k._gradients, pointers("logits", "slope_of", "scale_of", "top_of", "total_of", "nll_of") | {"b": "i32", "C": "i32"}, {"BLOCK": 1024})]
for architecture in (80, 90):
    for fn, signature, constants in sources:
        signature = {name: signature.get(name, "constexpr") for name in fn.arg_names}
        made = triton.compile(ASTSource(fn, signature, constants), target=GPUTarget("cuda", architecture, 32))
        print(architecture, fn.__name__, made.asm["ptx"].count("ex2.approx") > 0)
"""


def test_they_compile_for_gpus(tmp_path: Path) -> None:
    """Up to PTX and beyond, for A100 and H100: what the interpreter bears and the compiler does not would show here."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    found = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert [line.split()[-1] for line in found.stdout.splitlines()] == ["True"] * 6
