"""Gated convolution written to be read beside the paper (Yu et al., ICCV 2019, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inpaint_kernels.reference._convolution import activate, convolution, gradients


def gate(sums: Tensor, activation: str, slope: float, gate_first: bool) -> tuple[Tensor, Tensor]:
    """phi(features) * sigmoid(gating), halves of the channels [B, 2C, Ho, Wo]; and gating. Each [B, C, Ho, Wo]."""
    features, gating = sums.chunk(2, 1)
    if gate_first:
        features, gating = gating, features
    return activate(features, activation, slope) * torch.sigmoid(gating), gating


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    pad: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: int,
    reflect: bool,
    activation: str,
    slope: float,
    gate_first: bool,
) -> tuple[Tensor, Tensor]:
    """One convolution with twice the channels; its second half opens and closes the first.

    Args:
        x: [B, Cin, H, W], any floating dtype.
        weight: [2C, Cin / groups, kh, kw].
        bias: [2C]; None: 0.
        stride: of the convolution.
        pad: (top, bottom, left, right).
        dilation: of the convolution.
        groups: of the convolution.
        upsample: see :func:`inpaint_kernels.reference._convolution.convolution`.
        reflect: the same.
        activation: phi.
        slope: of phi = leaky_relu.
        gate_first: the first half is the gate, the second the features.

    Returns:
        The output and the gates before the sigmoid, each [B, C, Ho, Wo].
    """
    sums = convolution(x, weight, bias, stride, pad, dilation, groups, upsample, reflect)
    return gate(sums, activation, slope, gate_first)


def gated_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias; settings as in :func:`gated_conv2d`."""
    return gradients(lambda x, weight, bias: gated_conv2d(x, weight, bias, *settings)[0], grad, x, weight, bias)
