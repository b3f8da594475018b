"""How the CUDA backend cuts contextual attention into tiles: what depends on shapes and on the wanted queries only."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inpaint_kernels.portable._contextual_attention_tiles import Semantics

WORKSPACE_BYTES = 640 << 20
"""Aim for the matrices of a tile's samples; a tile has at least one cell and one sample, whatever that costs."""

MOST_SAMPLES = 65535
"""Samples that a tile holds at most: a GPU's grid has no more blocks in z."""

LARGEST_SIDE = 64
"""Cells along a side of a tile: beyond this the halo is cheap, and a tile's pixels must fit into MAX_RUNS runs."""

LINES = 4
"""Lines of queries whose scores the kernel computes at once; fewer take nearly as long."""

MAX_RUNS = 480
"""Runs of consecutive pixels that the kernel takes (csrc/cuda/contextual_attention_forward.cu)."""

Grid = tuple[int, int]
Rectangle = tuple[int, int, int, int]
"""Top, left, height, width."""


class Phases(NamedTuple):
    """The pixels of a cell to which equally many patches contribute: phases [y) x [x), patches reach_y x reach_x."""

    y: slice
    x: slice
    reach_y: int
    reach_x: int

    def fields(self, rate: int, pad: int) -> Tensor:
        """What the kernel takes (struct CellPhases)."""
        return torch.tensor([rate, pad, self.y.start, self.y.stop, self.x.start, self.x.stop], device="cpu")


class Positions(NamedTuple):
    """Query positions that have a row in a tile's matrices, ascending.

    Attributes:
        slices: stretches of consecutive positions.
        runs: [stretches, 2] int32, first position and first row of each.
        number: how many there are.
    """

    slices: tuple[slice, ...]
    runs: Tensor
    number: int


class Tile(NamedTuple):
    """A rectangle of queries and one of cells: those that its queries cover, or the queries that cover them.

    Attributes:
        queries, cells: (top, left, height, width).
        scores: positions whose patch scores the fuse sums for the queries.
        pixels: positions whose correlations these sum.
    """

    queries: Rectangle
    cells: Rectangle
    scores: Positions
    pixels: Positions

    @property
    def query_count(self) -> int:
        """Queries of the tile."""
        return self.queries[2] * self.queries[3]

    @property
    def cell_count(self) -> int:
        """Cells of the tile."""
        return self.cells[2] * self.cells[3]


class Keys(NamedTuple):
    """How keys lie in the matrices.

    Attributes:
        cells: rows and columns of the grid of key cells. Columns are padded, so that four keys (eight of half
            precision) from a multiple of four on are one access, and rows of operands of a product are aligned.
        logit_columns: columns of logits; they lie on the first rows of that grid.
        columns: columns of correlations, the keys and their padding.
    """

    cells: Grid
    logit_columns: int
    columns: int

    @property
    def cell_count(self) -> int:
        """Cells of the padded grid."""
        return self.cells[0] * self.cells[1]


class Plan(NamedTuple):
    """The tiles of a call and the sizes of the matrices that all of them share.

    Attributes:
        samples: how many samples of a batch a tile takes at once.
    """

    tiles: tuple[Tile, ...]
    phases: tuple[Phases, ...]
    keys: Keys
    samples: int
    most_pixels: int
    most_scores: int
    most_cells: int
    most_queries: int


@functools.lru_cache(maxsize=16)
def make_plan(
    queries: Grid,
    keys: Grid,
    semantics: Semantics,
    wanted: bytes | None,
    purpose: str,
    score_size: int,
    map_size: int,
    batch: int = 1,
) -> Plan:
    """Cut a call into tiles.

    Forward tiles are cut by cells, so that each output pixel is written once; backward ones by queries, so that each
    probability's gradient is complete.

    Args:
        queries: size of the query grid.
        keys: size of the key grid.
        semantics: of the call.
        wanted: the selected queries, a bool [hq, wq], as bytes; None for all.
        purpose: "output", "offsets" (cover every selected query, whatever its cells need) or "gradients".
        score_size: bytes of one score.
        map_size: bytes of one value of the maps, and of the products' operands.
        batch: samples of the call.
    """
    more = semantics.reach - 1
    selected = np.ones(queries, bool) if wanted is None else np.frombuffer(wanted, bool).reshape(queries)
    needed = _wanted_cells(selected, semantics, offsets=purpose == "offsets")
    if purpose == "gradients":
        needed = _covering_queries(needed, more)
    phases = tuple(_phases(semantics))
    layout = _layout(keys, more, map_size)
    side = LARGEST_SIDE
    while side > 1 and _bytes_of(side, layout, semantics, purpose, score_size, map_size) > WORKSPACE_BYTES:
        side -= 1
    tiles = []
    for top, left, bottom, right in _squares(needed, side, 0 if purpose == "gradients" else more):
        box = _bounding_box(needed[top:bottom, left:right])
        if box is None:
            continue
        y0, x0, y1, x1 = top + box[0], left + box[1], top + box[2], left + box[3]
        if purpose == "gradients":
            rectangle, cells = (y0, x0, y1 - y0, x1 - x0), (y0, x0, y1 - y0 + more, x1 - x0 + more)
        else:
            first, last = (max(0, y0 - more), max(0, x0 - more)), (min(queries[0], y1), min(queries[1], x1))
            rectangle, cells = (*first, last[0] - first[0], last[1] - first[1]), (y0, x0, y1 - y0, x1 - x0)
        tiles.append(Tile(rectangle, cells, *_positions(queries, rectangle, semantics)))
    most_pixels, most_scores, most_cells, most_queries = (
        max((number(tile) for tile in tiles), default=0)
        for number in (
            lambda tile: tile.pixels.number,
            lambda tile: tile.scores.number,
            lambda tile: tile.cell_count,
            lambda tile: tile.query_count,
        )
    )
    most = (most_pixels, most_scores, most_cells, most_queries)
    bytes_of_sample = sum(matrix_bytes(most, layout, len(phases), purpose, score_size, map_size))
    samples = max(1, min(batch, MOST_SAMPLES, WORKSPACE_BYTES // max(1, bytes_of_sample)))
    return Plan(tuple(tiles), phases, layout, samples, *most)


def _layout(keys: Grid, more: int, map_size: int) -> Keys:
    multiple = max(4, 16 // map_size)
    width = -(-(keys[1] + more) // multiple) * multiple
    return Keys((keys[0] + more, width), keys[0] * width, -(-keys[0] * keys[1] // multiple) * multiple)


def matrix_bytes(
    most: tuple[int, int, int, int], keys: Keys, phases: int, purpose: str, score_size: int, map_size: int
) -> tuple[int, int, int, int]:
    """Bytes of one sample's large matrices: what shares memory is never needed at the same time.

    Forward: correlations or weights; logits. Backward: correlations, which their gradients replace; logits, which the
    gradients of fused scores replace; gradients of weights (of all phases) or of patch scores; weights.

    Args:
        most: rows of the matrices: pixels, positions of patch scores, cells and queries of a tile.
        keys: columns of the matrices.
        phases: groups of phases.
        purpose: as in :func:`make_plan`.
        score_size: likewise.
        map_size: likewise.
    """
    pixels, scores, cells, queries = most
    correlations, logits = score_size * pixels * keys.columns, score_size * queries * keys.logit_columns
    weights = map_size * cells * keys.cell_count
    if purpose != "gradients":
        return max(correlations, weights), logits, 0, 0
    weight_gradients = score_size * phases * cells * keys.cell_count
    return correlations, logits, max(weight_gradients, map_size * scores * keys.columns), weights


def _phases(semantics: Semantics) -> Iterator[Phases]:
    """One entry if ``paste_size`` is a multiple of ``rate``, else up to four."""
    rate, most = semantics.rate, semantics.reach
    remainder = semantics.paste_size % rate
    axis = [(slice(0, rate), most)]
    if remainder:
        axis = [(slice(0, remainder), most), (slice(remainder, rate), most - 1)]
    for y, reach_y in axis:
        for x, reach_x in axis:
            yield Phases(y, x, reach_y, reach_x)


def _wanted_cells(selected: np.ndarray[Any, Any], semantics: Semantics, offsets: bool) -> np.ndarray[Any, Any]:
    """Cells that hold a pixel of a selected query; with ``offsets`` also those for which it must be computed."""
    rate, pad, more = semantics.rate, semantics.pad_put, semantics.reach - 1
    height, width = selected.shape
    cells = np.zeros((height + more, width + more), bool)
    shifts = range(pad // rate, (pad + rate - 1) // rate + 1)
    for dy in shifts:
        for dx in shifts:
            rows, columns = cells.shape[0] - dy, cells.shape[1] - dx
            if rows > 0 and columns > 0:
                cells[dy:, dx:] |= np.pad(selected, ((0, max(0, rows - height)), (0, max(0, columns - width))))[
                    :rows, :columns
                ]
    if offsets:
        cells[:height, :width] |= selected
    return cells


def _covering_queries(cells: np.ndarray[Any, Any], more: int) -> np.ndarray[Any, Any]:
    """Queries whose pasted patches reach a wanted cell."""
    height, width = cells.shape[0] - more, cells.shape[1] - more
    shifted = [cells[dy : dy + height, dx : dx + width] for dy in range(more + 1) for dx in range(more + 1)]
    return np.logical_or.reduce(shifted)


def _bytes_of(side: int, keys: Keys, semantics: Semantics, purpose: str, score_size: int, map_size: int) -> int:
    """Bytes of the matrices of a tile of side x side cells or, for gradients, queries, in the middle of the grid."""
    halo, fuse, more = semantics.patch - 1 + 2 * semantics.half, 2 * semantics.half, semantics.reach - 1
    queries, cells = (side, side + more) if purpose == "gradients" else (side + more, side)
    most = ((queries + halo) ** 2, (queries + fuse) ** 2, cells**2, queries**2)
    return sum(matrix_bytes(most, keys, len(tuple(_phases(semantics))), purpose, score_size, map_size))


def _squares(cells: np.ndarray[Any, Any], side: int, repeated: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the squares that the bounding box of the wanted cells is cut into.

    Args:
        cells: wanted ones.
        side: of the squares at most.
        repeated: lines of queries that a square needs above its first line of cells.
    """
    box = _bounding_box(cells)
    if box is None:
        return
    y0, x0, y1, x1 = box
    columns = np.linspace(x0, x1, -(-(x1 - x0) // side) + 1).round().astype(int)
    for top, bottom in itertools.pairwise(_line_cuts(y0, y1, side, repeated)):
        for left, right in itertools.pairwise(columns):
            yield top, int(left), bottom, int(right)


def _line_cuts(first: int, last: int, side: int, repeated: int) -> list[int]:
    """Borders of parts of at most ``side`` lines of cells, about equal, most of which need whole groups of queries."""
    cuts = [first]
    for parts in range(-(-(last - first) // side), 1, -1):
        begin = cuts[-1]
        start, even = max(0, begin - repeated), begin + (last - begin) / parts
        cut = start + round((even - start) / LINES) * LINES
        fits = begin < cut <= begin + side and last - cut <= (parts - 1) * side
        cuts.append(cut if fits else round(even))
    return [*cuts, last]


def _bounding_box(mask: np.ndarray[Any, Any]) -> tuple[int, int, int, int] | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _positions(grid: Grid, rectangle: Rectangle, semantics: Semantics) -> tuple[Positions, Positions]:
    """Positions of the patch scores that the fuse sums for a rectangle of queries, and of their patches' pixels."""
    (height, width), (top, left, rows, columns) = grid, rectangle
    y, x = np.mgrid[top : top + rows, left : left + columns].reshape(2, -1)
    steps = np.arange(-semantics.half, semantics.half + 1)
    order = (x * height + y)[:, None] + steps
    order = order[(order >= 0) & (order < height * width)]
    scores = (order % height * width + order // height)[:, None] + steps
    scores = np.unique(scores[(scores >= 0) & (scores < height * width)])
    before = (semantics.patch - 1) // 2
    reach = np.arange(-before, semantics.patch - before)
    pixel_y = (scores // width)[:, None, None] + reach[:, None]
    pixel_x = (scores % width)[:, None, None] + reach
    inside = (pixel_y >= 0) & (pixel_y < height) & (pixel_x >= 0) & (pixel_x < width)
    return _runs(scores), _runs(np.unique((pixel_y * width + pixel_x)[inside]))


def _runs(positions: np.ndarray[Any, Any]) -> Positions:
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    first_rows = np.concatenate([[0], breaks])
    slices = tuple(slice(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks))
    runs = np.stack([positions[first_rows], first_rows], 1).astype(np.int32)
    return Positions(slices, torch.from_numpy(runs), positions.size)
