"""Histograms of oriented gradients written to be read beside scikit-image's ``hog``: float64 from the gradient on."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor


def hog(
    images: Tensor,
    orientations: int,
    cell: tuple[int, int],
    block: tuple[int, int],
    block_norm: str,
    transform_sqrt: bool,
    cells: bool,
    visualize: bool,
) -> tuple[Tensor, Tensor | None]:
    """Features and, if asked for, the picture of the histograms.

    Args:
        images: [B, C, H, W], any real dtype.
        orientations: n, bins of 180 degrees / n.
        cell: rows and columns of a cell, in pixels.
        block: rows and columns of a block, in cells.
        block_norm: "L1", "L1-sqrt", "L2" or "L2-Hys".
        transform_sqrt: whether the square root of the images is taken first.
        cells: whether the features are the cells' histograms, not the blocks.
        visualize: whether to draw the picture.

    Returns:
        float64: [B, by, bx, block rows, block columns, n] blocks, or [B, cy, cx, n] cells; picture [B, H, W] or None.
    """
    height, width = images.shape[2:]
    magnitude, angle = gradient(images, transform_sqrt)
    histograms = cell_histograms(magnitude, angle, orientations, cell)
    picture = draw(histograms, cell, (height, width)) if visualize else None
    return histograms if cells else normalised_blocks(histograms, block, block_norm), picture


def gradient(images: Tensor, transform_sqrt: bool = False) -> tuple[Tensor, Tensor]:
    """Magnitude and angle in [0, 180) degrees of the gradient of the channel where it is largest: two [B, H, W]."""
    # Integers and float64 are float64, shorter floats float32: differences, and the magnitudes that are compared
    # between channels, are rounded in this dtype. It decides which of two almost equal channels counts.
    dtype = images.dtype if images.dtype in (torch.float32, torch.float64) else torch.float64
    if images.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    images = images.to(dtype)
    if transform_sqrt:
        images = rounded_sqrt(images)
    down, right = torch.zeros_like(images), torch.zeros_like(images)  # 0 where a neighbour is missing
    if images.shape[2] > 2:
        down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    if images.shape[3] > 2:
        right[:, :, :, 1:-1] = images[:, :, :, 2:] - images[:, :, :, :-2]
    down, right = down.double(), right.double()
    largest = length(down, right).to(dtype).argmax(1, keepdim=True)  # the first of equal ones
    down, right = down.gather(1, largest).squeeze(1), right.gather(1, largest).squeeze(1)
    return length(down, right), torch.rad2deg(torch.atan2(down, right)).detach() % 180


def length(y: Tensor, x: Tensor) -> Tensor:
    """sqrt(y^2 + x^2), whose gradient at 0 is 0."""
    moving = (y != 0) | (x != 0)
    return torch.hypot(y.where(moving, 1), x.where(moving, 1)).where(moving, 0)


def rounded_sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded; its gradient at 0 is 0.

    torch's own may be off by one unit in the last place, and for one number here but not there: neighbours that are
    equal would have a gradient.
    """
    if x.dtype == torch.float32:
        return rounded_sqrt(x.double()).float()
    positive = (x > 0) & (x < math.inf)
    x1 = x.where(positive, 1)
    root = x1.sqrt()
    high = root * (2.0**27 + 1) - (root * (2.0**27 + 1) - root)  # its first 26 bits, so that these products are exact
    low = root - high
    rest = ((x1 - high * high) - 2 * high * low) - low * low
    return (root + rest / (2 * root)).where(positive, x.detach().sqrt())


def cell_histograms(magnitude: Tensor, angle: Tensor, orientations: int, cell: tuple[int, int]) -> Tensor:
    """[B, cells y, cells x, n]: the mean over each cell of the magnitudes whose angle lies in each bin.

    Bin i holds the angles from 180 i / n on, to the next border exclusively: no interpolation. Pixels that do not fill
    a cell are left out, on the right and at the bottom.
    """
    rows, columns = magnitude.shape[1] // cell[0], magnitude.shape[2] // cell[1]
    bins = []
    for i in range(orientations):
        outside = (angle < 180.0 / orientations * i) | (angle >= 180.0 / orientations * (i + 1))  # NaN is in every bin
        votes = magnitude.where(~outside, 0)[:, : rows * cell[0], : columns * cell[1]]
        bins.append(votes.unflatten(1, (rows, cell[0])).unflatten(3, (columns, cell[1])).mean((2, 4)))
    return torch.stack(bins, -1)


def normalised_blocks(histograms: Tensor, block: tuple[int, int], norm: str, eps: float = 1e-5) -> Tensor:
    """[B, cells y, cells x, n] -> [B, blocks y, blocks x, block rows, block columns, n]; a block at every cell."""
    blocks = histograms.unfold(1, block[0], 1).unfold(2, block[1], 1).permute(0, 1, 2, 4, 5, 3)
    if norm in ("L1", "L1-sqrt"):
        blocks = blocks / (blocks.sum((3, 4, 5), keepdim=True) + eps)
        return blocks.where(blocks != 0, 1).sqrt().where(blocks != 0, 0) if norm == "L1-sqrt" else blocks
    for step in range(2 if norm == "L2-Hys" else 1):
        if step == 1:
            blocks = blocks.clamp_max(0.2)
        blocks = blocks / (blocks.square().sum((3, 4, 5), keepdim=True) + eps**2).sqrt()
    return blocks


def draw(histograms: Tensor, cell: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[B, H, W]: in every cell a line for each bin, along the edge, as bright as the bin is high; lines add up."""
    lines = line_masks(histograms.shape[3], *cell).to(histograms)
    batch, rows, columns, _ = histograms.shape
    row, column = torch.arange(rows).clamp_max(lines.shape[0] - 1), torch.arange(columns).clamp_max(lines.shape[1] - 1)
    picture = histograms.new_zeros(batch, *size)
    cells = picture[:, : rows * cell[0], : columns * cell[1]].unflatten(1, (rows, -1)).unflatten(3, (columns, -1))
    for i in range(histograms.shape[3]):
        mask = lines[row[:, None], column, i].transpose(1, 2)  # [cells y, cell rows, cells x, cell columns]
        cells += histograms[:, :, None, :, None, i] * mask
    return picture


@functools.cache
def line_masks(orientations: int, rows: int, columns: int) -> Tensor:
    """[ky, kx, n, rows, columns] bool: the pixels that each bin's line goes through, in the first cells of an image.

    The line through a cell's centre is perpendicular to the gradient in the middle of the bin, and never leaves the
    cell if that has at least 2 x 2 pixels. As published, its ends are rounded where they lie in the image: at a few
    angles this depends on how far from the origin the cell is. Cell (r, c) has the lines [min(r, ky-1), min(c, kx-1)].
    """
    radius = min(rows, columns) // 2 - 1
    angles = [math.pi * (i + 0.5) / orientations for i in range(orientations)]
    ends_y = ends([radius * math.cos(angle) for angle in angles], rows)
    ends_x = ends([-radius * math.sin(angle) for angle in angles], columns)
    masks = torch.zeros(len(ends_y), len(ends_x), orientations, rows, columns, dtype=torch.bool)
    for y, x, i in itertools.product(range(len(ends_y)), range(len(ends_x)), range(orientations)):
        (top, bottom), (left, right) = ends_y[y][i], ends_x[x][i]
        for row, column in line(top, left, bottom, right):
            masks[y, x, i, row, column] = True
    return masks


def ends(steps: list[float], size: int) -> list[list[tuple[int, int]]]:
    """Where lines begin and end along one axis, relative to their cell, for the first cells of ``size`` pixels.

    Args:
        steps: for each line, how far its end is from the cell's centre.
        size: of a cell.

    Returns:
        For the first cell, the second and so on a list of (begin, end); all further cells are as the last one.
    """
    cells = []
    for cell in [*range(16), 64]:
        centre = cell * size + size // 2
        cells.append([(int(centre - step) - cell * size, int(centre + step) - cell * size) for step in steps])
    while len(cells) > 1 and cells[-1] == cells[-2]:
        cells.pop()
    return cells


def line(y: int, x: int, y1: int, x1: int) -> list[tuple[int, int]]:
    """Pixels of the line from (y, x) to (y1, x1), by Bresenham's algorithm."""
    dy, dx = abs(y1 - y), abs(x1 - x)
    step_y, step_x = 1 if y1 > y else -1, 1 if x1 > x else -1
    steep = dy > dx
    if steep:
        y, x, dy, dx, step_y, step_x = x, y, dx, dy, step_x, step_y
    error = 2 * dy - dx
    pixels = []
    for _ in range(dx):
        pixels.append((x, y) if steep else (y, x))
        while error >= 0:
            y, error = y + step_y, error - 2 * dx
        x, error = x + step_x, error + 2 * dy
    return [*pixels, (y1, x1)]
