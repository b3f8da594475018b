"""The op ``hog``: histograms of oriented gradients, equal to scikit-image's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaint_kernels._backends import OpBackends
from inpaint_kernels._checks import check_choice, check_dtype, check_pair, check_range, check_tensor
from inpaint_kernels._compile import constant_for_compile
from inpaint_kernels.ops._autograd import register_autograd
from inpaint_kernels.ops._common import always, cpu_reasons, only_computes, wants_gradient
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
_KNOWN_DTYPES = frozenset(DTYPES)  # a look-up; a search of the tuple costs a microsecond


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
    """Histograms of oriented gradients (HOG), equal to scikit-image's.

    The five classic stages, and the arguments that decide them:

    1. Global normalisation: ``transform_sqrt``, the square root of every pixel.
    2. Gradients: differences of the two neighbours in rows and columns, 0 at the image's border. Of several channels
       the one counts where the magnitude is largest, pixel by pixel; the first of equal ones.
    3. Cell histograms: ``pixels_per_cell``, ``orientations``. Angles are folded into [0, 180) degrees; bin i holds
       those from 180 i / n on, without interpolation. A histogram is the mean of the magnitudes over the cell. Pixels
       on the right and at the bottom that fill no cell are left out.
    4. Block normalisation: ``cells_per_block``, ``block_norm``. At every cell starts a block, v are the values of its
       cells, eps is 1e-5::

           L1       v / (sum(v) + eps)
           L1-sqrt  sqrt(v / (sum(v) + eps))
           L2       v / sqrt(sum(v^2) + eps^2)
           L2-Hys   L2, at most 0.2 of each, L2 again

    5. Flattening: ``feature_vector``; ``target="cells"`` stops after stage 3.

    Images are not rescaled: bytes count as 0 ... 255. Differences are rounded as float32 for float16, bfloat16 and
    float32, are exact for integers of 8 and 16 bits, and float64 for all else; features are sums in float32 (float64
    for float64). With up to 32 orientations all are within 1e-6 of scikit-image's; see below for the exceptions.

    The gradient with respect to floating images goes through the magnitudes. Which bin and which channel a pixel counts
    for is piecewise constant, and taken as constant. It is 0 where the image's gradient is 0, and with
    ``transform_sqrt`` at pixels that are 0.

    Args:
        images: [B, C, H, W], [C, H, W] or [H, W], bool, any integer or floating dtype, any strides; C is the number of
            channels, the axis that scikit-image calls ``channel_axis``.
        orientations: n, number of bins, at least 1.
        pixels_per_cell: rows and columns of a cell, or one number for both.
        cells_per_block: rows and columns of a block, in cells, or one number for both.
        block_norm: "L1", "L1-sqrt", "L2" or "L2-Hys".
        visualize: also return the picture of the histograms; cells must have at least 2 x 2 pixels.
        transform_sqrt: take the square root of the images first; they must not be negative.
        feature_vector: flatten the features of each image.
        target: "blocks", or "cells" for the histograms before they are normalised.
        backend: "cpu", "triton", "portable" or "reference"; None: the first that can run
            (:func:`inpaint_kernels.explain`).

    Returns:
        Features, float64 for float64 images, else float32: of each image [blocks y, blocks x, block rows, block
        columns, n] or with ``target="cells"`` [cells y, cells x, n], flattened with ``feature_vector``; with B in front
        if the images have it. With ``visualize`` a :class:`HogResult`.

    Deviations from scikit-image 0.26:

    * Integer images give float32, not float64 (:func:`inpaint_kernels.drop_in.hog` does give float64).
    * Sums over large cells are more accurate than its running sum in float32.
    * Where a cell holds a NaN all of its bins are NaN there, here one is. Its blocks are NaN in both.
    * The last bit of an arc tangent or a hypotenuse decides some bins of float64 images and of integers with
      ``transform_sqrt``, and the channel of two integer gradients of equal length. The ``cpu`` kernel takes it from the
      C library, as numpy does unless the processor has AVX-512; other backends may decide otherwise.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    References:
        Dalal and Triggs, Histograms of Oriented Gradients for Human Detection, CVPR 2005; scikit-image's
        ``skimage.feature.hog``, whose deviations from it are kept.
    """
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
    if only_computes(batch) and not wants_gradient(batch):
        features, image = _run(batch, settings, visualize, backend)
    else:
        features, image = torch.ops.inpaint_kernels.hog(batch, *settings, visualize, backend)
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
    if images.dtype not in _KNOWN_DTYPES:
        check_dtype("images", images, DTYPES)
    settings = check_settings(
        orientations, pixels_per_cell, cells_per_block, block_norm, visualize, transform_sqrt, target
    )
    batch = images if images.dim() == 4 else images[None] if images.dim() == 3 else images[None, None]
    if batch.shape[1] == 0:
        raise ValueError(f"images: expected at least one channel, got shape {list(images.shape)}")
    down, right = (1, 1) if settings.cells else settings.block
    height, width = settings.cell[0] * down, settings.cell[1] * right
    if batch.shape[2] < height or batch.shape[3] < width:
        raise ValueError(
            f"images: expected at least {height} x {width} pixels for these cells and blocks, "
            f"got shape {list(images.shape)}"
        )
    return _Problem(batch, settings, bool(visualize))


def check_settings(
    orientations: int,
    pixels_per_cell: int | tuple[int, int],
    cells_per_block: int | tuple[int, int],
    block_norm: str,
    visualize: bool,
    transform_sqrt: bool,
    target: str,
) -> Settings:
    """The settings of these arguments, or an error."""
    check_range("orientations", orientations, minimum=1, integer=True)
    cell = check_pair("pixels_per_cell", pixels_per_cell, 1)
    block = check_pair("cells_per_block", cells_per_block, 1)
    check_choice("block_norm", block_norm, BLOCK_NORMS)
    check_choice("target", target, TARGETS)
    if visualize and min(cell) < 2:
        raise ValueError(f"pixels_per_cell: expected at least 2 x 2 with visualize, got {cell[0]} x {cell[1]}")
    return Settings(orientations, cell, block, block_norm, bool(transform_sqrt), target == "cells")


# 3. Schema ------------------------------------------------------------------------------------------------------------

_SETTINGS_SCHEMA = "int orientations, int[2] cell, int[2] block, str block_norm, bool transform_sqrt, bool cells"

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    f"hog(Tensor images, {_SETTINGS_SCHEMA}, bool visualize, str backend) -> (Tensor features, Tensor image)"
)
_library.define(
    f"hog_backward(Tensor? grad_features, Tensor? grad_image, Tensor images, {_SETTINGS_SCHEMA}, str backend) -> Tensor"
)


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


@torch.library.register_fake("inpaint_kernels::hog_backward", lib=_library)
def _fake_backward(grad_features: Tensor | None, grad_image: Tensor | None, images: Tensor, *_: Any) -> Tensor:
    return images.new_empty(images.shape)


# 5. Backends ----------------------------------------------------------------------------------------------------------


def _cpu_reasons(problem: _Problem) -> list[str]:
    return cpu_reasons("hog", problem.images)


def _triton_reasons(problem: _Problem) -> list[str]:
    if not problem.images.is_cuda:
        return [f"the tensors are on {problem.images.device}, not on a CUDA device"]
    if not torch.cuda.is_available():  # tensors without memory may claim a device that is not there
        return [f"torch {torch.__version__} sees no CUDA device"]
    return [*_triton_lacks(problem.images.device), *_triton_refuses(problem.settings)]


def _triton_refuses(settings: Settings) -> list[str]:
    from inpaint_kernels.triton_kernels import hog as triton_kernels

    return triton_kernels.reasons(settings)


# A constant for torch.compile, which could not trace the question to the driver.
@constant_for_compile
def _triton_lacks(device: torch.device) -> tuple[str, ...]:
    return _triton_lacks_once(device)


@functools.cache
def _triton_lacks_once(device: torch.device) -> tuple[str, ...]:
    from inpaint_kernels.triton_kernels import _availability

    return tuple(_availability.missing(device))


BACKENDS = OpBackends(
    "hog",
    _prepare,
    {"cpu": _cpu_reasons, "triton": _triton_reasons, "portable": always, "reference": always},
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
    return features.to(dtype).contiguous(), None if image is None else image.to(dtype)


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
    settings = _settings(orientations, cell, block, block_norm, transform_sqrt, cells)
    return _run(images, settings, visualize, backend)


def _run(images: Tensor, settings: Settings, visualize: bool, backend: str) -> tuple[Tensor, Tensor]:
    lines = _lines(settings.orientations, settings.cell, images.device) if visualize else None
    features, image = _KERNELS[backend](images, lines, settings)
    return features, features.new_empty(0) if image is None else image


@functools.cache
def _lines(orientations: int, cell: tuple[int, int], device: torch.device) -> Tensor:
    """:func:`inpaint_kernels.reference.hog.line_masks` on a device."""
    with torch.inference_mode(False):
        return reference.line_masks(orientations, *cell).to(device)


@torch.library.impl(_library, "hog_backward", "CompositeExplicitAutograd")
def _hog_backward(
    grad_features: Tensor | None,
    grad_image: Tensor | None,
    images: Tensor,
    orientations: int,
    cell: Any,
    block: Any,
    block_norm: str,
    transform_sqrt: bool,
    cells: bool,
    backend: str,
) -> Tensor:
    settings = _settings(orientations, cell, block, block_norm, transform_sqrt, cells)
    histograms, _ = _KERNELS[backend](images, None, settings._replace(cells=True))
    lines = None if grad_image is None else _lines(orientations, settings.cell, images.device)
    return portable.hog_backward(grad_features, grad_image, images, lines, histograms, settings)


# 6. Autograd ----------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(images)
    ctx.settings, ctx.visualize, ctx.backend = settings[:-2], settings[-2], settings[-1]
    if not ctx.visualize:
        ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx: Any, grad_features: Tensor | None, grad_image: Tensor | None) -> tuple[Any, ...]:
    unwanted = (None,) * (len(ctx.settings) + 2)
    if not ctx.visualize:
        grad_image = None
    if grad_features is None and grad_image is None:
        return (None, *unwanted)
    grad = torch.ops.inpaint_kernels.hog_backward(
        grad_features, grad_image, *ctx.saved_tensors, *ctx.settings, ctx.backend
    )
    return (grad, *unwanted)


def _no_second_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("hog: double backward is not implemented (the gradient has no gradient)")


register_autograd(_library, "hog", _autograd_backward, _setup_context)
register_autograd(_library, "hog_backward", _no_second_backward)
