"""The CUDA backend of coherent_semantic_attention on CPU tensors: its own host code around emulated kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.emulated_attention import as_array, check_call, name_of
from tests.emulation_build import Build, Order, run

PREFIX = "coherent_semantic_attention_"
GRADIENTS = ["official", "straight", "exact"]


def in_memory_order(x: Any) -> Any:
    """A map in channels_last as the contiguous tensor that its memory is."""
    return x.permute(0, 2, 3, 1) if isinstance(x, Tensor) and not x.is_contiguous() else x


class EmulatedKernels:
    """The native CUDA kernels, run by the emulation.

    Attributes:
        launches: the ops that were called, in their order.
        seen: arguments of the last call of each op.
    """

    def __init__(self, build: Build = "plain", order: Order = "ascending") -> None:
        self.build: Build = build
        self.order: Order = order
        self.launches: list[str] = []
        self.seen: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(PREFIX):
            raise AttributeError(name)
        kernel = name.removeprefix(PREFIX)

        def call(*arguments: Any) -> None:
            check_call(name, arguments)
            self.launches.append(kernel)
            self.seen[kernel] = arguments
            getattr(self, kernel, self._launch)(kernel, *arguments)

        return call

    def _launch(self, kernel: str, *arguments: Any, dtype: torch.dtype | None = None) -> None:
        """Run a launcher whose arguments are those of the op; ``dtype`` is that of the map or rows unless given."""
        name = PREFIX + kernel + "_" + name_of(dtype or arguments[3].dtype)
        arrays = [as_array(in_memory_order(x)) if x is None or isinstance(x, Tensor) else x for x in arguments]
        run((name, *arrays), build=self.build, order=self.order)

    def operands(self, kernel: str, *arguments: Any) -> None:
        *plan, queries, keys, count = arguments
        self._launch(kernel, *plan, queries, keys, keys.shape[1], keys.shape[2], count)

    def filter(self, kernel: str, *arguments: Any) -> None:
        *plan, products, first_sample, first_query, first_key, is_last, error = arguments[:11]
        samples, queries, keys = products.shape
        tile = (first_sample, samples, first_query, queries, first_key, keys, is_last, error)
        self._launch(kernel, *plan, products, *tile, *arguments[11:])

    def coefficients(self, kernel: str, *arguments: Any) -> None:
        self._launch(kernel, *arguments, dtype=arguments[5].dtype)

    def backward_scan(self, kernel: str, *arguments: Any) -> None:
        is_exact = arguments[3] is not None
        self._launch(kernel, *arguments[:13], is_exact, *arguments[13:], dtype=arguments[7].dtype)

    def gradient(self, kernel: str, *arguments: Any) -> None:
        mode = GRADIENTS.index(arguments[11])
        self._launch(kernel, *arguments[:11], mode, *arguments[12:], dtype=arguments[8].dtype)
