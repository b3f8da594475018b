"""Bookkeeping of the portable contextual attention: which rows of which diagonal sum a tile of queries needs.

Everything between the pixel correlation and the paste is a chain of *diagonal sums*

    out(p, q) = sum over steps s of source(query neighbour s of p, key neighbour s of q),    0 where either is undefined

over one axis at a time: the k x k patch score is a vertical and a horizontal one, the fuse one along rows and one along
columns (with wrap-around), the paste one per axis too. A tile holds scores as a matrix: one row per query position it
needs (positions ascending), all keys contiguous. A step is then a few additions of one block of that matrix to another:
*runs* of consecutive rows times *boxes* of keys. Only the runs depend on the tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True)
class Semantics:
    """The op's semantic arguments in the order of its schema."""

    patch: int
    norm: str
    eps: float
    fuse: int
    scale: float
    masking: str
    fill: float
    floor: float | None
    rate: int
    paste_size: int
    pad_cut: int
    pad_put: int
    divisor: float

    @property
    def half(self) -> int:
        """Reach of the fuse; 0: none."""
        return self.fuse // 2

    @property
    def reach(self) -> int:
        """Steps of ``rate`` that a pasted patch spans."""
        return -(-self.paste_size // self.rate)


Run = tuple[slice, slice]
"""Consecutive rows of the sum, and those of the source that they read."""

Box = tuple[tuple[slice, slice], tuple[slice, slice]]
"""A box of keys (rows, columns) of the sum, and the one of the source that it reads."""


class Step(NamedTuple):
    """One term of a diagonal sum: the neighbour of a query position (-1: none), and where each key finds its own."""

    query_neighbour: Callable[[Tensor], Tensor]
    boxes: list[Box]


class Stage(NamedTuple):
    """One diagonal sum on whole maps.

    Attributes:
        steps: its terms.
        positions: number of query positions on the source's side.
        out_keys, source_keys: key grids of the sum and of the source.
        covering: whether the first step is defined for every query and key.
    """

    steps: list[Step]
    positions: int
    out_keys: Grid
    source_keys: Grid
    covering: bool


class Pass(NamedTuple):
    """A stage restricted to the rows of one tile: for every step its runs, beside the stage's boxes."""

    stage: Stage
    runs: list[list[Run]]
    out_rows: int
    source_rows: int


# Neighbours on the query side, boxes on the key side ------------------------------------------------------------------


def _shifted(positions: Tensor, out_width: int, source: Grid, dy: int, dx: int) -> Tensor:
    """Position moved by (dy, dx) from a grid of ``out_width`` columns into the grid ``source``; -1 outside."""
    y, x = positions.div(out_width, rounding_mode="floor") + dy, positions % out_width + dx
    inside = (y >= 0) & (y < source[0]) & (x >= 0) & (x < source[1])
    return torch.where(inside, y * source[1] + x, -1)


def _next_in_rows(positions: Tensor, grid: Grid, step: int) -> Tensor:
    """R_d of the fuse: ``step`` further in row-major order, running on into the next row."""
    moved = positions + step
    return torch.where((moved >= 0) & (moved < grid[0] * grid[1]), moved, -1)


def _next_in_columns(positions: Tensor, grid: Grid, step: int) -> Tensor:
    """C_e of the fuse: ``step`` further in column-major order, running on into the next column."""
    height, width = grid
    moved = positions % width * height + positions.div(width, rounding_mode="floor") + step
    position = moved % height * width + moved.div(height, rounding_mode="floor")
    return torch.where((moved >= 0) & (moved < height * width), position, -1)


def _box(out: Grid, source: Grid, dy: int, dx: int, top: int = 0, bottom: int | None = None) -> list[Box]:
    """Keys in rows top to bottom of ``out`` whose (dy, dx) neighbour lies inside ``source``: one box or none."""
    y0, x0 = max(top, -dy), max(0, -dx)
    y1, x1 = min(out[0] if bottom is None else bottom, source[0] - dy), min(out[1], source[1] - dx)
    if y0 >= y1 or x0 >= x1:
        return []
    return [((slice(y0, y1), slice(x0, x1)), (slice(y0 + dy, y1 + dy), slice(x0 + dx, x1 + dx)))]


def _column_boxes(grid: Grid, step: int) -> list[Box]:
    """C_e on the key side: the bulk moves down by ``step``, what leaves a column enters a neighbouring one."""
    height = grid[0]
    boxes = []
    for columns in range(step // height, (height - 1 + step) // height + 1):
        top, bottom = max(0, columns * height - step), min(height, (columns + 1) * height - step)
        boxes += _box(grid, grid, step - columns * height, columns, top, bottom)
    return boxes


def _centred(size: int) -> list[int]:
    """Offsets of a window of ``size``, 0 first."""
    before = (size - 1) // 2
    return sorted(range(-before, size - before), key=abs)


def score_stages(queries: Grid, keys: Grid, semantics: Semantics) -> list[Stage]:
    """From pixel correlations to fused scores: patch vertically, patch horizontally, fuse along rows, along columns."""

    def shift(dy: int, dx: int) -> Step:
        neighbour = partial(_shifted, out_width=queries[1], source=queries, dy=dy, dx=dx)
        return Step(neighbour, _box(keys, keys, dy, dx))

    positions = queries[0] * queries[1]
    window = _centred(semantics.patch)
    stages = [
        Stage([shift(d, 0) for d in window], positions, keys, keys, covering=True),
        Stage([shift(0, d) for d in window], positions, keys, keys, covering=True),
    ]
    if semantics.fuse > 1:
        window = _centred(semantics.fuse)
        line = (1, keys[0] * keys[1])
        rows = [Step(partial(_next_in_rows, grid=queries, step=d), _box(line, line, 0, d)) for d in window]
        columns = [Step(partial(_next_in_columns, grid=queries, step=d), _column_boxes(keys, d)) for d in window]
        stages.append(Stage(rows, positions, line, line, covering=True))
        stages.append(Stage(columns, positions, keys, keys, covering=True))
    return stages


class PastePhases(NamedTuple):
    """The paste for those pixels of an r x r cell to which equally many patches contribute.

    Output pixel rate * u + phase - pad_put receives value pixel rate * w + phase - pad_cut with the weight
    sum over e of A(u - e, w - e), 0 <= e < ceil((paste_size - phase) / rate) per axis. ``stages``: along x, along y.
    """

    y: slice
    x: slice
    stages: list[Stage]

    def of(self, cells: Tensor) -> Tensor:
        """These pixels of cells [cells, Cv, rate, rate]."""
        return cells[:, :, self.y, self.x]


def paste_phases(queries: Grid, keys: Grid, semantics: Semantics) -> list[PastePhases]:
    """One entry if ``paste_size`` is a multiple of ``rate``, else four."""
    rate = semantics.rate
    most, remainder = semantics.reach, semantics.paste_size % rate
    if remainder:
        axis = [(slice(0, remainder), most), (slice(remainder, rate), most - 1)]
    else:
        axis = [(slice(0, rate), most)]
    (hq, wq), (hk, wk), more = queries, keys, most - 1

    def along_x(e: int) -> Step:
        neighbour = partial(_shifted, out_width=wq + more, source=queries, dy=0, dx=-e)
        return Step(neighbour, _box((hk, wk + more), keys, 0, -e))

    def along_y(e: int) -> Step:
        neighbour = partial(_shifted, out_width=wq + more, source=(hq, wq + more), dy=-e, dx=0)
        return Step(neighbour, _box((hk + more, wk + more), (hk, wk + more), -e, 0))

    def stages(count_y: int, count_x: int) -> list[Stage]:
        wide, full = (hk, wk + more), (hk + more, wk + more)
        return [
            Stage([along_x(e) for e in range(count_x)], hq * wq, wide, keys, covering=False),
            Stage([along_y(e) for e in range(count_y)], hq * (wq + more), full, wide, covering=False),
        ]

    return [PastePhases(py, px, stages(ny, nx)) for py, ny in axis for px, nx in axis]


# Tiles ----------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What is computed together.

    Attributes:
        queries: flat positions whose probabilities are needed, ascending (on the CPU).
        pixels: flat positions whose pixel correlations are needed, as slices.
        cells: cells of the canvas (see :class:`Selection`) that receive something, as slices.
        scores: the passes from ``pixels`` to ``queries``.
        pastes: for every entry of :func:`paste_phases` its passes from ``queries`` to ``cells``.
    """

    queries: Tensor
    pixels: list[slice]
    cells: list[slice]
    scores: list[Pass]
    pastes: list[list[Pass]]

    @property
    def rows(self) -> int:
        """Rows of the largest matrix."""
        sums = (*self.scores, *(step for paste in self.pastes for step in paste))
        return max(max(one.out_rows, one.source_rows) for one in sums)


def _runs(neighbours: Tensor, sources: Tensor, positions: int) -> list[Run]:
    """Rows whose neighbour is among the ascending ``sources``, as runs. ``positions``: size of the sources' grid."""
    row_of = torch.full((positions + 1,), -1, device="cpu")  # the last entry is that of neighbour -1
    row_of[sources] = torch.arange(sources.numel(), device="cpu")
    return [(out, source) for out, source in _consecutive(row_of[neighbours]) if source.start >= 0]


def _consecutive(x: Tensor) -> list[Run]:
    """Cut an integer vector into stretches of values that rise by 1: where they are, and the values they span."""
    breaks = ((x[1:] != x[:-1] + 1) | (x[:-1] < 0)).nonzero()[:, 0] + 1
    starts = [0] * (x.numel() > 0) + breaks.tolist()
    ends = [*starts[1:], x.numel()]
    values = x[starts].tolist()
    return [
        (slice(start, end), slice(value, value + end - start))
        for start, end, value in zip(starts, ends, values, strict=False)
    ]


def _restrict(stage: Stage, positions: Tensor, sources: Tensor | None = None) -> tuple[Pass, Tensor]:
    """A stage for the given output rows, and the source rows it reads: all it needs, or only those of ``sources``."""
    neighbours = [step.query_neighbour(positions) for step in stage.steps]
    if sources is None:
        sources = torch.cat(neighbours).unique()
        sources = sources[sources >= 0]
    runs = [_runs(neighbour, sources, stage.positions) for neighbour in neighbours]
    return Pass(stage, runs, positions.numel(), sources.numel()), sources


class Selection:
    """The queries to compute, cut into tiles, for given grids, semantics and wanted queries (None: all)."""

    def __init__(self, queries: Grid, keys: Grid, semantics: Semantics, selected: Tensor | None, offsets: bool) -> None:
        """``offsets``: also compute wanted queries that no wanted output depends on (possible with odd paddings)."""
        self.grid = queries
        self.semantics = semantics
        self.score_stages = score_stages(queries, keys, semantics)
        self.paste_phases = paste_phases(queries, keys, semantics)
        more = semantics.reach - 1
        self.cell_grid = (queries[0] + more, queries[1] + more)
        self.value_grid = (keys[0] + more, keys[1] + more)
        self.selected = torch.ones(queries, dtype=torch.bool, device="cpu") if selected is None else selected.cpu()
        self._wanted_cells = self._cells_of(self.selected)
        self._needed = self._queries_of(self._wanted_cells, more)
        if offsets:
            self._needed |= self.selected

    @property
    def halo(self) -> int:
        """By how much the pixels that a tile needs exceed its side."""
        return self.semantics.patch - 1 + 2 * self.semantics.half

    @cached_property
    def canvas(self) -> tuple[int, int, int, int]:
        """Bounding box (y0, x0, y1, x1) of the wanted cells."""
        return _bounding_box(self._wanted_cells)

    def canvas_pixels(self, axis: int) -> tuple[slice, slice]:
        """The output pixels that the canvas covers along an axis, and where they are in the canvas."""
        rate = self.semantics.rate
        first = rate * self.canvas[axis] - self.semantics.pad_put
        begin = max(0, first)
        end = max(begin, min(rate * self.grid[axis], rate * self.canvas[axis + 2] - self.semantics.pad_put))
        return slice(begin, end), slice(begin - first, end - first)

    def wanted_pixels(self, rows: slice, columns: slice) -> Tensor:
        """Which of these output pixels belong to wanted queries, bool [rows, columns]."""
        rate = self.semantics.rate
        y, x = (torch.arange(pixels.start, pixels.stop, device="cpu") for pixels in (rows, columns))
        return self.selected[y.div(rate, rounding_mode="floor")][:, x.div(rate, rounding_mode="floor")]

    def divisor(self, rows: slice, columns: slice) -> Tensor:
        """What the pasted sums are divided by: a scalar, or the overlap count [rows, columns] of these pixels."""
        if self.semantics.divisor:
            return torch.tensor(self.semantics.divisor, dtype=torch.float64, device="cpu")
        return self._overlap(rows, self.grid[0])[:, None] * self._overlap(columns, self.grid[1])

    def _overlap(self, pixels: slice, length: int) -> Tensor:
        """How many of ``length`` pasted patches cover each pixel of one axis (at least 1)."""
        rate = self.semantics.rate
        covered = torch.arange(pixels.start, pixels.stop, device="cpu") + self.semantics.pad_put
        last = covered.div(rate, rounding_mode="floor").clamp(max=length - 1)
        first = -(self.semantics.paste_size - 1 - covered).div(rate, rounding_mode="floor")
        return (last - first.clamp(min=0) + 1).clamp(min=1)

    def tiles(self, area: int) -> list[Tile]:
        """Tiles of about equal size and at most ``area`` queries, wide ones: the wider, the longer the runs."""
        y0, x0, y1, x1 = _bounding_box(self._needed)
        width = max(1, min(x1 - x0, 2 * math.isqrt(area)))
        rows, columns = _split(y0, y1, max(1, area // width)), _split(x0, x1, width)
        tiles = []
        for top, bottom in rows:
            for left, right in columns:
                inside = torch.zeros_like(self._needed)
                inside[top:bottom, left:right] = self._needed[top:bottom, left:right]
                if inside.any():
                    tiles.append(self._tile(inside.flatten().nonzero()[:, 0]))
        return tiles

    def _tile(self, queries: Tensor) -> Tile:
        positions = queries
        scores: list[Pass] = []
        for stage in reversed(self.score_stages):
            one, positions = _restrict(stage, positions)
            scores.insert(0, one)
        reached = torch.zeros(self.cell_grid, dtype=torch.bool, device="cpu")
        y, x = queries.div(self.grid[1], rounding_mode="floor"), queries % self.grid[1]
        more_y, more_x = self.cell_grid[0] - self.grid[0], self.cell_grid[1] - self.grid[1]
        for dy in range(more_y + 1):
            for dx in range(more_x + 1):
                reached[y + dy, x + dx] = True
        cells = (reached & self._wanted_cells).flatten().nonzero()[:, 0]
        pastes = [self._paste(paste.stages, queries, cells) for paste in self.paste_phases]
        pixels = [values for _, values in _consecutive(positions)]
        targets = [values for _, values in _consecutive(self._in_canvas(cells))]
        return Tile(queries, pixels, targets, scores, pastes)

    @staticmethod
    def _paste(stages: list[Stage], queries: Tensor, cells: Tensor) -> list[Pass]:
        along_y, rows = _restrict(stages[1], cells)
        along_x, _ = _restrict(stages[0], rows, queries)
        return [along_x, along_y]

    def _in_canvas(self, cells: Tensor) -> Tensor:
        y0, x0, _, x1 = self.canvas
        width = self.cell_grid[1]
        return (cells.div(width, rounding_mode="floor") - y0) * (x1 - x0) + cells % width - x0

    def _cells_of(self, queries: Tensor) -> Tensor:
        """The cells that hold the output pixels rate * p .. rate * p + rate - 1 of some queries p."""
        rate, pad = self.semantics.rate, self.semantics.pad_put
        cells = torch.zeros(self.cell_grid, dtype=torch.bool, device="cpu")
        height, width = self.grid
        shifts = range(pad // rate, (pad + rate - 1) // rate + 1)
        for dy in shifts:
            for dx in shifts:
                target = cells[dy : dy + height, dx : dx + width]
                target |= queries[: target.shape[0], : target.shape[1]]
        return cells

    def _queries_of(self, cells: Tensor, more: int) -> Tensor:
        """The queries that contribute to some cells."""
        height, width = self.grid
        queries = torch.zeros(self.grid, dtype=torch.bool, device="cpu")
        for dy in range(more + 1):
            for dx in range(more + 1):
                queries |= cells[dy : dy + height, dx : dx + width]
        return queries


def _bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not rows.numel():
        return 0, 0, 0, 0
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _split(begin: int, end: int, largest: int) -> list[tuple[int, int]]:
    """Cut begin..end into as few parts of about equal length as ``largest`` allows."""
    count = math.ceil((end - begin) / largest)
    bounds = [begin + (end - begin) * i // count for i in range(count)] + [end] if count else []
    return list(pairwise(bounds))
