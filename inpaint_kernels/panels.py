"""Rows of labelled panels that show what a fill did: input, mask, output and what lies behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from inpaint_kernels import flow_to_color
from inpaint_kernels.images import has_alpha

PANELS = ("truth", "input", "mask", "output", "attention", "edges", "hog")
DEFAULT_PANELS = ("input", "mask", "output")

HOLE_COLOUR = (255, 0, 170)
LARGEST_HEIGHT = 1024
_GAP = 8
_SMALLEST_CAPTION = 24

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class PanelSources:
    """Everything a panel can be drawn from.

    Attributes:
        pixels: the photo before, as :func:`inpaint_kernels.images.read_photo` gives it.
        mask: bool ``[H, W]``, True in the hole.
        filled: the photo after; shape and dtype of ``pixels``.
        method: name of the method that filled it.
        offsets: ``[2, H, W]``, rows and columns from each hole pixel to its source, or None.
        truth: the undamaged photo (same height and width), or None.
    """

    pixels: NDArray[Any]
    mask: NDArray[np.bool_]
    filled: NDArray[Any]
    method: str
    offsets: torch.Tensor | None = None
    truth: NDArray[Any] | None = None


def parse_panels(text: str) -> tuple[str, ...]:
    """``"input,mask,output"`` as names; ValueError if one of them is not a panel."""
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in PANELS]
    if unknown:
        raise ValueError(f"panels: expected names out of {', '.join(PANELS)}, got {unknown[0]!r}")
    return names


def check_panels(
    names: Sequence[str], *, method: str, size: tuple[int, int], truth: NDArray[Any] | None = None
) -> None:
    """Raise ValueError if one of the panels cannot be drawn; asked before a fill, it saves the work.

    Args:
        names: the panels.
        method: the method that fills; ``"auto"`` if that is not known yet.
        size: height and width of the photo.
        truth: the undamaged photo, or None.
    """
    for name in names:
        if name not in _DRAWERS:
            raise ValueError(f"panel {name!r}: the method {method!r} does not provide it")
        if name == "attention" and method == "diffusion":
            raise ValueError(f"panel 'attention': the method {method!r} copies no pixels, so it has no offsets")
        if name == "truth" and truth is None:
            raise ValueError("panel 'truth': it needs the undamaged photo (--truth)")
        if name == "truth" and truth is not None and truth.shape[:2] != size:
            expected, got = (f"{width} x {height}" for height, width in (size, truth.shape[:2]))
            raise ValueError(f"panel 'truth': expected {expected} pixels, got {got}")


def draw_row(sources: PanelSources, names: Sequence[str] = DEFAULT_PANELS) -> Picture:
    """Draw panels side by side, each with its name above it; photos taller than 1024 pixels are reduced.

    Returns:
        uint8 ``[H', W', 3]``.

    Raises:
        ValueError: a panel that this method, or the given sources, cannot provide.
    """
    height, width = sources.mask.shape
    check_panels(names, method=sources.method, size=(height, width), truth=sources.truth)
    return _side_by_side([(name, _DRAWERS[name](sources)) for name in names])


def _draw_truth(sources: PanelSources) -> Picture:
    assert sources.truth is not None  # check_panels has seen to it
    return _to_rgb(sources.truth)


def _draw_input(sources: PanelSources) -> Picture:
    picture = _to_rgb(sources.pixels, known=~sources.mask)
    picture[sources.mask] = HOLE_COLOUR
    return picture


def _draw_mask(sources: PanelSources) -> Picture:
    return _gray_to_rgb(np.where(sources.mask, 255, 0).astype(np.uint8))


def _draw_output(sources: PanelSources) -> Picture:
    return _to_rgb(sources.filled)


def _draw_attention(sources: PanelSources) -> Picture:
    """Where each hole pixel came from: hue is the direction, saturation the distance; known pixels stay, dimmed."""
    assert sources.offsets is not None  # check_panels has seen to it
    flow = np.asarray(flow_to_color(sources.offsets[None])[0].permute(1, 2, 0).numpy())
    picture = _to_rgb(sources.pixels, known=~sources.mask) // 3
    picture[sources.mask] = flow[sources.mask]
    return picture


def _draw_edges(sources: PanelSources) -> Picture:
    """Gradient magnitude of the output; the strongest percentile is white."""
    luminance = _to_rgb(sources.filled).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    rows, columns = np.gradient(luminance)
    magnitude = np.hypot(rows, columns)
    white = max(float(np.percentile(magnitude, 99)), 1.0)
    return _gray_to_rgb((magnitude * (255 / white)).clip(0, 255).astype(np.uint8))


_DRAWERS: dict[str, Callable[[PanelSources], Picture]] = {
    "truth": _draw_truth,
    "input": _draw_input,
    "mask": _draw_mask,
    "output": _draw_output,
    "attention": _draw_attention,
    "edges": _draw_edges,
}


def _to_rgb(pixels: NDArray[Any], known: NDArray[np.bool_] | None = None) -> Picture:
    """Any photo as 8-bit RGB: 16 bits cut to 8, the known range of floats stretched, alpha laid over white."""
    if pixels.dtype.kind == "f":
        shown = pixels[known] if known is not None else pixels
        low, high = float(shown.min()), float(shown.max())
        pixels = np.nan_to_num((pixels - low) * (255 / max(high - low, 1e-12))).clip(0, 255).astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if has_alpha(pixels):
        opacity = pixels[:, :, -1:].astype(np.uint16)
        blended = pixels[:, :, :-1] * opacity + 255 * (255 - opacity)
        pixels = ((blended + 127) // 255).astype(np.uint8)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return _gray_to_rgb(pixels.reshape(pixels.shape[:2]))
    return pixels.copy()


def _gray_to_rgb(gray: Picture) -> Picture:
    return np.repeat(gray[:, :, None], 3, axis=2)


def _side_by_side(panels: Sequence[tuple[str, Picture]]) -> Picture:
    pictures = [(name, _reduced(picture)) for name, picture in panels]
    height = max(picture.height for _, picture in pictures)
    width = sum(picture.width for _, picture in pictures) + _GAP * (len(pictures) - 1)
    caption = max(_SMALLEST_CAPTION, height // 16)
    row = Image.new("RGB", (width, caption + height), "white")
    draw = ImageDraw.Draw(row)
    font = ImageFont.load_default(caption * 0.6)
    left = 0
    for name, picture in pictures:
        draw.text((left + 4, caption // 2), name, fill="black", font=font, anchor="lm")
        row.paste(picture, (left, caption))
        left += picture.width + _GAP
    return np.asarray(row)


def _reduced(picture: Picture) -> Image.Image:
    image = Image.fromarray(picture)
    if image.height <= LARGEST_HEIGHT:
        return image
    return image.resize(
        (max(1, image.width * LARGEST_HEIGHT // image.height), LARGEST_HEIGHT), Image.Resampling.LANCZOS
    )
