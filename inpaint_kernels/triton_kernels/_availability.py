"""Why Triton's kernels cannot run: found out without importing Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)


def reasons(x: Tensor, groups: int) -> list[str]:
    """Why Triton cannot convolve ``x`` with this many groups; empty if it can."""
    found = missing(x.device)
    if x.dtype not in DTYPES:
        found.append(f"{x.dtype} is not among float32, float16, bfloat16")
    if groups != 1:
        found.append(f"groups is {groups}, the kernels take 1")
    return found


def missing(device: torch.device) -> list[str]:
    """What keeps every Triton kernel from running on a device; empty if nothing does."""
    found = []
    if not _triton_is_installed():
        found.append("the package triton is not installed")
    if device.type != "cuda":
        found.append(f"x is on {device.type}, Triton's kernels run on CUDA")
    elif torch.version.hip is not None:
        found.append("this torch is built for ROCm, where the kernels have never run")
    elif torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        found.append("the GPU's compute capability is below 8.0")
    return found


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
