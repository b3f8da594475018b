"""What every inpainting network shares: one call, one result, one convention for images and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from inpaint_kernels.models._boxes import Box, connected_boxes, merged
from inpaint_kernels.models._regions import pasted
from torch import Tensor, nn

from inpaint_kernels._checks import (
    check_choice,
    check_dtype,
    check_floating,
    check_same_device,
    check_shape,
)

D = TypeVar("D")

REGIONS = ("full", "hole")
_MASK_DTYPES = (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


class InpaintResult(NamedTuple):
    """What an inpainting network returns. Images are RGB in [0, 1].

    Attributes:
        output: [B, 3, H, W], what the network paints; a network that ends without a bound may leave [0, 1]. With
            ``region="hole"`` only the boxes of the holes are painted; around them stands the image.
        completed: [B, 3, H, W], ``output`` in the hole, within [0, 1]; the image around it, bit for bit.
        coarse: [B, 3, H, W], what the first of two stages paints; None where there is one stage.
        attention: [B, 2, h, w] int64, rows and columns from each position to the one whose patch it takes most of; None
            unless asked for.
        edges: [B, 1, H, W] in [0, 1], the edges that guided the network; None where none do.
        hog: [B, 1, H, W] in [0, 1], the drawn gradient histograms that guided it; None where none do.
    """

    output: Tensor
    completed: Tensor
    coarse: Tensor | None = None
    attention: Tensor | None = None
    edges: Tensor | None = None
    hog: Tensor | None = None


class InpaintingModel(nn.Module):
    """An inpainting network: ``model(image, mask)`` fills the hole.

    A subclass paints in the convention of its paper (:meth:`paint`) and translates at its own border; outside of it an
    image is RGB in [0, 1] and a mask is 1 in the hole.
    """

    size_multiple: ClassVar[int] = 1
    """Height and width must be multiples of it."""

    has_attention: ClassVar[bool] = False
    """Whether :meth:`paint` takes ``return_attention``, and gives offsets in positions of ``size_multiple`` pixels."""

    least_size: int = 1
    """Height and width must not be smaller."""

    def forward(
        self, image: Tensor, mask: Tensor, *, region: str | Sequence[Box] = "full", **guidance: Any
    ) -> InpaintResult:
        """Fill the hole of each image.

        Args:
            image: [B, 3, H, W] RGB, values in [0, 1], in the dtype of the parameters; H and W multiples of
                ``size_multiple``, from ``least_size`` on. What it holds in the hole is not looked at.
            mask: [B or 1, 1, H, W], bool, uint8 or floating; hole where it is larger than 0.5.
            region: "full"; "hole": only what the pixels of the holes depend on is computed, equal there up to
                rounding; or the boxes of the image that are wanted, for every image of the batch. Where one box needs
                everything (:meth:`needed_regions` is None), everything is computed; so it is for "hole" under
                torch.compile and torch.export, whose graphs cannot depend on where a hole lies.
            **guidance: what else the network takes, see :meth:`paint` of its class.

        Returns:
            An :class:`InpaintResult`, its images in the dtype of ``image``. Inside ``torch.autocast`` convolutions run
            in the short dtype, attention, HOG and the sums of norms in float32.

        Raises:
            ValueError, TypeError: an argument has the wrong rank, size, dtype or device; the message names it.
        """
        hole = self.checked_hole(image, mask)
        image = image.masked_fill(hole, 0)
        if not isinstance(region, str):
            result = self.paint(image, hole, boxes=self._check_boxes(region, image), **guidance)
            return _of_dtype(image.dtype, result)
        check_choice("region", region, REGIONS)
        if region == "hole" and not torch.compiler.is_compiling():
            return _of_dtype(image.dtype, self._paint_holes(image, hole, guidance))
        return _of_dtype(image.dtype, self.paint(image, hole, **guidance))

    def paint(
        self, image: Tensor, hole: Tensor, *, boxes: Sequence[Box] | None = None, **guidance: Any
    ) -> InpaintResult:
        """Fill the holes of checked images.

        Args:
            image: [B, 3, H, W] RGB in [0, 1], 0 in the hole.
            hole: bool [B, 1, H, W].
            boxes: only these pixels are wanted; None: all. Given only where :meth:`needed_regions` is not None.
            **guidance: of the network.
        """
        raise NotImplementedError

    def needed_regions(self, hole: Box, height: int, width: int) -> dict[str, Box] | None:
        """Which box of its output each layer must compute for the pixels of a hole, in the layer's own pixels.

        Args:
            hole: the box that is wanted of the image.
            height: of the image.
            width: of the image.

        Returns:
            Boxes by the layers' names; None if the hole depends on every pixel of every layer.
        """
        return None

    def multiply_adds(self, boxes: Sequence[Box] | None, height: int, width: int) -> int:
        """The products that filling one image takes, a measure of its time.

        Args:
            boxes: those wanted of the image; None: all of it.
            height: of the image.
            width: of the image.

        Defined where :meth:`needed_regions` is not None.
        """
        raise NotImplementedError

    def hole_boxes(self, hole: Tensor, around: int = 0) -> list[Box] | None:
        """The boxes to paint for the holes of one image: one for each, or for several where that is less work.

        Args:
            hole: bool [H, W].
            around: pixels around the holes that are wanted too.

        Returns:
            Disjoint boxes, none without a hole; None if the model needs the whole image in any case.
        """
        height, width = hole.shape
        boxes = [box.grown(around, height, width) for box in connected_boxes(hole)]
        if not boxes:
            return []
        if self.needed_regions(boxes[0], height, width) is None:
            return None
        shared = self.multiply_adds([], height, width)
        return merged(boxes, lambda box: self.multiply_adds([box], height, width) - shared)

    def checked_hole(self, image: Tensor, mask: Tensor) -> Tensor:
        """The hole, bool [B, 1, H, W], of arguments of :meth:`forward`, which raise as there."""
        sizes = check_shape("image", image, "B 3 H W")
        check_floating("image", image)
        check_shape("mask", mask, "B|1 1 H W", **sizes)
        check_dtype("mask", mask, _MASK_DTYPES)
        check_same_device(image=image, mask=mask)
        if image.shape[2] % self.size_multiple or image.shape[3] % self.size_multiple:
            raise ValueError(
                f"image: expected a height and width that are multiples of {self.size_multiple}, "
                f"got {image.shape[2]} x {image.shape[3]}"
            )
        check_least_size(image, self.least_size)
        hole = mask if mask.dtype == torch.bool else mask > 0.5
        return hole.expand(image.shape[0], -1, -1, -1)

    def _check_boxes(self, boxes: Sequence[Box], image: Tensor) -> list[Box] | None:
        """The boxes, inside the image; None where one needs everything."""
        height, width = image.shape[2:]
        wanted = [Box(*box) for box in boxes]
        for box in wanted:
            if not (0 <= box.top < box.bottom <= height and 0 <= box.left < box.right <= width):
                raise ValueError(f"region: expected boxes (top, left, bottom, right) in {height} x {width}, got {box}")
        if wanted and self.needed_regions(wanted[0], height, width) is None:
            return None
        return wanted

    def _paint_holes(self, image: Tensor, hole: Tensor, guidance: dict[str, Any]) -> InpaintResult:
        """Each image's own boxes alone, all in one run where these are the same."""
        boxes = [self.hole_boxes(h[0]) for h in hole]
        first = boxes[0]
        if all(own == first for own in boxes):
            return self.paint(image, hole, boxes=first or None, **guidance)
        parts = []
        for i, wanted in enumerate(boxes):
            one = slice(i, i + 1)
            own = {name: of_sample(value, i, len(boxes)) for name, value in guidance.items()}
            parts.append(self.paint(image[one], hole[one], boxes=wanted or None, **own))
        fields: list[Any] = [None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True)]
        return InpaintResult(*fields)


def _of_dtype(dtype: torch.dtype, result: InpaintResult) -> InpaintResult:
    """Its images in that dtype: autocast leaves some in the short one."""
    fields: list[Any] = [v.to(dtype) if v is not None and v.is_floating_point() else v for v in result]
    return InpaintResult(*fields)


def of_sample(value: Any, i: int, batch: int) -> Any:
    """What guides one image of a batch; a map of batch 1 guides all."""
    return value[i : i + 1] if isinstance(value, Tensor) and value.shape[0] == batch else value


def check_least_size(image: Tensor, least: int) -> None:
    """Raises ValueError where H or W of [B, C, H, W] is smaller than the networks take."""
    if min(image.shape[2:]) < least:
        got = " x ".join(map(str, image.shape[2:]))
        raise ValueError(f"image: expected a height and width of at least {least}, got {got}")


def complete(image: Tensor, output: Tensor, hole: Tensor, boxes: Sequence[Box] | None = None) -> Tensor:
    """The output in the hole, within [0, 1]; the image around it, bit for bit, and outside the boxes; all [B, C, H, W].

    A photo is large, and each pass over it makes fresh pages: only its boxes are computed with.
    """
    if boxes is None:
        return torch.where(hole, output.clamp(0, 1), image)
    return pasted((complete(box.of(image), box.of(output), box.of(hole)) for box in boxes), image, boxes)


def named(dialect: str | D, dialects: Mapping[str, D]) -> D:
    """The dialect of that name, or the dialect itself."""
    if not isinstance(dialect, str):
        return dialect
    check_choice("dialect", dialect, dialects)
    return dialects[dialect]


def check_guidance(name: str, value: Tensor, image: Tensor, channels: int = 1) -> Tensor:
    """A map that guides the network, [B or 1, channels, H, W] floating or bool, for each image and in its dtype."""
    batch, _, height, width = image.shape
    check_shape(name, value, f"B|1 {channels} H W", B=batch, H=height, W=width)
    check_dtype(name, value, _MASK_DTYPES)
    check_same_device(image=image, **{name: value})
    return value.to(image.dtype).expand(batch, -1, -1, -1)
