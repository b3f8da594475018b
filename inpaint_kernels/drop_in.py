"""Functions with the signature, the arrays and the dtypes of the ones that they replace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels._checks import check_choice, check_range
from inpaint_kernels.flow_color import flow_to_color
from inpaint_kernels.ops.contextual_attention import ContextualAttentionResult
from inpaint_kernels.ops.contextual_attention import contextual_attention as _contextual_attention
from inpaint_kernels.ops.hog import HogResult
from inpaint_kernels.ops.hog import hog as _hog


def contextual_attention(
    f: Tensor,
    b: Tensor,
    mask: Tensor | None = None,
    ksize: int = 3,
    stride: int = 1,
    rate: int = 1,
    fuse_k: int = 3,
    softmax_scale: float = 10.0,
    training: bool = True,
    fuse: bool = True,
    *,
    preset: str = "official",
) -> tuple[Tensor, Tensor]:
    """The function of DeepFill's published code, on tensors [B, C, H, W].

    For ``from inpaint_kernels.drop_in import contextual_attention``; :func:`inpaint_kernels.contextual_attention` tells
    more, returns what is needed only, and takes more.

    Args:
        f: [B, C, H, W] floating, where patches are looked for, its sides multiples of ``rate``.
        b: [B, C, H', W'], what they are pasted from.
        mask: [B or 1, 1, H', W'] or a whole multiple of that size, non-zero = hole; None: no hole.
        ksize: side of the patches that are compared.
        stride: of the patches; only 1 is published.
        rate: f and b are reduced so many times before they are compared.
        fuse_k: side of the fuse, odd.
        softmax_scale: inverse temperature.
        training: ignored, as there.
        fuse: whether neighbours vote together.
        preset: which published implementation decides the rest, see :data:`inpaint_kernels.PRESETS`.

    Returns:
        The output [B, C, H, W], and the offsets of the best keys as colours in -1..1, [B, 3, H, W].

    Raises:
        ValueError, TypeError: as :func:`inpaint_kernels.contextual_attention`; ``stride`` is not 1, or ``fuse_k`` even.

    References:
        Yu et al., Generative Image Inpainting with Contextual Attention, CVPR 2018, section 4.1.
    """
    check_choice("stride", stride, (1,))
    check_range("rate", rate, minimum=1, integer=True)
    check_range("fuse_k", fuse_k, minimum=1, integer=True)
    result = _contextual_attention(
        f,
        b,
        mask,
        preset=preset,
        return_offsets=True,
        patch=ksize,
        rate=rate,
        paste_size=2 * rate,
        pad_cut=rate // 2,
        pad_put=rate // 2,
        fuse=fuse_k if fuse else 0,
        scale=float(softmax_scale),
    )
    assert isinstance(result, ContextualAttentionResult)
    colours = flow_to_color(result.offsets).to(f.dtype) / 127.5 - 1
    if rate > 1:
        colours = F.interpolate(colours, scale_factor=rate, mode="bilinear", align_corners=True)
    return result.output, colours


def hog(
    image: Any,
    orientations: int = 9,
    pixels_per_cell: tuple[int, int] = (8, 8),
    cells_per_block: tuple[int, int] = (3, 3),
    block_norm: str = "L2-Hys",
    visualize: bool = False,
    transform_sqrt: bool = False,
    feature_vector: bool = True,
    *,
    channel_axis: int | None = None,
) -> Any:
    """``skimage.feature.hog``, for ``from inpaint_kernels.drop_in import hog``; :func:`inpaint_kernels.hog` tells more.

    Args:
        image: [M, N] array, or with ``channel_axis`` of three dimensions; any real dtype.
        orientations: number of bins.
        pixels_per_cell: rows and columns of a cell.
        cells_per_block: rows and columns of a block, in cells.
        block_norm: "L1", "L1-sqrt", "L2" or "L2-Hys".
        visualize: also return the picture of the histograms.
        transform_sqrt: take the square root of the image first.
        feature_vector: flatten the features.
        channel_axis: the axis of the channels; None: the image is gray.

    Returns:
        The features: float32 for float16 and float32 images, else float64, with the precision of float32 where the
        image is not float64. With ``visualize`` (features, picture [M, N]).

    Raises:
        ValueError, TypeError: as :func:`inpaint_kernels.hog`, about ``images`` in the order [channels, rows, columns].
    """
    array = np.atleast_2d(image)
    if array.ndim != (2 if channel_axis is None else 3):
        raise ValueError(
            f"image: expected two spatial dimensions, and the channels where channel_axis says, got shape "
            f"{list(array.shape)} with channel_axis={channel_axis}"
        )
    if channel_axis is not None:
        array = np.moveaxis(array, channel_axis, 0)
    result = _hog(
        torch.from_numpy(_readable(array)),
        orientations,
        pixels_per_cell,
        cells_per_block,
        block_norm,
        visualize,
        transform_sqrt,
        feature_vector,
    )
    dtype = np.float32 if array.dtype.type in (np.float16, np.float32) else np.float64
    if isinstance(result, HogResult):
        return tuple(x.numpy().astype(dtype, copy=False) for x in result)
    return result.numpy().astype(dtype, copy=False)


def _readable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array that torch can share: of native byte order, writable, with strides of whole elements, none negative."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    strides_fit = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return array if array.flags.writeable and strides_fit else array.copy()
