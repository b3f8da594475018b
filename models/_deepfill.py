"""What DeepFill v1 and v2 share: two stages, the second with a branch of contextual attention.

The table of either paper, in the names of the published TensorFlow graph; both networks keep their widths in units of
one width (v1: 32; v2: 24 behind the gate)::

    stage 1        conv1 .. conv17
    stage 2        xconv1 .. xconv10_atrous            the branch of dilated convolutions
                   pmconv1 .. pmconv6, contextual attention, pmconv9, pmconv10
                   allconv11 .. allconv17              both branches together
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from inpaint_kernels.models._boxes import Box, merged
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult, check_guidance, complete
from inpaint_kernels.models._layers import Convolution
from inpaint_kernels.models._regions import Chain, Plan, pasted, working_bytes
from torch import Tensor

from inpaint_kernels import contextual_attention

RATE = 2
"""Features per position of the attention's matching grid, along each axis."""

_FEWEST_QUERY_ROWS = 8


class Row(NamedTuple):
    """One convolution of the table: name, kernel, stride, dilation, width in units, enlargement, activation."""

    name: str
    width: float
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    upsample: int = 1
    activation: str = "elu"


def _atrous(prefix: str) -> tuple[Row, ...]:
    return tuple(Row(f"{prefix}conv{number}_atrous", 4, dilation=2 ** (number - 6)) for number in (7, 8, 9, 10))


def _painter(prefix: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}conv11", 4),
        Row(f"{prefix}conv12", 4),
        Row(f"{prefix}conv13_upsample", 2, upsample=2),
        Row(f"{prefix}conv14", 2),
        Row(f"{prefix}conv15_upsample", 1, upsample=2),
        Row(f"{prefix}conv16", 0.5),
    )


COARSE = (
    Row("conv1", 1, kernel=5),
    Row("conv2_downsample", 2, stride=2),
    Row("conv3", 2),
    Row("conv4_downsample", 4, stride=2),
    Row("conv5", 4),
    Row("conv6", 4),
    *_atrous(""),
    *_painter(""),
)
DILATED = (
    Row("xconv1", 1, kernel=5),
    Row("xconv2_downsample", 1, stride=2),
    Row("xconv3", 2),
    Row("xconv4_downsample", 2, stride=2),
    Row("xconv5", 4),
    Row("xconv6", 4),
    *_atrous("x"),
)
MATCHED = (
    Row("pmconv1", 1, kernel=5),
    Row("pmconv2_downsample", 1, stride=2),
    Row("pmconv3", 2),
    Row("pmconv4_downsample", 4, stride=2),
    Row("pmconv5", 4),
    Row("pmconv6", 4, activation="matched"),
)
ATTENDED = (Row("pmconv9", 4), Row("pmconv10", 4))
PAINTER = _painter("all")
LAST = ("conv17", "allconv17")
"""The last convolution of either stage: to 3 channels, without an activation of its own."""
RECOMPUTED = (
    ("conv1", "conv2_downsample", "conv3", "conv4_downsample"),
    ("conv15_upsample", "conv16", "conv17"),
    ("xconv1", "xconv2_downsample", "xconv3", "xconv4_downsample"),
    ("pmconv1", "pmconv2_downsample", "pmconv3", "pmconv4_downsample"),
)
"""Layers whose maps, large as they are, a step in training mode computes twice: 3 % more of its products, but a quarter
less of its memory. Those of the second stage's end are needed while all others are still there."""


@dataclass(frozen=True)
class Dialect:
    """What the public implementations of one DeepFill decide differently.

    Attributes:
        border: of the convolutions: "zeros", "reflect" or "same_tf".
        attention: preset of :func:`inpaint_kernels.contextual_attention`.
        fuse: side of the attention's diagonal sums; 0: off.
        width: of the first convolution, in features.
        painter_width: the same unit for the second stage's ``allconv`` layers; None: ``width``.
        ones: whether a channel of ones stands beside the mask.
        indicators: whether the second stage too sees that channel and the mask.
        gated_last: whether the last convolution of either stage has a gate.
        matched_activation: of ``pmconv6``, whose features the attention compares.
        squash: "clip" to [-1, 1] or "tanh", what ends a stage.
        signed: whether images are in [-1, 1], 0 in the hole; else in [0, 1], 1 in the hole.
    """

    border: str
    attention: str
    width: int
    squash: str
    fuse: int = 3
    painter_width: int | None = None
    ones: bool = True
    indicators: bool = True
    gated_last: bool = False
    matched_activation: str = "relu"
    signed: bool = True


@dataclass(frozen=True)
class _Plan:
    """How both stages compute a box of the image; the attention's keys need the whole of ``matched``."""

    coarse: Plan
    dilated: Plan
    attended: Plan
    painter: Plan
    queries: Box = field(init=False)

    def __post_init__(self) -> None:
        top, left, bottom, right = self.attended.source
        queries = Box(top // RATE, left // RATE, -(-bottom // RATE), -(-right // RATE))
        object.__setattr__(self, "queries", queries)

    @property
    def multiply_adds(self) -> int:
        """Of the convolutions."""
        return sum(plan.multiply_adds for plan in (self.coarse, self.dilated, self.attended, self.painter))


def _queries(plans: Sequence[_Plan | None], matched: Tensor) -> list[Box | None]:
    """Disjoint boxes of the matching grid that hold what the plans need; None: all of it.

    Where working memory is short, boxes of whose scores against all keys it can hold about as many, from 8 rows on:
    with fewer, most of them would be computed for the halo.
    """
    if None in plans:
        return [None]
    boxes = merged([plan.queries for plan in plans if plan is not None], lambda box: box.area)
    most_bytes = working_bytes()
    if most_bytes is None:
        return list(boxes)
    keys = matched.shape[2] // RATE * (matched.shape[3] // RATE) * matched.element_size()
    return [strip for box in boxes for strip in box.strips(max(most_bytes // (keys * box.size[1]), _FEWEST_QUERY_ROWS))]


class DeepFill(InpaintingModel):
    """Two stages that paint, the second one with contextual attention.

    Args:
        dialect: which implementation's decisions hold.
        guided: whether a sketch guides it: one more channel (v2).
    """

    size_multiple: ClassVar[int] = 8
    has_attention: ClassVar[bool] = True
    least_size: int = 8

    gated: ClassVar[bool]

    def __init__(self, dialect: Dialect, guided: bool = False) -> None:
        super().__init__()
        self.dialect, self.guided = dialect, guided
        if dialect.border == "reflect":
            self.least_size = 72  # 16 features are mirrored
        channels = 3 + guided + dialect.ones + 1
        second = 3 + (dialect.ones + 1 if dialect.indicators else 0)
        width, painter_width = dialect.width, dialect.painter_width or dialect.width
        features = self._add_rows(COARSE, channels, width)
        self._add_last(LAST[0], features)
        dilated = self._add_rows(DILATED, second, width)
        matched = self._add_rows(ATTENDED, self._add_rows(MATCHED, second, width), width)
        self._add_last(LAST[1], self._add_rows(PAINTER, dilated + matched, painter_width))

    # Construction -----------------------------------------------------------------------------------------------------

    def add_layer(self, name: str, layer: Convolution) -> None:
        """Register a layer of the table where the published checkpoints have it."""
        raise NotImplementedError

    def layer(self, name: str) -> Any:
        """The layer of the table of that name."""
        raise NotImplementedError

    def _add_rows(self, rows: Iterable[Row], channels: int, unit: int) -> int:
        for row in rows:
            width = int(row.width * unit)
            layer = Convolution(
                channels,
                width,
                row.kernel,
                row.stride,
                row.dilation,
                activation=self.dialect.matched_activation if row.activation == "matched" else row.activation,
                gated=self.gated,
                border=self.dialect.border,
                upsample=row.upsample,
            )
            self.add_layer(row.name, layer)
            channels = width
        return channels

    def _add_last(self, name: str, channels: int) -> None:
        gated = self.dialect.gated_last
        self.add_layer(name, Convolution(channels, 3, activation="none", gated=gated, border=self.dialect.border))

    def _chain(self, rows: Iterable[Row], *last: str) -> Chain:
        layers = {name: self.layer(name) for name in (*(row.name for row in rows), *last)}
        return Chain(layers, RECOMPUTED if self.training else ())

    # Regions ----------------------------------------------------------------------------------------------------------

    def needed_regions(self, hole: Box, height: int, width: int) -> dict[str, Box]:
        """Boxes of the layers by the table's names; "contextual_attention": its queries, on its matching grid."""
        plan = self._plan(hole, (height, width))
        matched = {}
        size = (height, width)
        for name, layer in self._chain(MATCHED).layers.items():
            size = layer.output_size(size)
            matched[name] = Box(0, 0, *size)
        attention = {"contextual_attention": plan.queries}
        return plan.coarse.boxes | plan.dilated.boxes | matched | attention | plan.attended.boxes | plan.painter.boxes

    def multiply_adds(self, boxes: Sequence[Box] | None, height: int, width: int) -> int:
        """See :meth:`._interface.InpaintingModel.multiply_adds`; all boxes share the attention's keys."""
        size, features = (height, width), (height // 4, width // 4)
        keys = features[0] // RATE * (features[1] // RATE)
        channels = self.layer(MATCHED[-1].name).channels
        attended = (1 + RATE**2) * channels * keys  # for each query: its scores, and the features that it pastes
        shared = self._chain(MATCHED).multiply_adds(size)
        if boxes is None:
            stages = (self._chain(COARSE, LAST[0]).multiply_adds(size), self._chain(DILATED).multiply_adds(size))
            rest = (
                self._chain(ATTENDED).multiply_adds(features),
                self._chain(PAINTER, LAST[1]).multiply_adds(features),
            )
            return shared + sum(stages) + keys * attended + sum(rest)
        plans = [self._plan(box, size) for box in boxes]
        return shared + sum(plan.multiply_adds + plan.queries.area * attended for plan in plans)

    def _plan(self, box: Box, size: tuple[int, int]) -> _Plan:
        features = (size[0] // 4, size[1] // 4)
        painter = self._chain(PAINTER, LAST[1]).plan(box, features)
        return _Plan(
            coarse=self._chain(COARSE, LAST[0]).plan(box, size),
            dilated=self._chain(DILATED).plan(painter.source, size),
            attended=self._chain(ATTENDED).plan(painter.source, features),
            painter=painter,
        )

    # Painting ---------------------------------------------------------------------------------------------------------

    def paint(
        self,
        image: Tensor,
        hole: Tensor,
        *,
        boxes: Sequence[Box] | None = None,
        sketch: Tensor | None = None,
        return_attention: bool = False,
    ) -> InpaintResult:
        """Fill the holes of checked images.

        Args:
            image: [B, 3, H, W] RGB in [0, 1], 0 in the hole.
            hole: bool [B, 1, H, W].
            boxes: only these pixels are wanted; None: all.
            sketch: [B or 1, 1, H, W] in [0, 1], lines to follow; what is above 0.6 in the hole is one. Only, and then
                always, for a guided network.
            return_attention: whether the result's ``attention`` is wanted; none of it is computed outside ``boxes``.
        """
        size = (image.shape[2], image.shape[3])
        plans = [None] if boxes is None else [self._plan(box, size) for box in boxes]
        coarse, second = self._first_stage(image, hole, self._lines(sketch, image, hole), boxes, plans)
        attended, attention = self._attend(self._chain(MATCHED)(second), hole, plans, return_attention)
        painted = (
            self._unscale(self._refine(second, source, plan)) for source, plan in zip(attended, plans, strict=True)
        )
        output = pasted(painted, image, boxes)
        return InpaintResult(output, complete(image, output, hole, boxes), coarse, attention)

    def _first_stage(
        self,
        image: Tensor,
        hole: Tensor,
        lines: list[Tensor],
        boxes: Sequence[Box] | None,
        plans: Sequence[_Plan | None],
    ) -> tuple[Tensor, Tensor]:
        """What it paints, and what the second stage sees, in channels_last for both of its branches."""
        known, mask = self._scale(image, hole), hole.to(image.dtype)
        indicators = [torch.ones_like(mask[:, :, :1, :1]).expand_as(mask), mask] if self.dialect.ones else [mask]
        x = torch.cat([known, *lines, *indicators], 1)
        stage = self._chain(COARSE, LAST[0])
        painted = [self._squash(stage.run(x, plan and plan.coarse)) for plan in plans]
        coarse = pasted(map(self._unscale, painted), image, boxes)
        if boxes is None:
            known = torch.where(hole, painted[0], known)
        second = torch.cat([known, *(indicators if self.dialect.indicators else [])], 1)
        second = second.contiguous(memory_format=torch.channels_last)
        for box, part in zip(boxes, painted, strict=True) if boxes is not None else ():
            seen = box.of(second)[:, :3]
            seen.copy_(torch.where(box.of(hole), part, seen))
        return coarse, second

    def _refine(self, second: Tensor, attended: Tensor, plan: _Plan | None) -> Tensor:
        dilated = self._chain(DILATED).run(second, plan and plan.dilated)
        attended = attended.contiguous(memory_format=torch.channels_last)
        attended = self._chain(ATTENDED)(attended, plan and plan.attended)
        both = torch.cat([dilated, attended], 1).contiguous(memory_format=torch.channels_last)
        return self._squash(self._chain(PAINTER, LAST[1])(both, plan and plan.painter))

    def _attend(
        self, matched: Tensor, mask: Tensor, plans: Sequence[_Plan | None], return_attention: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """What stands in the features' place where each plan reads it, and the offsets, if they are wanted."""
        options: dict[str, Any] = {"preset": self.dialect.attention, "fuse": self.dialect.fuse, "mask_batch": "each"}
        options["return_offsets"] = return_attention
        shape, offsets = matched.shape[:2], None
        sources = [matched.new_empty(*shape, *plan.attended.source.size) for plan in plans if plan is not None]
        for queries in _queries(plans, matched):
            output = contextual_attention(matched, matched, mask, queries=queries, **options)
            if return_attention:
                output, own = output.output, output.offsets
                offsets = own if offsets is None else offsets.add_(own)  # each is 0 where the others are not
            if queries is None:
                return [output], offsets
            computed = Box(*(RATE * side for side in queries))
            for plan, source in zip(plans, sources, strict=True):
                if plan is not None and plan.attended.source.meets(computed):
                    part = plan.attended.source.common(computed)
                    part.seen_from(plan.attended.source).of(source).copy_(part.of(output))
            del output  # before the next one is made
        return sources, offsets

    def _lines(self, sketch: Tensor | None, image: Tensor, hole: Tensor) -> list[Tensor]:
        if self.guided != (sketch is not None):
            expected = "a tensor for a guided network" if self.guided else "None for a network without guidance"
            raise ValueError(f"sketch: expected {expected}, got {'None' if sketch is None else 'a tensor'}")
        if sketch is None:
            return []
        return [((check_guidance("sketch", sketch, image) > 0.6) & hole).to(image.dtype)]

    def _scale(self, image: Tensor, hole: Tensor) -> Tensor:
        if self.dialect.signed:
            return (image * 2 - 1).masked_fill(hole, 0)
        return image.masked_fill(hole, 1)

    def _unscale(self, output: Tensor) -> Tensor:
        return (output + 1) / 2 if self.dialect.signed else output

    def _squash(self, x: Tensor) -> Tensor:
        return x.tanh() if self.dialect.squash == "tanh" else x.clamp(-1, 1)
