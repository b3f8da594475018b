"""One convolution kernel: an implicit GEMM, and in it what follows the convolution.

A program sums block_m output pixels times block_n * tiles output channels over (tap, input channel). Stride, dilation,
padding, mirrored borders and nearest upsampling are arithmetic on the pixel that a tap reads; nothing is stored for
them. The input is in channels_last, the weights a packed matrix, the sums float32.

Features and gates of a gated convolution are neighbouring columns of one product: they share the input's tile, and
the gate's epilogue finds both in the same thread.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from inpaint_kernels._packed_weights import PACKED_WEIGHTS
from inpaint_kernels.portable._convolution import Activation, Geometry
from inpaint_kernels.triton_kernels._epilogues import activate
from inpaint_kernels.triton_kernels._launch import Launch, Layout, needs_int64
from inpaint_kernels.triton_kernels._launch_config import LaunchConfig, Layer, capability_of, launch_config, layer_of
from inpaint_kernels.triton_kernels._packed_weights import Packing, pack

# Kernel ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _source(at: tl.tensor, size: tl.tensor, UPSAMPLE: tl.constexpr, REFLECT: tl.constexpr) -> Any:
    """The row (or column) of the input that a tap reads at row ``at`` of the enlarged one, and whether there is one."""
    if REFLECT:
        at = tl.where(at < 0, -at, at)
        at = tl.minimum(at, 2 * (size * UPSAMPLE - 1) - at)
    inside = at.to(tl.uint32) < (size * UPSAMPLE).to(tl.uint32)  # below 0 is very large
    if UPSAMPLE > 1:
        at = at // UPSAMPLE
    return at, inside


@triton.jit
def _store_gated(
    sums: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    gates: tl.tensor,
    column: tl.tensor,
    row: tl.tensor,
    image: tl.tensor,
    pixel: tl.tensor,
    pixels: tl.tensor,
    is_output: tl.tensor,
    slope: tl.tensor,
    COLUMNS: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Writes act(feature) * sigmoid(gate) to y, from sums whose columns alternate between features and gates."""
    CHANNELS: tl.constexpr = COLUMNS // 2
    FEATURES: tl.constexpr = CHANNELS if GATE_FIRST else 0
    GATES: tl.constexpr = 0 if GATE_FIRST else CHANNELS
    feature, gate = tl.split(tl.reshape(sums, (BLOCK_M, BLOCK_N // 2, 2)))
    channel = column // 2 + tl.arange(0, BLOCK_N // 2)
    is_channel = channel < CHANNELS
    if bias is not None:
        feature += tl.load(bias + FEATURES + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + GATES + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    stored = is_output[:, None] & is_channel[None, :]
    value = activate(feature, slope, ACTIVATION) * tl.sigmoid(gate)
    if Y_CHANNELS_LAST:
        at = (row * CHANNELS)[:, None] + channel[None, :]
    else:
        at = (image * CHANNELS * pixels + pixel)[:, None] + channel[None, :] * pixels
    tl.store(y + at, value, mask=stored)
    if gates is not None:
        tl.store(gates + at, gate, mask=stored)


@triton.jit
def _store(
    sums: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    y: tl.tensor,
    column: tl.tensor,
    row: tl.tensor,
    image: tl.tensor,
    pixel: tl.tensor,
    pixels: tl.tensor,
    is_output: tl.tensor,
    slope: tl.tensor,
    COLUMNS: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ONE_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Writes act(sums * scale + bias * shift) + residual to y, or without the maps act(sums + bias) + residual."""
    channel = column + tl.arange(0, BLOCK_N)
    is_channel = channel < COLUMNS
    place = pixel if ONE_MASK else row
    if scale is not None:
        sums *= tl.load(scale + place, mask=is_output, other=0.0)[:, None]
    if bias is not None:
        offset = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        if shift is not None:
            offset = offset * tl.load(shift + place, mask=is_output, other=0.0)[:, None]
        sums += offset
    value = activate(sums, slope, ACTIVATION)
    stored = is_output[:, None] & is_channel[None, :]
    if Y_CHANNELS_LAST:
        at = (row * COLUMNS)[:, None] + channel[None, :]
    else:
        at = (image * COLUMNS * pixels + pixel)[:, None] + channel[None, :] * pixels
    if residual is not None:
        value += tl.load(residual + at, mask=stored, other=0.0).to(tl.float32)
    tl.store(y + at, value, mask=stored)


@triton.jit(
    do_not_specialize=[
        "out_width",
        "height",
        "width",
        "stride_y",
        "stride_x",
        "pad_top",
        "pad_left",
        "dilation_y",
        "dilation_x",
    ]
)
def convolution_kernel(
    x: tl.tensor,
    mask: tl.tensor,
    segments: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    y: tl.tensor,
    gates: tl.tensor,
    outputs: tl.tensor,
    out_pixels: tl.tensor,
    out_width: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    pad_top: tl.tensor,
    pad_left: tl.tensor,
    dilation_y: tl.tensor,
    dilation_x: tl.tensor,
    weight_depth_stride: tl.tensor,
    weight_column_stride: tl.tensor,
    slope: tl.tensor,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    CHANNELS_IN: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    REFLECT: tl.constexpr,
    MASK_CHANNELS: tl.constexpr,
    ONE_MASK: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """See the module. ``mask`` [B|1, H, W, MASK_CHANNELS] multiplies x, ``segments`` is each channel's mask channel."""
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    DEPTH: tl.constexpr = TAPS * CHANNELS_IN
    STEPS: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    # A step lies within one tap, or runs over (tap, channel) as if they were one index.
    WITHIN_TAP: tl.constexpr = CHANNELS_IN % BLOCK_K == 0
    WIDTH: tl.constexpr = BLOCK_N * TILES
    PROGRAMS_N: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH

    program = tl.program_id(0)
    column = program % PROGRAMS_N * WIDTH
    first_row = program // PROGRAMS_N
    if WIDE:
        first_row = first_row.to(tl.int64)
    row = first_row * BLOCK_M + tl.arange(0, BLOCK_M)
    is_output = row < outputs
    image = row // out_pixels
    pixel = row % out_pixels
    # Where the first tap reads in the enlarged input; far above it for rows beyond the last output.
    top = tl.where(is_output, pixel // out_width * stride_y - pad_top, -(2**30))[:, None]
    left = (pixel % out_width * stride_x - pad_left)[:, None]
    first_of_image = (image * height)[:, None]
    first_read = (first_of_image + top) * width + left
    first_of_mask = (image * 0 if ONE_MASK else image * height)[:, None]

    lanes = tl.arange(0, BLOCK_K)
    weights = weight + lanes[:, None] * weight_depth_stride
    weights += (column + tl.arange(0, BLOCK_N))[None, :] * weight_column_stride

    sums_0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TILES > 1:
        sums_1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TILES > 2:
        sums_2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        if WITHIN_TAP:
            tap = step // (CHANNELS_IN // BLOCK_K)
            channel = (step % (CHANNELS_IN // BLOCK_K) * BLOCK_K + lanes)[None, :]
        else:
            tap = (step * BLOCK_K + lanes)[None, :] // CHANNELS_IN
            channel = (step * BLOCK_K + lanes)[None, :] % CHANNELS_IN
        input_y, is_row = _source(top + tap // KERNEL_WIDTH * dilation_y, height, UPSAMPLE, REFLECT)
        input_x, is_column = _source(left + tap % KERNEL_WIDTH * dilation_x, width, UPSAMPLE, REFLECT)
        inside = is_row & is_column
        if DEPTH % BLOCK_K != 0:
            inside = inside & (tap < TAPS)
        if UPSAMPLE == 1 and not REFLECT:
            # Only an addition depends on both the pixel and the tap.
            tap_at = tap // KERNEL_WIDTH * dilation_y * width + tap % KERNEL_WIDTH * dilation_x
            at = first_read * CHANNELS_IN + (tap_at * CHANNELS_IN + channel)
        else:
            at = ((first_of_image + input_y) * width + input_x) * CHANNELS_IN + channel
        values = tl.load(x + at, mask=inside, other=0.0)
        if mask is not None:
            mask_at = (first_of_mask + input_y) * width + input_x
            if MASK_CHANNELS > 1:
                segment = tl.load(segments + channel)
                known = tl.load(mask + mask_at * MASK_CHANNELS + segment, mask=inside, other=0.0)
            else:
                known = tl.load(mask + mask_at, mask=inside, other=0.0)
            values = (values.to(tl.float32) * known.to(tl.float32)).to(x.dtype.element_ty)
        step_weights = weights + step * BLOCK_K * weight_depth_stride
        sums_0 = tl.dot(values, tl.load(step_weights), sums_0, input_precision=INPUT_PRECISION)
        if TILES > 1:
            weights_1 = tl.load(step_weights + BLOCK_N * weight_column_stride)
            sums_1 = tl.dot(values, weights_1, sums_1, input_precision=INPUT_PRECISION)
        if TILES > 2:
            weights_2 = tl.load(step_weights + 2 * BLOCK_N * weight_column_stride)
            sums_2 = tl.dot(values, weights_2, sums_2, input_precision=INPUT_PRECISION)

    for tile in tl.static_range(TILES):
        sums = sums_0
        if tile == 1:
            sums = sums_1
        if tile == 2:
            sums = sums_2
        if EPILOGUE == "gated":
            _store_gated(
                sums,
                bias,
                y,
                gates,
                column + tile * BLOCK_N,
                row,
                image,
                pixel,
                out_pixels,
                is_output,
                slope,
                COLUMNS,
                Y_CHANNELS_LAST,
                ACTIVATION,
                GATE_FIRST,
                BLOCK_M,
                BLOCK_N,
            )
        else:
            _store(
                sums,
                bias,
                residual,
                scale,
                shift,
                y,
                column + tile * BLOCK_N,
                row,
                image,
                pixel,
                out_pixels,
                is_output,
                slope,
                COLUMNS,
                Y_CHANNELS_LAST,
                ACTIVATION,
                ONE_MASK,
                BLOCK_N,
            )


# Launcher -------------------------------------------------------------------------------------------------------------


class Epilogue(NamedTuple):
    """What follows the sums, which of it is there: see the fields that each kind reads.

    Attributes:
        kind: "plain" (y = act(sums + bias) + residual), "gated" (y = act(features) * sigmoid(gates), and the
            gates before the sigmoid into ``gates``) or "partial" (y = sums * scale + bias * shift).
        bias: one number for each column.
        activation: of plain and gated.
        gate_first: the gates are the first half of the columns.
        gates: of y's shape and layout, or None.
        residual: of y's shape and layout, or None.
        scale, shift: contiguous float32 maps [B|1, 1, Ho, Wo].
    """

    kind: Literal["plain", "gated", "partial"]
    bias: Tensor | None = None
    activation: Activation = Activation("none")
    gate_first: bool = False
    gates: Tensor | None = None
    residual: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class InputMask(NamedTuple):
    """What multiplies the input as it is read.

    Attributes:
        mask: [B|1, M, H, W] in channels_last, in the input's dtype.
        segments: int32 [C], the mask channel of each input channel of the padded layer; None for one mask channel.
    """

    mask: Tensor
    segments: Tensor | None


def as_read(x: Tensor, channels: int) -> Tensor:
    """The input in channels_last and with as many channels, the last ones zeros; a copy unless it is so already."""
    if x.shape[1] == channels:
        return Layout.CHANNELS_LAST.of(x)
    padded = Layout.CHANNELS_LAST.empty(x, channels, (x.shape[2], x.shape[3]))
    padded[:, : x.shape[1]] = x
    padded[:, x.shape[1] :] = 0
    return padded


def packing_for(layer: Layer, config: LaunchConfig, epilogue: Epilogue) -> Packing:
    """How the kernel wants the weights."""
    return Packing(
        channels=layer.channels_in,
        depth=triton.cdiv(layer.depth, config.block_k) * config.block_k,
        columns=triton.cdiv(layer.columns, config.width) * config.width,
        interleaved=epilogue.kind == "gated",
        gate_first=epilogue.gate_first,
        depth_contiguous=layer.precision != "float32",
    )


def run_convolution(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    epilogue: Epilogue,
    y: Tensor,
    layout: Layout,
    input_mask: InputMask | None = None,
) -> None:
    """Fill ``y`` [B, Cout, Ho, Wo] of ``layout``; see :func:`as_read` for what is copied."""
    layer = layer_of(x, weight, geometry, masked=input_mask is not None).padded
    config = launch_config(layer, capability_of(x))
    packed = PACKED_WEIGHTS.get(weight, packing_for(layer, config, epilogue), pack)
    kernel = (weight.shape[2], weight.shape[3])
    convolution(
        as_read(x, layer.channels_in), kernel, packed, geometry, layer, config, epilogue, y, layout, input_mask
    ).run()


def convolution(
    x: Tensor,
    kernel: tuple[int, int],
    packed: Tensor,
    geometry: Geometry,
    layer: Layer,
    config: LaunchConfig,
    epilogue: Epilogue,
    y: Tensor,
    layout: Layout,
    input_mask: InputMask | None = None,
) -> Launch:
    """The launch that fills ``y`` from ``x`` as it is read and packed weights, of a padded layer."""
    mask, segments = input_mask if input_mask is not None else (None, None)
    maps = epilogue.scale
    arguments = {
        "x": x,
        "mask": mask,
        "segments": segments,
        "weight": packed,
        "bias": epilogue.bias,
        "residual": epilogue.residual,
        "scale": epilogue.scale,
        "shift": epilogue.shift,
        "y": y,
        "gates": epilogue.gates,
        "outputs": layer.outputs,
        "out_pixels": y.shape[2] * y.shape[3],
        "out_width": y.shape[3],
        "height": x.shape[2],
        "width": x.shape[3],
        "stride_y": geometry.stride[0],
        "stride_x": geometry.stride[1],
        "pad_top": geometry.pad[0],
        "pad_left": geometry.pad[2],
        "dilation_y": geometry.dilation[0],
        "dilation_x": geometry.dilation[1],
        "weight_depth_stride": packed.stride(0),
        "weight_column_stride": packed.stride(1),
        "slope": float(epilogue.activation.slope),
    }
    constants = {
        "EPILOGUE": epilogue.kind,
        "ACTIVATION": epilogue.activation.name,
        "GATE_FIRST": epilogue.gate_first,
        "CHANNELS_IN": layer.channels_in,
        "KERNEL_HEIGHT": kernel[0],
        "KERNEL_WIDTH": kernel[1],
        "COLUMNS": layer.columns,
        "UPSAMPLE": geometry.upsample,
        "REFLECT": geometry.reflect,
        "MASK_CHANNELS": 0 if mask is None else mask.shape[1],
        "ONE_MASK": maps is not None and maps.shape[0] == 1,
        "Y_CHANNELS_LAST": layout is Layout.CHANNELS_LAST,
        "INPUT_PRECISION": "tf32" if layer.precision == "tf32" else "ieee",
        "WIDE": needs_int64(x, y, mask),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TILES": config.tiles,
        "BLOCK_K": config.block_k,
    }
    programs = triton.cdiv(layer.outputs, config.block_m) * triton.cdiv(layer.columns, config.width)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Launch(convolution_kernel, (programs,), arguments, constants, options)
