"""Partial convolution in plain torch operations: box sums of one channel, and the convolution by bands of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.portable._convolution import (
    Geometry,
    bands,
    convolution_dtype,
    convolve,
    empty_maps,
    input_of,
    sum_dtype,
)


def mask_scales(
    mask: Tensor,
    mask_channels: tuple[int, ...],
    geometry: Geometry,
    kernel: tuple[int, int],
    rule: str,
    eps: float,
    has_bias: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a rule makes of the mask: output = convolution(x * mask) * scale + bias * shift.

    Args:
        mask: [B or 1, M, H, W], bool or floating, 1 = known.
        mask_channels: how many channels of x each of the M covers.
        geometry: which pixels each tap reads; no upsampling, no mirrored border.
        kernel: its rows and columns.
        rule: "nvidia", "naoto" or "paper".
        eps: of the rule "nvidia".
        has_bias: whether the convolution has one, which the rule "nvidia" asks.
        dtype: of the sums.

    Returns:
        scale and shift in ``dtype``, and the new mask in the dtype of ``mask``, all [B or 1, 1, Ho, Wo].
    """
    counts = mask_channels
    if rule == "nvidia" and len(counts) == 1:
        counts = (1,)  # a mask of one channel is counted once, as published
    window = kernel[0] * kernel[1] * sum(counts)
    known = box_sums(channel_sums(mask, counts, dtype), geometry, kernel)
    if rule == "nvidia":
        update = known.clamp(0, 1)
        scale = torch.where(known > 0, window / (known + eps), 0).mul_(update)
        if has_bias:
            scale.mul_(update)
        return scale, update, update.to(mask.dtype) if mask.is_floating_point() else update > 0
    update = known > 0
    scale = torch.where(update, (window if rule == "paper" else 1) / known, 0)
    return scale, update.to(dtype), update.to(mask.dtype)


def channel_sums(mask: Tensor, counts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[B, M, H, W] -> [B, 1, H, W]: the mask's channels, each as often as it counts, added up."""
    if all(count == 1 for count in counts):
        return mask.sum(1, keepdim=True, dtype=dtype)
    total = mask[:, :1].to(dtype) * counts[0]
    for channel, count in enumerate(counts[1:], 1):
        total.add_(mask[:, channel : channel + 1], alpha=count)
    return total


def box_sums(x: Tensor, geometry: Geometry, kernel: tuple[int, int]) -> Tensor:
    """The sum over each output pixel's window of taps, zeros outside: along columns, then along rows."""
    height, width = geometry.output_size((x.shape[2], x.shape[3]), kernel)
    top, bottom, left, right = geometry.pad
    x = F.pad(x, (left, right, top, bottom))
    return _tap_sums(_tap_sums(x, 2, height, kernel[0], geometry), 3, width, kernel[1], geometry)


def _tap_sums(x: Tensor, dim: int, outputs: int, taps: int, geometry: Geometry) -> Tensor:
    step, dilation = geometry.stride[dim - 2], geometry.dilation[dim - 2]
    reach = (outputs - 1) * step + 1

    def tap(number: int) -> Tensor:
        return x.narrow(dim, number * dilation, reach)[(slice(None),) * dim + (slice(None, None, step),)]

    total = tap(0).clone(memory_format=torch.contiguous_format)
    for number in range(1, taps):
        total.add_(tap(number))
    return total


def masked(x: Tensor, mask: Tensor, mask_channels: tuple[int, ...]) -> Tensor:
    """X * mask, the mask's channels spread over those of x."""
    mask = mask.to(x.dtype)
    if len(mask_channels) not in (1, x.shape[1]):
        mask = mask.repeat_interleave(torch.tensor(mask_channels, device=mask.device), 1, output_size=x.shape[1])
    return x * mask


def partial_conv2d(
    x: Tensor,
    mask: Tensor,
    mask_channels: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """convolution(x * mask) * scale + bias * shift.

    Args:
        x: [B, Cin, H, W], any floating dtype, NCHW or channels_last.
        mask: [B or 1, M, H, W], bool or floating.
        mask_channels: how many channels of x each of the M covers.
        weight: [C, Cin / groups, kh, kw].
        bias: [C]; None: 0.
        geometry: which pixels each tap reads; no upsampling, no mirrored border.
        scale: [B or 1, 1, Ho, Wo], see :func:`mask_scales`.
        shift: the same.

    Returns:
        [B, C, Ho, Wo] in the dtype and the layout of ``x``.
    """
    kernel = (weight.shape[2], weight.shape[3])
    size = geometry.output_of(x, weight)
    y = empty_maps(x, weight.shape[0], size)
    dtype = convolution_dtype(x)
    weight = weight.to(dtype)
    offset = None if bias is None else bias.to(sum_dtype(x)).view(-1, 1, 1)
    for band in bands(x.shape[0], weight.shape[0], size):
        part, part_geometry = input_of(x, band, geometry, kernel)
        part_mask, _ = input_of(mask, band, geometry, kernel)
        part = masked(part.to(dtype), part_mask, mask_channels)
        sums = convolve(part, weight, None, part_geometry).to(sum_dtype(x)).mul_(band.of(scale))
        if offset is not None:
            sums.addcmul_(offset, band.of(shift))
        band.of(y).copy_(sums)
    return y
