"""Patch voting written to be read: all proposals of all positions are stored, patches first."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_vote(
    key: Tensor,
    index: Tensor,
    score: Tensor,
    confidence: Tensor,
    targets: Tensor,
    patch: int,
    bandwidth: float,
) -> Tensor:
    """The weighted mean of what the matched patches over each target propose.

    Args:
        key: [B, C, hk, wk], any floating dtype; where proposals are taken from.
        index: [B, hq, wq] int64, flat key position of each patch's match; -1: there is no patch.
        score: [B, hq, wq], minus the distance of each patch to its match.
        confidence: [hq, wq], logarithm of a weight of each patch.
        targets: [hq, wq] bool, the positions that are wanted.
        patch: side of the patches, odd.
        bandwidth: see :func:`inpaint_kernels.patch_vote`.

    Returns:
        [B, C, hq, wq], 0 where nothing was wanted or nothing is proposed.
    """
    key_height, key_width = key.shape[2:]
    half = patch // 2
    offset = torch.arange(patch * patch, device=key.device)[:, None, None]
    down, right = half - offset // patch, half - offset % patch  # from the patch's centre to the target
    match = _over(index, patch, -1)
    row = torch.where(match >= 0, match // key_width + down, -1)
    column = torch.where(match >= 0, match % key_width + right, -1)
    proposed = (row >= 0) & (row < key_height) & (column >= 0) & (column < key_width)
    source = torch.where(proposed, row * key_width + column, 0)

    distance = torch.where(proposed, -_over(score, patch, -math.inf), 0.0)
    mean_distance = distance.sum(1, keepdim=True) / proposed.sum(1, keepdim=True)
    exponent = _over(confidence[None], patch, 0.0) - distance / (2 * bandwidth * mean_distance).clamp_min(1e-8)
    weight = torch.softmax(exponent.masked_fill(~proposed, -math.inf), 1)
    sample = torch.arange(key.shape[0], device=key.device)[:, None, None, None]
    colours = key.flatten(2).transpose(1, 2)[sample, source].movedim(4, 1)
    mean = (weight[:, None] * colours).sum(2)
    return torch.where((proposed.any(1) & targets)[:, None], mean, 0.0)


def _over(x: Tensor, patch: int, outside: float) -> Tensor:
    """What belongs to the patches over each position: [B, h, w] -> [B, patch^2, h, w], by the patch's centre."""
    height, width = x.shape[1:]
    framed = F.pad(x, (patch // 2,) * 4, value=outside)
    steps = [(dy, dx) for dy in range(patch) for dx in range(patch)]
    return torch.stack([framed[:, dy : dy + height, dx : dx + width] for dy, dx in steps], 1)
