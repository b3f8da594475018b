"""The CUDA backend of contextual_attention on CPU tensors: its own host code around emulated kernels.

:class:`EmulatedKernels` stands in for ``torch.ops.inpaint_native``: the same names and arguments as the ops in
csrc/library.cpp, each handed to the launcher that the emulation exposes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.emulation_build import Build, Order, run

RULES = ["none", "add", "max", "sum"]


def as_array(x: Tensor | None) -> Any:
    """A NumPy array of the same memory; bfloat16 as its bits."""
    if x is None:
        return None
    assert x.is_contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class EmulatedKernels:
    """The native CUDA kernels, run by the emulation."""

    def __init__(self, build: Build = "plain", order: Order = "ascending") -> None:
        self.build: Build = build
        self.order: Order = order
        self.launched: set[str] = set()

    def _launch(self, kernel: str, dtypes: str, *arguments: Any) -> None:
        self.launched.add(kernel)
        name = f"contextual_attention_{kernel}" + (f"_{dtypes}" if dtypes else "")
        arrays = [as_array(x) if x is None or isinstance(x, Tensor) else x for x in arguments]
        run((name, *arrays), build=self.build, order=self.order)

    def contextual_attention_key_norm(self, key: Tensor, patch: int, rule: str, eps: float) -> Tensor:
        energy, norm = (torch.full((key.shape[0], *key.shape[2:]), float("nan"), dtype=key.dtype) for _ in range(2))
        arguments = (*key.shape, patch, RULES.index(rule), eps, 2)
        self._launch("key_norm", name_of(key.dtype), key.contiguous(), energy, norm, *arguments)
        return norm

    def contextual_attention_rows(self, runs: Tensor, rows: int, row_of: Tensor, position_of: Tensor) -> None:
        self._launch("rows", "", runs, runs.shape[0], rows, row_of, position_of, row_of.numel())

    def contextual_attention_scores(self, tile: Tensor, correlations: Tensor, *rest: Tensor) -> None:
        self._launch("scores", name_of(correlations.dtype), tile, correlations, *rest)

    def contextual_attention_statistics(self, partial: Tensor, statistics: Tensor) -> None:
        self._launch("statistics", name_of(partial.dtype), partial, statistics, partial.shape[1], partial.shape[2])

    def contextual_attention_paste_weights(
        self, tile: Tensor, keep: Tensor | None, floor: float, logits: Tensor, statistics: Tensor, weights: Tensor
    ) -> None:
        dtypes = f"{name_of(logits.dtype)}_{name_of(weights.dtype)}"
        self._launch("paste_weights", dtypes, tile, keep, floor, logits, statistics, weights)

    def contextual_attention_paste(
        self,
        tile: Tensor,
        phases: Tensor,
        products: Tensor,
        row_weight: Tensor,
        column_weight: Tensor,
        wanted: Tensor | None,
        output: Tensor,
    ) -> None:
        dtypes = f"{name_of(products.dtype)}_{name_of(output.dtype)}"
        arguments = (output.shape[0], products, row_weight, column_weight, wanted, output)
        self._launch("paste", dtypes, tile, phases, *arguments)

    def contextual_attention_matches(self, tile: Tensor, keep: Tensor | None, floor: float, *rest: Any) -> None:
        self._launch("matches", name_of(rest[0].dtype), tile, keep, floor, *rest)

    def contextual_attention_paste_backward(
        self, tile: Tensor, weight_gradients: Tensor, accumulate: bool, gradients: Tensor
    ) -> None:
        arguments = (weight_gradients, gradients, accumulate)
        self._launch("paste_backward", name_of(gradients.dtype), tile, *arguments)

    def contextual_attention_softmax_backward(self, tile: Tensor, factor: Tensor, *rest: Any) -> None:
        self._launch("softmax_backward", name_of(factor.dtype), tile, factor, *rest)

    def contextual_attention_fuse_backward(
        self,
        tile: Tensor,
        gradients: Tensor,
        correlations: Tensor,
        row_of: Tensor,
        inverse_norm: Tensor,
        positions: Tensor,
        score_gradients: Tensor,
        norm_sums: Tensor,
    ) -> None:
        arguments = (gradients, correlations, row_of, inverse_norm, positions, positions.numel())
        self._launch("fuse_backward", name_of(gradients.dtype), tile, *arguments, score_gradients, norm_sums)

    def contextual_attention_patch_backward(
        self, tile: Tensor, score_gradients: Tensor, row_of: Tensor, pixels: Tensor, gradients: Tensor
    ) -> None:
        arguments = (score_gradients, row_of, pixels, pixels.numel(), gradients)
        self._launch("patch_backward", name_of(gradients.dtype), tile, *arguments)
