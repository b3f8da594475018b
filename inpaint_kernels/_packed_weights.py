"""Weights as kernels read them, packed once per version of a parameter."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

K = TypeVar("K", bound=Hashable)


@dataclass
class _Entry:
    """What is known of one weight, alive as long as the weight."""

    weight: weakref.ref[Tensor]
    state: object
    packed: OrderedDict[tuple[Hashable, int], Tensor] = field(default_factory=OrderedDict)


class PackedWeights:
    """Packed copies of the weights used last.

    Keeps no weight alive, and forgets a copy when its weight is freed or changed. Of a weight on the CPU the values
    themselves are compared, by a digest. On a GPU, where that would wait, torch's count of changes in place and the
    memory's address have to do: an edit through ``weight.data`` counts as no change there and cannot be seen; call
    :meth:`clear` then. Copies belong to the stream that made them. While a CUDA graph is captured nothing is taken from
    here or kept, so that a replayed graph packs the weights as they are then.

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

    def get(
        self,
        weight: Tensor,
        packing: K,
        pack: Callable[[Tensor, K], Tensor],
        digest: Callable[[Tensor], int] | None = None,
        *,
        keep: bool = True,
    ) -> Tensor:
        """The weight as ``pack(weight, packing)`` makes it, from here or made now, and then kept here or not.

        ``digest`` of the weight tells whether it has changed; None: its version does.
        """
        if not _may_be_kept(weight, digest is None) or not (keep or id(weight) in self._entries):
            return pack(weight, packing)
        key = (packing, _stream(weight))
        state = (weight._version, weight.data_ptr()) if digest is None else digest(weight)
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is not None and entry.weight() is weight and entry.state == state and key in entry.packed:
                self._entries.move_to_end(id(weight))
                entry.packed.move_to_end(key)
                return entry.packed[key]
        packed = pack(weight, packing)
        if keep:
            self._keep(weight, state, key, packed)
        return packed

    def _keep(self, weight: Tensor, state: object, key: tuple[Hashable, int], packed: Tensor) -> None:
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
"""The one that all kernels use."""


def _may_be_kept(weight: Tensor, needs_version: bool) -> bool:
    if isinstance(weight, FakeTensor) or torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if needs_version and weight.is_inference():  # has no version
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _stream(weight: Tensor) -> int:
    if not weight.is_cuda:
        return 0
    stream: Any = torch.cuda.current_stream(weight.device)
    return int(stream.cuda_stream)
