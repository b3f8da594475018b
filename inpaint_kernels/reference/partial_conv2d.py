"""Partial convolution written to be read beside the paper (Liu et al., ECCV 2018, section 3.1) and its two ports."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.reference._convolution import convolution, gradients


def window_sums(
    mask: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The mask summed over all its channels and over each output pixel's window: [B, M, H, W] -> [B, 1, Ho, Wo]."""
    top, bottom, left, right = pad
    ones = torch.ones(1, mask.shape[1], *kernel, dtype=mask.dtype, device=mask.device)
    return F.conv2d(F.pad(mask, (left, right, top, bottom)), ones, None, stride, 0, dilation)


def partial_conv2d(
    x: Tensor,
    mask: Tensor,
    mask_channels: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    pad: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    rule: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A convolution of the known pixels, scaled up by how many of its window are known.

    Args:
        x: [B, Cin, H, W], any floating dtype.
        mask: [B or 1, M, H, W] bool or floating, 1 = known.
        mask_channels: how many channels of x each of the M covers.
        weight: [C, Cin / groups, kh, kw].
        bias: [C]; None: 0.
        stride: of the convolution.
        pad: (top, bottom, left, right), zeros.
        dilation: of the convolution.
        groups: of the convolution.
        rule: "nvidia" (NVIDIA/partialconv), "naoto" (naoto0804/pytorch-inpainting-with-partial-conv) or "paper".
        eps: of the rule "nvidia".

    Returns:
        The output [B, C, Ho, Wo] and the new mask [B or 1, 1, Ho, Wo] in the dtype of ``mask``.
    """
    kernel = (weight.shape[2], weight.shape[3])
    full = torch.cat([mask[:, i : i + 1].expand(-1, n, -1, -1) for i, n in enumerate(mask_channels)], 1)
    raw = convolution(x * full.to(x.dtype), weight, bias, stride, pad, dilation, groups)
    b = 0 if bias is None else bias.view(1, -1, 1, 1)

    # Sums in float32 at least: float16 has no 1e-8.
    counted = mask if rule == "nvidia" and mask.shape[1] == 1 else full
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    known = window_sums(counted.to(dtype), kernel, stride, pad, dilation)
    window = kernel[0] * kernel[1] * counted.shape[1]

    if rule == "nvidia":
        update = known.clamp(0, 1)
        ratio = torch.where(known > 0, window / (known + eps), 0) * update
        y = raw * ratio if bias is None else ((raw - b) * ratio + b) * update
    else:
        update = known > 0
        factor = window if rule == "paper" else 1
        y = torch.where(update, (raw - b) * factor / known.where(update, 1) + b, 0)
    return y.to(x.dtype), update.to(mask.dtype) if mask.is_floating_point() else update > 0


def partial_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    mask_channels: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, the mask being a constant; settings as in :func:`partial_conv2d`."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return partial_conv2d(x, mask, mask_channels, weight, bias, *settings)[0]

    return gradients(forward, grad, x, weight, bias)
