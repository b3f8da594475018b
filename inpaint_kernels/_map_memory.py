"""Memory of the maps that CPU kernels make: of large ones, pages that the system gets back with the map."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 4 << 20
"""Bytes of a large map, as in csrc/cpu/memory.h."""

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux; a page of 4 KiB at a time would cost as much as it saves


def empty_map(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """An uninitialised map [B, C, H, W] on the CPU.

    A large one does not come from malloc, which keeps freed blocks of up to 32 MiB in its heap. Maps of many sizes come
    and go there, packed weights settle between them, and the gaps fit no later map: at 512 x 512 they were 110 of the
    310 MiB of DeepFill v1 under ``accelerate``, 75 of 250 of DeepFill v2, at the same speed. Its storage cannot be
    resized.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = _pages(size) if size >= _SMALLEST else None
    if pages is None:
        return torch.empty(tuple(shape), dtype=dtype, memory_format=layout)
    strides = torch.empty(tuple(shape), device="meta", memory_format=layout).stride()
    storage = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), strides)  # no view, as autograd would take it for


def _pages(size: int) -> mmap.mmap | None:
    """So many bytes of their own; None where there are no huge pages or no memory, which is for torch to tell."""
    if _ADVICE is None:
        return None
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(_ADVICE)
    except OSError:
        return None
    return pages
