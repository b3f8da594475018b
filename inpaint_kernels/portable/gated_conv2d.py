"""Gated convolution in plain torch operations: the convolution by bands of rows, the gate in place on each band."""

from __future__ import annotations

import torch
from torch import Tensor

from inpaint_kernels.portable._convolution import (
    Activation,
    Geometry,
    activate_,
    activation_backward,
    bands,
    convolution_dtype,
    convolve,
    empty_maps,
    input_of,
    sum_dtype,
)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation,
    gate_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """act(features) * sigmoid(gate), where both are halves of one convolution's channels.

    Args:
        x: [B, Cin, H, W], any floating dtype, NCHW or channels_last.
        weight: [2C, Cin / groups, kh, kw].
        bias: [2C]; None: 0.
        geometry: which pixels each tap reads.
        activation: of the features.
        gate_first: whether the first C channels are the gate's, not the features'.
        keep: also return the convolution's result, which the gradient needs.

    Returns:
        [B, C, Ho, Wo], and the convolution's [B, 2C, Ho, Wo], bias included, or an empty tensor. Both have the dtype
        and the layout of ``x``.
    """
    kernel = (weight.shape[2], weight.shape[3])
    size = geometry.output_of(x, weight)
    y = empty_maps(x, weight.shape[0] // 2, size)
    pre = empty_maps(x, weight.shape[0], size) if keep else x.new_empty(0)
    dtype = convolution_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for band in bands(x.shape[0], weight.shape[0], size):
        part, part_geometry = input_of(x, band, geometry, kernel)
        sums = convolve(part.to(dtype), weight, bias, part_geometry)
        if keep:
            band.of(pre).copy_(sums)
        features, gate = (_own(half, sum_dtype(x)) for half in _features_and_gate(sums, gate_first))
        torch.mul(activate_(features, activation), gate.sigmoid_(), out=band.of(y))
    return y, pre


def gated_conv2d_gate_backward(grad: Tensor, pre: Tensor, activation: Activation, gate_first: bool) -> Tensor:
    """The gradient of the convolution's result: grad [B, C, Ho, Wo], pre [B, 2C, Ho, Wo] -> [B, 2C, Ho, Wo].

    In the dtype and the layout of ``pre``. Activation and sigmoid are computed once more, not stored.
    """
    batch, channels, height, width = pre.shape
    grad_pre = torch.empty_like(pre)
    dtype = sum_dtype(pre)
    for band in bands(batch, channels, (height, width)):
        upstream = _own(band.of(grad), dtype)
        features, gate = (_own(half, dtype) for half in _features_and_gate(band.of(pre), gate_first))
        grad_features, grad_gate = _features_and_gate(band.of(grad_pre), gate_first)
        opened = gate.sigmoid()
        grad_features.copy_(activation_backward(upstream * opened, features, activation, x_is_result=False))
        activated = activate_(features.clone(), activation)
        slope = torch.ops.aten.sigmoid_backward(upstream, opened)
        torch.mul(slope, activated, out=grad_gate)
    return grad_pre


def _features_and_gate(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, 1)
    return (second, first) if gate_first else (first, second)


def _own(half: Tensor, dtype: torch.dtype) -> Tensor:
    """A half of the channels, in ``dtype`` and so that elementwise operations run at full speed.

    In NCHW that is the view itself; in channels_last a copy, since the view has every pixel's few channels apart.
    """
    if half.dtype != dtype:
        return half.to(dtype)
    return half.contiguous(memory_format=torch.channels_last) if half.stride(1) == 1 and half.shape[1] > 1 else half
