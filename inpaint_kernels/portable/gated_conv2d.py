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
        keep: also return the gates, which the gradient needs.

    Returns:
        [B, C, Ho, Wo], and the gates before the sigmoid of the same shape, or an empty tensor. Both have the dtype and
        the layout of ``x``.
    """
    kernel = (weight.shape[2], weight.shape[3])
    size = geometry.output_of(x, weight)
    y = empty_maps(x, weight.shape[0] // 2, size)
    gates = torch.empty_like(y) if keep else x.new_empty(0)
    dtype = convolution_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for band in bands(x.shape[0], weight.shape[0], size):
        part, part_geometry = input_of(x, band, geometry, kernel)
        sums = convolve(part.to(dtype), weight, bias, part_geometry)
        features, gate = (_own(half, sum_dtype(x)) for half in _features_and_gate(sums, gate_first))
        if keep:
            band.of(gates).copy_(gate)
        torch.mul(activate_(features, activation), gate.sigmoid_(), out=band.of(y))
    return y, gates


def gated_conv2d_gate_backward(
    grad: Tensor, y: Tensor, gates: Tensor, activation: Activation, gate_first: bool
) -> Tensor:
    """The gradient of the convolution's result: grad, y and gates [B, C, Ho, Wo] -> [B, 2C, Ho, Wo].

    In the dtype and the layout of ``y``. The sigmoid is computed once more; what the activation gave is y over it.
    """
    batch, channels, height, width = y.shape
    grad_sums = empty_maps(y, 2 * channels, (height, width))
    dtype = sum_dtype(y)
    least = torch.finfo(dtype).tiny
    for band in bands(batch, 2 * channels, (height, width)):
        upstream, result = _own(band.of(grad), dtype), _own(band.of(y), dtype)
        grad_features, grad_gate = _features_and_gate(band.of(grad_sums), gate_first)
        opened = _own(band.of(gates), dtype).sigmoid()
        # A sigmoid that underflows is 0 as y is, and so are the gradients. Rounding of y may take an elu below -1.
        activated = result.div(opened.clamp_min(least)).clamp_min_(-1)
        grad_features.copy_(activation_backward(upstream * opened, activated, activation, x_is_result=True))
        torch.mul(upstream * result, 1 - opened, out=grad_gate)
    return grad_sums


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
