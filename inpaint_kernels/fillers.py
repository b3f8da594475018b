"""What fills photos on the command line: a method without weights, or a model with them, and what guides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from inpaint_kernels import images
from inpaint_kernels.models import (
    CSA,
    GLCIC,
    DeepFillV1,
    DeepFillV2,
    EdgeConnect,
    GuidedFace,
    InpaintingModel,
    PartialConvUNet,
)
from inpaint_kernels.models.edge_connect import canny
from inpaint_kernels.photo import METHODS, FilledPhoto, Progress, fill_photo, paint_photos
from inpaint_kernels.pretrained import load_pretrained

MODELS: Mapping[str, type[InpaintingModel]] = {
    "deepfill_v1": DeepFillV1,
    "deepfill_v2": DeepFillV2,
    "glcic": GLCIC,
    "edge_connect": EdgeConnect,
    "csa": CSA,
    "guided_face": GuidedFace,
    "partial_conv_unet": PartialConvUNet,
}
"""Names on the command line."""

Job = tuple[NDArray[Any], NDArray[np.bool_]]


class Filler(Protocol):
    """Fills photos.

    Attributes:
        name: what the user calls it.
        batch: how many photos of one size it fills together at best.
        panels: out of "attention" and "hog", what it can show of how it filled.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def batch(self) -> int:
        """See above."""

    @property
    def panels(self) -> frozenset[str]:
        """See above."""

    def fill(self, jobs: Sequence[Job], opaque_hole: bool, progress: Progress | None) -> list[FilledPhoto]:
        """Fill (pixels, mask) of photos of one size, see :mod:`inpaint_kernels.photo`."""


@dataclass(frozen=True)
class MethodFiller:
    """One of :data:`inpaint_kernels.photo.METHODS`."""

    name: str
    seed: int = 0
    batch: int = 1

    @property
    def panels(self) -> frozenset[str]:
        """See :class:`Filler`."""
        return frozenset() if self.name == "diffusion" else frozenset({"attention"})

    def fill(self, jobs: Sequence[Job], opaque_hole: bool, progress: Progress | None) -> list[FilledPhoto]:
        """See :class:`Filler`."""
        return [
            fill_photo(pixels, mask, method=self.name, seed=self.seed, opaque_hole=opaque_hole, progress=progress)
            for pixels, mask in jobs
        ]


@dataclass(frozen=True)
class Guide:
    """What a user gives a guided model.

    Attributes:
        drawing: bool ``[H, W]``, lines to paint along; or None.
        edges_from: ``[H, W, 3]`` uint8, another picture whose edges are wanted in the hole; or None.
        sigma: deviation of the Gaussian of Canny's edges, in pixels; None: the model's own.
    """

    drawing: NDArray[np.bool_] | None = None
    edges_from: NDArray[np.uint8] | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class ModelFiller:
    """A model with its weights.

    Attributes:
        model: the network.
        guide: of all photos.
        options: of :func:`inpaint_kernels.pipeline.inpaint`.
        batch: as of :class:`Filler`.
        name: the same.
    """

    model: InpaintingModel
    guide: Guide = Guide()
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    name: str = ""

    @property
    def panels(self) -> frozenset[str]:
        """See :class:`Filler`."""
        shown = {"attention": self.model.has_attention, "hog": isinstance(self.model, GuidedFace)}
        return frozenset(name for name, is_shown in shown.items() if is_shown)

    def fill(self, jobs: Sequence[Job], opaque_hole: bool, progress: Progress | None) -> list[FilledPhoto]:
        """See :class:`Filler`."""
        guidance = _guidance(self.model, self.guide, jobs[0][1].shape)
        return paint_photos(
            self.model, jobs, opaque_hole=opaque_hole, progress=progress, **dict(self.options), **guidance
        )


def name_of(model: InpaintingModel) -> str:
    """Its name on the command line."""
    return next(name for name, kind in MODELS.items() if isinstance(model, kind))


def make_fillers(
    names: Sequence[str],
    weights: Sequence[Path],
    *,
    seed: int,
    guide: Guide,
    device: str | None,
    batch: int,
    options: Mapping[str, Any],
    load: Callable[[Path], InpaintingModel] = load_pretrained,
) -> list[Filler]:
    """The fillers of those names.

    Args:
        names: out of :data:`inpaint_kernels.photo.METHODS` and :data:`MODELS`; none: the model of each of the weights,
            or without any the method "auto".
        weights: of the models in their order.
        seed: of the methods.
        guide: of the models.
        device: where the models run; None: the CPU.
        batch: photos of one size in one run of a model.
        options: as of :class:`ModelFiller`.
        load: a file's model.

    Raises:
        ValueError: a model without weights or weights without a model, weights of another model, a guide that the model
            does not take.
    """
    wanted = list(names) or (["" for _ in weights] or ["auto"])
    learned = [name for name in wanted if name not in METHODS]
    if len(learned) != len(weights):
        raise ValueError(
            f"weights: expected one file for each of {len(learned)} models, got {len(weights)}; "
            "inpaint-kernels models lists where people get them"
        )
    files = iter(weights)
    return [
        MethodFiller(name, seed)
        if name in METHODS
        else _model_filler(name, next(files), guide, device, batch, options, load)
        for name in wanted
    ]


def _model_filler(
    name: str,
    path: Path,
    guide: Guide,
    device: str | None,
    batch: int,
    options: Mapping[str, Any],
    load: Callable[[Path], InpaintingModel],
) -> ModelFiller:
    model = load(path)
    if name and not isinstance(model, MODELS[name]):
        raise ValueError(f"weights: {path} holds {name_of(model)}, expected {name}")
    _check_guide(model, guide)
    own = dict(options) | ({"return_attention": True} if model.has_attention else {})
    return ModelFiller(model.to(device or "cpu"), guide, own, batch, name_of(model))


def sigma_variants(filler: Filler, sigmas: Sequence[float]) -> list[Filler]:
    """The filler once for each sigma, named by it, if there are several and it is guided by edges."""
    if len(sigmas) < 2 or not isinstance(filler, ModelFiller) or not isinstance(filler.model, EdgeConnect):
        return [filler]
    return [
        replace(filler, guide=replace(filler.guide, sigma=sigma), name=f"{filler.name}, sigma {sigma:g}")
        for sigma in sigmas
    ]


# Guidance -------------------------------------------------------------------------------------------------------------


def _check_guide(model: InpaintingModel, guide: Guide) -> None:
    takes_edges = isinstance(model, EdgeConnect)
    takes_lines = takes_edges or (isinstance(model, DeepFillV2) and model.guided)
    if guide.drawing is not None and not takes_lines:
        raise ValueError(f"guide: {name_of(model)} takes no lines; EdgeConnect and a guided DeepFill v2 do")
    for option, given in (("edges-from", guide.edges_from), ("sigma", guide.sigma)):
        if given is not None and not takes_edges:
            raise ValueError(f"{option}: {name_of(model)} is not guided by edges; EdgeConnect is")


def _guidance(model: InpaintingModel, guide: Guide, size: Sequence[int]) -> dict[str, Any]:
    """What :meth:`paint` of the model's class takes, maps ``[1, 1, H, W]``."""
    if isinstance(model, EdgeConnect):
        sigma = {} if guide.sigma is None else {"sigma": guide.sigma}
        edges = _wanted_edges(guide, size)
        return sigma | ({} if edges is None else {"edges": edges})
    if isinstance(model, DeepFillV2) and model.guided:
        lines = np.zeros(tuple(size), np.bool_) if guide.drawing is None else guide.drawing
        return {"sketch": _map("guide", lines, size)}
    return {}


def _wanted_edges(guide: Guide, size: Sequence[int]) -> torch.Tensor | None:
    maps = []
    if guide.drawing is not None:
        maps.append(_map("guide", guide.drawing, size))
    if guide.edges_from is not None:
        if guide.edges_from.shape[:2] != tuple(size):
            raise ValueError(f"edges-from: expected a picture of {_size(size)}, got {_size(guide.edges_from.shape)}")
        picture = torch.from_numpy(guide.edges_from.astype(np.float32) / 255).permute(2, 0, 1)[None]
        nothing = torch.zeros(1, 1, *size, dtype=torch.bool)
        maps.append(canny(picture, nothing, *(() if guide.sigma is None else (guide.sigma,))))
    return torch.stack(maps).amax(0) if maps else None


def _map(name: str, lines: NDArray[np.bool_], size: Sequence[int]) -> torch.Tensor:
    if lines.shape != tuple(size):
        raise ValueError(f"{name}: expected a picture of {_size(size)}, got {_size(lines.shape)}")
    return torch.from_numpy(lines.astype(np.float32))[None, None]


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]} pixels"


def read_rgb(path: Path, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """A picture as ``[H, W, 3]`` of 8 bits, without its alpha."""
    pixels = images.read_photo(path, max_pixels=max_pixels).pixels
    if pixels.dtype == np.uint16:
        pixels = pixels >> 8
    if pixels.dtype.kind == "f":
        raise ValueError(f"{path}: expected a picture of 8 or 16 bits, got floating values")
    planes = pixels.reshape(*pixels.shape[:2], -1)
    colours = planes[:, :, :-1] if planes.shape[2] in (2, 4) else planes
    return np.broadcast_to(colours, (*colours.shape[:2], 3)).astype(np.uint8)
