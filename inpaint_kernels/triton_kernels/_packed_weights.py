"""Weights as the implicit GEMM reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """A layout of packed weights: a matrix [depth, columns] of (tap, input channel) and output channel.

    Attributes:
        channels: input channels, padded with zeros.
        depth, columns: its size, padded with zeros.
        interleaved: the two halves of the output channels alternate, so that the kernel finds a feature and its gate
            in neighbouring columns.
        gate_first: features are the second half.
        depth_contiguous: elements of a column are neighbours in memory, as tensor cores read them; else those of a row.
    """

    channels: int
    depth: int
    columns: int
    interleaved: bool
    gate_first: bool
    depth_contiguous: bool


def pack(weight: Tensor, packing: Packing) -> Tensor:
    """The weights [N, C, kh, kw] as a matrix [depth, columns]."""
    matrix = F.pad(weight.detach().permute(0, 2, 3, 1), (0, packing.channels - weight.shape[1])).flatten(1)
    if packing.interleaved:
        halves = matrix.unflatten(0, (2, -1))
        halves = halves.flip(0) if packing.gate_first else halves
        matrix = halves.transpose(0, 1).flatten(0, 1)
    if packing.depth_contiguous:
        packed = matrix.new_zeros(packing.columns, packing.depth)
        packed[: matrix.shape[0], : matrix.shape[1]] = matrix
        return packed.t()
    packed = matrix.new_zeros(packing.depth, packing.columns)
    packed[: matrix.shape[1], : matrix.shape[0]] = matrix.t()
    return packed
