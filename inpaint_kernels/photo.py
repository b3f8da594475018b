"""A photo and a mask in, the filled photo out: gray, RGB or RGBA, its known pixels untouched to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inpaint_kernels.models import InpaintingModel, exemplar
from inpaint_kernels.photo_tensors import luma
from inpaint_kernels.pipeline import inpaint

METHODS = ("auto", "exemplar", "diffusion")
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class FilledPhoto:
    """What :func:`fill_photo` returns.

    Attributes:
        pixels: the photo with its hole filled; shape and dtype of the input.
        method: the method that filled it, or the model's class; ``"none"`` when there was no hole.
        offsets: int64 ``[2, H, W]``, rows and columns from each hole pixel to where its colour came from, or None for
            a method that copies nothing; of a model's attention from each of its positions, if it was asked for.
        advice: a sentence for the user when a method for this kind of hole would do better, or None.
        edges: float32 ``[H, W]`` in [0, 1], the edges that guided a model, or None.
        hog: the same of drawn gradient histograms.
    """

    pixels: NDArray[Any]
    method: str
    offsets: torch.Tensor | None = None
    advice: str | None = None
    edges: NDArray[np.float32] | None = None
    hog: NDArray[np.float32] | None = None


def fill_photo(
    pixels: NDArray[Any],
    mask: NDArray[np.bool_],
    *,
    method: str = "auto",
    seed: int = 0,
    opaque_hole: bool = False,
    progress: Progress | None = None,
) -> FilledPhoto:
    """Fill the hole of a photo from the photo itself.

    Args:
        pixels: ``[H, W]`` gray, ``[H, W, 2]`` gray and alpha, ``[H, W, 3]`` RGB or ``[H, W, 4]`` RGBA; uint8, uint16 or
            floating. Known pixels that are fully transparent have no colour to give: nothing is copied from them.
        mask: bool ``[H, W]``, True in the hole. What ``pixels`` holds there is not looked at.
        method: one of :data:`METHODS`.
        seed: of everything random in the method; the same seed gives the same bits.
        opaque_hole: make the hole opaque (the hole was erased from the alpha channel) instead of keeping its alpha.
        progress: called with the share of the work that is done (0 to 1) and the name of the stage.

    Returns:
        A :class:`FilledPhoto`; known pixels are equal to those of ``pixels``, bit for bit.

    Raises:
        TypeError: ``pixels`` or ``mask`` of another dtype.
        ValueError: shapes that do not fit, an unknown method, nothing known to fill from, NaN or Inf in a known pixel.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    _check(pixels, mask)
    if not mask.any():
        return FilledPhoto(pixels.copy(), "none")
    photo = _Photo(pixels, mask, opaque_hole)
    result = exemplar.fill(photo.image, photo.unknown, method=method, seed=seed, progress=progress)
    return FilledPhoto(photo.filled(result.output), result.method, result.offsets, result.advice)


def paint_photos(
    model: InpaintingModel,
    photos: Sequence[tuple[NDArray[Any], NDArray[np.bool_]]],
    *,
    opaque_hole: bool = False,
    **options: Any,
) -> list[FilledPhoto]:
    """Fill the holes of photos of one size with a model, all in one run.

    Args:
        model: one of :mod:`inpaint_kernels.models`.
        photos: (pixels, mask) as of :func:`fill_photo`. Known pixels that are fully transparent are hole to the model.
        opaque_hole: the same.
        **options: of :func:`inpaint_kernels.pipeline.inpaint`: progress, how the photo is fitted and blended, and what
            guides the model.

    Returns:
        A :class:`FilledPhoto` for each.

    Raises:
        TypeError, ValueError: as :func:`fill_photo` and :func:`inpaint_kernels.pipeline.inpaint`.
    """
    for pixels, mask in photos:
        _check(pixels, mask)
    prepared = [_Photo(pixels, mask, opaque_hole) for pixels, mask in photos]
    images = torch.stack([photo.image.expand(3, -1, -1) for photo in prepared])
    unknown = torch.stack([photo.unknown for photo in prepared])[:, None]
    result = inpaint(model, images, unknown, **options)
    return [
        FilledPhoto(
            photo.filled(result.completed[i]),
            type(model).__name__,
            _offsets_of_pixels(result.attention, i, photo.unknown.shape),
            edges=None if result.edges is None else result.edges[i, 0].float().numpy(),
            hog=None if result.hog is None else result.hog[i, 0].float().numpy(),
        )
        for i, photo in enumerate(prepared)
    ]


def _offsets_of_pixels(attention: torch.Tensor | None, i: int, size: Sequence[int]) -> torch.Tensor | None:
    """Offsets of the attention's positions as those of the photo's pixels."""
    if attention is None:
        return None
    cells = [side / positions for side, positions in zip(size, attention.shape[2:], strict=True)]
    rows, columns = (
        (torch.arange(side) / cell).long().clamp_max(positions - 1)
        for side, cell, positions in zip(size, cells, attention.shape[2:], strict=True)
    )
    offsets = attention[i].cpu()[:, rows][:, :, columns]
    return (offsets * torch.tensor(cells).view(2, 1, 1)).round().long()


class _Photo:
    """A photo's colours as an image in [0, 1], and the photo again with what was painted.

    Attributes:
        image: float32 ``[1 or 3, H, W]``, 0 in the hole.
        unknown: bool ``[H, W]``: the hole, and where the photo is fully transparent.
    """

    def __init__(self, pixels: NDArray[Any], mask: NDArray[np.bool_], opaque_hole: bool) -> None:
        self._pixels, self._mask, self._opaque_hole = pixels, mask, opaque_hole
        colour, self._alpha = _split_channels(pixels)
        unknown = mask if self._alpha is None else mask | (self._alpha[:, :, 0] == 0)
        if unknown.all():
            raise ValueError("mask: every pixel that is not transparent is hole; nothing is known to fill from")
        _check_finite(colour, unknown)
        self._low, self._high = _value_range(colour, unknown)
        planes = colour.astype(np.float32)
        planes[unknown] = self._low
        self.image = torch.from_numpy((planes - self._low) / (self._high - self._low)).permute(2, 0, 1).contiguous()
        self.unknown = torch.from_numpy(unknown.copy())

    def filled(self, painted: torch.Tensor) -> NDArray[Any]:
        """A copy of the photo with a painted image ``[1 or 3, H, W]`` in its hole."""
        pixels, mask, channels = self._pixels, self._mask, self.image.shape[0]
        values = painted.float().cpu()
        if channels == 1 and len(values) == 3:
            values = luma(values)
        filled = pixels.copy()
        inside = values.permute(1, 2, 0).numpy()[mask].clip(0, 1) * (self._high - self._low) + self._low
        filled.reshape(*mask.shape, -1)[mask, :channels] = inside if _is_float(pixels) else np.rint(inside)
        if self._alpha is not None and self._opaque_hole:
            filled[mask, -1] = 1 if _is_float(pixels) else np.iinfo(pixels.dtype).max
        return filled


def _check(pixels: NDArray[Any], mask: NDArray[np.bool_]) -> None:
    if pixels.dtype not in (np.uint8, np.uint16) and not _is_float(pixels):
        raise TypeError(f"pixels: expected uint8, uint16 or floating values, got {pixels.dtype}")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (2, 3, 4))) or pixels.size == 0:
        raise ValueError(f"pixels: expected shape [H, W] or [H, W, 2..4], got {list(pixels.shape)}")
    if mask.shape != pixels.shape[:2]:
        height, width = pixels.shape[:2]
        raise ValueError(f"mask: expected shape [H, W] with H={height}, W={width}, got {list(mask.shape)}")
    if mask.all():
        raise ValueError("mask: every pixel is hole; nothing is known to fill from")


def _check_finite(colour: NDArray[Any], unknown: NDArray[np.bool_]) -> None:
    bad = ~np.isfinite(colour).all(axis=2) & ~unknown
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        value = colour[row, column][~np.isfinite(colour[row, column])][0]
        raise ValueError(
            f"pixels: {int(bad.sum())} known pixels are NaN or Inf, the first is {value} in row {row}, "
            f"column {column}; mask them (they are then filled) or repair them"
        )


def _split_channels(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Colour ``[H, W, 1 or 3]`` and alpha ``[H, W, 1]`` or None."""
    planes = pixels.reshape(*pixels.shape[:2], -1)
    if planes.shape[2] in (2, 4):
        return planes[:, :, :-1], planes[:, :, -1:]
    return planes, None


def _value_range(colour: NDArray[Any], unknown: NDArray[np.bool_]) -> tuple[float, float]:
    """The values that become 0 and 1: the full scale of integers, the known range of floating values."""
    if not _is_float(colour):
        return 0.0, float(np.iinfo(colour.dtype).max)
    known = colour[~unknown]
    low, high = float(known.min()), float(known.max())
    return (low, high) if high > low else (low, low + 1.0)


def _is_float(pixels: NDArray[Any]) -> bool:
    return bool(pixels.dtype.kind == "f")
