"""PatchMatch written to be read: every candidate of a pass is one gather of whole patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

JUMPS = (8, 4, 2, 1)
"""Distances over which one iteration propagates matches, in this order."""

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def mix(x: Tensor) -> Tensor:
    """A 32-bit hash, on int64 tensors that hold values in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def spread(bits: Tensor, radius: int) -> Tensor:
    """An integer in [-radius, radius] from 32 random bits."""
    return ((bits * (2 * radius + 1)) >> 32) - radius


def patch_distance(query: Tensor, key: Tensor, at: Tensor, match: Tensor, patch: int) -> Tensor:
    """Sum of squared differences over the part of each patch that lies inside the query map.

    Args:
        query: [C, hq, wq].
        key: [C, hk, wk].
        at: [N] flat query positions.
        match: [N] flat key positions whose patches lie inside the key map.
        patch: side of the patches, odd.
    """
    frame = (patch // 2,) * 4
    inside = F.unfold(F.pad(torch.ones_like(query), frame)[None], patch)[0] > 0
    windows = F.unfold(F.pad(query, frame)[None], patch)[0]
    keys = F.unfold(F.pad(key, frame)[None], patch)[0]
    return torch.where(inside[:, at], windows[:, at] - keys[:, match], 0.0).square().sum(0)


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
    """Approximate nearest patches.

    Args:
        query: [B, C, hq, wq], any floating dtype.
        key: [B, C, hk, wk].
        start: [B, hq, wq] int64, an eligible flat key position for every query; -1: the query is left out.
        queries: [hq, wq] bool, the positions that are wanted.
        eligible: [B, hk, wk] bool, keys that may be chosen; their patches lie inside the key map.
        patch: side of the patches, odd.
        iterations: rounds of propagation and random search.
        radius: of the first random draw around the best match so far; halved from draw to draw.
        seed: of the random draws, in [0, 2^32).

    Returns:
        index [B, hq, wq] int64 and score [B, hq, wq], minus the distance; -1 and -inf where nothing was wanted.
    """
    index = torch.full_like(start, -1)
    score = query.new_full(start.shape, -math.inf)
    for sample in range(query.shape[0]):
        wanted = queries & (start[sample] >= 0)
        field = _Field(query[sample], key[sample], start[sample], wanted, eligible[sample], patch)
        sample_seed = mix(torch.tensor((seed + sample) & _WORD, device=query.device))
        for iteration in range(iterations):
            for jump in JUMPS:
                field.propagate(jump)
            field.search(radius, mix((sample_seed + _GOLDEN * (iteration + 1)) & _WORD))
        index[sample][wanted] = field.match[field.at]
        score[sample][wanted] = -field.distance[field.at]
    return index, score


class _Field:
    """Matches and distances of the wanted queries of one sample."""

    def __init__(self, query: Tensor, key: Tensor, start: Tensor, wanted: Tensor, eligible: Tensor, patch: int) -> None:
        self.query, self.key, self.wanted, self.eligible, self.patch = query, key, wanted, eligible, patch
        self.at = wanted.flatten().nonzero()[:, 0]
        self.match = start.flatten().clone()
        self.distance = query.new_full(self.match.shape, math.inf)
        # A NaN would compare as nearer than everything.
        self.distance[self.at] = patch_distance(query, key, self.at, self.match[self.at], patch).nan_to_num(math.inf)

    def propagate(self, jump: int) -> None:
        """Offers every query the matches of four neighbours, moved along; all read the field before the pass."""
        height, width = self.wanted.shape
        key_width = self.key.shape[2]
        before = self.match.clone()
        row, column = self.at // width, self.at % width
        for dy, dx in ((-jump, 0), (0, -jump), (0, jump), (jump, 0)):
            inside = (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
            neighbour = torch.where(inside, self.at + dy * width + dx, self.at)
            offered = inside & self.wanted.flatten()[neighbour]
            theirs = before[neighbour]
            self._consider(theirs // key_width - dy, theirs % key_width - dx, offered)

    def search(self, radius: int, iteration_key: Tensor) -> None:
        """Offers every query random keys in ever smaller squares around its best match."""
        key_width = self.key.shape[2]
        state = mix(iteration_key ^ (self.at & _WORD))
        while radius >= 1:
            first, second = mix((state + _GOLDEN) & _WORD), mix((state + 2 * _GOLDEN) & _WORD)
            state = (state + 2 * _GOLDEN) & _WORD
            best = self.match[self.at]
            row, column = best // key_width + spread(first, radius), best % key_width + spread(second, radius)
            self._consider(row, column, torch.ones_like(row, dtype=torch.bool))
            radius //= 2

    def _consider(self, row: Tensor, column: Tensor, offered: Tensor) -> None:
        """Takes the offered keys that are eligible and nearer than the best so far."""
        height, width = self.eligible.shape
        offered = offered & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        candidate = torch.where(offered, row * width + column, 0)
        offered = offered & self.eligible.flatten()[candidate]
        at, candidate = self.at[offered], candidate[offered]
        distance = patch_distance(self.query, self.key, at, candidate, self.patch)
        nearer = distance < self.distance[at]
        self.match[at[nearer]] = candidate[nearer]
        self.distance[at[nearer]] = distance[nearer]
