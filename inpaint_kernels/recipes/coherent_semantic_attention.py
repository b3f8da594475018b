"""The published layer of coherent semantic attention, which keeps its mask and everything made of it in attributes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inpaint_kernels.ops.coherent_semantic_attention import coherent_semantic_attention
from inpaint_kernels.recipes._class_swap import argument_names
from inpaint_kernels.recipes._replacement import WARM_UP, Call, Recipe, Replacement, device_of, is_map, probe_map

_KEPT = ("flag", "nonmask_point_idx", "flatten_offsets", "mask_point_idx")


@dataclass(frozen=True)
class CoherentSemanticAttention(Replacement):
    """A layer that takes one map and reads its own mask.

    Attributes:
        gradient: as in the op.
    """

    recipe: ClassVar[str] = "coherent_semantic_attention"
    warms_up: ClassVar[bool] = True
    covers_all: ClassVar[bool] = True
    gradient: str
    state: frozenset[str] = frozenset({*_KEPT, "cal_fixed_flag", "c", "h", "w", "sp_x", "sp_y"})

    def semantics(self) -> str:
        """The published gradient, and the mask's fixing."""
        return f"{self.gradient} gradient, one mask for the batch, with fixed_mask the first one for ever"

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """One map of the mask's size; the first call, in which the layer makes its flags, is its own."""
        if len(args) != 1 or kwargs or not is_map(args[0]):
            return "not one map [B, C, H, W]"
        layer: Any = module
        mask = layer.mask
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != args[0].shape[2:]:
            return "a mask of another size than the map"
        if not isinstance(layer.sp_x, Tensor):
            return WARM_UP
        flags = _flags(layer)
        if not bool(flags.any()):
            return "a mask without a hole"
        if bool(flags.all()):
            return "a mask that is all hole"
        square = mask.shape[0] == mask.shape[1]
        return frozenset({"map"} if square or not args[0].requires_grad else {"map", "a map that is not square"})

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        (x,) = args
        layer: Any = module
        flags = _flags(layer)
        _, layer.c, layer.h, layer.w = x.shape
        if not (layer.fixed_mask and not layer.cal_fixed_flag):
            self._keep_flags(layer, flags)
        return coherent_semantic_attention(x, flags, gradient=self.gradient, triple_weight=float(layer.triple_weight))

    def _keep_flags(self, layer: Any, flags: Tensor) -> None:
        """What the layer makes of its mask when it looks at it anew."""
        flat = flags.flatten().cpu()
        known = (~flat).nonzero()[:, 0]
        layer.flag = flat.long()
        layer.nonmask_point_idx, layer.mask_point_idx = known, flat.nonzero()[:, 0]
        layer.flatten_offsets = known - torch.arange(len(known))
        layer.cal_fixed_flag = False


def _flags(layer: Any) -> Tensor:
    """The flags that the next call goes by, bool [h, w]: those it made before, where it keeps them."""
    if layer.fixed_mask and layer.cal_fixed_flag is False and isinstance(getattr(layer, "flag", None), Tensor):
        return layer.flag.bool().view(layer.mask.shape)
    return layer.mask >= layer.mask_thred


class CoherentSemanticAttentions(Recipe):
    """A module without parameters, with a mask, a patch size of 1 and a weight of the swapped gradient."""

    name: ClassVar[str] = "coherent_semantic_attention"

    def mismatch(self, module: nn.Module) -> str:
        """As in the base class."""
        if next(module.parameters(), None) is not None or len(argument_names(module)) != 1:
            return "parameters, or other arguments than one map"
        needed = ("mask", "fixed_mask", "cal_fixed_flag", "triple_weight", "mask_thred", "shift_sz", "stride", "sp_x")
        missing = [name for name in needed if name not in vars(module)]
        if missing:
            return f"no attribute {', '.join(missing)}"
        layer: Any = module
        if (layer.shift_sz, layer.stride) != (1, 1):
            return "patches of more than one position"
        return "" if isinstance(layer.mask, Tensor) and layer.mask.dim() == 2 else "no mask set"

    def calls(self, module: nn.Module, dtype: torch.dtype, example: Call | None) -> Sequence[Call]:
        """As in the base class: the first makes the layer's tables, by its own forward."""
        layer: Any = module
        height, width = layer.mask.shape

        def call(batch: int, seed: int, scale: float) -> Call:
            # Positive, as the maps of the network are: others make the recursion chaotic in float32.
            x = probe_map((batch, 16, height, width), dtype, device_of(module), seed, scale).abs()
            return Call((x + 0.1 * scale,))

        return [call(1, 0, 1), call(2, 1, 1), call(1, 2, 0.01)]

    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """As in the base class."""
        if is_map(output):
            yield from (CoherentSemanticAttention(gradient) for gradient in ("official", "straight", "exact"))
