"""What the recipes of convolutions share: the parts of a block, how it pads, and the weight that it uses in a call."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from inpaint_kernels.recipes._class_swap import child_at, has_foreign_hooks, original_class
from inpaint_kernels.recipes._replacement import Call, Recipe, Replacement, device_of, is_map, probe_map

PADS = (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d, nn.CircularPad2d)
NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)
ACTIVATIONS = (
    nn.ReLU,
    nn.ELU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Sigmoid,
    nn.Tanh,
    nn.SELU,
    nn.PReLU,
    nn.GELU,
    nn.SiLU,
    nn.ReLU6,
    nn.Softplus,
    nn.Hardtanh,
)

FUSED_ACTIVATIONS = (("elu", 0.0), ("relu", 0.0), ("leaky_relu", 0.2), ("leaky_relu", 0.01), ("leaky_relu", 0.1))
"""What a block without a module for its activation may apply by a function."""


@dataclass(frozen=True)
class Parts:
    """Paths of the modules in a block, by kind, in the order of their registration."""

    convolutions: tuple[str, ...] = ()
    pads: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every path but the block's own."""
        return (*self.convolutions, *self.pads, *self.norms, *self.activations, *self.containers)


def parts_of(block: nn.Module) -> Parts:
    """The parts of a block; one that is a convolution, or holds something unknown, has an "other"."""
    found: dict[str, list[str]] = {name: [] for name in Parts.__dataclass_fields__}
    for path, part in _leaves(block):
        if path == ".":
            kind = "others"
        elif is_plain_convolution(part):
            kind = "convolutions"
        elif isinstance(part, PADS):
            kind = "pads"
        elif isinstance(part, NORMS):
            kind = "norms"
        elif isinstance(part, ACTIVATIONS):
            kind = "activations"
        else:
            kind = "others"
        found[kind].append(path)
    leaves = {path for paths in found.values() for path in paths}
    inside = tuple(f"{path}." for path in found["convolutions"])  # a parametrisation's own modules
    found["containers"] = [
        path for path, _ in block.named_modules() if path and path not in leaves and not path.startswith(inside)
    ]
    return Parts(**{kind: tuple(paths) for kind, paths in found.items()})


def _leaves(block: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    spread = isinstance(block, (nn.DataParallel, nn.parallel.DistributedDataParallel))  # its own call is to happen
    if path and (isinstance(block, nn.Conv2d) or spread or not block._modules):
        yield path, block
        return
    if next(block.parameters(recurse=False), None) is not None:
        yield path or ".", block  # a container with weights of its own does more than it contains
    for name, child in block._modules.items():
        if child is not None:
            yield from _leaves(child, f"{path}.{name}" if path else name)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether it is a 2D convolution that computes what :class:`torch.nn.Conv2d` does."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and "forward" not in module.__dict__
    )


def block_mismatch(block: nn.Module, parts: Parts) -> str:
    """Why a block cannot be one of convolutions and what usually stands around them; empty if it can."""
    if isinstance(block, nn.Conv2d):
        return "it is a convolution itself"
    if not takes_one_map(block):
        return "not one argument"
    if parts.others:
        return f"it holds a {type(block.get_submodule(parts.others[0].lstrip('.'))).__name__}"
    hooked = next((path for path in parts.all if has_foreign_hooks(block.get_submodule(path))), None)
    if hooked is not None:
        return f"{hooked} has hooks"
    own = next((path for path in parts.all if "forward" in vars(block.get_submodule(path))), None)
    return "" if own is None else f"{own} has a forward of its own"


def takes_one_map(block: nn.Module) -> bool:
    """Whether the block's forward can be called with one argument."""
    try:
        parameters = list(inspect.signature(original_class(block).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 1 or (not required and any(p.kind is p.VAR_POSITIONAL for p in parameters))


def activation_of(module: nn.Module) -> tuple[str, float] | None:
    """(name, slope) as the ops take them; None if they do not."""
    if isinstance(module, nn.ReLU):
        return ("relu", 0.0)
    if isinstance(module, nn.ELU) and module.alpha == 1:
        return ("elu", 0.0)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope >= 0:
        return ("leaky_relu", float(module.negative_slope))
    return ("none", 0.0) if isinstance(module, nn.Identity) else None


# The weight of a call -------------------------------------------------------------------------------------------------


def weight_source(block: nn.Module, path: str) -> str:
    """Path of the module whose call sets a convolution's weight: a wrapper of the block's own, or the convolution."""
    conv = block.get_submodule(path)
    if "weight" in conv._parameters or is_parametrized(conv) or conv._forward_pre_hooks:
        return path
    names = path.split(".")
    for depth in range(1, len(names)):
        outer = ".".join(names[:depth])
        if [inner for inner, _ in _leaves(block.get_submodule(outer))] == [".".join(names[depth:])]:
            return outer
    return path


def parameter_of(conv: nn.Module) -> Tensor:
    """Any parameter of a convolution: its ``weight`` may be computed, and lag behind, or go on iterating when read."""
    own = next((p for p in conv._parameters.values() if p is not None), None)
    if own is not None:
        return own
    former: dict[str, Tensor] = getattr(conv, "_former_parameters", {})  # a replica of DataParallel has only these
    return next(itertools.chain(conv.parameters(), former.values()))


def weight_of(block: nn.Module, path: str, source: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a convolution in the block would use now.

    A spectral or weight norm computes the weight when its module is called, and may go on iterating then: it is
    called, once as it would have been, with as few pixels as the kernel spans.
    """
    conv: Any = child_at(block, path)
    if source != path or conv._forward_pre_hooks:
        span = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        child_at(block, source)(parameter_of(conv).new_zeros(1, conv.in_channels, *span))
    return conv.weight, conv.bias


# Padding --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padding:
    """How a block pads before its convolution.

    Attributes:
        module: path of a padding module in front; empty: none.
        same_tf: the forward pads as TensorFlow's SAME does.
    """

    module: str = ""
    same_tf: bool = False

    def __str__(self) -> str:
        return ", TensorFlow's SAME padding" if self.same_tf else ""

    def apply(self, block: nn.Module, conv: Any, x: Tensor) -> tuple[Tensor, tuple[int, int], str]:
        """``x``, padded where an op cannot; the op's ``padding`` and ``padding_mode``."""
        if self.same_tf:
            return x, (0, 0), "same_tf"
        own, mode = _own_padding(conv), conv.padding_mode
        if self.module:
            pad: Any = child_at(block, self.module)
            left, right, top, bottom = (pad.padding,) * 4 if isinstance(pad.padding, int) else pad.padding
            even = left == right >= 0 and top == bottom >= 0
            if type(pad) is nn.ZeroPad2d and even and own is not None and mode == "zeros":
                return x, (top + own[0], left + own[1]), "zeros"
            if type(pad) is nn.ReflectionPad2d and even and own == (0, 0):
                return x, (top, left), "reflect"
            x = pad(x)
        if own is None or mode not in ("zeros", "reflect"):
            before_after = conv._reversed_padding_repeated_twice
            return F.pad(x, before_after, mode="constant" if mode == "zeros" else mode), (0, 0), "zeros"
        return x, own, mode


def _own_padding(conv: Any) -> tuple[int, int] | None:
    """The convolution's padding on each side; None where its sides differ."""
    if not isinstance(conv.padding, str):
        return (conv.padding[0], conv.padding[1])
    totals = [
        d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ]
    return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)


def paddings_of(block: nn.Module, parts: Parts) -> list[Padding]:
    """How a block may pad."""
    if parts.pads:
        return [Padding(parts.pads[0])]
    conv: Any = block.get_submodule(parts.convolutions[0])
    functional = _own_padding(conv) == (0, 0) and max(conv.kernel_size) > 1
    return [Padding(), Padding(same_tf=True)] if functional else [Padding()]


# Calls ----------------------------------------------------------------------------------------------------------------


def map_kinds(conv: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> frozenset[str] | str:
    """The kind of a call with one map, for this convolution."""
    if len(args) != 1 or kwargs:
        return "not one argument"
    if not is_map(args[0]):
        return "not a map [B, C, H, W]"
    if args[0].dtype != parameter_of(conv).dtype or args[0].shape[1] != conv.in_channels:
        return "a map of another dtype or number of channels than the weight"
    return frozenset({"map"})


def map_calls(block: nn.Module, channels: int, reach: int, dtype: torch.dtype) -> list[Call]:
    """Calls with one map: two samples; sides that differ and odd ones; another scale, and channels_last.

    ``reach``: what the map must be larger than, so that it is mirrored and seen by a tap beside the middle one.
    """
    device = device_of(block)
    side = max(reach + 3, 8)
    last = probe_map((1, channels, side + 1, side), dtype, device, 2, 0.1)
    return [
        Call((probe_map((2, channels, side, side + 4), dtype, device, 0),)),
        Call((last.contiguous(memory_format=torch.channels_last),)),
    ]


def reach_of(block: nn.Module, parts: Parts) -> int:
    """The largest distance from a kernel's middle tap to the next, or the widest border."""
    reaches = [1]
    for path in parts.convolutions:
        conv: Any = block.get_submodule(path)
        reaches += [*conv.dilation, *((k - 1) // 2 for k in conv.kernel_size)]
        reaches += [(k - 1) * d // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    for path in parts.pads:
        padding: Any = block.get_submodule(path).padding
        reaches.append(max(padding) if isinstance(padding, tuple) else padding)
    return max(reaches)


class BlockReplacement(Replacement):
    """A replacement whose parts are covered by it, except for those that it calls."""

    parts: Parts
    called: tuple[str, ...]

    def covered(self) -> tuple[str, ...]:
        return ("", *(path for path in self.parts.all if path not in self.called))


class BlockRecipe(Recipe):
    """A recipe for blocks of convolutions with one map as their argument: all of them try the same calls."""

    family = "block"

    def calls(self, module: nn.Module, dtype: torch.dtype, example: Call | None) -> Sequence[Call]:
        """As in the base class."""
        parts = parts_of(module)
        conv: Any = module.get_submodule(parts.convolutions[0])
        return map_calls(module, conv.in_channels, reach_of(module, parts), dtype)
