"""Functions with the signature, the arrays and the dtypes of the ones that they replace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inpaint_kernels.ops.hog import HogResult
from inpaint_kernels.ops.hog import hog as _hog


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
