"""The CUDA backend of contextual_attention on CPU tensors: its own host code around emulated kernels.

:class:`EmulatedKernels` stands in for ``torch.ops.inpaint_native``: the same names and arguments as the ops in
csrc/library.cpp, each handed to the launcher that the emulation exposes.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from tests.emulation_build import ROOT, Build, Order, run

RULES = ["none", "add", "max", "sum"]
PREFIX = "contextual_attention_"


def as_array(x: Tensor | None) -> Any:
    """A NumPy array of the same memory; bfloat16 as its bits."""
    if x is None:
        return None
    assert x.is_contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def schemas() -> dict[str, Any]:
    """The schemas of csrc/library.cpp by the name of the op."""
    text = (ROOT / "csrc/library.cpp").read_text(encoding="utf-8")
    literals = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", text)
    parsed = [torch._C.parse_schema("".join(re.findall(r"\"([^\"]*)\"", literal))) for literal in literals]
    return {schema.name: schema for schema in parsed}


def check_call(name: str, arguments: tuple[Any, ...]) -> None:
    """Fail for arguments that the op's schema would refuse: without a GPU, nobody else would notice."""
    expected = schemas()[name].arguments
    assert len(arguments) == len(expected), f"{name}: {len(expected)} arguments expected, got {len(arguments)}"
    accepted: dict[str, tuple[type, ...]] = {"Tensor": (Tensor,), "int": (int,), "float": (float,), "bool": (bool,)}
    accepted |= {"str": (str,), "Optional[Tensor]": (Tensor, type(None))}
    for argument, value in zip(expected, arguments, strict=True):
        assert isinstance(value, accepted[str(argument.type)]), f"{name}: {argument.name} is {type(value)}"


class EmulatedKernels:
    """The native CUDA kernels, run by the emulation.

    Attributes:
        launches: the ops that were called, in their order.
    """

    def __init__(self, build: Build = "plain", order: Order = "ascending") -> None:
        self.build: Build = build
        self.order: Order = order
        self.launches: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(PREFIX):
            raise AttributeError(name)
        kernel = name.removeprefix(PREFIX)

        def call(*arguments: Any) -> Any:
            check_call(name, arguments)
            self.launches.append(kernel)
            return getattr(self, kernel)(*arguments)

        return call

    def _launch(self, kernel: str, dtypes: str, *arguments: Any) -> None:
        name = PREFIX + kernel + (f"_{dtypes}" if dtypes else "")
        arrays = [as_array(x) if x is None or isinstance(x, Tensor) else x for x in arguments]
        run((name, *arrays), build=self.build, order=self.order)

    def key_norm(self, key: Tensor, patch: int, rule: str, eps: float) -> Tensor:
        energy, norm = (torch.full((key.shape[0], *key.shape[2:]), float("nan"), dtype=key.dtype) for _ in range(2))
        arguments = (*key.shape, patch, RULES.index(rule), eps, 2)
        self._launch("key_norm", name_of(key.dtype), key.contiguous(), energy, norm, *arguments)
        return norm

    def rows(self, runs: Tensor, rows: int, row_of: Tensor, position_of: Tensor) -> None:
        self._launch("rows", "", runs, runs.shape[0], rows, row_of, position_of, row_of.numel())

    def scores(self, tile: Tensor, correlations: Tensor, *rest: Tensor) -> None:
        self._launch("scores", name_of(correlations.dtype), tile, correlations, *rest)

    def statistics(self, partial: Tensor, statistics: Tensor) -> None:
        samples, _, queries, partials = partial.shape
        self._launch("statistics", name_of(partial.dtype), partial, statistics, samples, queries, partials)

    def paste_weights(self, tile: Tensor, keep: Tensor | None, floor: float, logits: Tensor, *rest: Any) -> None:
        weights = rest[2]
        dtypes = f"{name_of(logits.dtype)}_{name_of(weights.dtype)}"
        self._launch("paste_weights", dtypes, tile, keep, floor, logits, *rest)

    def paste(self, tile: Tensor, phases: Tensor, products: Tensor, *rest: Any) -> None:
        output = rest[-1]
        dtypes = f"{name_of(products.dtype)}_{name_of(output.dtype)}"
        self._launch("paste", dtypes, tile, phases, output.shape[1], products, *rest)

    def matches(self, tile: Tensor, keep: Tensor | None, floor: float, *rest: Any) -> None:
        self._launch("matches", name_of(rest[0].dtype), tile, keep, floor, *rest)

    def softmax_backward(self, tile: Tensor, weight_gradients: Tensor, dots: Tensor, *rest: Any) -> None:
        arguments = (weight_gradients, dots, dots.shape[0], dots.shape[4])
        self._launch("softmax_backward", name_of(dots.dtype), tile, *arguments, *rest)

    def fuse_backward(self, tile: Tensor, gradients: Tensor, *rest: Tensor) -> None:
        score_gradients = rest[4]
        dtypes = f"{name_of(gradients.dtype)}_{name_of(score_gradients.dtype)}"
        self._launch("fuse_backward", dtypes, tile, gradients, *rest)

    def patch_backward(self, tile: Tensor, score_gradients: Tensor, *rest: Tensor) -> None:
        of_scores = torch.float64 if score_gradients.dtype == torch.float64 else torch.float32
        dtypes = f"{name_of(of_scores)}_{name_of(score_gradients.dtype)}"
        self._launch("patch_backward", dtypes, tile, score_gradients, *rest)
