"""Rows of labelled panels that show what a fill did: input, mask, output and what lies behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
        edges: ``[H, W]`` in [0, 1], those that guided the fill, or None: the output's own are drawn.
        hog: ``[H, W]`` in [0, 1], the drawn histograms of gradients that guided it, or None.
        truth: the undamaged photo (same height and width), or None.
    """

    pixels: NDArray[Any]
    mask: NDArray[np.bool_]
    filled: NDArray[Any]
    method: str
    offsets: torch.Tensor | None = None
    truth: NDArray[Any] | None = None
    edges: NDArray[np.float32] | None = None
    hog: NDArray[np.float32] | None = None


def parse_panels(text: str) -> tuple[str, ...]:
    """``"input,mask,output"`` as names; ValueError if one of them is not a panel."""
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in PANELS]
    if unknown:
        raise ValueError(f"panels: expected names out of {', '.join(PANELS)}, got {unknown[0]!r}")
    return names


def check_panels(
    names: Sequence[str],
    *,
    method: str,
    provided: Collection[str],
    size: tuple[int, int],
    truth: NDArray[Any] | None = None,
) -> None:
    """Raise ValueError if one of the panels cannot be drawn; asked before a fill, it saves the work.

    Args:
        names: the panels.
        method: the method or model that fills; ``"auto"`` if that is not known yet.
        provided: panels out of "attention" and "hog" that it provides.
        size: height and width of the photo.
        truth: the undamaged photo, or None.
    """
    for name in names:
        if name in ("attention", "hog") and name not in provided:
            raise ValueError(f"panel {name!r}: the method {method!r} does not provide it")
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
    provided = {name for name, source in (("attention", sources.offsets), ("hog", sources.hog)) if source is not None}
    check_panels(names, method=sources.method, provided=provided, size=(height, width), truth=sources.truth)
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
    """The edges that guided the fill; else the output's gradient magnitude, the strongest percentile white."""
    if sources.edges is not None:
        return _gray_to_rgb(_to_bytes(sources.edges))
    luminance = _to_rgb(sources.filled).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    rows, columns = np.gradient(luminance)
    magnitude = np.hypot(rows, columns)
    white = max(float(np.percentile(magnitude, 99)), 1.0)
    return _gray_to_rgb((magnitude * (255 / white)).clip(0, 255).astype(np.uint8))


def _draw_hog(sources: PanelSources) -> Picture:
    assert sources.hog is not None  # check_panels has seen to it
    return _gray_to_rgb(_to_bytes(sources.hog))


_DRAWERS: dict[str, Callable[[PanelSources], Picture]] = {
    "truth": _draw_truth,
    "input": _draw_input,
    "mask": _draw_mask,
    "output": _draw_output,
    "attention": _draw_attention,
    "edges": _draw_edges,
    "hog": _draw_hog,
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


def _to_bytes(shares: NDArray[np.float32]) -> Picture:
    return (shares * 255).round().clip(0, 255).astype(np.uint8)


def _gray_to_rgb(gray: Picture) -> Picture:
    return np.repeat(gray[:, :, None], 3, axis=2)


def draw_sheet(entries: Sequence[tuple[str, NDArray[Any]]]) -> Picture:
    """Draw photos side by side, each with its caption of one or several lines above it.

    Args:
        entries: (caption, pixels as of :func:`inpaint_kernels.images.read_photo`).

    Returns:
        uint8 ``[H', W', 3]``; photos taller than 1024 pixels are reduced.
    """
    return _side_by_side([(caption, _to_rgb(pixels)) for caption, pixels in entries])


def _side_by_side(panels: Sequence[tuple[str, Picture]]) -> Picture:
    pictures = [(caption, _reduced(picture)) for caption, picture in panels]
    height = max(picture.height for _, picture in pictures)
    line = max(_SMALLEST_CAPTION, height // 16)
    font = ImageFont.load_default(line * 0.6)
    widths = [max(picture.width, _width_of(caption, font)) for caption, picture in pictures]
    above = line * max(len(caption.splitlines()) for caption, _ in pictures)
    row = Image.new("RGB", (sum(widths) + _GAP * (len(pictures) - 1), above + height), "white")
    draw = ImageDraw.Draw(row)
    left = 0
    for (caption, picture), width in zip(pictures, widths, strict=True):
        for number, text in enumerate(caption.splitlines()):
            draw.text((left + 4, number * line + line // 2), text, fill="black", font=font, anchor="lm")
        row.paste(picture, (left, above))
        left += width + _GAP
    return np.asarray(row)


def _width_of(caption: str, font: Any) -> int:
    """Pixels of a caption of several lines; names of panels, of one, may be cut."""
    lines = caption.splitlines()
    return 8 + max(round(font.getlength(line)) for line in lines) if len(lines) > 1 else 0


def _reduced(picture: Picture) -> Image.Image:
    image = Image.fromarray(picture)
    if image.height <= LARGEST_HEIGHT:
        return image
    return image.resize(
        (max(1, image.width * LARGEST_HEIGHT // image.height), LARGEST_HEIGHT), Image.Resampling.LANCZOS
    )
