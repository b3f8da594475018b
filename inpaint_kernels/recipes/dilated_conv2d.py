"""Blocks of one convolution, of any rate, with padding, norm, activation and residual in a usual order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inpaint_kernels.ops.dilated_conv2d import dilated_conv2d
from inpaint_kernels.recipes._class_swap import child_at
from inpaint_kernels.recipes._convolution import (
    FUSED_ACTIVATIONS,
    BlockRecipe,
    BlockReplacement,
    Padding,
    Parts,
    activation_of,
    block_mismatch,
    is_plain_convolution,
    map_calls,
    map_kinds,
    paddings_of,
    parts_of,
    weight_of,
    weight_source,
)
from inpaint_kernels.recipes._replacement import Call, Recipe, Replacement


@dataclass(frozen=True)
class ConvolutionBlock(BlockReplacement):
    """A convolution with what stands around it.

    Attributes:
        parts: of the block.
        convolution: its path; empty: the module itself.
        source: path of the module that sets its weight.
        padding: in front.
        activation: name and slope, fused with the convolution.
        called: paths of the norm and the activation that are called after it, in this order.
        residual: whether the block's input is added in the end.
    """

    recipe: ClassVar[str] = "dilated_conv2d"
    parts: Parts
    convolution: str
    source: str
    padding: Padding
    activation: tuple[str, float]
    called: tuple[str, ...]
    residual: bool

    def semantics(self) -> str:
        """What is fused."""
        words = [] if self.activation[0] == "none" else [f"{self.activation[0]} activation"]
        words += ["norm or activation called after it"] if self.called else []
        words += ["residual"] if self.residual else []
        return (", ".join(words) or "plain convolution") + str(self.padding)

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """One map."""
        conv: Any = child_at(module, self.convolution)
        return map_kinds(conv, args, kwargs)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output."""
        (x,) = args
        conv: Any = child_at(module, self.convolution)
        weight, bias = (
            weight_of(module, self.convolution, self.source) if self.convolution else (conv.weight, conv.bias)
        )
        padded, padding, padding_mode = self.padding.apply(module, conv, x)
        name, slope = self.activation
        y = dilated_conv2d(
            padded,
            weight,
            bias,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            activation=name,
            negative_slope=slope,
            residual=x if self.residual and not self.called else None,
            padding_mode=padding_mode,
        )
        for path in self.called:
            y = child_at(module, path)(y)
        return y + x if self.residual and self.called else y


class PlainConvolution(Recipe):
    """:class:`torch.nn.Conv2d` alone."""

    name: ClassVar[str] = "dilated_conv2d"

    def mismatch(self, module: nn.Module) -> str:
        """As in the base class."""
        conv: Any = module
        if not is_plain_convolution(conv):
            return "not a plain convolution"
        return "groups" if conv.groups > 1 else ""

    def calls(self, module: nn.Module, dtype: torch.dtype, example: Call | None) -> Sequence[Call]:
        """As in the base class."""
        conv: Any = module
        reach = max((k - 1) * d // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        # A convolution without padding needs all its taps inside.
        return map_calls(module, conv.in_channels, reach if conv.padding != (0, 0) else 2 * reach, dtype)

    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """As in the base class."""
        yield ConvolutionBlock(Parts(), "", "", Padding(), ("none", 0.0), (), False)


class Convolution(BlockRecipe):
    """One convolution, at most one norm and one activation, in a module of their own."""

    name: ClassVar[str] = "dilated_conv2d"

    def mismatch(self, module: nn.Module) -> str:
        """As in the base class."""
        parts = parts_of(module)
        if len(parts.convolutions) != 1:
            return f"{len(parts.convolutions)} convolutions"
        conv: Any = module.get_submodule(parts.convolutions[0])
        if conv.groups > 1:
            return "groups"
        if max(map(len, (parts.norms, parts.pads, parts.activations))) > 1:
            return "more than one norm, padding or activation"
        return block_mismatch(module, parts)

    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """As in the base class."""
        if not isinstance(output, Tensor) or output.dim() != 4:
            return
        parts = parts_of(module)
        conv: Any = module.get_submodule(parts.convolutions[0])
        if output.shape[1] != conv.out_channels:
            return
        same = output.shape == call.args[0].shape
        for padding, (act, called), residual in itertools.product(
            paddings_of(module, parts), _orders(module, parts), (False, True) if same else (False,)
        ):
            path = parts.convolutions[0]
            yield ConvolutionBlock(parts, path, weight_source(module, path), padding, act, called, residual)


def _orders(module: nn.Module, parts: Parts) -> list[tuple[tuple[str, float], tuple[str, ...]]]:
    """(fused activation, modules called after it) of every usual order."""
    none = ("none", 0.0)
    orders: list[tuple[tuple[str, float], tuple[str, ...]]] = []
    for path in parts.activations:
        fused = activation_of(module.get_submodule(path))
        if fused is not None:
            orders += [(fused, ()), (fused, parts.norms)]
        orders += [(none, (*parts.norms, path)), (none, (path, *parts.norms)), (none, (path,))]
    orders += [(none, parts.norms), (none, ())]
    if not parts.activations:
        orders += [(act, norms) for act in FUSED_ACTIVATIONS for norms in ((), parts.norms)]
    return list(dict.fromkeys(orders))
