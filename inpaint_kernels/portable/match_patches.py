"""Exhaustive patch matching in plain torch operations: slabs of key rows against tiles of queries, on any device.

The patch vectors of a slab and of a tile are multiplied, and only the running best of every query is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_BYTES = 64 << 20
"""Upper bound of the three buffers: patch vectors of the queries, patch vectors of the keys, and their scores."""


def match_patches(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    queries: Tensor | None,
    patch: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`inpaint_kernels.reference.match_patches.match_patches`; memory does not grow with queries x keys."""
    batch, channels, height, width = query.shape
    index = query.new_full((batch, height * width), -1, dtype=torch.int64)
    score = query.new_full((batch, height * width), -math.inf)
    if queries is None:
        wanted = torch.arange(height * width, device=query.device)
    else:
        wanted = queries.flatten().nonzero()[:, 0]
    query_count, key_rows = _tile_sizes(channels * patch**2, key.shape[3], query.element_size())
    for sample in range(batch):
        framed = _frame(query[sample], patch)
        for first, key_vectors in _key_slabs(key[sample], patch, key_rows):
            for tile in wanted.split(query_count):
                scores = _patches_at(framed, tile, width, patch) @ key_vectors
                _weigh(scores, first, sample, valid, key_scale, key_bias)
                tile_score, tile_index = _largest(scores)
                # Slabs come in order and "greater" is strict, so the lowest index wins a tie.
                best = score[sample, tile]
                better = tile_score > best
                score[sample, tile] = torch.where(better, tile_score, best)
                index[sample, tile] = torch.where(better, tile_index + first, index[sample, tile])
    return index.view(batch, height, width), score.view(batch, height, width)


def _tile_sizes(vector: int, key_width: int, element_size: int) -> tuple[int, int]:
    """Queries per tile and key rows per slab; the memory bound and the shapes decide, never the thread count."""
    elements = TILE_BYTES // element_size // 3
    key_rows = max(1, elements // (vector * key_width))
    return max(1, min(elements // vector, elements // (key_rows * key_width))), key_rows


def _frame(x: Tensor, patch: int) -> Tensor:
    """Zero border that a patch around every pixel reaches into."""
    before = (patch - 1) // 2
    after = patch - 1 - before
    return F.pad(x, (before, after, before, after))


def _patches_at(framed: Tensor, positions: Tensor, width: int, patch: int) -> Tensor:
    """Patch vectors around some flat positions of the unframed map: [positions, C * patch^2]."""
    steps = torch.arange(patch, device=framed.device)
    window = (steps[:, None] * framed.shape[2] + steps).flatten()
    corner = positions.div(width, rounding_mode="floor") * framed.shape[2] + positions % width
    return framed.flatten(1)[:, corner[:, None] + window].transpose(0, 1).flatten(1)


def _key_slabs(key: Tensor, patch: int, rows: int) -> Iterator[tuple[int, Tensor]]:
    """For one slab of key rows after the other: index of its first key, patch vectors [C * patch^2, rows * wk]."""
    height, width = key.shape[1], key.shape[2]
    framed = _frame(key, patch)
    for top in range(0, height, rows):
        slab = framed[None, :, top : min(top + rows, height) + patch - 1]
        yield top * width, F.unfold(slab, patch)[0]


def _weigh(
    scores: Tensor,
    first: int,
    sample: int,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
) -> None:
    """Apply scale, bias and validity of the keys from ``first`` on, in place."""
    if key_scale is not None:
        scores.mul_(_of_slab(key_scale, sample, first, scores.shape[1]))
    if key_bias is not None:
        scores.add_(_of_slab(key_bias, sample, first, scores.shape[1]))
    if valid is not None:
        scores.masked_fill_(~_of_slab(valid, sample, first, scores.shape[1]), -math.inf)


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest score of every row that is a number, and its index; ``scores`` may be overwritten."""
    score, index = scores.max(1)
    if score.isnan().any():
        score, index = scores.masked_fill_(scores.isnan(), -math.inf).max(1)
    return score, index


def _of_slab(per_key: Tensor, sample: int, first: int, count: int) -> Tensor:
    """The entries of [B or 1, hk, wk] that belong to one sample and one slab of keys."""
    return per_key[sample if per_key.shape[0] > 1 else 0].flatten()[first : first + count]
