"""Histograms of oriented gradients in plain torch operations: bands of cell rows, on any device."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

BAND_BYTES = 64 << 20
"""Upper bound, roughly, of what is computed together beyond the features and the picture."""

EPS = 1e-5
"""What keeps the norm of an empty block from being 0, as published."""


class Settings(NamedTuple):
    """The arguments of :func:`inpaint_kernels.hog` beside the images, checked."""

    orientations: int
    cell: tuple[int, int]
    block: tuple[int, int]
    block_norm: str
    transform_sqrt: bool
    cells: bool

    def cells_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of cells in images [B, C, H, W]."""
        return images.shape[2] // self.cell[0], images.shape[3] // self.cell[1]

    def features_of(self, images: Tensor) -> tuple[int, ...]:
        """Shape of the features of images [B, C, H, W]."""
        rows, columns = self.cells_of(images)
        if self.cells:
            return (images.shape[0], rows, columns, self.orientations)
        down, right = self.block
        return (images.shape[0], rows - down + 1, columns - right + 1, down, right, self.orientations)


def feature_dtype(images: Tensor) -> torch.dtype:
    """Data type of the features and the picture."""
    return torch.float64 if images.dtype == torch.float64 else torch.float32


@functools.cache
def borders(orientations: int) -> tuple[tuple[float, float], ...]:
    """(cosine, sine) of the angles between the bins, 180 k / n degrees for k = 1 ... n - 1.

    Those at 45, 90 and 135 degrees are exact up to a common factor: only there does an image of integers have gradients
    that lie on a border.
    """
    table = []
    for k in range(1, orientations):
        quarter, rest = divmod(4 * k, orientations)
        if rest == 0:
            table.append([(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0)][quarter])
        else:
            table.append((math.cos(math.pi * k / orientations), math.sin(math.pi * k / orientations)))
    return tuple(table)


def hog(images: Tensor, lines: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """Features and, if lines are given, the picture: see :func:`inpaint_kernels.reference.hog.hog`.

    Args:
        images: [B, C, H, W], any real dtype and strides.
        lines: [n, cell rows, cell columns] bool, the pixels of each bin's line; None: no picture.
        settings: all else.
    """
    rows, columns = settings.cells_of(images)
    dtype = feature_dtype(images)
    histograms = images.new_empty((images.shape[0], rows, columns, settings.orientations), dtype=dtype)
    for sample in range(images.shape[0]):
        for first, last in _bands(rows, _bytes_of_cell_row(images, settings)):
            down, right, _ = gradient(images[sample], first * settings.cell[0], last * settings.cell[0], settings)
            _fill_histograms(histograms[sample, first:last], down, right, settings)
    picture = None
    if lines is not None:
        picture = images.new_zeros((images.shape[0], *images.shape[2:]), dtype=dtype)
        _draw(picture, histograms, lines, settings)
    return (histograms if settings.cells else _blocks_of(histograms, images, settings)), picture


def gradient(image: Tensor, top: int, bottom: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """(down, right) [rows, columns] of the channel where the gradient is largest, and that channel; None: there is one.

    Args:
        image: [C, H, W].
        top: first row that is wanted.
        bottom: end of these rows.
        settings: of the call; only the columns inside cells are computed.
    """
    height, width = image.shape[1:]
    columns = width // settings.cell[1] * settings.cell[1]
    above, below = max(top - 1, 0), min(bottom + 1, height)
    strip = image[:, above:below, : columns + 1].to(_image_dtype(image, settings))
    if settings.transform_sqrt:
        strip = rounded_sqrt(strip)
    down, right = torch.zeros_like(strip), torch.zeros_like(strip)  # 0 where a neighbour is missing
    torch.sub(strip[:, 2:], strip[:, :-2], out=down[:, 1:-1])
    torch.sub(strip[:, :, 2:], strip[:, :, :-2], out=right[:, :, 1:-1])
    down, right = (x[:, top - above : bottom - above, :columns].to(_wide_dtype(image, settings)) for x in (down, right))
    if image.shape[0] == 1:
        return down[0], right[0], None
    # In the images' own precision, as published: it decides which of two almost equal channels counts.
    squares = down.square() + right.square()
    magnitude = squares if squares.dtype == torch.float32 else torch.hypot(down, right).to(strip.dtype)
    channel = magnitude.argmax(0, keepdim=True)  # the first of equal ones
    return down.gather(0, channel)[0], right.gather(0, channel)[0], channel


def rounded_sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded.

    torch's own may be off by one unit in the last place, and for one number here but not there: neighbours that are
    equal would have a gradient.
    """
    if x.device.type == "mps":
        return x.sqrt()
    wide = x.double()
    root = wide.sqrt()
    high = root * (2.0**27 + 1) - (root * (2.0**27 + 1) - root)  # its first 26 bits, so that these products are exact
    low = root - high
    rest = ((wide - high * high) - 2 * high * low) - low * low
    return torch.where((root > 0) & (root < math.inf), root + rest / (2 * root), root).to(x.dtype)


def bins_of(down: Tensor, right: Tensor, orientations: int) -> Tensor:
    """Number of the bin of each gradient: how many borders its angle, folded into [0, 180), has passed. int16."""
    bins = torch.zeros_like(down, dtype=torch.int16)
    if down.dtype == torch.float64:
        # The published formula, whose rounding decides near-ties: square roots of integers have gradients at exactly
        # 30 and 60 degrees.
        angle = torch.rad2deg(torch.atan2(down, right)) % 180
        for k in range(1, orientations):
            bins += angle >= 180.0 / orientations * k
        return bins
    # Two rounded products are compared: a fused multiply-add would break the ties at 45 degrees.
    right = torch.where(down < 0, -right, torch.where(down == 0, right.abs(), right))
    down = down.abs()
    for cosine, sine in borders(orientations):
        bins += down * cosine >= right * sine
    return bins


def _image_dtype(image: Tensor, settings: Settings) -> torch.dtype:
    """What the image is before its differences are taken: float64 for integers, float32 for short floats."""
    if image.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return torch.float32
    return _wide_dtype(image, settings)


def _wide_dtype(image: Tensor, settings: Settings) -> torch.dtype:
    """What gradients are compared and measured in.

    float32 decides the bins of 8-bit integers exactly (all pairs of differences, up to 32 bins). Apple's GPUs have no
    float64: there a gradient within 1e-7 of a border may fall into the neighbouring bin.
    """
    exact = image.dtype in (torch.uint8, torch.int8, torch.bool) and not settings.transform_sqrt
    return torch.float32 if exact or image.device.type == "mps" else torch.float64


def _fill_histograms(histograms: Tensor, down: Tensor, right: Tensor, settings: Settings) -> None:
    """Histograms [cell rows, cell columns, n] of gradients [rows, columns], in place."""
    magnitude, bins = torch.hypot(down, right), bins_of(down, right, settings.orientations)
    for i in range(settings.orientations):
        votes = magnitude.where(bins == i, 0)
        histograms[:, :, i] = (
            votes.unflatten(0, (-1, settings.cell[0])).unflatten(2, (-1, settings.cell[1])).mean((1, 3))
        )


def _blocks_of(histograms: Tensor, images: Tensor, settings: Settings) -> Tensor:
    """The normalised blocks of all cells."""
    blocks = histograms.new_empty(settings.features_of(images))
    row = blocks[:, :1].numel() * blocks.element_size() * 3
    for first, last in _bands(blocks.shape[1], row):
        blocks[:, first:last] = normalised(histograms[:, first : last + settings.block[0] - 1], settings)
    return blocks


def normalised(histograms: Tensor, settings: Settings) -> Tensor:
    """[B, cells y, cells x, n] -> [B, blocks y, blocks x, block rows, block columns, n]."""
    down, right = settings.block
    blocks = histograms.unfold(1, down, 1).unfold(2, right, 1).permute(0, 1, 2, 4, 5, 3)
    if settings.block_norm.startswith("L1"):
        blocks = blocks / (blocks.sum((3, 4, 5), keepdim=True) + EPS)
        return blocks.where(blocks > 0, 1).sqrt().where(blocks > 0, 0) if settings.block_norm == "L1-sqrt" else blocks
    blocks = blocks / (blocks.square().sum((3, 4, 5), keepdim=True) + EPS**2).sqrt()
    if settings.block_norm == "L2-Hys":
        blocks = blocks.clamp_max(0.2)
        blocks = blocks / (blocks.square().sum((3, 4, 5), keepdim=True) + EPS**2).sqrt()
    return blocks


def _draw(picture: Tensor, histograms: Tensor, lines: Tensor, settings: Settings) -> None:
    """Add every bin's line to the picture [B, H, W], one bin after the other."""
    rows, columns = histograms.shape[1:3]
    for sample in range(picture.shape[0]):
        inside = picture[sample, : rows * settings.cell[0], : columns * settings.cell[1]]
        cells = inside.unflatten(0, (rows, settings.cell[0])).unflatten(2, (columns, settings.cell[1]))
        for i in range(settings.orientations):
            cells += histograms[sample, :, None, :, None, i] * lines[i, :, None, :]


def _bytes_of_cell_row(images: Tensor, settings: Settings) -> int:
    """What one row of cells takes while its histograms are computed, roughly."""
    return images.shape[1] * settings.cell[0] * images.shape[3] * 8 * 8


def _bands(rows: int, bytes_of_row: int) -> list[tuple[int, int]]:
    """[first, last) rows that are computed together."""
    together = max(1, BAND_BYTES // max(bytes_of_row, 1))
    return [(first, min(first + together, rows)) for first in range(0, rows, together)]
