"""Gated convolution by Triton: the gate inside an implicit GEMM, or behind cuDNN's convolution, whichever is quicker.

Triton itself is imported by the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inpaint_kernels.portable._convolution import Activation, Geometry
from inpaint_kernels.triton_kernels._availability import reasons
from inpaint_kernels.triton_kernels._cudnn import bare_convolution
from inpaint_kernels.triton_kernels._launch import Layout
from inpaint_kernels.triton_kernels._launch_config import capability_of, in_gemm, layer_of

__all__ = ["gated_conv2d", "gated_conv2d_gate_backward", "in_gemm", "reasons"]


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    gate_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """``y`` [B, C, Ho, Wo] and, to keep for the backward, the gates before the sigmoid, of the same shape.

    Both are in channels_last if x is, else in NCHW; without ``keep`` the second is empty. The implicit GEMM reads
    channels_last: it copies an x in NCHW, or whose pixels are not whole 8 bytes. Sums are float32. Behind cuDNN the
    sums of a half dtype are rounded to it before the bias is added, as torch does, inside the GEMM only the results
    are.
    """
    inside, _ = in_gemm(layer_of(x, weight, geometry), capability_of(x))
    return (gate_in_gemm if inside else gate_behind_cudnn)(x, weight, bias, geometry, activation, gate_first, keep)


def gate_in_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    gate_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """One kernel, beside what copies an x in NCHW and packs weights that have changed."""
    from inpaint_kernels.triton_kernels import _implicit_gemm as gemm

    layout, size = Layout.like(x), geometry.output_of(x, weight)
    y = layout.empty(x, weight.shape[0] // 2, size)
    gates = torch.empty_like(y) if keep else None
    if y.numel() > 0:
        epilogue = gemm.Epilogue("gated", bias, activation, gate_first, gates)
        gemm.run_convolution(x, weight, geometry, epilogue, y, layout)
    return y, x.new_empty(0) if gates is None else gates


def gate_behind_cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    gate_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """CuDNN's convolution, then one kernel."""
    from inpaint_kernels.triton_kernels import _epilogues as epilogues

    layout, size = Layout.like(x), geometry.output_of(x, weight)
    y = layout.empty(x, weight.shape[0] // 2, size)
    gates = torch.empty_like(y) if keep else None
    raw = bare_convolution(x, weight, geometry, layout)
    if y.numel() > 0:
        epilogues.gate(raw, bias, activation, gate_first, y, gates, layout).run()
    return y, x.new_empty(0) if gates is None else gates


def gated_conv2d_gate_backward(
    grad_y: Tensor, y: Tensor, gates: Tensor, activation: Activation, gate_first: bool
) -> Tensor:
    """The gradient of the sums [B, 2C, Ho, Wo], in the layout of y; the sigmoid is computed again."""
    from inpaint_kernels.triton_kernels import _epilogues as epilogues

    layout = Layout.like(y)
    grad_y, y, gates = (layout.of(t) for t in (grad_y, y, gates))
    grad_sums = layout.empty(y, 2 * y.shape[1], (y.shape[2], y.shape[3]))
    if y.numel() > 0:
        epilogues.gate_backward(grad_y, y, gates, activation, gate_first, grad_sums, layout).run()
    return grad_sums
