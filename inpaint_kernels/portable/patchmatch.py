"""PatchMatch in plain torch operations, on any device: distances are summed offset by offset, tile by tile."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1 << 16
"""Candidates whose distances are computed together; bounds the memory beyond the maps and the field."""

_JUMPS = (8, 4, 2, 1)
_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def patchmatch(
    query: Tensor,
    key: Tensor,
    start: Tensor,
    queries: Tensor,
    eligible: Tensor,
    patch: int,
    iterations: int,
    radius: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`inpaint_kernels.reference.patchmatch.patchmatch`: the same candidates in the same order."""
    index = torch.full_like(start, -1)
    score = query.new_full(start.shape, -math.inf)
    for sample in range(query.shape[0]):
        at = (queries & (start[sample] >= 0)).flatten().nonzero()[:, 0]
        distances = _Distances(query[sample], key[sample], patch)
        row, column = at // query.shape[3], at % query.shape[3]
        place = torch.full((queries.numel(),), -1, dtype=torch.int64, device=query.device)
        place[at] = torch.arange(len(at), device=query.device)
        neighbours = {jump: _neighbours(row, column, jump, place, queries.shape) for jump in _JUMPS}
        match = start[sample].flatten()[at]
        # A NaN would compare as nearer than everything.
        distance = distances(row, column, match).nan_to_num(math.inf)
        sample_key = _mix(torch.tensor((seed + sample) & _WORD, device=query.device))
        for iteration in range(iterations):
            for jump in _JUMPS:
                before = match
                for (dy, dx), neighbour in neighbours[jump]:
                    theirs = before[neighbour.clamp_min(0)]
                    offer = _key_at(theirs, -dy, -dx, neighbour >= 0, eligible[sample])
                    match, distance = _nearer(distances, row, column, match, distance, offer)
            state = _mix(_mix((sample_key + _GOLDEN * (iteration + 1)) & _WORD) ^ (at & _WORD))
            reach = radius
            while reach >= 1:
                draws = [_mix((state + n * _GOLDEN) & _WORD) * (2 * reach + 1) >> 32 for n in (1, 2)]
                state = (state + 2 * _GOLDEN) & _WORD
                offer = _key_at(match, draws[0] - reach, draws[1] - reach, None, eligible[sample])
                match, distance = _nearer(distances, row, column, match, distance, offer)
                reach //= 2
        index[sample].view(-1)[at] = match
        score[sample].view(-1)[at] = -distance
    return index, score


class _Distances:
    """Patch distances between lists of query and key positions of one sample."""

    def __init__(self, query: Tensor, key: Tensor, patch: int) -> None:
        self.half = patch // 2
        frame = (self.half,) * 4
        self.query = F.pad(query, frame).permute(1, 2, 0).contiguous()
        self.inside = F.pad(torch.ones_like(query[0], dtype=torch.bool), frame)
        self.key = key.permute(1, 2, 0).contiguous()

    def __call__(self, row: Tensor, column: Tensor, match: Tensor) -> Tensor:
        tiles = zip(row.split(TILE), column.split(TILE), match.split(TILE), strict=True)
        return torch.cat([self._tile(*tile) for tile in tiles])

    def _tile(self, row: Tensor, column: Tensor, match: Tensor) -> Tensor:
        query, key, inside = self.query.flatten(0, 1), self.key.flatten(0, 1), self.inside.flatten()
        query_width, key_width = self.query.shape[1], self.key.shape[1]
        corner = row * query_width + column
        key_corner = match - self.half * (key_width + 1)
        distance = query.new_zeros(row.shape)
        for dy in range(2 * self.half + 1):
            for dx in range(2 * self.half + 1):
                at = corner + dy * query_width + dx
                difference = query[at] - key[key_corner + dy * key_width + dx]
                distance += torch.where(inside[at], difference.square().sum(1), 0.0)
        return distance


def _neighbours(
    row: Tensor, column: Tensor, jump: int, place: Tensor, shape: torch.Size
) -> list[tuple[tuple[int, int], Tensor]]:
    """The four steps of a jump, each with the place of that neighbour in the list of queries; -1: there is none."""
    height, width = shape
    found = []
    for dy, dx in ((-jump, 0), (0, -jump), (0, jump), (jump, 0)):
        y, x = row + dy, column + dx
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        found.append(((dy, dx), torch.where(inside, place[torch.where(inside, y * width + x, 0)], -1)))
    return found


def _key_at(match: Tensor, dy: Tensor | int, dx: Tensor | int, offered: Tensor | None, eligible: Tensor) -> Tensor:
    """Keys at a distance from ``match``; -1 where nothing is offered or the key is not eligible."""
    height, width = eligible.shape
    row, column = match // width + dy, match % width + dx
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if offered is not None:
        inside &= offered
    key = torch.where(inside, row * width + column, 0)
    return torch.where(inside & eligible.flatten()[key], key, -1)


def _nearer(
    distances: _Distances, row: Tensor, column: Tensor, match: Tensor, distance: Tensor, offer: Tensor
) -> tuple[Tensor, Tensor]:
    """The matches and distances after the keys on offer (-1: none) that are nearer were taken."""
    new = ((offer >= 0) & (offer != match)).nonzero()[:, 0]
    if not len(new):
        return match, distance
    candidate = offer[new]
    offered = distances(row[new], column[new], candidate)
    taken = offered < distance[new]
    return match.index_put((new[taken],), candidate[taken]), distance.index_put((new[taken],), offered[taken])


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash, on int64 tensors that hold values in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
