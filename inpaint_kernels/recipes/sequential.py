""":class:`torch.nn.Sequential`: runs of padding, convolution and activation in it are fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from inpaint_kernels.recipes._class_swap import child_at
from inpaint_kernels.recipes._convolution import ACTIVATIONS, PADS, activation_of, is_plain_convolution
from inpaint_kernels.recipes._replacement import Replacement
from inpaint_kernels.recipes.dilated_conv2d import ConvolutionBlock


@dataclass(frozen=True)
class Segment:
    """Children of a Sequential that are run as one.

    Attributes:
        names: of the children, in order.
        block: the replacement of a Sequential of them alone; None: they are called.
    """

    names: tuple[str, ...]
    block: ConvolutionBlock | None


@dataclass(frozen=True)
class FusedSequential(Replacement):
    """A Sequential, some of its children run as one."""

    recipe: ClassVar[str] = "dilated_conv2d"
    segments: tuple[Segment, ...]

    def semantics(self) -> str:
        """How much is fused."""
        fused = [segment.block.semantics() for segment in self.segments if segment.block is not None]
        return f"Sequential, {len(fused)} fused: " + "; ".join(dict.fromkeys(fused))

    def covered(self) -> tuple[str, ...]:
        """The children that are fused."""
        blocks = [segment.block for segment in self.segments if segment.block is not None]
        return ("", *(path for block in blocks for path in block.parts.all if path not in block.called))

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """One argument, as the Sequential takes it."""
        if tuple(module._modules) != tuple(name for segment in self.segments for name in segment.names):
            return "other children than when probed"
        return "not one argument" if len(args) != 1 or kwargs else frozenset({"map"})

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The last child's output."""
        (x,) = args
        for segment in self.segments:
            if segment.block is not None and not isinstance(segment.block.kinds(module, x), str):
                x = segment.block.run(module, x)
            else:
                for name in segment.names:
                    x = child_at(module, name)(x)
        return x


def runs_of(sequential: nn.Sequential) -> Iterator[tuple[str, ...]]:
    """Names of the children, run by run: [padding,] convolution [, activation], or one other child."""
    names = list(sequential._modules)
    at = 0
    while at < len(names):
        end = at
        if isinstance(sequential._modules[names[end]], PADS):
            end += 1
        if end < len(names) and _is_convolution(sequential._modules[names[end]]):
            end += 1
            following: Any = sequential._modules[names[end]] if end < len(names) else None
            if isinstance(following, ACTIVATIONS) and activation_of(following) not in (None, ("none", 0.0)):
                end += 1
        else:
            end = at + 1
        yield tuple(names[at:end])
        at = end


def _is_convolution(module: Any) -> bool:
    return is_plain_convolution(module) and module.groups == 1
