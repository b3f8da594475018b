"""Patch voting in plain torch operations, on any device: targets are gathered tile by tile."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1 << 15
"""Targets that vote together; bounds the memory beyond the maps."""


def patch_vote(
    key: Tensor,
    index: Tensor,
    score: Tensor,
    confidence: Tensor,
    targets: Tensor,
    patch: int,
    bandwidth: float,
) -> Tensor:
    """See :func:`inpaint_kernels.reference.patch_vote.patch_vote`."""
    height, width = targets.shape
    out = key.new_zeros(key.shape[0], key.shape[1], height * width)
    steps = torch.arange(patch, device=key.device)
    window = (steps[:, None] * (width + patch - 1) + steps).flatten()[:, None]
    down, right = (patch // 2 - steps).repeat_interleave(patch)[:, None], (patch // 2 - steps).repeat(patch)[:, None]
    frame = (patch // 2,) * 4
    framed_confidence = F.pad(confidence, frame).flatten()
    places = targets.flatten().nonzero()[:, 0]
    for sample in range(key.shape[0]):
        framed_index = F.pad(index[sample], frame, value=-1).flatten()
        framed_score = F.pad(score[sample], frame, value=-math.inf).flatten()
        colours = key[sample].flatten(1).t().contiguous()
        for tile in places.split(TILE):
            over = tile // width * (width + patch - 1) + tile % width + window
            source, proposed = _sources(framed_index[over], down, right, key.shape[2], key.shape[3])
            distance = torch.where(proposed, -framed_score[over], 0.0)
            spread = (2 * bandwidth * distance.sum(0) / proposed.sum(0)).clamp_min(1e-8)
            exponent = torch.where(proposed, framed_confidence[over] - distance / spread, -math.inf)
            mean = _weighted_mean(colours, source, torch.softmax(exponent, 0))
            out[sample][:, tile] = torch.where(proposed.any(0), mean.t(), 0.0)
    return out.unflatten(2, (height, width))


def _sources(match: Tensor, down: Tensor, right: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat key positions of the proposals, and whether there is one; both [patch^2, N]."""
    row, column = match // width + down, match % width + right
    proposed = (match >= 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(proposed, row * width + column, 0), proposed


def _weighted_mean(colours: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """[N, C], without storing the colours of all proposals together."""
    mean = colours.new_zeros(source.shape[1], colours.shape[1])
    for places, share in zip(source, weight, strict=True):
        mean.addcmul_(colours[places], share[:, None])
    return mean
