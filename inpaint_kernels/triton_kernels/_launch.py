"""A launch of a Triton kernel, and what decides how it addresses its tensors. Does not import Triton."""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels.portable._convolution import layout_of

_LARGEST_INT32_TENSOR = 2**31 - 2**20
"""Elements of a tensor that 32-bit offsets reach, masked ones just beyond its end included."""

COMMON_OPTIONS = {"enable_fp_fusion": True}
"""The default of Triton up to 3.9, which 3.9 warns of and 3.10 changes. A launch may have its own."""


class Launch(NamedTuple):
    """A kernel with all that it is called with; the tests compile it without a GPU.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: number of programs.
        arguments: tensors, numbers, and None for a tensor that is not there.
        constants: compile-time parameters.
        options: warps, stages, and what is not as in COMMON_OPTIONS.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def keywords(self) -> dict[str, Any]:
        """All that the kernel is called with."""
        return {**self.arguments, **self.constants, **COMMON_OPTIONS, **self.options}

    def run(self) -> None:
        """Launch on the device of the tensors, in its current stream."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.keywords)


class Layout(Enum):
    """How the channels and pixels of a map lie in memory. A map of one channel or one pixel is in both."""

    NCHW = torch.contiguous_format
    CHANNELS_LAST = torch.channels_last

    @staticmethod
    def like(x: Tensor) -> Layout:
        """That of an output: channels_last if x is contiguous in it and not in NCHW, else NCHW."""
        return Layout(layout_of(x))

    def of(self, x: Tensor) -> Tensor:
        """The tensor itself or a copy in this layout."""
        return x.contiguous(memory_format=self.value)

    def empty(self, x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
        """An uninitialised map of x's batch, dtype and device."""
        shape = (x.shape[0], channels, *size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.value)


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether offsets into one of the tensors exceed 32 bits."""
    return any(tensor is not None and _reach(tensor) > _LARGEST_INT32_TENSOR for tensor in tensors)


def _reach(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of a tensor: more than it has, where it is not dense."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() > 0 else 0
