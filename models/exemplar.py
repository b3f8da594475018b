"""A hole filled without training: thin holes by diffusion, others by patches of the same photo.

The exemplar method finds a source pixel for every hole pixel (:mod:`.patch_synthesis`), takes the differences between
neighbours from the sources, and solves for the pixels that have these differences and meet the known ones at the border
(:mod:`.blending`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from inpaint_kernels.models.blending import blend
from inpaint_kernels.models.diffusion import diffuse, is_thin
from inpaint_kernels.models.patch_synthesis import (
    Synthesis,
    Tunables,
    box_mean,
    city_block_distance,
    dilate,
    synthesise,
    tunables_for,
)
from torch import Tensor, nn

from inpaint_kernels._checks import check_choice, check_dtype, check_range, check_shape

METHODS = ("auto", "exemplar", "diffusion")
Progress = Callable[[float, str], None]

# When a learned model is advised: holes of this share of the photo, or that reach this far in, as a share of its
# shorter side; not for holes less deep than this; and contrast that can be seen, of a full scale of 1.
_LARGE_SHARE = 0.25
_LARGE_DEPTH = 0.2
_SHALLOW = 16
_VISIBLE = 0.05

_LEARNED = (
    "a learned model does better here: inpaint-kernels fill IMAGE MASK -o OUT --weights WEIGHTS "
    "(inpaint-kernels models says whose)"
)


@dataclass(frozen=True)
class ExemplarResult:
    """What :func:`fill` returns.

    Attributes:
        output: [C, H, W] float32, the image with its hole filled; known pixels are those of the input, bit for bit.
        offsets: [2, H, W] int64, row and column from each hole pixel to the pixel it was copied from, 0 elsewhere; None
            if nothing was copied.
        method: "exemplar", "diffusion" or "none" (there was no hole).
        advice: one sentence when another method would do better, or None.
    """

    output: Tensor
    offsets: Tensor | None
    method: str
    advice: str | None


def fill(
    image: Tensor,
    mask: Tensor,
    *,
    method: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    **tunables: Any,
) -> ExemplarResult:
    """Fill the hole of an image from the image itself.

    Args:
        image: [C, H, W] float32 with C 1 or 3, values in [0, 1]. What it holds in the hole is not looked at.
        mask: [H, W] bool, True in the hole.
        method: "exemplar", "diffusion", or "auto": diffusion for holes in which no disc of more than 4 pixels radius
            fits, exemplar for others.
        seed: of the random search, in [0, 2^32); the same seed gives the same bits for any number of threads.
        progress: called with the share of the work that is done (0 to 1) and the name of the stage.
        **tunables: fields of :class:`~inpaint_kernels.models.patch_synthesis.Tunables`.

    Returns:
        See :class:`ExemplarResult`.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or value, NaN or Inf in a known pixel, or nothing known to fill
            from; the message names the argument.

    References:
        Newson et al., Non-Local Patch-Based Image Inpainting, IPOL 7, 2017.
        Perez et al., Poisson Image Editing, SIGGRAPH 2003.
    """
    settings = _check(image, mask, method, seed, tunables)
    report = progress or _silent
    if not mask.any():
        return ExemplarResult(image.clone(), None, "none", None)
    image = image.detach()
    known = torch.where(mask, 0.0, image)
    if method == "diffusion" or (method == "auto" and is_thin(mask)):
        return _diffused(image, known, mask, report, None)
    with torch.no_grad():
        synthesis = synthesise(known, mask, settings, seed, lambda share, stage: report(0.95 * share, stage))
        if synthesis is None:
            return _without_patches(image, known, mask, method, settings.patch, report)
        report(0.95, "blending")
        output = _composed(image, known, mask, synthesis)
    report(1.0, "done")
    return ExemplarResult(output, _offsets(synthesis, mask), "exemplar", _advice(known, mask, synthesis))


class Exemplar(nn.Module):
    """:func:`fill` as a module without parameters, for batches.

    Args:
        method, seed, **tunables: as for :func:`fill`.
    """

    def __init__(self, method: str = "auto", seed: int = 0, **tunables: Any) -> None:
        super().__init__()
        check_choice("method", method, METHODS)
        self.method, self.seed, self.tunables = method, seed, tunables

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Fills [B, C, H, W] float32 in [0, 1] where mask [B, 1, H, W] (bool, or nonzero for True) is set."""
        sizes = check_shape("image", image, "B C H W")
        check_shape("mask", mask, "B|1 1 H W", B=sizes["B"], H=sizes["H"], W=sizes["W"])
        holes = (mask != 0).expand(sizes["B"], 1, sizes["H"], sizes["W"])
        if not sizes["B"]:
            return image.clone()
        filled = [
            fill(one, hole[0], method=self.method, seed=self.seed, **self.tunables).output
            for one, hole in zip(image, holes, strict=True)
        ]
        return torch.stack(filled)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"method={self.method!r}, seed={self.seed}"


def _check(image: Tensor, mask: Tensor, method: str, seed: int, tunables: dict[str, Any]) -> Tunables:
    sizes = check_shape("image", image, "C H W")
    check_dtype("image", image, (torch.float32,))
    if sizes["C"] not in (1, 3):
        raise ValueError(f"image: expected 1 or 3 channels, got {sizes['C']}")
    check_shape("mask", mask, "H W", H=sizes["H"], W=sizes["W"])
    check_dtype("mask", mask, (torch.bool,))
    check_choice("method", method, METHODS)
    check_range("seed", seed, minimum=0, maximum=2**32 - 1, integer=True)
    if image.numel() == 0:
        raise ValueError(f"image: expected at least one pixel, got shape {list(image.shape)}")
    if mask.all():
        raise ValueError("mask: every pixel is hole; nothing is known to fill from")
    bad = ~image.isfinite().all(0) & ~mask
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"image: {int(bad.sum())} known pixels are NaN or Inf, the first in row {row}, column {column}; "
            "mask them (they are then filled) or repair them"
        )
    names = [field.name for field in dataclasses.fields(Tunables)]
    for name in tunables:
        check_choice("tunables", name, names)
    return tunables_for(mask, **tunables) if mask.any() else Tunables(**tunables)


def _silent(share: float, stage: str) -> None:
    """Reports nothing."""


def _diffused(image: Tensor, known: Tensor, mask: Tensor, report: Progress, advice: str | None) -> ExemplarResult:
    report(0.0, "diffusion")
    output = torch.where(mask, diffuse(known, mask), image)
    report(1.0, "done")
    return ExemplarResult(output, None, "diffusion", advice)


def _without_patches(
    image: Tensor, known: Tensor, mask: Tensor, method: str, patch: int, report: Progress
) -> ExemplarResult:
    what = f"no patch of {patch}x{patch} pixels is known entirely"
    if method == "exemplar":
        raise ValueError(f"mask: {what}, so there is nothing to copy; method='diffusion' can fill this hole")
    return _diffused(image, known, mask, report, f"{what}, so the hole was filled by diffusion; {_LEARNED}")


def _composed(image: Tensor, known: Tensor, mask: Tensor, synthesis: Synthesis) -> Tensor:
    """The image with the sources copied into the hole and blended with its border."""
    blended = gradient_blend(known, mask, synthesis)
    output = image.clone()
    output[synthesis.box] = torch.where(synthesis.hole, blended.clamp(0, 1), image[synthesis.box])
    return output


def gradient_blend(known: Tensor, mask: Tensor, synthesis: Synthesis, tolerance: float = 0.2) -> Tensor:
    """Colours [C, h, w] of the synthesis' box, whose hole has the differences that its sources have.

    Where two neighbours have sources that are no neighbours, the differences beside both are averaged. Where a source
    continues quite otherwise than its neighbour (a structure ends there), that difference counts less, so that the edge
    stays an edge instead of being spread over the hole.

    Args:
        known: [C, H, W], the photo.
        mask: [H, W] bool, its hole.
        synthesis: of the hole.
        tolerance: root mean square error of colour at which a difference counts half.
    """
    below, below_weight = _wanted_differences(known, mask, synthesis, 0, tolerance)
    right, right_weight = _wanted_differences(known, mask, synthesis, 1, tolerance)
    copied = known.flatten(1)[:, synthesis.source]
    return blend(synthesis.hole, known[synthesis.box], right, below, right_weight, below_weight, guess=copied)


def _wanted_differences(
    known: Tensor, mask: Tensor, synthesis: Synthesis, dim: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """For neighbours along a dimension of the box: the wanted difference of their colours, and its weight."""
    size, (height, width) = synthesis.hole.shape[dim], mask.shape
    step = width if dim == 0 else 1
    colours, is_known = known.flatten(1), ~mask.flatten()

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        along = x.dim() - 2 + dim
        return x.narrow(along, 0, size - 1), x.narrow(along, 1, size - 1)

    one, two = pair(synthesis.source)
    hole_one, hole_two = pair(synthesis.hole)
    # What lies behind the first source and before the second one, if that is in the photo and known.
    place_one, place_two = (one // width, two // width) if dim == 0 else (one % width, two % width)
    behind = (one + step).where(place_one < (height, width)[dim] - 1, one)
    before = (two - step).where(place_two > 0, two)
    use_one = hole_one & (behind != one) & is_known[behind]
    use_two = hole_two & (before != two) & is_known[before]
    count = (use_one.int() + use_two.int()).clamp_min(1)
    from_one = (colours[:, behind] - colours[:, one]) * use_one
    from_two = (colours[:, two] - colours[:, before]) * use_two
    wanted = torch.where(use_one | use_two, (from_one + from_two) / count, colours[:, two] - colours[:, one])

    # What each source has in the other pixel's place, against what is there; 0 for two neighbours copied together.
    error_one = (colours[:, behind] - colours[:, two]).square().mean(0) * use_one
    error_two = (colours[:, before] - colours[:, one]).square().mean(0) * use_two
    return wanted, 1 / (1 + (error_one + error_two) / count / tolerance**2)


def _offsets(synthesis: Synthesis, mask: Tensor) -> Tensor:
    (top, left), (height, width) = synthesis.corner, synthesis.hole.shape
    row = torch.arange(top, top + height, device=mask.device)[:, None]
    column = torch.arange(left, left + width, device=mask.device)[None, :]
    offsets = torch.zeros(2, *mask.shape, dtype=torch.int64, device=mask.device)
    offsets[0, top : top + height, left : left + width] = synthesis.source // mask.shape[1] - row
    offsets[1, top : top + height, left : left + width] = synthesis.source % mask.shape[1] - column
    return offsets


def _advice(known: Tensor, mask: Tensor, synthesis: Synthesis) -> str | None:
    """A sentence for holes that copying cannot be expected to fill well."""
    depth = int(city_block_distance(synthesis.hole).max())
    if float(mask.float().mean()) > _LARGE_SHARE or depth > _LARGE_DEPTH * min(mask.shape):
        return f"the hole is large; {_LEARNED}"
    if depth >= _SHALLOW and _structure_meets_border(known, mask, synthesis, depth):
        return f"different things meet at the hole; {_LEARNED}"
    return None


def _structure_meets_border(known: Tensor, mask: Tensor, synthesis: Synthesis, depth: int) -> bool:
    """Whether colour varies more from place to place around the hole than within each place.

    A texture goes on around its hole: local means differ less than the pixels of one neighbourhood do. Where objects
    and their borders meet the hole, it is the other way round.
    """
    reach = max(_SHALLOW // 4, depth // 6)
    (top, left), (height, width) = synthesis.corner, synthesis.hole.shape
    around = (
        slice(max(0, top - 2 * reach), top + height + 2 * reach),
        slice(max(0, left - 2 * reach), left + width + 2 * reach),
    )
    colours, hole = known[(slice(None), *around)], mask[around]
    ring = dilate(hole, reach) & ~hole
    local = box_mean(colours, (~hole).float(), reach)
    between = float(local[:, ring].std(1).mean())
    within = float((colours - local)[:, ring].std(1).mean())
    return between > max(within, _VISIBLE)
