"""Masks from what people have: a mask file, boxes, a colour painted over a copy of the photo, an erased alpha channel.

A mask is a bool array ``[H, W]``, True where the hole is. Pixels are arrays as :mod:`inpaint_kernels.images` reads
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

MOST_HOLE = 0.9
LEAST_HOLE = 0.0001


class Box(NamedTuple):
    """A rectangle of pixels: its left and top edge, its width and height."""

    x: int
    y: int
    width: int
    height: int


# --- words to values -----------------------------------------------------------------------------------------------


def parse_box(text: str) -> Box:
    """``"X,Y,W,H"`` as a :class:`Box`; ValueError if it is anything else."""
    try:
        box = Box(*(int(part) for part in text.split(",")))
    except (ValueError, TypeError):
        raise ValueError(f"box: expected four whole numbers X,Y,W,H, got {text!r}") from None
    if box.width < 1 or box.height < 1:
        raise ValueError(f"box: expected a width and a height of at least 1, got {text!r}")
    return box


def parse_colour(text: str) -> tuple[int, int, int]:
    """``"#ff00ff"``, ``"#f0f"`` or either without the ``#`` as red, green and blue (0 to 255)."""
    digits = text.strip().removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    if len(digits) != 6 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
        raise ValueError(f"colour: expected #rrggbb or #rgb, got {text!r}")
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


# --- masks from sources --------------------------------------------------------------------------------------------


def mask_from_brightness(pixels: NDArray[Any], threshold: float = 0.5) -> Mask:
    """Hole where a mask picture is bright.

    The brightest of its colour channels counts (a mask painted in pure red works), transparent pixels count as black.

    Args:
        pixels: the mask picture.
        threshold: share of full brightness (0 to 1) from which a pixel is hole; float pixels are shares already.
    """
    _check_threshold(threshold)
    colour, alpha = _split_alpha(pixels)
    brightness = colour.max(axis=2) if colour.ndim == 3 else colour
    value = brightness.astype(np.float32) / _full_scale(pixels)
    if alpha is not None:
        value *= alpha.astype(np.float32) / _full_scale(pixels)
    # Black is never hole, not even at threshold 0.
    return np.asarray((value >= threshold) & (value > 0))


def mask_from_boxes(height: int, width: int, boxes: Sequence[Box]) -> Mask:
    """Hole inside any of ``boxes``; what lies outside the photo is cut off, a box that lies there whole is an error."""
    mask = np.zeros((height, width), np.bool_)
    for box in boxes:
        rows = slice(max(box.y, 0), max(box.y + box.height, 0))
        columns = slice(max(box.x, 0), max(box.x + box.width, 0))
        inside = mask[rows, columns]
        if inside.size == 0:
            raise ValueError(f"box: {tuple(box)} lies outside the photo of {width} x {height} pixels")
        inside[...] = True
    return mask


def mask_from_colour(pixels: NDArray[Any], colour: tuple[int, int, int], tolerance: int = 32) -> Mask:
    """Hole where a picture has a colour, as when it was painted over in an editor.

    Args:
        pixels: uint8 or uint16 picture; its alpha is not looked at.
        colour: red, green and blue, 0 to 255.
        tolerance: largest difference in any channel, on the scale of 0 to 255. JPEG needs some: it smears colours.
    """
    if not 0 <= tolerance <= 255:
        raise ValueError(f"tolerance: expected 0 to 255, got {tolerance}")
    if pixels.dtype.kind == "f":
        raise ValueError("pixels: a colour can be looked up in 8-bit and 16-bit pictures only, got float pixels")
    scale = _full_scale(pixels) // 255
    shown, _ = _split_alpha(pixels)
    channels = shown if shown.ndim == 3 else shown[:, :, None]
    mask = np.ones(pixels.shape[:2], np.bool_)
    for index, value in enumerate(colour):
        channel = channels[:, :, min(index, channels.shape[2] - 1)].astype(np.int32)
        mask &= np.abs(channel - value * scale) <= tolerance * scale
    return mask


def mask_from_alpha(pixels: NDArray[Any], threshold: float = 0.5) -> Mask:
    """Hole where a picture is transparent: where its opacity is below ``threshold`` (0 to 1)."""
    _check_threshold(threshold)
    _, alpha = _split_alpha(pixels)
    if alpha is None:
        raise ValueError("pixels: the picture has no alpha channel to take the mask from")
    return np.asarray(alpha.astype(np.float32) / _full_scale(pixels) < threshold)


# --- changing masks ------------------------------------------------------------------------------------------------


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """Nearest enlargement; in a reduction a pixel is hole if any that it covers is, so that no scratch is lost."""
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return np.asarray(np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1))


def grow_mask(mask: Mask, radius: int) -> Mask:
    """Every pixel within ``radius`` pixels (Euclidean) of the hole becomes hole."""
    if radius < 0:
        raise ValueError(f"radius: expected 0 or more, got {radius}")
    if radius == 0 or not mask.any():
        return mask
    # Only the surroundings of the hole can change.
    reach = tuple(
        slice(max(int(hole[0]) - radius, 0), int(hole[-1]) + radius + 1)
        for hole in (np.flatnonzero(mask.any(axis=other)) for other in (1, 0))
    )
    near = mask[reach]
    grown = np.zeros_like(mask)
    target = grown[reach]
    height = near.shape[0]
    for shift in range(min(radius, height - 1) + 1):
        widened = _widen_rows(near, math.isqrt(radius * radius - shift * shift))
        target[shift:] |= widened[: height - shift]
        target[: height - shift] |= widened[shift:]
    return grown


def _widen_rows(mask: Mask, reach: int) -> Mask:
    """Hole where a row has hole within ``reach`` columns: a running count of hole pixels answers it for any reach."""
    width = mask.shape[1]
    count = np.zeros((mask.shape[0], width + 1), np.int32)
    np.cumsum(mask, axis=1, out=count[:, 1:])
    columns = np.arange(width)
    after = np.minimum(columns + reach + 1, width)
    before = np.maximum(columns - reach, 0)
    return count[:, after] > count[:, before]


# --- what to say about a mask --------------------------------------------------------------------------------------


def describe_hole(mask: Mask) -> str:
    """For example ``"12,345 of 262,144 pixels (4.71 %)"``."""
    hole = int(mask.sum())
    return f"{hole:,} of {mask.size:,} pixels ({100 * hole / mask.size:.3g} %)"


def hole_warning(mask: Mask) -> str | None:
    """A sentence if the hole is suspiciously large or small (but not empty)."""
    share = float(mask.mean())
    if share > MOST_HOLE:
        return f"the hole is {describe_hole(mask)}, more than {MOST_HOLE:.0%}: is the mask inverted (--invert-mask)?"
    if 0 < share < LEAST_HOLE:
        return f"the hole is {describe_hole(mask)}, less than {LEAST_HOLE:.2%}: is this the right mask?"
    return None


def _split_alpha(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Colour ``[H, W]`` or ``[H, W, 3]``, and alpha ``[H, W]`` or None."""
    if pixels.ndim == 2:
        return pixels, None
    if pixels.shape[2] == 2:
        return pixels[:, :, 0], pixels[:, :, 1]
    return pixels[:, :, :3], pixels[:, :, 3] if pixels.shape[2] == 4 else None


def _full_scale(pixels: NDArray[Any]) -> int:
    return 1 if pixels.dtype.kind == "f" else int(np.iinfo(pixels.dtype).max)


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a share of full scale from 0 to 1, got {threshold}")
