"""Whole photos and holes through every model and the public networks: time and peak memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from inpaint_kernels.models import CSA, GLCIC, Box, DeepFillV1, DeepFillV2, EdgeConnect, GuidedFace, PartialConvUNet
from inpaint_kernels.models._regions import working_memory
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benches.harness import Outputs, Provider
from benches.peer_models import tensors_in, unit_image
from benches.published_models import PublishedModel, available_pairs, published_model
from benches.published_race import PUBLISHED, TOLERANCE, means
from inpaint_kernels.memory_plan import LiveMemory, estimate_memory

WHOLE, STRIPS, HOLE = "whole maps", "strips of 128 MiB", "the hole alone"
WORKING_BYTES = {WHOLE: None, STRIPS: 128 << 20, HOLE: 128 << 20}
MODELS: Mapping[str, Callable[[], Any]] = {
    "deepfill_v1": lambda: DeepFillV1("daa233"),
    "deepfill_v2": lambda: DeepFillV2("nipponjo"),
    "glcic": lambda: GLCIC("otenim"),
    "partial_conv_unet": PartialConvUNet,
    "edge_connect": EdgeConnect,
    "guided_face": GuidedFace,
    "csa": CSA,
}
PAIRS: Mapping[str, str] = {
    "deepfill_v1": "deepfill_v1-daa233",
    "deepfill_v2": "deepfill_v2-nipponjo",
    "glcic": "glcic-otenim",
    "partial_conv_unet": "partial_conv_unet-naoto",
    "edge_connect": "edge_connect-knazeri",
}
"""Public networks, see published_models.py."""
MOST_PUBLISHED_BYTES = 5 << 30
"""A public network that holds more in its tensors alone is not run."""
OWN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class PhotoCase:
    """One race: a model, a photo, and a square hole in it.

    Attributes:
        name: of the model.
        side: of the photo, made a size that the model takes.
        hole: side of the hole.
        folder: where the checkouts of public networks are, whose weights the model then has; None: its initial ones.
    """

    name: str
    side: int
    hole: int
    folder: Path | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.name}-{self.side}-hole{self.hole}"

    @property
    def slow(self) -> bool:
        return self.side > 512

    @property
    def race_seconds(self) -> float:
        return 20.0

    @property
    def rounds(self) -> int | None:
        return 1 if self.side > 1024 else None  # after the gate's; one takes up to minutes

    @property
    def published(self) -> PublishedModel | None:
        name = PAIRS.get(self.name, "")
        return published_model(name) if name in available_pairs(self.folder) else None

    @property
    def baseline(self) -> str | None:
        return None if self.side > 2048 else WHOLE

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (OWN_TOLERANCE if self.published is None else TOLERANCE,)

    @property
    def provider_names(self) -> tuple[str, ...]:
        if self.baseline is None:
            return (HOLE,)
        partial = _skeleton(self.name).needed_regions(self.box, *self.size) is not None
        least = _least_published_bytes(self)
        runs = least is not None and least <= MOST_PUBLISHED_BYTES and self.published is not None
        return (*((PUBLISHED,) if runs else ()), WHOLE, *((STRIPS, HOLE) if partial else ()))

    @property
    def size(self) -> tuple[int, int]:
        multiple = _skeleton(self.name).size_multiple
        return (-(-self.side // multiple) * multiple,) * 2

    @property
    def box(self) -> Box:
        corner = self.side // 4
        return Box(corner, corner, corner + self.hole, corner + self.hole)

    def provider(self, name: str) -> Provider:
        run = _published_runner(self) if name == PUBLISHED else functools.partial(_fill, self, name)
        if self.baseline is None:
            return Provider(name, run=run, expected=None)
        if self.published is None:
            return Provider(name, run=run, expected=functools.partial(_expected, self))
        # Of the public networks' weights; see published_race.py. The tests compare all pixels, with other weights.
        return Provider(name, run=run, expected=lambda: means(_expected(self)), select=means)

    def facts(self) -> Mapping[str, Any]:
        options: dict[str, Any] = {**_guidance(self), "working_bytes": WORKING_BYTES[STRIPS]}
        model, partial = _model(self), HOLE in self.provider_names
        least = _least_published_bytes(self)
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
            "published_least_mib": round(least / 2**20, 1) if least and least > MOST_PUBLISHED_BYTES else None,
            "direction": "inference",
        }


@functools.lru_cache
def _skeleton(name: str) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return MODELS[name]().eval()


@functools.lru_cache(maxsize=1)
def _model(case: PhotoCase) -> Any:
    if case.published is not None:
        return case.published.load_ours(_public_network(case.published, case.folder))
    torch.manual_seed(0)
    return MODELS[case.name]().eval()


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
        return (_model(case)(image, mask, region=region, **_guidance(case)).completed,)


@functools.lru_cache(maxsize=1)
def _expected(case: PhotoCase) -> Outputs:
    return _fill(case, WHOLE)


# The public network ---------------------------------------------------------------------------------------------------


def _published_arguments(pair: PublishedModel, case: PhotoCase, image: Tensor, mask: Tensor) -> Any:
    if case.name == "edge_connect":
        return image, _guidance(case)["canny_edges"], mask
    return pair.arguments(image, mask)


def _published_runner(case: PhotoCase) -> Callable[[], Outputs]:
    pair = case.published
    assert pair is not None
    network = _public_network(pair, case.folder)
    image, hole = _photo(case)
    mask = hole.to(image.dtype)
    arguments = _published_arguments(pair, case, image * (1 - mask), mask)

    def fill() -> Outputs:
        with torch.no_grad(), pair.peer.running(torch.zeros(())):
            outputs = tensors_in(network(*arguments))
        output = pair.picture(outputs[: 1 + pair.coarse][-1])
        return (torch.where(hole, output.clamp(0, 1), image),)

    return fill


@functools.lru_cache(maxsize=1)
def _public_network(pair: PublishedModel, folder: Path | None) -> nn.Module:
    assert folder is not None  # it was found there
    return pair.load_published(folder)


@functools.lru_cache
def _least_published_bytes(case: PhotoCase) -> int | None:
    """What the public network's tensors take at their peak, so that it needs more; None without its checkout.

    It runs on tensors without memory, up to the first operation that asks for their values: daa233's picture of the
    attention, behind the largest maps. CSA's, which asks all along, multiplies with an attention of all positions by
    all positions.
    """
    if case.name == "csa":
        return 4 * (case.size[0] * case.size[1] // 64) ** 2
    pair = case.published
    if pair is None:
        return None
    if case.side <= 512:
        return 0  # each of them runs there
    network = _public_network(pair, case.folder)
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), pair.peer.running(torch.zeros(())):
        image, mask = (torch.empty(1, channels, *case.size) for channels in (3, 1))
        arguments = _published_arguments(pair, case, image, mask)
        try:
            with memory:
                network(*arguments)
        except RuntimeError as error:
            if "numpy" not in str(error):
                raise
    return memory.peak
