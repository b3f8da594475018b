"""Rectangles of pixels: those of the holes of a mask, and which of them are worth painting together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CELL = 16
_Cell = tuple[int, int]  # its row and column


class Box(NamedTuple):
    """A rectangle of pixels, the ends exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    @property
    def area(self) -> int:
        """Its pixels."""
        return (self.bottom - self.top) * (self.right - self.left)

    def of(self, x: Tensor) -> Tensor:
        """This part of maps [B, C, H, W], a view."""
        return x[:, :, self.top : self.bottom, self.left : self.right]

    def grown(self, by: int, height: int, width: int) -> Box:
        """The box with ``by`` more pixels on every side, inside an image of that size."""
        top, left = max(self.top - by, 0), max(self.left - by, 0)
        return Box(top, left, min(self.bottom + by, height), min(self.right + by, width))

    def strips(self, rows: int) -> list[Box]:
        """The box cut into boxes of so many whole rows of it."""
        return [self._replace(top=y, bottom=min(y + rows, self.bottom)) for y in range(self.top, self.bottom, rows)]

    def common(self, other: Box) -> Box:
        """The pixels that lie in both, which meet."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Box(top, left, min(self.bottom, other.bottom), min(self.right, other.right))

    def seen_from(self, other: Box) -> Box:
        """The same pixels, counted from the corner of another box."""
        return Box(self.top - other.top, self.left - other.left, self.bottom - other.top, self.right - other.left)

    def joined(self, other: Box) -> Box:
        """The smallest box that holds both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        return Box(top, left, max(self.bottom, other.bottom), max(self.right, other.right))

    def meets(self, other: Box) -> bool:
        """Whether they have a pixel in common."""
        return (
            self.top < other.bottom and other.top < self.bottom and self.left < other.right and other.left < self.right
        )


def bounding_box(hole: Tensor) -> Box | None:
    """The box of the True pixels of a bool [H, W]; None if there are none."""
    rows, columns = (hole.any(dim).nonzero() for dim in (1, 0))
    if not len(rows):
        return None
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def connected_boxes(hole: Tensor, most: int = 12) -> list[Box]:
    """A box for every hole of a bool [H, W].

    Holes are apart where a whole cell of a coarse grid lies between them, along rows, columns and diagonals. The cells
    have 16 pixels along each axis, and twice as many as long as there are more than ``most`` holes.
    """
    extents = _extents(hole)
    groups = _connected(extents)
    while len(groups) > most:
        extents = _on_a_coarser_grid(extents)
        groups = _connected(extents)
    return sorted(functools.reduce(Box.joined, (extents[cell] for cell in group)) for group in groups)


def _extents(hole: Tensor) -> dict[_Cell, Box]:
    """The box of the hole's pixels in every cell that holds some; the mask is looked at on its own device, once."""
    height, width = hole.shape
    padded = F.pad(hole, (0, -width % _CELL, 0, -height % _CELL))
    cells = padded.view(torch.uint8).unflatten(1, (-1, _CELL)).unflatten(0, (-1, _CELL))  # of which amax is the faster
    in_columns, in_rows = cells.amax(1), cells.amax(3).transpose(1, 2)  # [rows, columns, cell]
    occupied = in_columns.amax(2).nonzero()
    at = torch.arange(_CELL, device=hole.device)
    lines = torch.stack([in_rows[tuple(occupied.T)], in_columns[tuple(occupied.T)]], 1) > 0  # [occupied, 2, cell]
    first, end = torch.where(lines, at, _CELL).amin(2), torch.where(lines, at + 1, 0).amax(2)
    boxes = torch.cat([first, end], 1) + _CELL * occupied.repeat(1, 2)
    return {(row, column): Box(*box) for row, column, *box in torch.cat([occupied, boxes], 1).tolist()}


def _on_a_coarser_grid(extents: Mapping[_Cell, Box]) -> dict[_Cell, Box]:
    """Those of cells that are twice as high and wide."""
    coarser: dict[_Cell, Box] = {}
    for (row, column), box in extents.items():
        cell = row // 2, column // 2
        coarser[cell] = box.joined(coarser.get(cell, box))
    return coarser


def _connected(cells: Iterable[_Cell]) -> list[list[_Cell]]:
    """Groups of cells that touch along an edge or at a corner."""
    left, groups = dict.fromkeys(cells), []
    while left:
        group = [next(iter(left))]
        del left[group[0]]
        for row, column in group:  # grows while it is walked along
            around = ((row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
            beside = [cell for cell in around if cell in left]
            for cell in beside:
                del left[cell]
            group += beside
        groups.append(group)
    return groups


def merged(boxes: Sequence[Box], cost: Callable[[Box], float]) -> list[Box]:
    """Boxes joined in pairs as long as they meet, or as the joint costs no more than both.

    Args:
        boxes: any.
        cost: of painting a box.

    Returns:
        Disjoint boxes that hold all of these.
    """
    cost = functools.cache(cost)
    result = list(dict.fromkeys(boxes))
    while pair := next(_worth_joining(result, cost), None):
        one, other = pair
        joint = one.joined(other)
        result = [box for box in result if box not in (one, other, joint)] + [joint]
    return sorted(result)


def _worth_joining(boxes: Sequence[Box], cost: Callable[[Box], float]) -> Iterator[tuple[Box, Box]]:
    for one, other in itertools.combinations(boxes, 2):
        if one.meets(other) or cost(one.joined(other)) <= cost(one) + cost(other):
            yield one, other
