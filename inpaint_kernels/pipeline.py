"""Any photo with any model: image and mask of every kind in, the filled image of the same kind out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels._checks import check_choice, check_range
from inpaint_kernels.detail import carried_residual, match
from inpaint_kernels.memory_plan import estimate_memory, parse_memory
from inpaint_kernels.models import Box, InpaintingModel, InpaintResult
from inpaint_kernels.models._boxes import connected_boxes, merged
from inpaint_kernels.models._interface import of_sample
from inpaint_kernels.models._regions import working_memory
from inpaint_kernels.models.blending import blend as solve_differences
from inpaint_kernels.photo_tensors import PhotoTensor, read_image, read_mask

REGIONS = ("hole", "full")
FITS = ("pad", "crop", "resize")
BLENDS = ("paste", "feather", "poisson")
DETAILS = ("none", "residual")

FULL_RUN_SHARE = 0.7
"""Of the whole image's work: holes that need more are painted with the whole image."""
LEAST_MARGIN = 64
"""Pixels of a crop around its hole, at least; half the hole's larger side where that is more."""
FEATHER = 8
"""Pixels from the hole's border on over which ``blend="feather"`` fades."""

Progress = Callable[[float, str], None]


def inpaint(
    model: InpaintingModel,
    image: Any,
    mask: Any,
    *,
    region: str = "hole",
    fit: str = "pad",
    max_side: int | None = None,
    margin: int | None = None,
    blend: str = "paste",
    detail: str = "none",
    threshold: float = 0.5,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
    **guidance: Any,
) -> InpaintResult:
    """Fill the hole of a photo of any size and kind.

    The model runs in evaluation mode and without gradients, on its device; its training flag is put back. A photo of
    any size from 1 x 1 on is taken: what is smaller than the model takes, or no multiple of its sizes, is padded.

    Args:
        model: one of :mod:`inpaint_kernels.models`.
        image: a path; a Pillow image; an array [H, W] or [H, W, C], uint8, uint16 or floating in [0, 1]; or a tensor
            [C, H, W] or [B, C, H, W], uint8 or floating in [0, 1]. C is 1 (gray), 2 (with alpha), 3 (RGB) or 4. A gray
            is repeated for the network and made of its colours again. What it holds in the hole is not looked at.
        mask: of the same kinds, of the image's size, for all images of a batch or for each; also bool, and a tensor
            [H, W]. See :func:`inpaint_kernels.photo_tensors.read_mask`.
        region: "hole": only what the holes depend on is computed, each hole for itself where that is less work; the
            whole image where that takes more than 70 % of its work, or where the model needs all of it. "full": the
            whole image.
        fit: "pad": the whole photo at its own size, its lower and right border mirrored up to a size that the model
            takes (mirrored hole is hole). "resize": the photo reduced so that its larger side is ``max_side``, pixels
            that the hole touches being hole; what is painted is enlarged again (bicubic), and only the hole is taken
            from it. "crop": each hole with ``margin`` pixels around it alone, reduced where its larger side is above
            ``max_side``; for networks trained on small images, and for those that need the whole image.
        max_side: for "resize" and "crop". A photo is never enlarged.
        margin: for "crop"; None: half the hole's larger side, at least 64. Holes whose crops overlap share one.
        blend: "paste": the painted pixels as they are; "feather": over 8 pixels from the hole's border on they take
            over the difference that the painting has to the known pixels there, fading; "poisson": the hole's pixels
            have the painting's differences and meet the known ones at the border (Perez et al., 2003). Known pixels
            stay bit for bit in either.
        detail: where a photo was reduced ("resize", "crop"), what the enlarged painting lacks. "residual": what the
            known pixels have beyond their own reduced and enlarged copy is taken from where they resemble the painting;
            from near where the network's attention looked, if it has one. See :mod:`inpaint_kernels.detail`.
        threshold: share of the mask's full scale; the hole is where the mask is larger.
        dtype: of the computation: None or the parameters' own; torch.bfloat16 or torch.float16 run it in autocast.
        device: must be the model's, if it is given: models are not moved.
        memory: bytes, or a text such as "4GiB", that the call may take beside the model, about
            (:func:`inpaint_kernels.estimate_memory`): large maps are computed in strips as thin as needed, one image of
            a batch after the other. No precision is given up for it; ``dtype`` does that. None: strips as thin as costs
            no time. A GPU that runs out of memory gets thinner strips, and the call goes on.
        progress: called with the share of the work that is done (0 to 1) and the name of the stage.
        **guidance: what else the model takes, see ``paint`` of its class. Maps, [B or 1, C, H, W] of the photo's size,
            are padded, cut and reduced as the photo is.

    Returns:
        An :class:`~inpaint_kernels.models.InpaintResult` whose images have the caller's kind, layout, dtype and device
        (a path's are Pillow's); edges and HOG are gray ones. ``completed`` keeps known pixels bit for bit, and alpha.
        Where only boxes were painted, the image stands around them in the other fields. ``attention`` is a tensor: with
        "pad" of the positions that lie in the photo, with "resize" of the reduced photo; None with "crop".

    Raises:
        ValueError, TypeError: an argument is of the wrong kind, size, dtype, device or value; the message names it.
            ``memory`` does not suffice; the message says what would.

    Example:
        >>> from inpaint_kernels.models import GLCIC
        >>> photo = np.zeros((37, 50, 3), np.uint8)
        >>> hole = np.zeros((37, 50), bool)
        >>> hole[10:20, 15:30] = True
        >>> inpaint(GLCIC(), photo, hole).completed.shape
        (37, 50, 3)
    """
    settings = _check(model, region, fit, max_side, margin, blend, detail, dtype, device, memory)
    photo = read_image(image)
    hole = read_mask(mask, photo, threshold)
    report = progress or _silent
    report(0.0, "reading")
    with _evaluating(model), torch.no_grad(), _autocast(settings):
        x = photo.rgb(hole, settings.dtype, settings.device)
        hole = hole.to(settings.device).expand(len(x), -1, -1, -1)
        report(0.05, "painting")
        result = _FITTED[fit](_Run(model, settings, guidance, report), x, hole)
        report(0.95, "blending")
        filled = _in_kind(photo, result, _blended(blend, x, result.output, hole), hole)
    report(1.0, "done")
    return filled


def _in_kind(photo: PhotoTensor, result: InpaintResult, painted: Tensor, hole: Tensor) -> InpaintResult:
    """The result with its images in the caller's kind, ``completed`` made of what was painted."""
    attention = None if result.attention is None else result.attention.to(photo.pixels.device)
    pictures = {
        name: None if x is None else photo.picture(x)
        for name, x in result._asdict().items()
        if name not in ("completed", "attention")
    }
    return InpaintResult(completed=photo.completed(painted, hole), attention=attention, **pictures)


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """The checked arguments.

    Attributes:
        region: as in :func:`inpaint`, as the next two.
        max_side: the same.
        margin: the same.
        around: pixels around the hole that the blending looks at.
        residual: whether what the enlarged painting lacks is taken from known pixels.
        dtype: of the parameters.
        autocast: the dtype to compute in, if it is another one.
        device: of the model.
        memory: bytes that may be taken; None: as many as are there.
    """

    region: str
    max_side: int | None
    margin: int | None
    around: int
    residual: bool
    dtype: torch.dtype
    autocast: torch.dtype | None
    device: torch.device
    memory: int | None


def _check(
    model: Any,
    region: str,
    fit: str,
    max_side: int | None,
    margin: int | None,
    blend: str,
    detail: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    memory: int | str | None,
) -> _Settings:
    if not isinstance(model, InpaintingModel):
        raise TypeError(f"model: expected a model of inpaint_kernels.models, got {type(model).__name__}")
    check_choice("region", region, REGIONS)
    check_choice("fit", fit, FITS)
    check_choice("blend", blend, BLENDS)
    check_choice("detail", detail, DETAILS if fit != "pad" else ("none",))
    if max_side is not None:
        check_range("max_side", max_side, minimum=1, integer=True)
    if (max_side is None) != (fit == "pad") and fit != "crop":
        expected = "a number of pixels" if fit == "resize" else "None"
        raise ValueError(f"max_side: expected {expected} with fit={fit!r}, got {max_side}")
    if margin is not None:
        check_range("margin", margin, minimum=0, integer=True)
        if fit != "crop":
            raise ValueError(f"margin: expected None with fit={fit!r}, got {margin}")
    parameter = next(model.parameters())
    own_device, own_dtype = parameter.device, parameter.dtype
    if device is not None and _canonical(torch.device(device)) != _canonical(own_device):
        raise ValueError(
            f"device: expected the model's, {own_device}, got {device}; model.to({str(device)!r}) moves it"
        )
    if dtype not in (None, own_dtype, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype: expected the parameters' {own_dtype}, torch.bfloat16 or torch.float16, got {dtype}; "
            f"model.to({dtype}) changes them"
        )
    autocast = None if dtype in (None, own_dtype) else dtype
    around = 0 if blend == "paste" else 1
    limit = None if memory is None else parse_memory(memory)
    return _Settings(region, max_side, margin, around, detail == "residual", own_dtype, autocast, own_device, limit)


def _canonical(device: torch.device) -> torch.device:
    """With an index where the kind of device has several."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _silent(share: float, stage: str) -> None:
    """Reports nothing."""


@contextmanager
def _evaluating(model: InpaintingModel) -> Iterator[None]:
    """The model and all its modules in evaluation mode, and back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _autocast(settings: _Settings) -> Any:
    if settings.autocast is None:
        return nullcontext()
    return torch.autocast(settings.device.type, settings.autocast)


# Painting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """One call: what paints, how, guided by what, and who is told."""

    model: InpaintingModel
    settings: _Settings
    guidance: Mapping[str, Any]
    report: Progress

    def with_maps(self, change: Callable[[Tensor], Tensor], size: Sequence[int]) -> _Run:
        """The same call with its maps of that size changed."""
        guidance = {
            name: change(value) if isinstance(value, Tensor) and tuple(value.shape[-2:]) == tuple(size) else value
            for name, value in self.guidance.items()
        }
        return _Run(self.model, self.settings, guidance, self.report)

    def with_attention(self) -> _Run:
        """The same call, asking for the attention of a network that has one."""
        asked = {"return_attention": True} if self.model.has_attention else {}
        return _Run(self.model, self.settings, {**self.guidance, **asked}, self.report)

    def of_sample(self, i: int, image: Tensor, hole: Tensor) -> tuple[_Run, Tensor, Tensor]:
        """The call for one image of the batch; a map of batch 1 guides all of them."""
        guidance = {name: of_sample(value, i, len(image)) for name, value in self.guidance.items()}
        return _Run(self.model, self.settings, guidance, self.report), image[i : i + 1], hole[i : i + 1]


def _pad(run: _Run, image: Tensor, hole: Tensor) -> InpaintResult:
    """Paint images [B, 3, H, W] of any size; every map of the result has that size."""
    height, width = image.shape[2:]
    rows, columns = (_mirrored(side, run.model, image.device) for side in (height, width))
    if len(rows) == height and len(columns) == width:
        return _paint(run, image, hole, (height, width))

    def padded(x: Tensor) -> Tensor:
        return x.index_select(2, rows.to(x.device)).index_select(3, columns.to(x.device))

    result = _paint(run.with_maps(padded, (height, width)), padded(image), padded(hole), (height, width))
    maps = {name: None if x is None else x[:, :, :height, :width] for name, x in result._asdict().items()}
    if result.attention is not None:
        cell = len(rows) // result.attention.shape[2]
        maps["attention"] = result.attention[:, :, : -(-height // cell), : -(-width // cell)]
    return InpaintResult(**maps)


def _mirrored(side: int, model: InpaintingModel, device: torch.device) -> Tensor:
    """Which pixel stands at each place of a side that is padded to what the model takes: mirrored behind the last."""
    multiple = model.size_multiple
    padded = -(-max(side, model.least_size) // multiple) * multiple
    period = max(2 * side - 2, 1)
    places = torch.arange(padded, device=device) % period
    return torch.minimum(places, period - places) if side > 1 else torch.zeros_like(places)


def _paint(run: _Run, image: Tensor, hole: Tensor, size: tuple[int, int]) -> InpaintResult:
    """Paint images whose size the model takes; "hole" are the holes in their top left corner of ``size``."""
    if run.settings.memory is not None and len(image) > 1:
        return _joined([_paint(*run.of_sample(i, image, hole), size) for i in range(len(image))])
    if run.settings.region == "full":
        return _within_memory(run, image, hole, "full")
    wanted = [_region(run, own[0, : size[0], : size[1]].cpu(), image.shape[2:]) for own in hole]
    if all(region == wanted[0] for region in wanted):
        return _within_memory(run, image, hole, wanted[0])
    return _joined([_paint(*run.of_sample(i, image, hole), size) for i in range(len(image))])


def _region(run: _Run, hole: Tensor, size: Sequence[int]) -> str | list[Box]:
    """The boxes that are worth painting instead of a whole image of that size, for a hole [H, W] in its corner."""
    height, width = size
    hole = F.pad(hole, (0, width - hole.shape[1], 0, height - hole.shape[0]))
    boxes = run.model.hole_boxes(hole, run.settings.around)
    if boxes is None:
        return "full"
    if not boxes:
        return []
    whole = run.model.multiply_adds(None, height, width)
    return boxes if run.model.multiply_adds(boxes, height, width) <= FULL_RUN_SHARE * whole else "full"


def _joined(results: Sequence[InpaintResult]) -> InpaintResult:
    """The results of single images as one of their batch, less what some of them lack."""
    return InpaintResult(*(None if any(m is None for m in x) else torch.cat(x) for x in zip(*results, strict=True)))


def _resize(run: _Run, image: Tensor, hole: Tensor) -> InpaintResult:
    """Paint reduced images; the maps of the result are enlarged again."""
    height, width = image.shape[2:]
    scale = (run.settings.max_side or max(height, width)) / max(height, width)
    if scale >= 1:
        return _pad(run, image, hole)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))

    def reduced(x: Tensor) -> Tensor:
        return F.interpolate(x.to(image.dtype), size, mode="area")

    small_hole = F.adaptive_max_pool2d(hole.to(image.dtype), size) > 0
    small = reduced(image).masked_fill(small_hole, 0)
    inner = run.with_maps(reduced, (height, width))
    result = _pad(inner.with_attention() if run.settings.residual else inner, small, small_hole)
    maps = {
        name: x if x is None or name == "attention" else _enlarged(x, (height, width))
        for name, x in result._asdict().items()
    }
    if run.settings.residual:
        maps["output"] = _with_residual(
            run, image, hole, torch.where(small_hole, result.output, small), small_hole, result
        )
        maps["attention"] = result.attention if run.guidance.get("return_attention") else None
    return InpaintResult(**maps)


def _enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x.float(), size, mode="bicubic").clamp(0, 1).to(x.dtype)


def _with_residual(
    run: _Run, image: Tensor, hole: Tensor, small: Tensor, small_hole: Tensor, result: InpaintResult
) -> Tensor:
    """Images of full size whose holes are those of the reduced ones, with the fine structure of known places."""
    base = _enlarged(small, (image.shape[2], image.shape[3]))
    for i in range(len(image)):
        one = slice(i, i + 1)
        attention = None if result.attention is None else result.attention[one]
        offsets = match(small[one], small_hole[one], attention, run.model.size_multiple)
        base[one] += carried_residual(image[one], base[one], hole[one], offsets)
    return base.clamp_(0, 1)


def _crop(run: _Run, image: Tensor, hole: Tensor) -> InpaintResult:
    """Paint what is around each hole alone; around the crops stand the images, and no edges and no HOG."""
    if len(image) > 1:
        return _joined([_crop(*run.of_sample(i, image, hole)) for i in range(len(image))])
    height, width = image.shape[2:]
    maps = {"output": image.clone()}
    crops = _crops(run, hole[0, 0].cpu())
    for number, crop in enumerate(crops):
        run.report(0.05 + 0.9 * number / len(crops), f"painting crop {number + 1} of {len(crops)}")
        result = _resize(run.with_maps(crop.of, (height, width)), crop.of(image), crop.of(hole))
        for name, x in result._asdict().items():
            if x is None or name in ("attention", "completed"):
                continue
            if name not in maps:
                maps[name] = image.clone() if name == "coarse" else image.new_zeros(1, x.shape[1], height, width)
            crop.of(maps[name]).copy_(x)
    return InpaintResult(completed=maps["output"], **maps)


def _crops(run: _Run, hole: Tensor) -> list[Box]:
    """Disjoint boxes that hold the holes [H, W] and what is around them, of sizes that the model takes if they can."""
    crops = []
    for box in connected_boxes(hole):
        margin = run.settings.margin
        if margin is None:
            margin = max(max(box.size) // 2, LEAST_MARGIN)
        crops.append(_snapped(box.grown(margin, *hole.shape), run.model, hole.shape))
    joined = merged(crops, lambda crop: crop.area)
    while (snapped := merged([_snapped(crop, run.model, hole.shape) for crop in joined], lambda c: c.area)) != joined:
        joined = snapped
    return joined


def _snapped(box: Box, model: InpaintingModel, size: Sequence[int]) -> Box:
    """The box enlarged to what the model takes, as far as the image of that size reaches."""
    height, width = (-(-max(side, model.least_size) // model.size_multiple) * model.size_multiple for side in box.size)
    top, left = max(min(box.top, size[0] - height), 0), max(min(box.left, size[1] - width), 0)
    return Box(top, left, min(top + height, size[0]), min(left + width, size[1]))


_FITTED: Mapping[str, Callable[[_Run, Tensor, Tensor], InpaintResult]] = {
    "pad": _pad,
    "crop": _crop,
    "resize": _resize,
}


# Memory ---------------------------------------------------------------------------------------------------------------

_WORKING_MEMORY = tuple(mebibytes << 20 for mebibytes in (512, 256, 128, 64, 32))
"""Of strips, see :func:`.models._regions.working_memory`. On a CPU those of 128 MiB cost no time."""
_BYTES_PER_PIXEL = 2 * (3 * 4 + 1)
"""Of the photo and its mask as a network sees them, before and behind their padding."""


def _within_memory(run: _Run, image: Tensor, hole: Tensor, region: str | list[Box]) -> InpaintResult:
    """What the model makes, in strips as thin as memory asks for; thinner ones where a GPU's does not suffice."""
    *attempts, last = _attempts(run, image, region)
    for wanted, working_bytes in attempts:
        with suppress(torch.cuda.OutOfMemoryError), working_memory(working_bytes):
            return run.model(image, hole, region=wanted, **run.guidance)
        run.report(0.05, "out of memory; painting in thinner strips")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    with working_memory(last[1]):
        return run.model(image, hole, region=last[0], **run.guidance)


def _attempts(run: _Run, image: Tensor, region: str | list[Box]) -> list[tuple[str | list[Box], int | None]]:
    """Regions and working memories to try, the quickest first, all of them within the memory that may be taken."""
    working = (None, *_WORKING_MEMORY) if run.settings.device.type == "cuda" else _WORKING_MEMORY[2:]
    regions = [region] if region == "full" else [region, "full"]  # of which strips can be thinner than many a box
    attempts = [(wanted, working_bytes) for wanted in regions for working_bytes in working]
    if run.settings.memory is None:
        return attempts[: len(working)]
    height, width = image.shape[2:]
    least = None
    for i, (wanted, working_bytes) in enumerate(attempts):
        hole = None if isinstance(wanted, str) else wanted
        options = {"working_bytes": working_bytes, **run.guidance}
        needed = estimate_memory(run.model, height, width, run.settings.autocast, hole, **options)
        needed += _BYTES_PER_PIXEL * height * width
        if needed <= run.settings.memory:
            return attempts[i : i + 1] if run.settings.device.type == "cpu" else attempts[i:]
        least = needed if least is None else min(least, needed)
    raise ValueError(
        f"memory: expected at least {least:,} bytes ({(least or 0) / 2**30:.2f} GiB) for {type(run.model).__name__} on "
        f"{height} x {width} pixels, got {run.settings.memory:,}; fit='resize' and fit='crop' need less"
    )


# Blending -------------------------------------------------------------------------------------------------------------


def _feathered(image: Tensor, painted: Tensor, hole: Tensor) -> Tensor:
    """The painting plus the difference that the known pixels beside the hole have to it, fading from the border on."""
    spread = ((image - painted) * ~hole, (~hole).to(painted.dtype))
    result = painted.clone()
    for step in range(FEATHER):
        sums, count = (F.avg_pool2d(x, 3, 1, 1, divisor_override=1) for x in spread)
        reached = (count > 0) & (spread[1] == 0)
        difference = sums / count.clamp_min(1)
        result += difference * reached * (1 - (step + 1) / (FEATHER + 1))
        spread = (torch.where(reached, difference, spread[0]), spread[1] + reached)
    return result


def _solved(image: Tensor, painted: Tensor, hole: Tensor) -> Tensor:
    """The pixels that have the painting's differences and meet the known ones."""
    if hole.all():
        return painted
    right, below = painted[0, :, :, 1:] - painted[0, :, :, :-1], painted[0, :, 1:] - painted[0, :, :-1]
    return solve_differences(hole[0, 0], image[0], right, below, guess=painted[0])[None]


def _blended(blend: str, image: Tensor, painted: Tensor, hole: Tensor) -> Tensor:
    """The painting [B, 3, H, W] in [0, 1], changed in the holes as ``blend`` says, each in its own box."""
    result = painted.to(torch.promote_types(painted.dtype, torch.float32), copy=True)
    if blend != "paste":
        for i, own in enumerate(hole[:, 0].cpu()):
            one = slice(i, i + 1)
            for box in connected_boxes(own):
                seen = box.grown(1, *own.shape)
                parts = (seen.of(image[one]).to(result.dtype), seen.of(result[one]), seen.of(hole[one]))
                seen.of(result[one]).copy_(torch.where(parts[2], _BLENDS[blend](*parts), parts[1]))
    return result.clamp(0, 1)


_BLENDS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"feather": _feathered, "poisson": _solved}
