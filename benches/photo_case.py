"""Whole photos and holes through every model: time and peak memory, maps whole and in strips."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from inpaint_kernels.models import CSA, GLCIC, Box, DeepFillV1, DeepFillV2, EdgeConnect, GuidedFace, PartialConvUNet
from inpaint_kernels.models._regions import working_memory
from torch import Tensor

from benches.harness import Outputs, Provider
from benches.peer_models import unit_image
from inpaint_kernels.memory_plan import estimate_memory

WHOLE, STRIPS, HOLE = "whole maps", "strips of 128 MiB", "the hole alone"
WORKING_BYTES = {WHOLE: None, STRIPS: 128 << 20, HOLE: 128 << 20}
MODELS: Mapping[str, Callable[[], Any]] = {
    "deepfill_v1": DeepFillV1,
    "deepfill_v2": DeepFillV2,
    "glcic": GLCIC,
    "partial_conv_unet": PartialConvUNet,
    "edge_connect": EdgeConnect,
    "guided_face": GuidedFace,
    "csa": CSA,
}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class PhotoCase:
    """One race: a model with its initial weights, a photo, and a square hole in it.

    Attributes:
        name: of the model.
        side: of the photo, made a size that the model takes.
        hole: side of the hole.
    """

    name: str
    side: int
    hole: int

    def __str__(self) -> str:
        return f"{self.name}-{self.side}-hole{self.hole}"

    @property
    def slow(self) -> bool:
        return self.side > 512

    @property
    def race_seconds(self) -> float:
        return 20.0

    @property
    def baseline(self) -> str | None:
        return None if self.side > 2048 else WHOLE

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE,)

    @property
    def provider_names(self) -> tuple[str, ...]:
        model, size = _model(self.name), self.size
        if model.needed_regions(self.box, *size) is None:
            return (WHOLE,)
        return (HOLE,) if self.baseline is None else (WHOLE, STRIPS, HOLE)

    @property
    def size(self) -> tuple[int, int]:
        multiple = _model(self.name).size_multiple
        return (-(-self.side // multiple) * multiple,) * 2

    @property
    def box(self) -> Box:
        corner = self.side // 4
        return Box(corner, corner, corner + self.hole, corner + self.hole)

    def provider(self, name: str) -> Provider:
        expected = None if self.baseline is None else functools.partial(_expected, self)
        return Provider(name, run=functools.partial(_fill, self, name), expected=expected)

    def facts(self) -> Mapping[str, Any]:
        options: dict[str, Any] = {**_guidance(self), "working_bytes": WORKING_BYTES[STRIPS]}
        model, partial = _model(self.name), HOLE in self.provider_names
        estimates = {"whole": estimate_memory(model, *self.size, **options)}
        if partial:
            estimates["hole"] = estimate_memory(model, *self.size, hole=self.box, **options)
        return {
            "op": "photo",
            "case": str(self),
            "model": self.name,
            "height": self.size[0],
            "width": self.size[1],
            "hole": self.hole,
            "estimated_mib": {name: round(size / 2**20, 1) for name, size in estimates.items()},
            "direction": "inference",
        }


@functools.lru_cache(maxsize=1)
def _model(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@functools.lru_cache(maxsize=1)
def _photo(case: PhotoCase) -> tuple[Tensor, Tensor]:
    image = unit_image(case.size[0], 1, 1)
    mask = torch.zeros(1, 1, *case.size, dtype=torch.bool)
    case.box.of(mask).fill_(True)
    return image, mask


def _guidance(case: PhotoCase) -> dict[str, Tensor]:
    return {"canny_edges": torch.zeros(1, 1, *case.size)} if case.name == "edge_connect" else {}


def _fill(case: PhotoCase, name: str) -> Outputs:
    image, mask = _photo(case)
    region = "hole" if name == HOLE else "full"
    with torch.no_grad(), working_memory(WORKING_BYTES[name]):
        return (_model(case.name)(image, mask, region=region, **_guidance(case)).completed,)


@functools.lru_cache(maxsize=1)
def _expected(case: PhotoCase) -> Outputs:
    return _fill(case, WHOLE)
