"""The op ``hog``: histograms of oriented gradients, equal to scikit-image's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels import _native
from inpaint_kernels._backends import OpBackends
from inpaint_kernels._checks import check_choice, check_dtype, check_pair, check_range, check_tensor
from inpaint_kernels._compile import constant_for_compile
from inpaint_kernels.ops._convolution import only_computes, wants_gradient
from inpaint_kernels.portable import hog as portable
from inpaint_kernels.portable.hog import Settings, feature_dtype
from inpaint_kernels.reference import hog as reference

BLOCK_NORMS = ("L1", "L1-sqrt", "L2", "L2-Hys")
TARGETS = ("blocks", "cells")
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


class HogResult(NamedTuple):
    """What :func:`hog` returns with ``visualize``.

    Attributes:
        features: as without.
        image: [H, W] or [B, H, W]: in every cell a line for each bin, along the edge that the bin stands for, as bright
            as the cell's histogram is high there; lines add up.
    """

    features: Tensor
    image: Tensor


# 1. The public function -----------------------------------------------------------------------------------------------


def hog(
    images: Tensor,
    orientations: int = 9,
    pixels_per_cell: int | tuple[int, int] = (8, 8),
    cells_per_block: int | tuple[int, int] = (3, 3),
    block_norm: str = "L2-Hys",
    visualize: bool = False,
    transform_sqrt: bool = False,
    feature_vector: bool = True,
    target: str = "blocks",
    *,
    backend: str | None = None,
) -> Tensor | HogResult:
    """Histograms of oriented gradients."""
    problem = _prepare(
        images,
        orientations,
        pixels_per_cell,
        cells_per_block,
        block_norm,
        visualize,
        transform_sqrt,
        feature_vector,
        target,
    )
    backend = BACKENDS.choose(problem, backend)
    batch, settings, visualize = problem
    call: Callable[..., tuple[Tensor, Tensor]] = torch.ops.inpaint_kernels.hog
    if only_computes(batch) and not wants_gradient(batch):
        call = _hog
    features, image = call(batch, *_arguments(settings), visualize, backend)
    if images.dim() < 4:
        features = features.flatten() if feature_vector else features[0]
        image = image[0] if visualize else image
    elif feature_vector:
        features = features.flatten(1)
    return HogResult(features, image) if visualize else features


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One checked call."""

    images: Tensor
    settings: Settings
    visualize: bool

    @property
    def device(self) -> torch.device:
        return self.images.device


def _prepare(
    images: Tensor,
    orientations: int = 9,
    pixels_per_cell: int | tuple[int, int] = (8, 8),
    cells_per_block: int | tuple[int, int] = (3, 3),
    block_norm: str = "L2-Hys",
    visualize: bool = False,
    transform_sqrt: bool = False,
    feature_vector: bool = True,
    target: str = "blocks",
) -> _Problem:
    check_tensor("images", images)
    if images.dim() not in (2, 3, 4):
        raise ValueError(f"images: expected shape [B, C, H, W], [C, H, W] or [H, W], got {list(images.shape)}")
    check_dtype("images", images, DTYPES)
    check_range("orientations", orientations, minimum=1, integer=True)
    cell = check_pair("pixels_per_cell", pixels_per_cell, 1)
    block = check_pair("cells_per_block", cells_per_block, 1)
    check_choice("block_norm", block_norm, BLOCK_NORMS)
    check_choice("target", target, TARGETS)
    settings = Settings(orientations, cell, block, block_norm, bool(transform_sqrt), target == "cells")
    batch = images if images.dim() == 4 else images[None] if images.dim() == 3 else images[None, None]
    if batch.shape[1] == 0:
        raise ValueError(f"images: expected at least one channel, got shape {list(images.shape)}")
    height, width = cell if settings.cells else (cell[0] * block[0], cell[1] * block[1])
    if batch.shape[2] < height or batch.shape[3] < width:
        raise ValueError(
            f"images: expected at least {height} x {width} pixels for these cells and blocks, "
            f"got shape {list(images.shape)}"
        )
    if visualize and min(cell) < 2:
        raise ValueError(f"pixels_per_cell: expected at least 2 x 2 with visualize, got {cell[0]} x {cell[1]}")
    return _Problem(batch, settings, bool(visualize))


# 3. Schema ------------------------------------------------------------------------------------------------------------

_SETTINGS_SCHEMA = "int orientations, int[2] cell, int[2] block, str block_norm, bool transform_sqrt, bool cells"

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    f"hog(Tensor images, {_SETTINGS_SCHEMA}, bool visualize, str backend) -> (Tensor features, Tensor image)"
)


def _arguments(settings: Settings) -> tuple[Any, ...]:
    """The settings in the order of the schema."""
    return tuple(settings)


def _settings(orientations: int, cell: Any, block: Any, *others: Any) -> Settings:
    """The settings of an op's arguments."""
    return Settings(orientations, tuple(cell), tuple(block), *others)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::hog", lib=_library)
def _fake(images: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    dtype = feature_dtype(images)
    shape = (images.shape[0], *images.shape[2:]) if settings[6] else (0,)
    features = images.new_empty(_settings(*settings[:6]).features_of(images), dtype=dtype)
    return features, images.new_empty(shape, dtype=dtype)


# 5. Backends ----------------------------------------------------------------------------------------------------------


def _cpu_reasons(problem: _Problem) -> list[str]:
    if problem.images.device.type != "cpu":
        return [f"the tensors are on {problem.images.device}, not on the CPU"]
    why = _native.why_not("hog", "CPU")
    return [] if why is None else [why]


def _triton_reasons(problem: _Problem) -> list[str]:
    if not problem.images.is_cuda:
        return [f"the tensors are on {problem.images.device}, not on a CUDA device"]
    if not torch.cuda.is_available():  # tensors without memory may claim a device that is not there
        return [f"torch {torch.__version__} sees no CUDA device"]
    return list(_triton_lacks(problem.images.device))


# A constant for torch.compile, which could not trace the question to the driver.
@constant_for_compile
def _triton_lacks(device: torch.device) -> tuple[str, ...]:
    return _triton_lacks_once(device)


@functools.cache
def _triton_lacks_once(device: torch.device) -> tuple[str, ...]:
    from inpaint_kernels.triton_kernels import _availability

    return tuple(_availability.missing(device))


def _always(problem: _Problem) -> list[str]:
    return []


BACKENDS = OpBackends(
    "hog",
    _prepare,
    {"cpu": _cpu_reasons, "triton": _triton_reasons, "portable": _always, "reference": _always},
)


def _cpu(images: Tensor, lines: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor | None]:
    orientations, cell, block, *others = settings
    return torch.ops.inpaint_native.hog(images, lines, orientations, *cell, *block, *others)


def _triton(*args: Any) -> tuple[Tensor, Tensor | None]:
    from inpaint_kernels.triton_kernels import hog as triton_kernels

    return triton_kernels.hog(*args)


def _reference(images: Tensor, lines: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor | None]:
    features, image = reference.hog(images, *settings, lines is not None)
    dtype = feature_dtype(images)
    return features.to(dtype), None if image is None else image.to(dtype)


_KERNELS: dict[str, Callable[[Tensor, Tensor | None, Settings], tuple[Tensor, Tensor | None]]] = {
    "cpu": _cpu,
    "triton": _triton,
    "portable": portable.hog,
    "reference": _reference,
}


@torch.library.impl(_library, "hog", "CompositeExplicitAutograd")
def _hog(
    images: Tensor,
    orientations: int,
    cell: Any,
    block: Any,
    block_norm: str,
    transform_sqrt: bool,
    cells: bool,
    visualize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    settings = Settings(orientations, tuple(cell), tuple(block), block_norm, transform_sqrt, cells)
    lines = _lines(orientations, settings.cell, images.device) if visualize else None
    features, image = _KERNELS[backend](images, lines, settings)
    return features, features.new_empty(0) if image is None else image


@functools.cache
def _lines(orientations: int, cell: tuple[int, int], device: torch.device) -> Tensor:
    """:func:`inpaint_kernels.reference.hog.line_masks` on a device."""
    with torch.inference_mode(False):
        return reference.line_masks(orientations, *cell).to(device)
