"""How the kernels of hog are launched. Does not import Triton.

Nothing is tuned while a program runs: the tiles depend on the arguments of the op alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inpaint_kernels.portable.hog import Settings

LANES = 128
"""Threads of a program, each a column of pixels."""

ROWS_AT_ONCE = 4
"""Rows of a cell in one step of a thread. Of an RGB float32 image of 2000 x 2000 an H200 makes features in 52 us; with
1 or 8 rows in 63 and 61, with 64 or 256 lanes in 54 and 78."""

VALUES_OF_WARP = 1024
"""Values of the blocks that a warp normalises at a time, 32 of each thread."""

MOST_VALUES = 1 << 15
"""Values of the largest block, which lies in the registers of 16 warps."""


class CellTile(NamedTuple):
    """The threads of a program: one for each column of ``cells`` cells side by side, at most ``columns`` of each.

    Cells that have more columns are read in steps; both numbers are powers of two.
    """

    cells: int
    columns: int
    warps: int


class BlockTile(NamedTuple):
    """Blocks of a program, their values rounded up to a power of two."""

    blocks: int
    values: int
    warps: int


def arithmetic_of(images: Tensor, transform_sqrt: bool) -> str:
    """What gradients are computed in: as scikit-image, or in less where that is exact.

    Integers and float64 are float64 there, shorter floats float32. Differences of 8-bit integers, and the squares of
    their magnitudes, are exact in int32.
    """
    if images.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return "float32"
    exact = images.dtype in (torch.bool, torch.uint8, torch.int8) and not transform_sqrt
    return "int32" if exact else "float64"


def cell_tile(cell: tuple[int, int], columns: int) -> CellTile:
    """The tile for cells [rows, columns] in pixels, ``columns`` of them side by side in an image.

    A thread goes down its column of a cell alone, and the 8 columns of a cell are neighbours in a warp. Images of few
    cells take fewer warps.
    """
    width = min(power_of_two(cell[1]), LANES)
    cells = min(LANES // width, power_of_two(columns))
    return CellTile(cells, width, max(1, cells * width // 32))


def rows_at_once(arithmetic: str, rows: int) -> int:
    """Rows of a cell that are in one step; of float64, whose kernels are long, one."""
    return 1 if arithmetic == "float64" else min(ROWS_AT_ONCE, rows)


def block_tile(settings: Settings) -> BlockTile:
    """The tile for blocks: whole blocks within a warp, so that sums need no other warp, unless one is too large."""
    values = power_of_two(settings.block[0] * settings.block[1] * settings.orientations)
    warps = min(max(1, values // VALUES_OF_WARP), 16)
    return BlockTile(max(1, VALUES_OF_WARP // values), values, warps)


def power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()
