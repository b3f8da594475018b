"""What the convolution ops share: where taps read, what follows the sum, and the convolution itself, band by band."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BAND = 1 << 22
"""Entries of a convolution's output that are held at a time beside input and result: 16 MiB in float32."""


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

    def output_of(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """The same for an input x [B, Cin, H, W] and a weight [O, Cin / groups, kh, kw]."""
        return self.output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))


class Activation(NamedTuple):
    """What follows a convolution: "none", "relu", "elu" (alpha 1) or "leaky_relu" with its slope below zero."""

    name: str
    slope: float = 0.2


def activate_(x: Tensor, activation: Activation) -> Tensor:
    """The activation of every element, in place."""
    if activation.name == "elu":
        return F.elu(x, inplace=True)
    if activation.name == "relu":
        return F.relu(x, inplace=True)
    return F.leaky_relu(x, activation.slope, inplace=True) if activation.name == "leaky_relu" else x


def activation_backward(grad: Tensor, x: Tensor, activation: Activation, *, x_is_result: bool) -> Tensor:
    """``grad`` times the activation's derivative, at its argument ``x`` or where it gave the result ``x``."""
    if activation.name == "elu":
        return torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, x_is_result, x)
    if activation.name == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0.0)
    if activation.name == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(grad, x, activation.slope, x_is_result)
    return grad


# Memory layouts and dtypes --------------------------------------------------------------------------------------------


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout of the op's result: channels_last if ``x`` is in it and in no other, else NCHW."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_maps(x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """An uninitialised [B, channels, height, width] in the dtype and the layout of ``x``."""
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums are held in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def convolution_dtype(x: Tensor) -> torch.dtype:
    """What torch's convolution is called in. On a CPU short dtypes are widened: nothing is rounded before the end."""
    return sum_dtype(x) if x.is_cpu else x.dtype


# Bands of output rows -------------------------------------------------------------------------------------------------


class Band(NamedTuple):
    """A part of the output: some samples and some rows, as slices of its dimensions 0 and 2; slice(None): all rows."""

    samples: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """That part of maps of the output's size; maps of batch 1 serve every sample."""
        return (x if x.shape[0] == 1 else x[self.samples])[:, :, self.rows]


def bands(batch: int, channels: int, size: tuple[int, int]) -> Iterator[Band]:
    """Cuts an output [batch, channels, *size] into parts of at most :data:`BAND` entries, but at least one row."""
    height, width = size
    per_row = max(1, channels * width)
    rows = min(height, max(1, BAND // per_row))
    samples = max(1, BAND // (per_row * height)) if rows == height else 1
    for sample in range(0, batch, samples):
        some = slice(sample, min(sample + samples, batch))
        if rows == height:
            yield Band(some, slice(None))
            continue
        for row in range(0, height, rows):
            yield Band(some, slice(row, min(row + rows, height)))


def input_of(x: Tensor, band: Band, geometry: Geometry, kernel: tuple[int, int]) -> tuple[Tensor, Geometry]:
    """The part of the input that a band sees, and the geometry that makes the band of it."""
    if x.shape[0] > 1:
        x = x[band.samples]
    if band.rows == slice(None):
        return x, geometry
    _, _, left, right = geometry.pad
    factor, step = geometry.upsample, geometry.stride[0]
    height = x.shape[2] * factor
    first = band.rows.start * step - geometry.pad[0]
    last = (band.rows.stop - 1) * step - geometry.pad[0] + geometry.dilation[0] * (kernel[0] - 1)
    if geometry.reflect and (first < 0 or last >= height):
        rows = torch.arange(first, last + 1, device=x.device).abs()
        rows = height - 1 - (height - 1 - rows).abs()
        mirrored = x.index_select(2, rows // factor).repeat_interleave(factor, 3)
        return mirrored, geometry._replace(pad=(0, 0, left, right), upsample=1)
    if last < 0 or first >= height:  # padding alone
        zeros = x.new_zeros(x.shape[0], x.shape[1], last - first + 1, x.shape[3] * factor)
        return zeros, geometry._replace(pad=(0, 0, left, right), upsample=1)
    begin, end = max(first, 0) // factor, min(last, height - 1) // factor + 1
    pad = (begin * factor - first, last + 1 - end * factor, left, right)
    return x[:, :, begin:end], geometry._replace(pad=pad)


# The convolution ------------------------------------------------------------------------------------------------------


def convolution_padding(geometry: Geometry) -> tuple[int, int] | None:
    """The padding (rows, columns) that a convolution applies itself; None where the input is padded before."""
    top, bottom, left, right = geometry.pad
    return (top, left) if not geometry.reflect and top == bottom and left == right else None


def prepare(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, int]]:
    """The input as a convolution with symmetric zero padding takes it, and that padding (rows, columns)."""
    if geometry.upsample > 1:
        x = F.interpolate(x, scale_factor=geometry.upsample, mode="nearest")
    top, bottom, left, right = geometry.pad
    if top < 0 or bottom < 0:  # a band may need half of the first or last enlarged pixel
        x = x[:, :, max(-top, 0) : x.shape[2] + min(bottom, 0)]
        top, bottom = max(top, 0), max(bottom, 0)
    own = convolution_padding(geometry._replace(pad=(top, bottom, left, right)))
    if own is not None:
        return x, own
    if top or bottom or left or right:
        x = F.pad(x, (left, right, top, bottom), mode="reflect" if geometry.reflect else "constant")
    return x, (0, 0)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution alone."""
    x, padding = prepare(x, geometry)
    return F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the convolution with respect to x, weight and bias, those that are ``wanted``."""
    dtype = convolution_dtype(x)
    prepared, padding = prepare(x.to(dtype), geometry)
    grad_prepared, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.to(dtype),
        prepared,
        weight.to(dtype),
        [weight.shape[0]],
        geometry.stride,
        padding,
        geometry.dilation,
        False,
        [0, 0],
        geometry.groups,
        list(wanted),
    )
    grad_x = prepare_backward(grad_prepared, x, geometry).to(x.dtype) if wanted[0] else None
    return (
        grad_x,
        grad_weight.to(x.dtype) if wanted[1] else None,
        grad_bias.to(x.dtype) if wanted[2] else None,
    )


def prepare_backward(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
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
