"""Triton kernels of the heads: run by Triton's interpreter on the CPU, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be tested")
CASES = Path(__file__).with_name("head_kernel_cases.py")


def test_the_interpreter_gives_what_pytorch_gives() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = result.stdout[-5000:] + result.stderr[-2000:]
    assert result.returncode == 0, output
    assert "11 passed" in result.stdout, output


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dist_scan.heads import gpu_kernels

def types(*pointers, integers):
    return dict.fromkeys(pointers, "*fp32") | dict.fromkeys(integers, "i32")

sources = [
    (
        gpu_kernels._row_stats,
        types("logits", "maxima", "totals", integers=["C"]),
        {"BLOCK": 1024},
    ),
    (
        gpu_kernels._column_sums,
        types("logits", "maxima", "totals", "sums", integers=["b", "C"]),
        {"PER_SUM": 512, "ROWS": 16, "BLOCK": 128},
    ),
    (
        gpu_kernels._gradients,
        types(
            "logits", "entropy_gradient", "scale_pointer", "maxima", "totals", "nll",
            integers=["b", "C"],
        ),
        {"BLOCK": 1024},
    ),
]
for architecture in (80, 90):
    for kernel, signature, constants in sources:
        signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        print(architecture, kernel.__name__, compiled.asm["ptx"].count("ex2.approx") > 0)
"""


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """For A100 and H100, without a GPU: the interpreter allows more than the compiler."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["True"] * 6
