"""Partial convolution by Triton: mask and renormalisation inside an implicit GEMM, or around cuDNN's convolution.

Triton itself is imported by the first call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from inpaint_kernels.portable._convolution import Geometry
from inpaint_kernels.triton_kernels._availability import reasons
from inpaint_kernels.triton_kernels._cudnn import bare_convolution
from inpaint_kernels.triton_kernels._launch import Layout
from inpaint_kernels.triton_kernels._launch_config import capability_of, in_gemm, layer_of

__all__ = ["in_gemm", "partial_conv2d", "reasons"]


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
    """conv(x * mask) * scale + bias * shift, [B, C, Ho, Wo], in channels_last if x is, else in NCHW.

    ``mask`` [B|1, M, H, W] covers ``mask_channels`` input channels with each of its own; ``scale`` and ``shift`` are
    float32 [B|1, 1, Ho, Wo]. The implicit GEMM reads channels_last: it copies what is in NCHW, and an x whose pixels
    are not whole 8 bytes. Sums are float32. Behind cuDNN the sums of a half dtype are rounded to it before they are
    scaled, inside the GEMM only the results are.
    """
    inside, _ = in_gemm(layer_of(x, weight, geometry), capability_of(x))
    convolution = renormalised_in_gemm if inside else renormalised_behind_cudnn
    return convolution(x, mask, mask_channels, weight, bias, geometry, scale, shift)


def renormalised_in_gemm(
    x: Tensor,
    mask: Tensor,
    mask_channels: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """One kernel, beside what copies tensors in NCHW and packs weights that have changed."""
    from inpaint_kernels.triton_kernels import _implicit_gemm as gemm

    layout = Layout.like(x)
    size = geometry.output_of(x, weight)
    y = layout.empty(x, weight.shape[0], size)
    if y.numel() > 0:
        epilogue = gemm.Epilogue("partial", bias, scale=scale.float().contiguous(), shift=shift.float().contiguous())
        channels = layer_of(x, weight, geometry).padded.channels_in
        segments = _segments(mask_channels, channels, x.device) if mask.shape[1] > 1 else None
        input_mask = gemm.InputMask(Layout.CHANNELS_LAST.of(mask.to(x.dtype)), segments)
        gemm.run_convolution(x, weight, geometry, epilogue, y, layout, input_mask)
    return y


def renormalised_behind_cudnn(
    x: Tensor,
    mask: Tensor,
    mask_channels: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """The product with the mask, cuDNN's convolution, then one kernel in place."""
    from inpaint_kernels.triton_kernels import _epilogues as epilogues

    layout, mask = Layout.like(x), mask.to(x.dtype)
    if mask.shape[1] > 1:
        parts = zip(mask.split(1, dim=1), mask_channels, strict=True)
        mask = torch.cat([part.expand(-1, channels, -1, -1) for part, channels in parts], dim=1)
    y = bare_convolution(x * mask, weight, geometry, layout)
    if y.numel() > 0:
        scale, shift = scale.float().contiguous(), shift.float().contiguous()
        epilogues.renormalise_in_place(y, bias, scale, shift, layout).run()
    return y


@functools.lru_cache(maxsize=1024)
def _segments(mask_channels: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """The mask channel of every input channel; those beyond the mask's are zeros and have the first."""
    numbers = [number for number, covered in enumerate(mask_channels) for _ in range(covered)]
    numbers += [0] * (channels - len(numbers))
    return torch.tensor(numbers, dtype=torch.int32, device=device)
