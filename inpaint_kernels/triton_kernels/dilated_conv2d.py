"""Dilated convolution by Triton: an implicit GEMM with what follows inside, or cuDNN's convolution and one kernel.

Triton itself is imported by the first call.
"""

from __future__ import annotations

from torch import Tensor

from inpaint_kernels.portable._convolution import Activation, Geometry
from inpaint_kernels.triton_kernels._availability import reasons
from inpaint_kernels.triton_kernels._cudnn import bare_convolution
from inpaint_kernels.triton_kernels._launch import Layout
from inpaint_kernels.triton_kernels._launch_config import capability_of, in_gemm, layer_of

__all__ = ["dilated_conv2d", "in_gemm", "reasons"]


def dilated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    """act(conv(x) + bias) + residual, [B, C, Ho, Wo], in channels_last if x is, else in NCHW.

    The implicit GEMM reads channels_last: it copies an x in NCHW, or whose pixels are not whole 8 bytes. Sums are
    float32. Behind cuDNN the sums of a half dtype are rounded to it before what follows, inside the GEMM only the
    results are.
    """
    inside, _ = in_gemm(layer_of(x, weight, geometry), capability_of(x))
    return (activation_in_gemm if inside else activation_behind_cudnn)(x, weight, bias, geometry, activation, residual)


def activation_in_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    """One kernel, beside what copies an x in NCHW and packs weights that have changed."""
    from inpaint_kernels.triton_kernels import _implicit_gemm as gemm

    layout = Layout.like(x)
    size = geometry.output_of(x, weight)
    y = layout.empty(x, weight.shape[0], size)
    if y.numel() > 0:
        residual = None if residual is None else layout.of(residual)
        epilogue = gemm.Epilogue("plain", bias, activation, residual=residual)
        gemm.run_convolution(x, weight, geometry, epilogue, y, layout)
    return y


def activation_behind_cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    """CuDNN's convolution, then one kernel in place."""
    from inpaint_kernels.triton_kernels import _epilogues as epilogues

    layout = Layout.like(x)
    y = bare_convolution(x, weight, geometry, layout)
    if y.numel() > 0:
        residual = None if residual is None else layout.of(residual)
        epilogues.activation_in_place(y, bias, activation, residual, layout).run()
    return y
