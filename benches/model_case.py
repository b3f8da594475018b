"""Cases of bench_models.py: our models beside the public networks with the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from inpaint_kernels.models._interface import Box
from torch import Tensor

from benches.harness import Outputs
from benches.peer_models import unit_image
from benches.published_models import PublishedModel, published_model
from benches.published_race import OURS, PUBLISHED_LAST, PublishedRace

HOLE = "ours, hole only"


@dataclass(frozen=True)
class ModelCase(PublishedRace):
    """One race: a batch of photos with a hole of the same box in each.

    Attributes:
        name: of the pair, see published_models.py.
        height: of the photos, cut to a multiple that both networks take.
        width: the same.
        batch: photos.
        hole: side of the square hole in the middle.
        folder: where the checkouts are.
    """

    name: str
    height: int
    width: int
    batch: int
    hole: int
    folder: Path = field(repr=False)

    def __str__(self) -> str:
        return f"{self.name}-{self.height}x{self.width}-batch{self.batch}"

    @property
    def pair(self) -> PublishedModel:
        return published_model(self.name)

    @property
    def slow(self) -> bool:
        return self.height * self.width * self.batch > 256 * 256

    @property
    def provider_names(self) -> tuple[str, ...]:
        partial = self.pair.build().eval().needed_regions(_box(self), self.height, self.width) is not None
        return (*super().provider_names, *((HOLE,) if partial else ()))

    def runner(self, name: str) -> Callable[[], Outputs]:
        return _runner(self, name)

    def facts(self) -> Mapping[str, Any]:
        return {
            "op": "models",
            "case": str(self),
            "model": self.name,
            "repository": self.pair.peer.repository,
            "height": self.height,
            "width": self.width,
            "batch": self.batch,
            "hole": self.hole,
            "direction": "inference",
        }


def _box(case: ModelCase) -> Box:
    top, left = (case.height - case.hole) // 2, (case.width - case.hole) // 2
    return Box(top, left, top + case.hole, left + case.hole)


def _photos(case: ModelCase) -> tuple[Tensor, Tensor]:
    side = max(case.height, case.width)
    image = unit_image(side, case.batch, 1)[..., : case.height, : case.width].contiguous()
    mask = torch.zeros(case.batch, 1, case.height, case.width)
    top, left, bottom, right = _box(case)
    mask[..., top:bottom, left:right] = 1
    return image * (1 - mask), mask


def _runner(case: ModelCase, name: str) -> Callable[[], Outputs]:
    pair = case.pair
    network = pair.load_published(case.folder)
    image, mask = _photos(case)
    if name in (OURS, HOLE):
        model = pair.load_ours(network)
        return functools.partial(_fill, pair, model, image, mask, "hole" if name == HOLE else "full")
    if name == PUBLISHED_LAST:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        image, mask = (x.contiguous(memory_format=torch.channels_last) for x in (image, mask))
    return functools.partial(_fill_published, pair, network, image, mask)


def _fill(pair: PublishedModel, model: Any, image: Tensor, mask: Tensor, region: str) -> Outputs:
    with torch.no_grad():
        return (model(image, mask, region=region, **pair.guidance(image, mask)).completed,)


def _fill_published(pair: PublishedModel, network: Any, image: Tensor, mask: Tensor) -> Outputs:
    *_, output = pair.run_published(network, image, mask)
    return (torch.where(mask > 0, output.clamp(0, 1), image),)
