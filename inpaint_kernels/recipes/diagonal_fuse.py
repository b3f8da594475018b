"""Attention code that is otherwise unknown: its convolutions of a score matrix with a unit matrix become shifted sums.

A convolution [1, 1, L, L] -> [1, 1, L, L] with a 3 x 3 unit matrix adds three numbers per score. oneDNN stores the one
channel as sixteen for it: at L = 4,096 the call takes 1.1 GB beside its result of 64 MB, and 12 times as long as the
shifted sums (0.70 against 0.056 CPU seconds).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inpaint_kernels.recipes._class_swap import argument_names, original_class
from inpaint_kernels.recipes._replacement import Call, Form, Recipe, Replacement
from inpaint_kernels.recipes.contextual_attention import ContextualAttention

_LARGEST_MAP = 64 * 64
"""Positions of a map up to which an example is probed."""

_SMALLEST = 4096
"""Elements below which torch's own convolution is as quick."""


class DiagonalSum(torch.autograd.Function):
    """The convolution of one channel with a unit matrix: out[i, j] is the sum over d of x[i + d - p, j + d - p]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, padding: int) -> Tensor:
        """[B, 1, H, W] -> [B, 1, H + 2p - k + 1, W + 2p - k + 1]."""
        ctx.size, ctx.padding = size, padding
        return _diagonal_sum(x, size, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The same sum of the other shifts."""
        return _diagonal_sum(grads[0], ctx.size, ctx.size - 1 - ctx.padding), None, None


def _diagonal_sum(x: Tensor, size: int, padding: int) -> Tensor:
    height, width = (side + 2 * padding - size + 1 for side in x.shape[2:])
    out = x.new_zeros(*x.shape[:2], height, width)
    for shift in range(-padding, size - padding):
        top, left = max(0, -shift), max(0, -shift)
        rows = min(height, x.shape[2] - shift) - top
        columns = min(width, x.shape[3] - shift) - left
        if rows > 0 and columns > 0:
            source = x[:, :, top + shift : top + shift + rows, left + shift : left + shift + columns]
            out[:, :, top : top + rows, left : left + columns] += source
    return out


class DiagonalSums(TorchFunctionMode):
    """While it is active, in the thread that entered it, convolutions with a unit matrix are :class:`DiagonalSum`.

    Attributes:
        count: how many it took over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Take over the convolutions; let everything else pass."""
        kwargs = kwargs or {}
        if func in (F.conv2d, torch.conv2d):
            taken = _unit_convolution(args, kwargs)
            if taken is not None:
                self.count += 1
                return DiagonalSum.apply(*taken)
        return func(*args, **kwargs)


def _unit_convolution(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, int, int] | None:
    """(x, size, padding) of a convolution of one large channel with a constant unit matrix, else None."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight = given.get("input"), given.get("weight")
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.requires_grad or x.dim() != 4:
        return None
    size = weight.shape[-1]
    if weight.shape != (1, 1, size, size) or size < 2 or x.shape[1] != 1 or x.shape[2] * x.shape[3] < _SMALLEST:
        return None
    padding = given.get("padding", 0)
    pads = {padding} if isinstance(padding, int) else set(padding) if isinstance(padding, (tuple, list)) else set()
    ones = all(_is_one(given.get(name, 1)) for name in ("stride", "dilation", "groups"))
    if len(pads) != 1 or not ones or given.get("bias") is not None or not 0 <= min(pads) < size:
        return None
    if x.dtype != weight.dtype or not torch.equal(weight[0, 0], torch.eye(size, dtype=x.dtype, device=weight.device)):
        return None
    return x, size, pads.pop()


def _is_one(value: Any) -> bool:
    return value == 1 or (isinstance(value, (tuple, list)) and set(value) == {1})


@dataclass(frozen=True)
class DiagonalFuse(Replacement):
    """The module's own forward, its convolutions with unit matrices taken over."""

    recipe: ClassVar[str] = "diagonal_fuse"
    names: tuple[str, ...]

    def semantics(self) -> str:
        """What changes."""
        return "unknown attention; its unit-matrix convolutions become shifted sums"

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """Any call: the forward is the module's own."""
        return "torch.compile traces no function modes" if torch.compiler.is_compiling() else frozenset({"any"})

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        with DiagonalSums():
            return original_class(module).forward(module, *args, **kwargs)


class DiagonalFuses(Recipe):
    """A module that holds or makes a unit matrix and convolves with it."""

    name: ClassVar[str] = "diagonal_fuse"
    uses_example: ClassVar[bool] = True

    def mismatch(self, module: nn.Module) -> str:
        """As in the base class."""
        if original_class(module).__module__.startswith("torch."):
            return "a module of torch"
        if len(argument_names(module)) < 2:
            return "not two maps"
        return "it holds other attention modules" if len(list(module.modules())) > 16 else ""

    def calls(self, module: nn.Module, dtype: torch.dtype, example: Call | None) -> Sequence[Call]:
        """As in the base class."""
        if example is not None:
            # Unknown attention may keep dozens of score matrices for its gradient.
            small = all(not isinstance(x, Form) or x.shape[2:].numel() <= _LARGEST_MAP for x in example.args[:2])
            calls = [example.filled(dtype)] if small else []
        else:
            attention = ContextualAttention()
            calls = [] if attention.mismatch(module) else [*attention.calls(module, dtype, None)[:3]]
        return calls if any(_unit_convolutions(module, call) for call in calls) else []

    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """As in the base class: only where at least one convolution is taken over."""
        if _unit_convolutions(module, call):
            yield DiagonalFuse(argument_names(module))


def _unit_convolutions(module: nn.Module, call: Call) -> int:
    """How many convolutions with a unit matrix are made in a call; 0 where it fails."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()), DiagonalSums() as sums:
            original_class(module).forward(module, *call.args, **call.kwargs)
    except Exception:  # whatever a foreign module raises
        return 0
    return sums.count
