"""Dilated convolution with its activation in plain torch operations, by bands of rows."""

from __future__ import annotations

from torch import Tensor

from inpaint_kernels.portable._convolution import (
    Activation,
    Geometry,
    activate_,
    bands,
    convolution_dtype,
    convolve,
    empty_maps,
    input_of,
    sum_dtype,
)


def dilated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    """act(convolution) + residual.

    Args:
        x: [B, Cin, H, W], any floating dtype, NCHW or channels_last.
        weight: [C, Cin / groups, kh, kw].
        bias: [C]; None: 0.
        geometry: which pixels each tap reads.
        activation: of the convolution's result.
        residual: [B, C, Ho, Wo], added after the activation; None: nothing is.

    Returns:
        [B, C, Ho, Wo] in the dtype and the layout of ``x``.
    """
    kernel = (weight.shape[2], weight.shape[3])
    size = geometry.output_of(x, weight)
    y = empty_maps(x, weight.shape[0], size)
    dtype = convolution_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for band in bands(x.shape[0], weight.shape[0], size):
        part, part_geometry = input_of(x, band, geometry, kernel)
        sums = convolve(part.to(dtype), weight, bias, part_geometry).to(sum_dtype(x))
        activate_(sums, activation)
        if residual is not None:
            sums += residual[band.samples, :, band.rows]
        band.of(y).copy_(sums)
    return y
