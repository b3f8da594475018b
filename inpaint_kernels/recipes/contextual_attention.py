"""Contextual attention layers: which published one a module is, found by trying all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaint_kernels.flow_color import flow_to_color
from inpaint_kernels.ops._contextual_attention_presets import PRESETS, ContextualAttentionPreset
from inpaint_kernels.ops.contextual_attention import ContextualAttentionResult, contextual_attention
from inpaint_kernels.recipes._class_swap import argument_names, has_foreign_hooks, original_class
from inpaint_kernels.recipes._probe import works
from inpaint_kernels.recipes._replacement import (
    Call,
    Form,
    Recipe,
    Replacement,
    arguments_of,
    device_of,
    is_map,
    probe_holes,
    probe_map,
)

_CHANNELS = 8

# Side of f at which, at rate 2, every two sampling grids read other pixels (tests/test_acceleration.py checks it). At
# smaller ones "corners" and "linspace", which differ by how they round, read the same.
_SIDES = (16, 24)
_TELLING_SIDE = 54

_SCALES = (1, 2, 4, 8)
_MASK_NAMES = {0: "no mask", 1: "a mask as large as the map"}


@dataclass(frozen=True)
class Flow:
    """How the image of the offsets that a layer also returns is made.

    Attributes:
        enlarge: sides of the image in matching-grid sides.
        bilinear: interpolated (corners aligned); else pixels are repeated.
    """

    enlarge: int
    bilinear: bool

    def draw(self, offsets: Tensor) -> Tensor:
        """[B, 2, h, w] -> [B, 3, enlarge * h, enlarge * w] in 0..1, float32, as numpy made it there."""
        image = flow_to_color(offsets).float() / 255
        if self.enlarge == 1:
            return image
        if self.bilinear:
            return F.interpolate(image, scale_factor=self.enlarge, mode="bilinear", align_corners=True)
        return F.interpolate(image, scale_factor=self.enlarge, mode="nearest")


@dataclass(frozen=True)
class Attention(Replacement):
    """A layer (queries, keys, mask) -> output, or (values, keys, mask) where the keys are the queries.

    Attributes:
        preset: what it computes.
        name: of the preset.
        names: of its arguments.
        values_first: whether the first argument is what is pasted and the second both queries and keys.
        returns: "output", "none" (output, None), or "flow" (output, image of the offsets).
        sequence: type of what it returns, where that is not the output alone.
        flow: how the image is made.
    """

    recipe: ClassVar[str] = "contextual_attention"
    covers_all: ClassVar[bool] = True
    preset: ContextualAttentionPreset
    name: str
    names: tuple[str, ...]
    values_first: bool
    returns: str
    sequence: type = tuple
    flow: Flow | None = None

    @property
    def discrete_outputs(self) -> tuple[int, ...]:  # type: ignore[override]
        """The image of the offsets."""
        return (1,) if self.flow is not None else ()

    def semantics(self) -> str:
        """The preset and its oddities."""
        words = [self.name]
        if self.preset.mask_batch == "first":
            words.append("the first sample's mask for the whole batch")
        if self.flow is not None:
            words.append("draws the offsets on the CPU" if self.flow.enlarge > 2 else "draws the offsets")
        return ", ".join(words)

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """The mask's size, odd sides, maps of two sizes, maps that are not square, one mask for a batch."""
        arguments = arguments_of(self.names, args, kwargs)
        if arguments is None or len(arguments) < 2:
            return "other arguments than two maps and a mask"
        first, second, mask = self._split(arguments)
        if not (is_map(first) and is_map(second)) or first.dtype != second.dtype:
            return "not two maps [B, C, H, W] of one dtype"
        if len(first) != len(second):
            return "two batch sizes"
        kinds = self._sizes(first, second)
        if mask is None:
            return frozenset({*kinds, _MASK_NAMES[0]})
        if not is_map(mask) or mask.shape[1] != 1 or mask.dtype != first.dtype or mask.requires_grad:
            return "not a mask [B, 1, H, W] of the maps' dtype without gradient"
        scale, rest_ = divmod(mask.shape[2], second.shape[2])
        if rest_ or mask.shape[3] != scale * second.shape[3]:
            return "a mask that is no multiple of the map"
        kinds.add(mask_kind(scale))
        if len(mask) != len(first):
            if len(mask) != 1:
                return "another number of masks than maps"
            kinds.add("one mask for a batch")
        return frozenset(kinds)

    def _split(self, arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
        """The two maps and the mask, None for what is not given."""
        first, second, *rest = (arguments.get(name) for name in self.names)
        return first, second, rest[0] if rest else None

    def _sizes(self, first: Tensor, second: Tensor) -> set[str]:
        kinds = set()
        rate = self.preset.rate
        if self.values_first:
            if first.shape[2] != rate * second.shape[2] or first.shape[3] != rate * second.shape[3]:
                kinds.add("other sizes than 1 and the rate")
        elif first.shape[2:] != second.shape[2:]:
            kinds.add("maps of two sizes")
        if any(side % rate for side in (*first.shape[2:], *(() if self.values_first else second.shape[2:]))):
            kinds.add("sides that the rate does not divide")
        if second.shape[2] != second.shape[3]:
            kinds.add("maps that are not square")
        return kinds

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        arguments = arguments_of(self.names, args, kwargs)
        assert arguments is not None
        first, second, mask = self._split(arguments)
        query, value = (second, first) if self.values_first else (first, None)
        wants_offsets = self.flow is not None
        result = contextual_attention(
            query, second, mask, value=value, preset=self.preset, return_offsets=wants_offsets
        )
        if self.returns == "output":
            return result
        if isinstance(result, ContextualAttentionResult):
            assert self.flow is not None
            return self.sequence((result.output, self.flow.draw(result.offsets)))
        return self.sequence((result, None))


def mask_kind(scale: int) -> str:
    """The kind of a call with a mask of ``scale`` times the map's sides; 0: without one."""
    return _MASK_NAMES.get(scale, f"a mask of {scale} x the map")


class ContextualAttention(Recipe):
    """A module without trained parameters that makes one map of two."""

    name: ClassVar[str] = "contextual_attention"
    uses_example: ClassVar[bool] = True

    def mismatch(self, module: nn.Module) -> str:
        """As in the base class."""
        if original_class(module).__module__.startswith("torch."):
            return "a module of torch"
        if any(parameter.requires_grad for parameter in module.parameters()):
            return "it has parameters"
        if any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()):
            return "it holds a convolution"
        names = argument_names(module)
        if not 2 <= len(names) <= 3:
            return f"{len(names)} arguments instead of two maps and a mask"
        if any(has_foreign_hooks(part) for part in module.modules() if part is not module):
            return "a module inside has hooks"
        return ""

    def calls(self, module: nn.Module, dtype: torch.dtype, example: Call | None) -> Sequence[Call]:
        """As in the base class."""
        build = _calls_values_first if _takes_values_first(module, dtype) else _calls
        return build(module, dtype, tuple(dict.fromkeys((*_SCALES, *_scale_of(example)))))

    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """As in the base class."""
        names = argument_names(module)
        values_first = call.args[0] is not call.args[1]
        maps = output if isinstance(output, (tuple, list)) else (output,)
        if not maps or not is_map(maps[0]) or maps[0].shape[1] != call.args[0].shape[1]:
            return
        returns: list[tuple[str, type, Flow | None]] = [("output", tuple, None)]
        if isinstance(output, (tuple, list)):
            if len(output) != 2:
                return
            returns = _second_result(output, type(output))
        for name, preset in PRESETS.items():
            if (preset.grid == "none") != values_first:
                continue
            for changed in _with_settings(module, preset):
                for kind, sequence, flow in returns:
                    yield Attention(changed, name, names, values_first, kind, sequence, flow)


def _second_result(output: Sequence[Any], sequence: type) -> list[tuple[str, type, Flow | None]]:
    image = output[1]
    if image is None:
        return [("none", sequence, None)]
    if not (is_map(image) and image.shape[1] == 3):
        return []
    enlarge = image.shape[2] // (output[0].shape[2] // 2)
    return [("flow", sequence, Flow(enlarge, bilinear)) for bilinear in (False, True)]


def _with_settings(module: nn.Module, preset: ContextualAttentionPreset) -> Iterable[ContextualAttentionPreset]:
    """The preset, with what the module's own attributes may say of it: its patches, its fuse or none, its scale."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (int, float))}
    scales = {preset.scale, *(float(v) for k, v in settings.items() if "scale" in k and v > 0)}
    fuses = {preset.fuse, 0, *(int(v) for k, v in settings.items() if "fuse" in k and v in (3, 5, 7))}
    patches = {preset.patch, *(int(v) for k, v in settings.items() if k in ("ksize", "kernel_size") and v in (1, 3, 5))}
    for fuse in sorted(fuses, key=lambda size: (size != preset.fuse, size)):
        for scale in sorted(scales, key=lambda size: size != preset.scale):
            for patch in sorted(patches, key=lambda size: size != preset.patch):
                yield dataclasses.replace(preset, fuse=fuse, scale=scale, patch=patch)


# Calls ----------------------------------------------------------------------------------------------------------------


def _maps(side: int, width: int, scale: float, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return probe_map((2, _CHANNELS, side, width), dtype, device, seed, scale)


def _takes_values_first(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it takes a map, and one of half its sides, and nothing else."""
    device = device_of(module)
    mask = probe_holes((2, 1, 32, 32), dtype, device, "some")
    small, large = (_maps(side, side, 1, 3, dtype, device) for side in (16, 32))
    return works(module, Call((large, small, mask))) and not works(module, Call((large, large, mask)))


def _scale_of(example: Call | None) -> tuple[int, ...]:
    """Sides of the real call's mask in sides of its second map."""
    forms = [x for x in example.args if isinstance(x, Form) and len(x.shape) == 4] if example is not None else []
    if len(forms) != 3 or forms[2].shape[2] % forms[1].shape[2]:
        return ()
    return (forms[2].shape[2] // forms[1].shape[2],)


def _calls(module: nn.Module, dtype: torch.dtype, scales: tuple[int, ...]) -> list[Call]:
    device = device_of(module)
    narrow, wide = _SIDES
    takes_mask = len(argument_names(module)) == 3

    def call(f: Tensor, scale: int, holes: str, b: Tensor | None = None, masks: int = 2) -> Call:
        size = (masks, 1, scale * (f if b is None else b).shape[2], scale * (f if b is None else b).shape[3])
        mask = None if scale == 0 else probe_holes(size, dtype, device, holes)
        differentiable = (0,) if b is None else (0, 1)
        return Call((f, f if b is None else b, *((mask,) if takes_mask else ())), differentiable=differentiable)

    def square(amplitude: float, seed: int, side: int = _TELLING_SIDE) -> Tensor:
        return _maps(side, side, amplitude, seed, dtype, device)

    scales = scales if takes_mask else (0,)
    ordinary = next((s for s in (4, *scales) if works(module, call(square(1, 0), s, "some"))), scales[0])
    calls = [call(square(1, 0), ordinary, "some")]
    calls += [call(square(amplitude, 1), ordinary, "some") for amplitude in (0.1, 0.01)]
    calls += [call(square(0.3, 2, narrow), ordinary, holes) for holes in ("none", "all")] if takes_mask else []
    if takes_mask:
        calls += [call(square(0.3, 3, narrow), s, "some") for s in scales if s != ordinary]
        calls += [call(square(0.3, 3, narrow), 0, "none"), call(square(0.3, 4, narrow), ordinary, "some", masks=1)]
    calls.append(call(square(1e-5, 10, narrow), ordinary, "some"))  # patches shorter than every published eps
    layout = square(0.1, 5, narrow).contiguous(memory_format=torch.channels_last)
    calls.append(call(layout, ordinary, "some"))
    calls.append(call(_maps(narrow, wide, 0.3, 6, dtype, device), ordinary, "some"))
    calls.append(call(square(0.3, 7, narrow + 1), ordinary, "some"))
    calls.append(call(square(0.3, 8, narrow), ordinary, "some", b=square(0.3, 9, wide)))
    return calls


def _calls_values_first(module: nn.Module, dtype: torch.dtype, scales: tuple[int, ...]) -> list[Call]:
    device = device_of(module)
    takes_mask = len(argument_names(module)) == 3

    def call(height: int, width: int, amplitude: float, scale: int, holes: str, seed: int, masks: int = 2) -> Call:
        keys = _maps(height, width, amplitude, seed, dtype, device)
        values = _maps(2 * height, 2 * width, amplitude, seed + 100, dtype, device)
        mask = None if scale == 0 else probe_holes((masks, 1, scale * height, scale * width), dtype, device, holes)
        return Call((values, keys, *((mask,) if takes_mask else ())), differentiable=(0, 1))

    side, wide = _SIDES
    calls = [call(side, side, a, 2 if takes_mask else 0, "some", 10) for a in (1, 0.1, 0.01)]
    calls.append(call(side, wide, 0.3, 2 if takes_mask else 0, "some", 11))
    if takes_mask:
        calls += [call(side, side, 0.3, 2, holes, 12) for holes in ("none", "all")]
        calls += [call(side, side, 0.3, s, "some", 13) for s in (*scales, 0) if s != 2]
        calls.append(call(side, side, 0.3, 2, "some", 14, masks=1))
    return calls
