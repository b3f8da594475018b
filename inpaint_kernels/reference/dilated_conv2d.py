"""Dilated convolution written to be read: convolution, activation, residual (Yu and Koltun, ICLR 2016, equation 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inpaint_kernels.reference._convolution import activate, convolution, gradients


def dilated_conv2d(
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
    residual: Tensor | None,
) -> Tensor:
    """phi(convolution of x + bias) + residual.

    Args:
        x: [B, Cin, H, W], any floating dtype.
        weight: [C, Cin / groups, kh, kw], its taps ``dilation`` pixels apart.
        bias: [C]; None: 0.
        stride: of the convolution.
        pad: (top, bottom, left, right).
        dilation: the rate.
        groups: of the convolution.
        upsample: see :func:`inpaint_kernels.reference._convolution.convolution`.
        reflect: mirrored instead of zero border.
        activation: phi.
        slope: of phi = leaky_relu.
        residual: [B, C, Ho, Wo]; None: 0.
    """
    y = activate(convolution(x, weight, bias, stride, pad, dilation, groups, upsample, reflect), activation, slope)
    return y if residual is None else y + residual


def dilated_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias; settings as in :func:`dilated_conv2d`."""
    return gradients(lambda x, weight, bias: dilated_conv2d(x, weight, bias, *settings), grad, x, weight, bias)
