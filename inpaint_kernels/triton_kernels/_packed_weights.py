"""Weights as the implicit GEMM reads them, packed once per version of a parameter."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor


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


@dataclass
class _Entry:
    """What is known of one weight, alive as long as the weight."""

    weight: weakref.ref[Tensor]
    state: tuple[int, int]
    packed: OrderedDict[tuple[Packing, int], Tensor] = field(default_factory=OrderedDict)


class PackedWeights:
    """Packed copies of the weights used last.

    Keeps no weight alive, and forgets a copy when its weight is freed, changed in place (torch counts a tensor's
    versions) or moved. An edit through ``weight.data`` counts no version and cannot be seen: call :meth:`clear` then.
    Copies belong to the stream that made them. While a CUDA graph is captured nothing is taken from here or kept, so
    that a replayed graph packs the weights as they are then.

    Args:
        limit: Most weights with copies; the one used least recently goes.
        copies: Most copies of one weight.
    """

    def __init__(self, limit: int = 512, copies: int = 8) -> None:
        self._limit, self._copies = limit, copies
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        # Reentrant: freeing a weight while the lock is held calls _forget in the same thread.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget every copy."""
        with self._lock:
            self._entries.clear()

    def get(self, weight: Tensor, packing: Packing) -> Tensor:
        """The packed weight, from here or packed now."""
        if not _may_be_kept(weight):
            return pack(weight, packing)
        key = (packing, _stream(weight))
        state = (weight._version, weight.data_ptr())
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is not None and entry.weight() is weight and entry.state == state and key in entry.packed:
                self._entries.move_to_end(id(weight))
                entry.packed.move_to_end(key)
                return entry.packed[key]
        packed = pack(weight, packing)
        self._keep(weight, state, key, packed)
        return packed

    def _keep(self, weight: Tensor, state: tuple[int, int], key: tuple[Packing, int], packed: Tensor) -> None:
        identity = id(weight)
        with self._lock:
            entry = self._entries.get(identity)
            if entry is None or entry.weight() is not weight or entry.state != state:
                entry = _Entry(weakref.ref(weight, lambda reference: self._forget(identity, reference)), state)
                self._entries[identity] = entry
            entry.packed[key] = packed
            self._entries.move_to_end(identity)
            if len(entry.packed) > self._copies:
                entry.packed.popitem(last=False)
            if len(self._entries) > self._limit:
                self._entries.popitem(last=False)

    def _forget(self, identity: int, reference: weakref.ref[Tensor]) -> None:
        """The weight of ``reference`` is gone; another one may have its identity by now."""
        with self._lock:
            entry = self._entries.get(identity)
            if entry is not None and entry.weight is reference:
                del self._entries[identity]


PACKED_WEIGHTS = PackedWeights()
"""The one that the kernels use."""


def _may_be_kept(weight: Tensor) -> bool:
    if isinstance(weight, FakeTensor) or torch.compiler.is_compiling():
        return False
    if weight.is_inference():  # has no version
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _stream(weight: Tensor) -> int:
    if not weight.is_cuda:
        return 0
    stream: Any = torch.cuda.current_stream(weight.device)
    return int(stream.cuda_stream)
