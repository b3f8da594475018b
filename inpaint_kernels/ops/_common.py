"""What ops of every kind share: who looks at a call, what its sums are in, and why a native kernel cannot run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inpaint_kernels import _native


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What sums over maps like ``x`` are in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for this call's gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def only_computes(*tensors: Tensor | None) -> bool:
    """Whether nobody but the kernel looks at a call that wants no gradient: no compilation, tracing or subclass.

    The dispatcher and autograd layers of a Python op cost 20 us a call, as much as a kernel on a small map.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and all(t is None or ((type(t) is Tensor or type(t) is torch.nn.Parameter) and not t.is_meta) for t in tensors)
    )


def always(problem: Any) -> list[str]:
    """No reason against any problem."""
    return []


def cpu_reasons(kernel: str, x: Tensor) -> list[str]:
    """Why a native CPU kernel cannot run on ``x`` and the tensors beside it."""
    if not x.is_cpu:
        return [f"the tensors are on {x.device}, not on the CPU"]
    missing = _native.why_not(kernel, "CPU")
    return [] if missing is None else [missing]


def cuda_reasons(kernel: str, x: Tensor, *, bfloat16: bool = False) -> list[str]:
    """The same for a CUDA kernel; ``bfloat16``: whether it needs a GPU that multiplies such numbers."""
    if not x.is_cuda:
        return [f"the tensors are on {x.device}, not on a CUDA device"]
    missing = _native.why_not(kernel, "CUDA")
    if missing is None:
        missing = _native.gpu_reason(x.device.index, bfloat16)
    return [] if missing is None else [missing]
