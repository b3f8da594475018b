"""Where the hole is, as the command line says it: the options that its commands share."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer

from inpaint_kernels import images, masks
from inpaint_kernels.models import random_masks

_MASKS = "The hole"
MaskArgument = Annotated[
    Path | None,
    typer.Argument(metavar="MASK", help="Picture of the same size, bright where the hole is.", show_default=False),
]
BoxOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mask-box", metavar="X,Y,W,H", help="A rectangle of hole, in pixels; repeatable.", rich_help_panel=_MASKS
    ),
]
ColourOption = Annotated[
    str | None,
    typer.Option(
        "--mask-color",
        metavar="#RRGGBB",
        help="Hole where MASK (a copy of the photo painted over in any editor), or without MASK the photo itself, "
        "has this colour.",
        rich_help_panel=_MASKS,
    ),
]
ToleranceOption = Annotated[
    int,
    typer.Option(
        "--mask-tolerance",
        min=0,
        max=255,
        help="Largest difference to --mask-color in any channel.",
        rich_help_panel=_MASKS,
    ),
]
AlphaOption = Annotated[
    bool,
    typer.Option(
        "--mask-alpha",
        help="Hole where MASK, or without MASK the photo itself, is transparent. A photo's erased hole becomes opaque.",
        rich_help_panel=_MASKS,
    ),
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        "--mask-threshold",
        min=0.0,
        max=1.0,
        help="Share of full brightness (of full opacity with --mask-alpha) that divides hole from known.",
        rich_help_panel=_MASKS,
    ),
]
InvertOption = Annotated[
    bool, typer.Option("--invert-mask", help="Swap hole and known, before growing.", rich_help_panel=_MASKS)
]
GrowOption = Annotated[
    int, typer.Option("--mask-grow", metavar="N", min=0, help="Grow the hole by N pixels.", rich_help_panel=_MASKS)
]
ResizeOption = Annotated[
    bool,
    typer.Option("--resize-mask", help="Bring a MASK of another size to the photo's.", rich_help_panel=_MASKS),
]


RandomOption = Annotated[
    Literal["bbox", "strokes", "irregular"] | None,
    typer.Option(
        "--mask-random",
        help="A hole drawn at random, another one for each photo, the same for a --seed: a box of half the sides, "
        "DeepFill v2's strokes, or the blots of a random walk.",
        show_default=False,
        rich_help_panel=_MASKS,
    ),
]


@dataclass(frozen=True)
class MaskOptions:
    """Where the hole is, as the command line says it; ``seed`` is that of random holes."""

    file: Path | None
    boxes: Sequence[masks.Box]
    colour: tuple[int, int, int] | None
    tolerance: int
    alpha: bool
    threshold: float
    invert: bool
    grow: int
    resize: bool
    random: str | None = None
    seed: int = 0

    @property
    def erased_from_photo(self) -> bool:
        """Whether the hole is the photo's own transparency."""
        return self.alpha and self.file is None


def mask_options(
    file: Path | None,
    boxes: Sequence[str],
    colour: str | None,
    tolerance: int,
    alpha: bool,
    threshold: float,
    invert: bool,
    grow: int,
    resize: bool,
    random: str | None,
    seed: int,
) -> MaskOptions:
    """The options in their own types; a wrong word is a wrong command line."""
    try:
        parsed_boxes = [masks.parse_box(box) for box in boxes]
        parsed_colour = None if colour is None else masks.parse_colour(colour)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if file is None and not parsed_boxes and parsed_colour is None and not alpha and random is None:
        raise typer.BadParameter(
            "where is the hole? Give a MASK file, --mask-box, --mask-color, --mask-alpha or --mask-random"
        )
    return MaskOptions(
        file, parsed_boxes, parsed_colour, tolerance, alpha, threshold, invert, grow, resize, random, seed
    )


def build_mask(photo: images.Photo, options: MaskOptions, name: str, max_pixels: int | None) -> masks.Mask:
    """Union of everything that the options call hole, then inverted and grown as they say.

    Args:
        photo: whose holes they are.
        options: see :class:`MaskOptions`.
        name: of the photo's file, of which random holes depend.
        max_pixels: of the mask's file, see :func:`inpaint_kernels.images.read_photo`.
    """
    source = photo
    if options.file is not None:
        source = images.read_photo(options.file, max_pixels=max_pixels)
    parts: list[masks.Mask] = []
    if options.colour is not None:
        parts.append(masks.mask_from_colour(source.pixels, options.colour, options.tolerance))
    if options.alpha:
        parts.append(masks.mask_from_alpha(source.pixels, options.threshold))
    if options.file is not None and not parts:
        parts.append(masks.mask_from_brightness(source.pixels, options.threshold))
    size = (photo.height, photo.width)
    if options.file is not None and source.pixels.shape[:2] != size:
        if not options.resize:
            raise ValueError(
                f"{options.file}: the mask is {source.width} x {source.height} pixels, the photo {photo.width} x "
                f"{photo.height}; --resize-mask brings it to size"
            )
        parts = [masks.resize_mask(part, *size) for part in parts]
    if options.boxes:
        parts.append(masks.mask_from_boxes(*size, options.boxes))
    if options.random is not None:
        parts.append(_random_mask(options.random, size, options.seed, name))
    mask = np.logical_or.reduce(parts)
    return masks.grow_mask(~mask if options.invert else mask, options.grow)


def _random_mask(kind: str, size: tuple[int, int], seed: int, name: str) -> masks.Mask:
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    if kind == "bbox":
        half = (-(-size[0] // 2), -(-size[1] // 2))
        mask = random_masks.box_masks(random_masks.random_boxes(1, size, half, generator=generator), size)
    elif kind == "strokes":
        mask = random_masks.free_form_masks(1, size, generator=generator)
    else:
        mask = random_masks.random_walk_masks(1, size, generator=generator)
    return np.asarray(mask[0, 0].numpy())
