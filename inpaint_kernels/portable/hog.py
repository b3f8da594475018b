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
        lines: [ky, kx, n, cell rows, cell columns] bool, the pixels of each bin's line in the first cells of an image:
            cell (r, c) has the lines [min(r, ky - 1), min(c, kx - 1)]. None: no picture.
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
    """Number of the bin of each gradient: how many borders its angle, folded into [0, 180), has passed. int16.

    n, no bin, where the angle is rounded up to 180 degrees, as published.
    """
    bins = torch.zeros_like(down, dtype=torch.int16)
    if down.dtype == torch.float64:
        # The published formula, whose rounding decides near-ties: square roots of integers have gradients at exactly
        # 30 and 60 degrees.
        angle = torch.rad2deg(torch.atan2(down, right)) % 180
        for k in range(1, orientations + 1):
            bins += angle >= 180.0 / orientations * k
        return bins
    # Two rounded products are compared: a fused multiply-add would break the ties at 45 degrees.
    right = torch.where(down < 0, -right, torch.where(down == 0, right.abs(), right))
    down = down.abs()
    for cosine, sine in borders(orientations):
        bins += down * cosine >= right * sine
    return bins


def hog_backward(
    grad_features: Tensor | None,
    grad_picture: Tensor | None,
    images: Tensor,
    lines: Tensor | None,
    histograms: Tensor,
    settings: Settings,
) -> Tensor:
    """Gradient of the images: through the magnitudes, with the bins and the choice of the channel as they are.

    Args:
        grad_features: of the features; None: 0.
        grad_picture: of the picture; None: 0.
        images: [B, C, H, W] floating.
        lines: as in :func:`hog`; needed with ``grad_picture``.
        histograms: [B, cells y, cells x, n], the cells' features.
        settings: as in :func:`hog`.

    Returns:
        [B, C, H, W], contiguous, dtype of the images; 0 where a gradient, or with ``transform_sqrt`` a pixel, is 0.
    """
    grad_cells = torch.zeros_like(histograms)
    if grad_features is not None:
        if settings.cells:
            grad_cells += grad_features
        else:
            _add_block_gradients(grad_cells, grad_features, histograms, settings)
    if grad_picture is not None:
        assert lines is not None
        _add_picture_gradients(grad_cells, grad_picture, lines, settings)
    grad = torch.zeros(images.shape, dtype=feature_dtype(images), device=images.device)
    for sample in range(images.shape[0]):
        for first, last in _bands(histograms.shape[1], 2 * _bytes_of_cell_row(images, settings)):
            _add_pixel_gradients(grad[sample], images[sample], grad_cells[sample], first, last, settings)
    if settings.transform_sqrt:
        root = images.to(grad.dtype).sqrt()
        grad = torch.where(root > 0, grad / (2 * root), 0)
    return grad.to(images.dtype)


def _add_block_gradients(grad_cells: Tensor, grad: Tensor, histograms: Tensor, settings: Settings) -> None:
    """Gradients of the cells from those of the blocks, in place, by bands of block rows."""
    down, right = settings.block
    row = grad[:, :1].numel() * grad.element_size() * 6
    for first, last in _bands(grad.shape[1], row):
        band = histograms[:, first : last + down - 1]
        of_blocks = _normalised_backward(grad[:, first:last], band, settings)
        for y in range(down):
            for x in range(right):
                cells = grad_cells[:, first + y : last + y, x : x + grad.shape[2]]
                cells += of_blocks[:, :, :, y, x]


def _normalised_backward(grad: Tensor, histograms: Tensor, settings: Settings) -> Tensor:
    """Gradient of the cells of each block, before overlapping blocks are added up."""
    of_block = (3, 4, 5)

    def through_l2(grad: Tensor, out: Tensor, norm: Tensor) -> Tensor:
        return (grad - out * (grad * out).sum(of_block, keepdim=True)) / norm

    blocks = histograms.unfold(1, settings.block[0], 1).unfold(2, settings.block[1], 1).permute(0, 1, 2, 4, 5, 3)
    if settings.block_norm.startswith("L1"):
        norm = blocks.sum(of_block, keepdim=True) + EPS
        out = blocks / norm
        if settings.block_norm == "L1-sqrt":
            grad = torch.where(out > 0, grad / (2 * out.sqrt()), 0)
        return (grad - (grad * out).sum(of_block, keepdim=True)) / norm
    norm = (blocks.square().sum(of_block, keepdim=True) + EPS**2).sqrt()
    out = blocks / norm
    if settings.block_norm == "L2-Hys":
        cut = out.clamp_max(0.2)
        again = (cut.square().sum(of_block, keepdim=True) + EPS**2).sqrt()
        grad = through_l2(grad, cut / again, again).where(out <= 0.2, 0)
    return through_l2(grad, out, norm)


def _add_picture_gradients(grad_cells: Tensor, grad: Tensor, lines: Tensor, settings: Settings) -> None:
    """Gradients of the cells from that of the picture, in place."""
    rows, columns = grad_cells.shape[1:3]
    inside = grad[:, : rows * settings.cell[0], : columns * settings.cell[1]]
    cells = inside.unflatten(1, (rows, settings.cell[0])).unflatten(3, (columns, settings.cell[1]))
    row, column = _cells_with_lines(lines, rows, columns)
    for i in range(settings.orientations):
        grad_cells[..., i] += (cells * lines[row, column, i].transpose(1, 2)).sum((2, 4))


def _add_pixel_gradients(
    grad: Tensor, image: Tensor, grad_cells: Tensor, first: int, last: int, settings: Settings
) -> None:
    """Gradients of the pixels [C, H, W] from those of the rows [first, last) of cells, in place."""
    rows, columns = settings.cell
    top, bottom = first * rows, last * rows
    down, right, channel = gradient(image, top, bottom, settings)
    width = down.shape[1]
    row = torch.arange(top, bottom, device=image.device).div(rows, rounding_mode="floor")
    column = torch.arange(width, device=image.device).div(columns, rounding_mode="floor")
    cell = row[:, None] * grad_cells.shape[1] + column
    bins = bins_of(down, right, settings.orientations)
    votes = grad_cells.flatten()[cell * settings.orientations + bins.clamp_max(settings.orientations - 1)]
    magnitude = torch.hypot(down, right).where(bins < settings.orientations, 0)
    # Gradients of a difference that is 0 for want of a neighbour are 0 too, as they are multiples of it.
    votes = torch.where(magnitude > 0, votes / (magnitude * (rows * columns)), 0)
    strip = down.new_zeros(image.shape[0], bottom - top + 2, width + 2)
    if channel is None:
        channel = torch.zeros_like(down, dtype=torch.int64)[None]
    pull = torch.zeros_like(strip[:, 1:-1, 1:-1]).scatter_(0, channel, (votes * down)[None])
    strip[:, 2:, 1:-1] += pull
    strip[:, :-2, 1:-1] -= pull
    pull = torch.zeros_like(pull).scatter_(0, channel, (votes * right)[None])
    strip[:, 1:-1, 2:] += pull
    strip[:, 1:-1, :-2] -= pull
    above, below, beyond = max(top - 1, 0), min(bottom + 1, image.shape[1]), min(width + 1, image.shape[2])
    grad[:, above:below, :beyond] += strip[:, above - top + 1 : below - top + 1, 1 : beyond + 1]


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
        return blocks.sqrt() if settings.block_norm == "L1-sqrt" else blocks
    blocks = blocks / (blocks.square().sum((3, 4, 5), keepdim=True) + EPS**2).sqrt()
    if settings.block_norm == "L2-Hys":
        blocks = blocks.clamp_max(0.2)
        blocks = blocks / (blocks.square().sum((3, 4, 5), keepdim=True) + EPS**2).sqrt()
    return blocks


def _draw(picture: Tensor, histograms: Tensor, lines: Tensor, settings: Settings) -> None:
    """Add every bin's line to the picture [B, H, W], one bin after the other."""
    rows, columns = histograms.shape[1:3]
    row, column = _cells_with_lines(lines, rows, columns)
    for sample in range(picture.shape[0]):
        inside = picture[sample, : rows * settings.cell[0], : columns * settings.cell[1]]
        cells = inside.unflatten(0, (rows, settings.cell[0])).unflatten(2, (columns, settings.cell[1]))
        for i in range(settings.orientations):
            cells += histograms[sample, :, None, :, None, i] * lines[row, column, i].transpose(1, 2)


def _cells_with_lines(lines: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Indices of the lines of every cell: [rows, 1] and [columns]. One line for all cells stays one."""
    row = torch.arange(rows, device=lines.device).clamp_max(lines.shape[0] - 1)
    column = torch.arange(columns, device=lines.device).clamp_max(lines.shape[1] - 1)
    return row[: rows if lines.shape[0] > 1 else 1, None], column[: columns if lines.shape[1] > 1 else 1]


def _bytes_of_cell_row(images: Tensor, settings: Settings) -> int:
    """What one row of cells takes while its histograms are computed, roughly."""
    return images.shape[1] * settings.cell[0] * images.shape[3] * 8 * 8


def _bands(rows: int, bytes_of_row: int) -> list[tuple[int, int]]:
    """[first, last) rows that are computed together."""
    together = max(1, BAND_BYTES // max(bytes_of_row, 1))
    return [(first, min(first + together, rows)) for first in range(0, rows, together)]
