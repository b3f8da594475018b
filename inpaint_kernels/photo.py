"""A photo and a mask in, the filled photo out: gray, RGB or RGBA, its known pixels untouched to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inpaint_kernels.models import exemplar

METHODS = ("auto", "exemplar", "diffusion")
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class FilledPhoto:
    """What :func:`fill_photo` returns.

    Attributes:
        pixels: the photo with its hole filled; shape and dtype of the input.
        method: the method that filled it; ``"none"`` when there was no hole.
        offsets: int64 ``[2, H, W]``, rows and columns from each hole pixel to where its colour came from, or None for
            a method that copies nothing.
        advice: a sentence for the user when a method for this kind of hole would do better, or None.
    """

    pixels: NDArray[Any]
    method: str
    offsets: torch.Tensor | None = None
    advice: str | None = None


def fill_photo(
    pixels: NDArray[Any],
    mask: NDArray[np.bool_],
    *,
    method: str = "auto",
    seed: int = 0,
    opaque_hole: bool = False,
    progress: Progress | None = None,
) -> FilledPhoto:
    """Fill the hole of a photo.

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
    _check(pixels, mask, method)
    if not mask.any():
        return FilledPhoto(pixels.copy(), "none")
    colour, alpha = _split_channels(pixels)
    unknown = mask if alpha is None else mask | (alpha[:, :, 0] == 0)
    if unknown.all():
        raise ValueError("mask: every pixel that is not transparent is hole; nothing is known to fill from")
    _check_finite(colour, unknown)

    low, high = _value_range(colour, unknown)
    planes = colour.astype(np.float32)
    planes[unknown] = low
    image = torch.from_numpy((planes - low) / (high - low)).permute(2, 0, 1).contiguous()
    result = exemplar.fill(image, torch.from_numpy(unknown.copy()), method=method, seed=seed, progress=progress)

    filled = pixels.copy()
    values = result.output.permute(1, 2, 0).numpy()[mask].clip(0, 1) * (high - low) + low
    filled.reshape(*mask.shape, -1)[mask, : colour.shape[2]] = values if _is_float(pixels) else np.rint(values)
    if alpha is not None and opaque_hole:
        filled[mask, -1] = 1 if _is_float(pixels) else np.iinfo(pixels.dtype).max
    return FilledPhoto(filled, result.method, result.offsets, result.advice)


def _check(pixels: NDArray[Any], mask: NDArray[np.bool_], method: str) -> None:
    if pixels.dtype not in (np.uint8, np.uint16) and not _is_float(pixels):
        raise TypeError(f"pixels: expected uint8, uint16 or floating values, got {pixels.dtype}")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (2, 3, 4))) or pixels.size == 0:
        raise ValueError(f"pixels: expected shape [H, W] or [H, W, 2..4], got {list(pixels.shape)}")
    if mask.shape != pixels.shape[:2]:
        height, width = pixels.shape[:2]
        raise ValueError(f"mask: expected shape [H, W] with H={height}, W={width}, got {list(mask.shape)}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
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
