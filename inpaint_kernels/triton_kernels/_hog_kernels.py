"""The kernels of hog: pixels to histograms of cells, cells to normalised blocks, cells to a picture.

None may be compiled with fused multiply-adds (``enable_fp_fusion``): whether a gradient at 45 degrees lies on a border
of two bins, and whether two channels tie, would depend on which product the compiler fuses. Where an exact remainder is
wanted the code says ``tl.fma``.
"""

# ruff: noqa: RUF005 - Triton compiles a sum of tuples, but no star in one

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from inpaint_kernels.portable.hog import EPS, Settings
from inpaint_kernels.triton_kernels._hog_borders import borders
from inpaint_kernels.triton_kernels._hog_launch import CellTile, block_tile, cell_tile, rows_at_once
from inpaint_kernels.triton_kernels._launch import Launch, needs_int64

MOST_UNROLLED_CHANNELS = 4
ROUNDS_TO_180 = tl.constexpr(2.0**-46 * 3.14159265358979 / 180)
"""Radians below 180 degrees from which on an angle in float64 is 180 degrees in scikit-image, and in no bin."""

OPTIONS = {"enable_fp_fusion": False}

# Gradients ------------------------------------------------------------------------------------------------------------


@triton.jit
def _number(value: tl.constexpr, like: tl.tensor) -> Any:
    """A constant in the dtype of a tensor: as an argument of a function Triton compiles it as float32."""
    return tl.full(like.shape, value, like.dtype)


@triton.jit
def _root(x: tl.tensor) -> Any:
    """The square root, correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _pixels(at: tl.tensor, ARITHMETIC: tl.constexpr, SQRT: tl.constexpr) -> Any:
    """Pixels as the arithmetic has them."""
    number: tl.constexpr = tl.int32 if ARITHMETIC == "int32" else tl.float64 if ARITHMETIC == "float64" else tl.float32
    value = tl.load(at).to(number)
    return _root(value) if SQRT else value


@triton.jit
def _length(down: tl.tensor, right: tl.tensor, ARITHMETIC: tl.constexpr) -> Any:
    """What channels are compared by: the square of integers, else the magnitude, correctly rounded.

    Channels tie in scikit-image where their rounded magnitudes are equal, and nearly do in 2 % of the pixels of a
    photo: a wrong last bit would decide for another channel. So the square is a sum of two floats, and a Newton step
    corrects its root by the exact remainder.
    """
    down_square, right_square = down * down, right * right
    square = down_square + right_square
    if ARITHMETIC == "int32":
        length = square
    else:
        part = square - down_square
        low = (down_square - (square - part)) + (right_square - part)
        low += tl.fma(down, down, -down_square) + tl.fma(right, right, -right_square)
        inverse = _inverse_root(tl.maximum(square, 1e-37))  # the root of 0 stays 0
        root = square * inverse
        length = tl.fma(tl.fma(-root, root, square) + low, 0.5 * inverse, root)
    return length


@triton.jit
def _inverse_root(x: tl.tensor) -> Any:
    """One over the square root; in float32 to 2 units in the last place."""
    return 1.0 / tl.sqrt(x) if x.dtype == tl.float64 else tl.rsqrt(x)


@triton.jit
def _gradient(
    row: tl.tensor,
    step: tl.tensor,
    here: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    ARITHMETIC: tl.constexpr,
    SQRT: tl.constexpr,
) -> Any:
    """(down, right): what the pixel below is more than the one above, and the right one more than the left one.

    ``row`` points to a row of a channel and ``step`` leads to the next; offsets within a row are those of the pixels
    themselves and of their neighbours, and where one of two neighbours is missing both are the pixel itself.
    """
    down = _pixels(row + step + here, ARITHMETIC, SQRT) - _pixels(row - step + here, ARITHMETIC, SQRT)
    return down, _pixels(row + right, ARITHMETIC, SQRT) - _pixels(row + left, ARITHMETIC, SQRT)


@triton.jit
def _longer(
    best: tl.tensor,
    down: tl.tensor,
    right: tl.tensor,
    other_down: tl.tensor,
    other_right: tl.tensor,
    ARITHMETIC: tl.constexpr,
) -> Any:
    """(length, down, right) of another channel where it is longer."""
    length = _length(other_down, other_right, ARITHMETIC)
    longer = length > best
    return tl.where(longer, length, best), tl.where(longer, other_down, down), tl.where(longer, other_right, right)


# Histograms -----------------------------------------------------------------------------------------------------------


@triton.jit
def _passed(
    up: tl.tensor,
    across: tl.tensor,
    magnitude: tl.tensor,
    turned: tl.tensor,
    BORDERS: tl.constexpr,
    NUMBER: tl.constexpr,
    ARITHMETIC: tl.constexpr,
) -> Any:
    """Whether gradients, turned so that up >= 0, are at or beyond a border, and at or beyond 180 degrees minus it.

    At 45 degrees, where ties are frequent, nothing is rounded. Else two rounded products decide right for differences
    of 8-bit integers, for all of them; for others the difference of the products is computed to twice the precision.
    """
    BORDER: tl.constexpr = BORDERS[NUMBER]  # see the class Border
    if ARITHMETIC != "float64" and BORDER[0] == BORDER[1]:
        return up >= across, -up >= across
    product = across * BORDER[1]
    if ARITHMETIC == "int32":
        other = up * BORDER[0]
        return other >= product, -other >= product
    cosine, sine = _number(BORDER[0], up), _number(BORDER[1], up)
    cosine_low, sine_low = _number(BORDER[2], up), _number(BORDER[3], up)
    low = tl.fma(across, sine_low, tl.fma(across, sine, -product))
    beyond = tl.fma(up, cosine, -product) + tl.fma(up, cosine_low, -low)
    behind = tl.fma(up, cosine, product) + tl.fma(up, cosine_low, low)
    if ARITHMETIC == "float64":
        early = tl.where(turned, _number(BORDER[5], up), _number(BORDER[4], up))
        early_mirrored = tl.where(turned, _number(BORDER[7], up), _number(BORDER[6], up))
        return beyond >= -magnitude * early, behind <= magnitude * early_mirrored
    return beyond >= 0.0, behind <= 0.0


@triton.jit
def _with_votes(
    totals: tl.tuple,
    down: tl.tensor,
    right: tl.tensor,
    magnitude: tl.tensor,
    BORDERS: tl.constexpr,
    BINS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
) -> Any:
    """The totals of all bins and the magnitudes of gradients, each in its bin.

    From both ends to the middle: a gradient is in the bin between two borders if it has passed one of them.
    """
    turned = down < 0.0
    up = tl.abs(down)
    across = tl.where(turned, -right, tl.where(down == 0.0, tl.abs(right), right))
    votes = magnitude.to(totals[0].dtype)
    if ARITHMETIC == "float64":
        votes = tl.where(turned & (across < 0.0) & (up <= magnitude * ROUNDS_TO_180), 0.0, votes)
    first: tl.tuple = ()
    last: tl.tuple = ()
    before, behind = turned, turned  # whether the borders before these were passed
    for i in tl.static_range((BINS - 1) // 2):
        low, high = totals[i], totals[BINS - 1 - i]
        passed, passed_mirrored = _passed(up, across, magnitude, turned, BORDERS, i, ARITHMETIC)
        if i == 0:
            first = (tl.where(passed, low, low + votes),)
            last = (tl.where(passed_mirrored, high + votes, high),)
        else:
            first = first + (tl.where(before ^ passed, low + votes, low),)
            last = (tl.where(passed_mirrored ^ behind, high + votes, high),) + last
        before, behind = passed, passed_mirrored
    middle = totals[(BINS - 1) // 2]
    if BINS == 1:
        first = (middle + votes,)
    elif BINS % 2 == 1:
        first = first + (tl.where(before ^ behind, middle + votes, middle),)
    else:
        upright, high = across <= 0.0, totals[BINS // 2]
        if BINS == 2:
            first = (tl.where(upright, middle, middle + votes),)
            last = (tl.where(upright, high + votes, high),)
        else:
            first = first + (tl.where(before ^ upright, middle + votes, middle),)
            last = (tl.where(upright ^ behind, high + votes, high),) + last
    return first + last


@triton.jit(do_not_specialize=["stride_sample", "stride_channel", "stride_y"])
def hog_cells_kernel(
    images: tl.tensor,
    cells: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride_sample: tl.tensor,
    stride_channel: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    CHANNELS: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
    BORDERS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    SQRT: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Histograms [B, rows, columns, n] of BLOCK_CELLS neighbouring cells: the mean of the magnitudes in each bin.

    Every thread goes down one column of pixels with totals of its own; in the end those of a cell's columns are added.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    programs = tl.cdiv(columns, BLOCK_CELLS)
    cell = program % programs * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    cell_row = program // programs % rows
    sample = program // programs // rows
    image = images + sample * stride_sample
    totals: tl.tuple = ()
    for _bin in tl.static_range(BINS):
        totals = totals + (tl.zeros([BLOCK_CELLS, BLOCK_COLUMNS], cells.dtype.element_ty),)
    for left_column in range(0, CELL_COLUMNS, BLOCK_COLUMNS):
        # Threads without a pixel repeat one: their totals are left out, or their magnitudes.
        column = left_column + tl.arange(0, BLOCK_COLUMNS)
        x = tl.minimum(cell, columns - 1)[:, None] * CELL_COLUMNS + tl.minimum(column, CELL_COLUMNS - 1)[None, :]
        beside = tl.where((x > 0) & (x < width - 1), stride_x, 0)
        here = x * stride_x
        left, right = here - beside, here + beside
        for i in tl.range(CELL_ROWS, loop_unroll_factor=ROWS_AT_ONCE):
            y = cell_row * CELL_ROWS + i
            row = image + y * stride_y
            step = tl.where((y > 0) & (y < height - 1), stride_y, 0)
            down_by, right_by = _gradient(row, step, here, left, right, ARITHMETIC, SQRT)
            if CHANNELS == 1:
                length = down_by * down_by + right_by * right_by
            else:
                length = _length(down_by, right_by, ARITHMETIC)
            if UNROLLED:
                for _unrolled in tl.static_range(1, CHANNELS):
                    row += stride_channel
                    other_down, other_right = _gradient(row, step, here, left, right, ARITHMETIC, SQRT)
                    length, down_by, right_by = _longer(length, down_by, right_by, other_down, other_right, ARITHMETIC)
            else:
                for _channel in range(1, CHANNELS):
                    row += stride_channel
                    other_down, other_right = _gradient(row, step, here, left, right, ARITHMETIC, SQRT)
                    length, down_by, right_by = _longer(length, down_by, right_by, other_down, other_right, ARITHMETIC)
            if ARITHMETIC == "int32":
                magnitude = _root(length.to(tl.float32))
                down_by, right_by = down_by.to(tl.float32), right_by.to(tl.float32)
            elif CHANNELS == 1:
                magnitude = _root(length)
            else:
                magnitude = length
            if CELL_COLUMNS % BLOCK_COLUMNS > 0:
                magnitude = tl.where((column < CELL_COLUMNS)[None, :], magnitude, 0.0)
            totals = _with_votes(totals, down_by, right_by, magnitude, BORDERS, BINS, ARITHMETIC)
    # The threads of a cell write a bin each: neighbours in memory, and where they are.
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    at = cells + (((sample * rows + cell_row) * columns + cell) * BINS)[:, None] + lane
    for first in tl.static_range(0, BINS, BLOCK_COLUMNS):
        means = tl.zeros([BLOCK_CELLS, BLOCK_COLUMNS], cells.dtype.element_ty)
        for i in tl.static_range(first, min(first + BLOCK_COLUMNS, BINS)):
            means = tl.where(lane == i - first, (tl.sum(totals[i], 1) / (CELL_ROWS * CELL_COLUMNS))[:, None], means)
        tl.store(at + first, means, mask=(cell < columns)[:, None] & (lane < BINS - first))


# Blocks and picture ---------------------------------------------------------------------------------------------------


@triton.jit
def hog_blocks_kernel(
    cells: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """Normalised blocks [B, by, bx, block rows, block columns, n] of cells [B, rows, columns, n]: BLOCKS neighbours."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    across, down = columns - BLOCK_COLUMNS + 1, rows - BLOCK_ROWS + 1
    programs = tl.cdiv(across, BLOCKS)
    block = program % programs * BLOCKS + tl.arange(0, BLOCKS)
    block_row = program // programs  # of all samples
    cell_row = block_row // down * rows + block_row % down
    value = tl.arange(0, VALUES)
    line: tl.constexpr = BLOCK_COLUMNS * BINS
    size: tl.constexpr = BLOCK_ROWS * line
    inside = (block < across)[:, None] & (value < size)[None, :]
    at = (block * BINS)[:, None] + (value // line * (columns * BINS) + value % line)[None, :]
    values = tl.load(cells + cell_row * columns * BINS + at, mask=inside, other=0.0)
    if NORM == "L1" or NORM == "L1-sqrt":
        values *= (1.0 / (tl.sum(values, 1) + EPS))[:, None]
        if NORM == "L1-sqrt":
            values = _root(values)
    else:
        values *= _inverse_root(tl.sum(values * values, 1) + EPS * EPS)[:, None]
        if NORM == "L2-Hys":
            values = tl.minimum(values, _number(0.2, values))
            values *= _inverse_root(tl.sum(values * values, 1) + EPS * EPS)[:, None]
    tl.store(blocks + block_row * across * size + (block * size)[:, None] + value[None, :], values, mask=inside)


@triton.jit
def hog_picture_kernel(
    cells: tl.tensor,
    lines: tl.tensor,
    picture: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    LINE_ROWS: tl.constexpr,
    LINE_COLUMNS: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Draws BLOCK_CELLS neighbouring cells of [B, rows, columns, n], every bin's line.

    ``lines`` are [LINE_ROWS, LINE_COLUMNS, n, cell rows, cell columns]: of the first cells of an image, the last of
    them being those of all further cells. What is not in a cell, on the right and at the bottom, becomes 0.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    programs = tl.cdiv(width, BLOCK_CELLS * CELL_COLUMNS)
    all_rows = tl.cdiv(height, CELL_ROWS)
    cell = program % programs * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    row = program // programs % all_rows
    sample = program // programs // all_rows
    which = tl.minimum(row, LINE_ROWS - 1) * LINE_COLUMNS + tl.minimum(cell, LINE_COLUMNS - 1)
    lines_of_cells = lines + (which * (BINS * CELL_ROWS * CELL_COLUMNS))[:, None]
    histogram = cells + ((sample * rows + row) * columns + cell) * BINS
    brightness: tl.tuple = ()
    for j in tl.static_range(BINS):
        there = cell < tl.where(row < rows, columns, 0)
        brightness = brightness + (tl.load(histogram + j, mask=there, other=0.0)[:, None],)
    for left in range(0, CELL_COLUMNS, BLOCK_COLUMNS):
        column = left + tl.arange(0, BLOCK_COLUMNS)[None, :]
        x = cell[:, None] * CELL_COLUMNS + column
        inside = (column < CELL_COLUMNS) & (x < width)
        for i in range(CELL_ROWS):
            drawn = tl.zeros([BLOCK_CELLS, BLOCK_COLUMNS], cells.dtype.element_ty)
            for j in tl.static_range(BINS):
                line = lines_of_cells + (j * CELL_ROWS + i) * CELL_COLUMNS + column
                drawn += tl.where(tl.load(line, mask=column < CELL_COLUMNS, other=0) != 0, brightness[j], 0.0)
            y = row * CELL_ROWS + i
            end = tl.where(y < height, width, 0)
            tl.store(picture + (sample * height + y) * width + x, drawn, mask=inside & (x < end))


# Launchers ------------------------------------------------------------------------------------------------------------


def fill_cells(images: Tensor, cells: Tensor, settings: Settings, arithmetic: str) -> Launch:
    """The launch that fills ``cells`` [B, rows, columns, n] from ``images`` [B, C, H, W] of any strides."""
    batch, channels, height, width = images.shape
    rows, columns = cells.shape[1:3]
    tile = cell_tile(settings.cell, columns)
    arguments = {"images": images, "cells": cells, "height": height, "width": width, "rows": rows, "columns": columns}
    names = ("stride_sample", "stride_channel", "stride_y", "stride_x")
    constants = {
        **_cell_constants(settings, tile),
        "CHANNELS": channels,
        "BORDERS": borders(settings.orientations, arithmetic != "float64"),
        "ARITHMETIC": arithmetic,
        "SQRT": settings.transform_sqrt,
        "UNROLLED": channels <= MOST_UNROLLED_CHANNELS,
        "ROWS_AT_ONCE": rows_at_once(arithmetic, settings.cell[0]),
        "WIDE": needs_int64(images, cells),
    }
    grid = (batch * rows * triton.cdiv(columns, tile.cells),)
    return _launch(
        hog_cells_kernel, grid, {**arguments, **dict(zip(names, images.stride(), strict=True))}, constants, tile.warps
    )


def fill_blocks(cells: Tensor, blocks: Tensor, settings: Settings) -> Launch:
    """The launch that fills ``blocks`` [B, by, bx, block rows, block columns, n] from [B, rows, columns, n]."""
    batch, down, across = blocks.shape[:3]
    tile = block_tile(settings)
    constants = {
        "BLOCK_ROWS": settings.block[0],
        "BLOCK_COLUMNS": settings.block[1],
        "BINS": settings.orientations,
        "NORM": settings.block_norm,
        "EPS": EPS,
        "WIDE": needs_int64(cells, blocks),
        "BLOCKS": tile.blocks,
        "VALUES": tile.values,
    }
    arguments = {"cells": cells, "blocks": blocks, "rows": cells.shape[1], "columns": cells.shape[2]}
    grid = (batch * down * triton.cdiv(across, tile.blocks),)
    return _launch(hog_blocks_kernel, grid, arguments, constants, tile.warps)


def draw(cells: Tensor, lines: Tensor, picture: Tensor, settings: Settings) -> Launch:
    """The launch that fills ``picture`` [B, H, W] from the cells and [ky, kx, n, cell rows, cell columns] bool."""
    batch, height, width = picture.shape
    rows, columns = cells.shape[1:3]
    tile = cell_tile(settings.cell, columns)
    constants = {
        **_cell_constants(settings, tile),
        "LINE_ROWS": lines.shape[0],
        "LINE_COLUMNS": lines.shape[1],
        "WIDE": needs_int64(cells, picture),
    }
    across, down = triton.cdiv(width, tile.cells * settings.cell[1]), triton.cdiv(height, settings.cell[0])
    arguments = {
        "cells": cells,
        "lines": lines,
        "picture": picture,
        "height": height,
        "width": width,
        "rows": rows,
        "columns": columns,
    }
    return _launch(hog_picture_kernel, (batch * down * across,), arguments, constants, tile.warps)


def _cell_constants(settings: Settings, tile: CellTile) -> dict[str, Any]:
    return {
        "CELL_ROWS": settings.cell[0],
        "CELL_COLUMNS": settings.cell[1],
        "BINS": settings.orientations,
        "BLOCK_CELLS": tile.cells,
        "BLOCK_COLUMNS": tile.columns,
    }


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], constants: Mapping[str, Any], warps: int
) -> Launch:
    return Launch(kernel, grid, dict(arguments), dict(constants), {"num_warps": warps, **OPTIONS})
