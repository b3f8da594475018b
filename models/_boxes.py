"""Rectangles of pixels: those of the holes of a mask, and which of them are worth painting together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_CELL = 16


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
    cell, groups = _SMALLEST_CELL, _connected_cells(hole, _SMALLEST_CELL)
    while len(groups) > most:
        cell *= 2
        groups = _connected_cells(hole, cell)
    boxes = []
    for group in groups:
        pixels = torch.zeros_like(hole)
        for row, column in group:
            pixels[cell * row : cell * (row + 1), cell * column : cell * (column + 1)] = True
        box = bounding_box(hole & pixels)
        assert box is not None
        boxes.append(box)
    return boxes


def _connected_cells(hole: Tensor, cell: int) -> list[list[tuple[int, int]]]:
    """Groups of cells, (row, column), that hold a hole and touch along an edge or at a corner."""
    occupied = F.max_pool2d(hole[None].float(), cell, ceil_mode=True)[0].nonzero().tolist()
    left, groups = {(row, column) for row, column in occupied}, []
    for row, column in occupied:
        if (row, column) not in left:
            continue
        left.remove((row, column))
        group = [(row, column)]
        for y, x in group:  # grows while it is walked along
            beside = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= beside
            group += sorted(beside)
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
