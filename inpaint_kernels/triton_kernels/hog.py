"""Histograms of oriented gradients by Triton: one kernel from pixels to cells, one to blocks, one draws the picture.

Triton itself is imported by the first call.
"""

from __future__ import annotations

from torch import Tensor

from inpaint_kernels.portable.hog import Settings, feature_dtype
from inpaint_kernels.triton_kernels._hog_launch import MOST_VALUES, arithmetic_of

__all__ = ["hog", "reasons"]


def reasons(settings: Settings) -> list[str]:
    """Why the kernels cannot compute these features, wherever they run; empty if they can."""
    values = settings.block[0] * settings.block[1] * settings.orientations
    if settings.cells or values <= MOST_VALUES:
        return []
    return [f"a block has {values} values, the kernels take {MOST_VALUES} at most"]


def hog(images: Tensor, lines: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """Features and, if lines are given, the picture: see :func:`inpaint_kernels.portable.hog.hog`.

    Images are read as they lie in memory, in their own dtype. Magnitudes of float32 images are accurate between 1e-18
    and 1e18; outside, a gradient counts as 0 or as infinite.
    """
    from inpaint_kernels.triton_kernels import _hog_kernels as kernels

    batch, rows, columns = images.shape[0], *settings.cells_of(images)
    dtype = feature_dtype(images)
    cells = images.new_empty((batch, rows, columns, settings.orientations), dtype=dtype)
    features = cells if settings.cells else images.new_empty(settings.features_of(images), dtype=dtype)
    picture = None
    if lines is not None:
        picture = images.new_empty((batch, *images.shape[2:]), dtype=dtype)
    if batch > 0:
        kernels.fill_cells(images, cells, settings, arithmetic_of(images, settings.transform_sqrt)).run()
        if not settings.cells:
            kernels.fill_blocks(cells, features, settings).run()
        if picture is not None and lines is not None:
            kernels.draw(cells, lines, picture, settings).run()
    return features, picture
