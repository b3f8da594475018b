"""Exhaustive patch matching written to be read: every score is stored, so it is for small maps and for tests."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def patches(x: Tensor, size: int) -> Tensor:
    """The ``size`` x ``size`` zero-padded patch around every pixel: [B, C, H, W] -> [B, C * size^2, H * W]."""
    before = (size - 1) // 2
    after = size - 1 - before
    return F.unfold(F.pad(x, (before, after, before, after)), size)


def match_patches(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    queries: Tensor | None,
    patch: int,
) -> tuple[Tensor, Tensor]:
    """Flat index and score of the best key of every query position.

    Args:
        query: [B, C, hq, wq], any floating dtype.
        key: [B, C, hk, wk].
        valid: [B or 1, hk, wk] bool; None: every key.
        key_scale: [B or 1, hk, wk]; score = key_scale * correlation + key_bias.
        key_bias: [B or 1, hk, wk].
        queries: [hq, wq] bool, the positions that are wanted; None: all.
        patch: side of the patches.

    Returns:
        index [B, hq, wq] int64 and score [B, hq, wq]; -1 and -inf where nothing was wanted or no key can be chosen.
    """
    scores = patches(query, patch).transpose(1, 2) @ patches(key, patch)
    if key_scale is not None:
        scores = scores * key_scale.flatten(1)[:, None]
    if key_bias is not None:
        scores = scores + key_bias.flatten(1)[:, None]
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    if valid is not None:
        scores = scores.masked_fill(~valid.flatten(1)[:, None], -math.inf)
    if queries is not None:
        scores = scores.masked_fill(~queries.flatten()[:, None], -math.inf)
    score, index = scores.max(-1)
    index = index.masked_fill(score == -math.inf, -1)
    return index.unflatten(1, query.shape[2:]), score.unflatten(1, query.shape[2:])
