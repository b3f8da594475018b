"""Whole photos and holes through every model and the public networks: time and peak memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from inpaint_kernels.models import CSA, GLCIC, Box, DeepFillV1, DeepFillV2, EdgeConnect, GuidedFace, PartialConvUNet
from inpaint_kernels.models._regions import working_memory
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benches.harness import BFLOAT16, FLOAT32, Outputs, Provider, products_in
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
        device: where it is filled.
        precision: "float32", "tf32" (products of float32 maps), "bfloat16" (autocast).
    """

    name: str
    side: int
    hole: int
    folder: Path | None = field(default=None, repr=False)
    device: str = "cpu"
    precision: str = FLOAT32

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
        return (OWN_TOLERANCE if self.published is None and self.precision == FLOAT32 else TOLERANCE,)

    @property
    def provider_names(self) -> tuple[str, ...]:
        if self.baseline is None:
            return (HOLE,)
        least = _least_published_bytes(self)
        runs = least is not None and least <= MOST_PUBLISHED_BYTES and self.published is not None
        return (*((PUBLISHED,) if runs else ()), *self.own_ways)

    @property
    def own_ways(self) -> tuple[str, ...]:
        """Of the model, whose maps are in strips where it paints regions."""
        partial = _skeleton(self.name).needed_regions(self.box, *self.size) is not None
        return (WHOLE, *((STRIPS, HOLE) if partial else ()))

    @property
    def size(self) -> tuple[int, int]:
        multiple = _skeleton(self.name).size_multiple
        return (-(-self.side // multiple) * multiple,) * 2

    @property
    def box(self) -> Box:
        corner = self.side // 4
        return Box(corner, corner, corner + self.hole, corner + self.hole)

    @property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        return _model(self.on_its_own)

    @property
    def photo(self) -> tuple[Tensor, Tensor]:
        """An image and the mask of its hole."""
        return _photo(self.on_its_own)

    @property
    def guidance(self) -> dict[str, Tensor]:
        """What else the model takes."""
        return {"canny_edges": torch.zeros(1, 1, *self.size, device=self.device)} if self.name == "edge_connect" else {}

    @property
    def on_its_own(self) -> PhotoCase:
        """What the model and the photo depend on."""
        return replace(self, precision=FLOAT32)

    def fill(self, name: str) -> Outputs:
        """The photo filled in one of the ways."""
        image, mask = self.photo
        region = "hole" if name == HOLE else "full"
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.precision == BFLOAT16)
        with torch.no_grad(), working_memory(WORKING_BYTES[name]), products_in(self.precision), autocast:
            return (self.model(image, mask, region=region, **self.guidance).completed,)

    def provider(self, name: str) -> Provider:
        run = _published_runner(self) if name == PUBLISHED else functools.partial(self.fill, name)
        if self.baseline is None:
            return Provider(name, run=run, expected=None, device=self.device)
        if self.published is None and self.precision == FLOAT32:
            return Provider(name, run=run, expected=functools.partial(_expected, self), device=self.device)
        # Of the public networks' weights; see published_race.py. The tests compare all pixels, with other weights.
        return Provider(name, run=run, expected=lambda: means(_expected(self)), select=means, device=self.device)

    @property
    def description(self) -> dict[str, Any]:
        """What is filled, without a run."""
        return {
            "op": "photo",
            "case": str(self),
            "model": self.name,
            "height": self.size[0],
            "width": self.size[1],
            "hole": self.hole,
            "direction": "inference",
        }

    def facts(self) -> Mapping[str, Any]:
        options: dict[str, Any] = {**self.guidance, "working_bytes": WORKING_BYTES[STRIPS]}
        model, partial = self.model, HOLE in self.provider_names
        least = _least_published_bytes(self)
        estimates = {"whole": estimate_memory(model, *self.size, **options)}
        if partial:
            estimates["hole"] = estimate_memory(model, *self.size, hole=self.box, **options)
        return {
            **self.description,
            "estimated_mib": {name: round(size / 2**20, 1) for name, size in estimates.items()},
            "published_least_mib": round(least / 2**20, 1) if least and least > MOST_PUBLISHED_BYTES else None,
        }


@functools.lru_cache
def _skeleton(name: str) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return MODELS[name]().eval()


@functools.lru_cache(maxsize=1)
def _model(case: PhotoCase) -> Any:
    if case.published is not None:
        return case.published.load_ours(_public_network(case.published, case.folder, "cpu")).to(case.device)
    torch.manual_seed(0)
    return MODELS[case.name]().eval().to(case.device)


@functools.lru_cache(maxsize=1)
def _photo(case: PhotoCase) -> tuple[Tensor, Tensor]:
    image = unit_image(case.size[0], 1, 1).to(case.device)
    mask = torch.zeros(1, 1, *case.size, dtype=torch.bool, device=case.device)
    case.box.of(mask).fill_(True)
    return image, mask


@functools.lru_cache(maxsize=1)
def _expected(case: PhotoCase) -> Outputs:
    return case.on_its_own.fill(WHOLE)


# The public network ---------------------------------------------------------------------------------------------------


def _published_arguments(pair: PublishedModel, case: PhotoCase, image: Tensor, mask: Tensor) -> Any:
    if case.name == "edge_connect":
        return image, case.guidance["canny_edges"], mask
    return pair.arguments(image, mask)


def _published_runner(case: PhotoCase) -> Callable[[], Outputs]:
    pair = case.published
    assert pair is not None
    network = _public_network(pair, case.folder, case.device)
    image, hole = case.photo
    mask = hole.to(image.dtype)
    arguments = _published_arguments(pair, case, image * (1 - mask), mask)

    def fill() -> Outputs:
        with torch.no_grad(), products_in(case.precision), pair.peer.running(torch.zeros((), device=case.device)):
            outputs = tensors_in(network(*arguments))
        output = pair.picture(outputs[: 1 + pair.coarse][-1])
        return (torch.where(hole, output.clamp(0, 1), image),)

    return fill


@functools.lru_cache(maxsize=1)
def _public_network(pair: PublishedModel, folder: Path | None, device: str) -> nn.Module:
    assert folder is not None  # it was found there
    return pair.load_published(folder, device)


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
    network = _public_network(pair, case.folder, "cpu")
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
