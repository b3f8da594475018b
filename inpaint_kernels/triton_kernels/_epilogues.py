"""What follows a convolution, in one pass over its output; and the backward of the gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from inpaint_kernels.portable._convolution import Activation
from inpaint_kernels.triton_kernels._launch import Launch, Layout, needs_int64

BLOCK = 1024
WARPS = 4

# Helpers --------------------------------------------------------------------------------------------------------------


@triton.jit
def activate(x: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> Any:
    """The activation of float32 values."""
    if ACTIVATION == "elu":
        # exp(x) - 1 loses the digits of a small x; a minimum of x and 0 would lose a NaN.
        below = tl.where(x > -0.03, x * (1.0 + x * (0.5 + x * (1.0 / 6.0))), tl.exp(tl.where(x > 0.0, 0.0, x)) - 1.0)
        return tl.where(x > 0.0, x, below)
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    if ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, x, x * slope)
    return x


@triton.jit
def _activation_derivative(y: tl.tensor, opening: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> Any:
    """The derivative where the activation gave y / opening, torch's one-sided choice at 0."""
    if ACTIVATION == "elu":
        # A sigmoid that underflows is 0 as y is. Rounding of y may take the quotient below -1, its limit; a NaN stays.
        below = y / tl.where(opening > 0.0, opening, 1.0) + 1.0
        return tl.where(y > 0.0, 1.0, tl.where(below < 0.0, 0.0, below))
    if ACTIVATION == "relu":
        return tl.where(y <= 0.0, 0.0, 1.0)
    if ACTIVATION == "leaky_relu":
        return tl.where(y > 0.0, 1.0, slope)
    return tl.full(y.shape, 1.0, tl.float32)


@triton.jit
def _elements(outputs: tl.tensor, CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """This program's elements of a flat tensor of ``outputs`` pixels, and which of them there are."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
        outputs = outputs.to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    return index, index < outputs * CHANNELS


@triton.jit
def _channel(index: tl.tensor, pixels: tl.tensor, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr) -> Any:
    """The channel of elements of a tensor [B, C, pixels]."""
    if CHANNELS_LAST:
        return index % CHANNELS
    return index // pixels % CHANNELS


@triton.jit
def _half(
    index: tl.tensor, pixels: tl.tensor, half: tl.tensor, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
) -> Any:
    """Where the same elements of the first or second half of a tensor [B, 2C, pixels] are."""
    if CHANNELS_LAST:
        return index + (index // CHANNELS + half) * CHANNELS
    return index + (index // (CHANNELS * pixels) + half) * (CHANNELS * pixels)


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def gated_conv2d_epilogue_kernel(
    raw: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    gates: tl.tensor,
    outputs: tl.tensor,
    pixels: tl.tensor,
    slope: tl.tensor,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes act(features) * sigmoid(gates) of ``raw`` + bias to y and, if they are kept, the gates."""
    index, inside = _elements(outputs, CHANNELS, WIDE, BLOCK)
    feature_at = raw + _half(index, pixels, 1 if GATE_FIRST else 0, CHANNELS, CHANNELS_LAST)
    gate_at = raw + _half(index, pixels, 0 if GATE_FIRST else 1, CHANNELS, CHANNELS_LAST)
    feature = tl.load(feature_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        channel = _channel(index, pixels, CHANNELS, CHANNELS_LAST)
        feature += tl.load(bias + channel + (CHANNELS if GATE_FIRST else 0), mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(bias + channel + (0 if GATE_FIRST else CHANNELS), mask=inside, other=0.0).to(tl.float32)
    if gates is not None:
        tl.store(gates + index, gate, mask=inside)
    tl.store(y + index, activate(feature, slope, ACTIVATION) * tl.sigmoid(gate), mask=inside)


@triton.jit
def gated_conv2d_gate_backward_kernel(
    grad_y: tl.tensor,
    y: tl.tensor,
    gates: tl.tensor,
    grad_sums: tl.tensor,
    outputs: tl.tensor,
    pixels: tl.tensor,
    slope: tl.tensor,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """From the gradient of y to that of the features and gates; the sigmoid is computed again."""
    index, inside = _elements(outputs, CHANNELS, WIDE, BLOCK)
    feature_at = _half(index, pixels, 1 if GATE_FIRST else 0, CHANNELS, CHANNELS_LAST)
    gate_at = _half(index, pixels, 0 if GATE_FIRST else 1, CHANNELS, CHANNELS_LAST)
    result = tl.load(y + index, mask=inside, other=0.0).to(tl.float32)
    opening = tl.sigmoid(tl.load(gates + index, mask=inside, other=0.0).to(tl.float32))
    upstream = tl.load(grad_y + index, mask=inside, other=0.0).to(tl.float32)
    derivative = _activation_derivative(result, opening, slope, ACTIVATION)
    tl.store(grad_sums + feature_at, upstream * opening * derivative, mask=inside)
    tl.store(grad_sums + gate_at, upstream * result * (1.0 - opening), mask=inside)


@triton.jit
def dilated_conv2d_epilogue_kernel(
    y: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    outputs: tl.tensor,
    pixels: tl.tensor,
    slope: tl.tensor,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Makes act(y + bias) + residual of y, in place."""
    index, inside = _elements(outputs, CHANNELS, WIDE, BLOCK)
    value = tl.load(y + index, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        channel = _channel(index, pixels, CHANNELS, CHANNELS_LAST)
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    value = activate(value, slope, ACTIVATION)
    if residual is not None:
        value += tl.load(residual + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, value, mask=inside)


@triton.jit
def partial_conv2d_epilogue_kernel(
    y: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    outputs: tl.tensor,
    pixels: tl.tensor,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ONE_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Makes y * scale + bias * shift of y, in place; the maps are of one sample or of each."""
    index, inside = _elements(outputs, CHANNELS, WIDE, BLOCK)
    if CHANNELS_LAST:
        place = index // CHANNELS
        place = place % pixels if ONE_MASK else place
    else:
        place = index % pixels
        place = place if ONE_MASK else place + index // (CHANNELS * pixels) * pixels
    value = tl.load(y + index, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale + place, mask=inside, other=0.0)
    if bias is not None:
        channel = _channel(index, pixels, CHANNELS, CHANNELS_LAST)
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        value += offset * tl.load(shift + place, mask=inside, other=0.0)
    tl.store(y + index, value, mask=inside)


# Launchers ------------------------------------------------------------------------------------------------------------


def gate(
    raw: Tensor,
    bias: Tensor | None,
    activation: Activation,
    gate_first: bool,
    y: Tensor,
    gates: Tensor | None,
    layout: Layout,
) -> Launch:
    """Y, and the gates if there is a place for them, from the bare convolution's output [B, 2C, H, W]."""
    constants = {"ACTIVATION": activation.name, "GATE_FIRST": gate_first}
    tensors = {"raw": raw, "bias": bias, "y": y, "gates": gates}
    return _launch(gated_conv2d_epilogue_kernel, tensors, y, raw, layout, constants, activation)


def gate_backward(
    grad_y: Tensor,
    y: Tensor,
    gates: Tensor,
    activation: Activation,
    gate_first: bool,
    grad_sums: Tensor,
    layout: Layout,
) -> Launch:
    """``grad_sums`` [B, 2C, H, W] from the gradient of y, y and the gates."""
    constants = {"ACTIVATION": activation.name, "GATE_FIRST": gate_first}
    tensors = {"grad_y": grad_y, "y": y, "gates": gates, "grad_sums": grad_sums}
    return _launch(gated_conv2d_gate_backward_kernel, tensors, y, grad_sums, layout, constants, activation)


def activation_in_place(
    y: Tensor, bias: Tensor | None, activation: Activation, residual: Tensor | None, layout: Layout
) -> Launch:
    """Y = act(y + bias) + residual."""
    tensors = {"y": y, "bias": bias, "residual": residual}
    constants = {"ACTIVATION": activation.name}
    return _launch(dilated_conv2d_epilogue_kernel, tensors, y, y, layout, constants, activation)


def renormalise_in_place(y: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, layout: Layout) -> Launch:
    """Y = y * scale + bias * shift with contiguous float32 maps [B|1, 1, H, W]."""
    tensors = {"y": y, "bias": bias, "scale": scale, "shift": shift}
    return _launch(partial_conv2d_epilogue_kernel, tensors, y, y, layout, {"ONE_MASK": scale.shape[0] == 1}, None)


def _launch(
    kernel: Any,
    tensors: Mapping[str, Tensor | None],
    y: Tensor,
    largest: Tensor,
    layout: Layout,
    constants: dict[str, Any],
    activation: Activation | None,
) -> Launch:
    """One program for every BLOCK elements of ``y``; all maps are of one layout."""
    slope = {} if activation is None else {"slope": float(activation.slope)}
    shape = {"CHANNELS": y.shape[1], "CHANNELS_LAST": layout is Layout.CHANNELS_LAST}
    return Launch(
        kernel,
        (triton.cdiv(y.numel(), BLOCK),),
        {**tensors, "outputs": y.numel() // y.shape[1], "pixels": y.shape[2] * y.shape[3], **slope},
        {**shape, **constants, "WIDE": needs_int64(largest), "BLOCK": BLOCK},
        {"num_warps": WARPS},
    )
