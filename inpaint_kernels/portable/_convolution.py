"""What the convolution ops share: where taps read, what follows the sum, and the plain convolution of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Which input pixels an output pixel of a convolution sees.

    Output (y, x) sums tap (i, j) at row ``y * stride[0] - pad[0] + i * dilation[0]`` and the column likewise, of the
    input after nearest upsampling. Outside of it are zeros, or with ``reflect`` the pixels mirrored at the border.

    Attributes:
        stride: (rows, columns).
        pad: (top, bottom, left, right), in pixels of the upsampled input.
        dilation: (rows, columns).
        groups: groups of channels that see only each other.
        upsample: whole factor by which the input is enlarged first, each pixel a square (1: none).
        reflect: mirror at the borders instead of zeros.
    """

    stride: tuple[int, int]
    pad: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int = 1
    upsample: int = 1
    reflect: bool = False

    def output_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of ``size`` and a kernel of ``kernel`` rows and columns."""
        top, bottom, left, right = self.pad
        return (
            _outputs(size[0] * self.upsample + top + bottom, kernel[0], self.stride[0], self.dilation[0]),
            _outputs(size[1] * self.upsample + left + right, kernel[1], self.stride[1], self.dilation[1]),
        )


class Activation(NamedTuple):
    """What follows a convolution: "none", "relu", "elu" (alpha 1) or "leaky_relu" with its slope below zero."""

    name: str
    slope: float = 0.2


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of every element."""
    if activation.name == "elu":
        return F.elu(x)
    if activation.name == "relu":
        return F.relu(x)
    return F.leaky_relu(x, activation.slope) if activation.name == "leaky_relu" else x


def prepare(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, int]]:
    """The input as a convolution with symmetric zero padding takes it, and that padding (rows, columns)."""
    if geometry.upsample > 1:
        x = F.interpolate(x, scale_factor=geometry.upsample, mode="nearest")
    top, bottom, left, right = geometry.pad
    if not geometry.reflect and top == bottom and left == right:
        return x, (top, left)
    if top or bottom or left or right:
        x = F.pad(x, (left, right, top, bottom), mode="reflect" if geometry.reflect else "constant")
    return x, (0, 0)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution alone."""
    x, padding = prepare(x, geometry)
    return F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the convolution with respect to x, weight and bias, those that are ``wanted``."""
    prepared, padding = prepare(x, geometry)
    grad_prepared, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        prepared,
        weight,
        [weight.shape[0]],
        geometry.stride,
        padding,
        geometry.dilation,
        False,
        [0, 0],
        geometry.groups,
        list(wanted),
    )
    grad_x = _prepare_backward(grad_prepared, x, geometry) if wanted[0] else None
    return grad_x, grad_weight if wanted[1] else None, grad_bias if wanted[2] else None


def _prepare_backward(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The adjoint of :func:`prepare`."""
    top, bottom, left, right = geometry.pad
    batch, channels, height, width = x.shape
    enlarged = (batch, channels, height * geometry.upsample, width * geometry.upsample)
    if geometry.reflect and (top or bottom or left or right):
        like = grad.new_empty(1).expand(enlarged)  # only its shape counts
        grad = torch.ops.aten.reflection_pad2d_backward(grad, like, [left, right, top, bottom])
    elif top != bottom or left != right:
        grad = F.pad(grad, (-left, -right, -top, -bottom))
    if geometry.upsample > 1:
        grad = torch.ops.aten.upsample_nearest2d_backward(
            grad, enlarged[2:], list(x.shape), float(geometry.upsample), float(geometry.upsample)
        )
    return grad


def _outputs(padded: int, kernel: int, stride: int, dilation: int) -> int:
    return (padded - dilation * (kernel - 1) - 1) // stride + 1
