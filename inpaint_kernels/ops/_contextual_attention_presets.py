"""The published variants of contextual attention: one frozen description each, and the sampling grids they use.

Public code agrees on the formula and differs in a dozen details that change pixels (which columns are sampled, how a
zero patch is divided, what an invalid key costs). A preset names one public implementation and fixes all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels._checks import check_choice, check_range

GRIDS: Final = ("floor", "corners", "linspace", "halfpixel", "bilinear", "none")
MASK_GRIDS: Final = (*GRIDS[:4], "bilinear", "max")

FLOAT32_1E_4: Final = 9.99999974737875e-05
"""1e-4 as the ports that write ``torch.FloatTensor([1e-4])`` hold it, also in float64."""


@dataclass(frozen=True)
class ContextualAttentionPreset:
    """One published contextual attention.

    Attributes:
        description: the implementation that this reproduces, and known deviations from it.
        patch: side of the square patches that are compared, in matching-grid pixels.
        norm: rule of the key-patch divisor, "max" | "sum" | "add" | "none".
        eps: constant of that rule.
        fuse: side of the diagonal fuse sums (odd); 0 or 1 switches the fuse off.
        scale: softmax scale (inverse temperature).
        masking: "multiply" (logit and probability times 0), "inf" (key excluded) or "fill" (score replaced).
        fill: score of an invalid key with masking "fill", before the scale.
        floor: lower bound put on every probability after masking, or None.
        rate: pixels of the value map per matching-grid pixel.
        paste_size: side K of the pasted patches, in value pixels.
        pad_cut, pad_put: zero border in front of the value map, crop in front of the output.
        divisor: the constant every pasted sum is divided by; 0: by the number of patches that overlap there.
        grid: how f and b are reduced to the matching grid.
        mask_grid: how the mask is reduced to the matching grid.
        mask_batch: "each" sample has its mask, or the "first" one's is used for the whole batch.
        odd_sizes: whether heights and widths that ``rate`` does not divide are defined (the rest is cropped).
    """

    description: str
    patch: int = 3
    norm: str = "max"
    eps: float = 1e-4
    fuse: int = 3
    scale: float = 10.0
    masking: str = "multiply"
    fill: float = -1000.0
    floor: float | None = None
    rate: int = 2
    paste_size: int = 4
    pad_cut: int = 1
    pad_put: int = 1
    divisor: float = 4.0
    grid: str = "floor"
    mask_grid: str = "floor"
    mask_batch: str = "each"
    odd_sizes: bool = False


PRESETS: Final[dict[str, ContextualAttentionPreset]] = {
    "official": ContextualAttentionPreset(
        "Table A, JiahuiYu/generative_inpainting (TensorFlow), DeepFill v1 and v2: align-corners nearest sampling; an "
        "image mask is resized to feature resolution first, then to the matching grid.",
        grid="corners",
        mask_grid="corners",
        mask_batch="first",
    ),
    "daa233": ContextualAttentionPreset(
        "Table A, daa233/generative-inpainting-pytorch (DeepFill v1): norm sqrt(sum(x^2 + 1e-4)).",
        norm="sum",
        eps=FLOAT32_1E_4,
        mask_batch="first",
    ),
    "csqiangwen": ContextualAttentionPreset(
        "Table A, csqiangwen/DeepFillv2_Pytorch: as daa233, its mask comes at feature resolution.",
        norm="sum",
        eps=FLOAT32_1E_4,
        mask_batch="first",
    ),
    "nipponjo": ContextualAttentionPreset(
        "Table A, nipponjo/deepfillv2-pytorch, networks.py: norm max(|k|, 1e-4), every second pixel sampled.",
        mask_batch="first",
    ),
    "nipponjo_tf": ContextualAttentionPreset(
        "Table A, nipponjo/deepfillv2-pytorch, networks_tf.py (converted TensorFlow weights): linspace sampling, the "
        "image mask reduced in one stage.",
        grid="linspace",
        mask_grid="linspace",
        mask_batch="first",
    ),
    "yangyu12": ContextualAttentionPreset(
        "Table B, yangyu12/deepfill_v2.pytorch: linspace sampling, one mask per sample. Deviation: f and b may differ "
        "in size.",
        grid="linspace",
        mask_grid="linspace",
        odd_sizes=True,
    ),
    "mmagic": ContextualAttentionPreset(
        "Table A, open-mmlab/mmagic: invalid keys excluded, division by the overlap count. Deviations: 0 instead of "
        "NaN where no key is valid; f and b may differ in size with the fuse on.",
        masking="inf",
        divisor=0.0,
        odd_sizes=True,
    ),
    "selflein": ContextualAttentionPreset(
        "Table B, selflein/DeepFill-v2: eps 1e-3, score -1000 for invalid keys. Deviation: the fuse of non-square maps "
        "is the published formula, not its transposed reshape.",
        eps=1e-3,
        masking="fill",
        odd_sizes=True,
    ),
    "pennet": ContextualAttentionPreset(
        "Table B, PEN-Net AtnConv: f = b = the deep map as it is, value = the map twice as large; no fuse; "
        "probabilities at least 1e-8.",
        fuse=0,
        floor=1e-8,
        grid="none",
        mask_grid="bilinear",
    ),
    "ctsdg": ContextualAttentionPreset(
        "Table B, CTSDG RAL: f = b = foreground, reduced bilinearly, value = background; no mask, no fuse; "
        "probabilities at least 1e-8.",
        fuse=0,
        floor=1e-8,
        grid="bilinear",
        mask_grid="bilinear",
    ),
    "hifill": ContextualAttentionPreset(
        "Table B, HiFill training code (soft attention): 3x3 patches pasted every 2 pixels without division; mask by "
        "max-pool.",
        eps=1e-8,
        paste_size=3,
        pad_cut=0,
        pad_put=0,
        divisor=1.0,
        mask_grid="max",
        mask_batch="first",
    ),
    "csnln": ContextualAttentionPreset(
        "Table B, CSNLN CrossScaleAttention at scale 2: f = queries, b = keys already reduced, value = the full map; "
        "patches of 3 x scale, division by 6. For scale s: rate=s, paste_size=3 * s, pad_cut=s, pad_put=s.",
        fuse=0,
        paste_size=6,
        pad_cut=2,
        pad_put=2,
        divisor=6.0,
        grid="none",
        mask_grid="bilinear",
        odd_sizes=True,
    ),
}


def check_preset(preset: ContextualAttentionPreset) -> None:
    """ValueError for a field outside its domain (the names in :data:`PRESETS` need no check)."""
    check_choice("norm", preset.norm, ("max", "sum", "add", "none"))
    check_choice("masking", preset.masking, ("multiply", "inf", "fill"))
    check_choice("grid", preset.grid, GRIDS)
    check_choice("mask_grid", preset.mask_grid, MASK_GRIDS)
    check_choice("mask_batch", preset.mask_batch, ("each", "first"))
    for name in ("patch", "rate"):
        check_range(name, getattr(preset, name), minimum=1)
    for name in ("eps", "fuse", "pad_cut", "pad_put", "divisor"):
        check_range(name, getattr(preset, name), minimum=0)
    if preset.fuse > 1 and preset.fuse % 2 == 0:
        raise ValueError(f"fuse: expected an odd size, or 0 for none, got {preset.fuse}")
    check_range("paste_size", preset.paste_size, minimum=preset.rate)


def _corners_index(size: int, count: int) -> Tensor:
    """TensorFlow's align_corners nearest neighbour, rounded in float32 as it is there."""
    step = torch.tensor((size - 1) / (count - 1) if count > 1 else 0.0, dtype=torch.float32)
    return (torch.arange(count, dtype=torch.float32) * step + 0.5).floor().long()


def _linspace_index(size: int, count: int) -> Tensor:
    return (torch.linspace(0, size - 1, count, dtype=torch.float32) + 0.5).floor().long()


def _halfpixel_index(size: int, count: int) -> Tensor:
    return (2 * torch.arange(count) + 1) * size // (2 * count)


_GRID_INDEX: Final[dict[str, Callable[[int, int], Tensor]]] = {
    "corners": _corners_index,
    "linspace": _linspace_index,
    "halfpixel": _halfpixel_index,
}


def resample(x: Tensor, size: tuple[int, int], grid: str, step: int) -> Tensor:
    """Reduce [B, C, H, W] about ``step`` times to [B, C, *size] on a published sampling grid (differentiable)."""
    height, width = x.shape[2], x.shape[3]
    if (height, width) == size:
        return x
    if grid == "floor":
        return x[:, :, : step * size[0] : step, : step * size[1] : step]
    if grid == "bilinear":
        return F.interpolate(x, size, mode="bilinear", align_corners=True)
    rows, columns = _GRID_INDEX[grid](height, size[0]), _GRID_INDEX[grid](width, size[1])
    return x.index_select(2, rows.to(x.device)).index_select(3, columns.to(x.device))


def valid_keys(
    mask: Tensor, feature_size: tuple[int, int], key_size: tuple[int, int], preset: ContextualAttentionPreset
) -> Tensor:
    """Keys whose whole patch lies outside the hole: mask [B, 1, H, W], non-zero = hole -> bool [B, hk, wk]."""
    hole = mask if mask.is_floating_point() else mask.float()
    feature_step = hole.shape[2] // feature_size[0]
    reduction = feature_size[0] // key_size[0]
    if preset.mask_grid == "max":
        hole = F.max_pool2d(hole, feature_step * reduction)[:, :, : key_size[0], : key_size[1]]
    else:
        if preset.mask_grid == "corners":  # two stages, as the official network does it
            hole = resample(hole, feature_size, "corners", feature_step)
            feature_step = 1
        hole = resample(hole, key_size, preset.mask_grid, feature_step * reduction)
    before = (preset.patch - 1) // 2
    after = preset.patch - 1 - before
    touched = F.max_pool2d(F.pad((hole != 0).to(hole.dtype), (before, after, before, after)), preset.patch, stride=1)
    return touched[:, 0] == 0
