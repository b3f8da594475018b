"""The Triton kernels become machine code for sm_80 and sm_90 without a GPU, without spills and within its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inpaint_kernels.triton_kernels._launch_config import SHARED_BUDGET

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
COMPILER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
KERNELS = {
    "convolution_kernel",
    "gated_conv2d_epilogue_kernel",
    "gated_conv2d_gate_backward_kernel",
    "dilated_conv2d_epilogue_kernel",
    "partial_conv2d_epilogue_kernel",
}

pytestmark = pytest.mark.skipif(not COMPILER.is_file(), reason=f"this triton has no compiler for CUDA, {COMPILER}")


def run_python(*arguments: str, cache: Path) -> str:
    """What a Python process prints that does not interpret kernels and starts with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def usages(which: str, cache: Path) -> list[dict[str, Any]]:
    return json.loads(run_python("-m", "tests.triton_compilation", which, cache=cache))


def violations(usage: dict[str, Any]) -> list[str]:
    name = f"{usage['case']} on {usage['architecture']}"
    found = []
    if usage["spills"] > 0:
        found.append(f"{name} spills: {usage['spills']} instructions access local memory")
    if usage["shared"] > SHARED_BUDGET:
        found.append(f"{name} takes {usage['shared']} bytes of shared memory, {SHARED_BUDGET} at most")
    expected = expected_products(usage)
    if usage["products"] != expected:
        found.append(f"{name} multiplies with {usage['products']}, expected {expected}")
    return found


def expected_products(usage: dict[str, Any]) -> list[str]:
    """Tensor cores, those of the architecture, wherever numbers may be multiplied by them."""
    if usage["kernel"] != "convolution_kernel" or usage["precision"] == "float32":
        return []
    return ["wgmma.mma_async"] if usage["architecture"] == "sm_90" else ["mma.sync"]


def test_one_of_every_kind_compiles_within_the_limits(tmp_path):
    found = usages("quick", tmp_path)
    assert {usage["kernel"] for usage in found} == KERNELS
    assert {usage["architecture"] for usage in found} == {"sm_80", "sm_90"}
    assert {usage["precision"] for usage in found} == {"bfloat16", "float16", "tf32", "float32"}
    assert [violation for usage in found for violation in violations(usage)] == []


@pytest.mark.slow
def test_every_layer_of_deepfill_compiles_within_the_limits(tmp_path):
    found = usages("all", tmp_path)
    assert len(found) > 300
    assert [violation for usage in found for violation in violations(usage)] == []


def test_planted_faults_are_found(tmp_path):
    (usage,) = usages("planted", tmp_path)
    spills, shared = violations(usage)
    assert " spills: " in spills
    assert "bytes of shared memory" in shared


def test_nothing_needs_triton_before_a_kernel_runs(tmp_path):
    """Nor is Triton imported before, which takes its time."""
    run_python(
        "-c",
        """
import sys
sys.modules["triton"] = None
import torch
import inpaint_kernels
from inpaint_kernels.triton_kernels import dilated_conv2d, gated_conv2d, partial_conv2d
for module in (dilated_conv2d, gated_conv2d, partial_conv2d):
    assert module.reasons(torch.empty(1, 3, 4, 4), 1)[0] == "the package triton is not installed"
""",
        cache=tmp_path,
    )
