"""The ops of the models in operations that ONNX has: shapes are fixed, and none depends on values.

Each function has the schema of its torch op. They are traced, by :mod:`inpaint_kernels.onnx`, not run: all scores are
stored, all positions computed.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.portable._convolution import Geometry, convolve, sum_dtype
from inpaint_kernels.portable.hog import Settings, borders, feature_dtype
from inpaint_kernels.reference import contextual_attention as reference_attention
from inpaint_kernels.reference import hog as reference_hog
from inpaint_kernels.reference import partial_conv2d as reference_partial
from inpaint_kernels.reference.coherent_semantic_attention import norm

# Convolutions ---------------------------------------------------------------------------------------------------------


def dilated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    pad: Any,
    dilation: Any,
    groups: int,
    upsample: int,
    reflect: bool,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    """A convolution, perhaps with a border before it, and its activation."""
    geometry = Geometry(tuple(stride), tuple(pad), tuple(dilation), groups, upsample, reflect)
    y = _activate(convolve(x, weight, bias, geometry), activation, negative_slope)
    return y if residual is None else y + residual


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    pad: Any,
    dilation: Any,
    groups: int,
    upsample: int,
    reflect: bool,
    activation: str,
    negative_slope: float,
    gate_first: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """A convolution whose second half opens and closes the first."""
    geometry = Geometry(tuple(stride), tuple(pad), tuple(dilation), groups, upsample, reflect)
    features, gate = convolve(x, weight, bias, geometry).chunk(2, 1)
    if gate_first:
        features, gate = gate, features
    y = _activate(features, activation, negative_slope) * gate.sigmoid()
    return y, gate.clone() if keep else x.new_empty(0)


def partial_conv2d(
    x: Tensor, mask: Tensor, mask_channels: Any, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    """The reference."""
    stride, pad, dilation, groups, rule, eps, _ = settings
    geometry = (tuple(stride), tuple(pad), tuple(dilation), groups)
    return reference_partial.partial_conv2d(x, mask, tuple(mask_channels), weight, bias, *geometry, rule, eps)


def _activate(x: Tensor, activation: str, slope: float) -> Tensor:
    """Each as the one operation that ONNX has for it."""
    if activation == "elu":
        return F.elu(x)
    if activation == "relu":
        return F.relu(x)
    return F.leaky_relu(x, slope) if activation == "leaky_relu" else x


# Attention ------------------------------------------------------------------------------------------------------------


def contextual_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, which stores every score."""
    *arguments_of_reference, _ = arguments
    return reference_attention.forward(*arguments_of_reference)


def coherent_semantic_attention(
    x: Tensor, flags: Tensor, variant: str, gradient: str, triple_weight: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Search for every position, then one scan over all: a known one passes on what was generated before it."""
    size = (x.shape[2], x.shape[3])
    vectors = x.to(sum_dtype(x)).flatten(2).transpose(1, 2)  # [B, N, C]
    masked = flags.to(x.device).flatten(1).expand(x.shape[0], -1)
    length = norm(vectors)
    unit = vectors / length[..., None]
    scores = vectors @ vectors.transpose(1, 2) / length[:, None]
    index = scores.masked_fill(masked[:, None], -math.inf).argmax(2)
    found = vectors.gather(1, index[..., None].expand_as(vectors))
    v = (vectors * found).sum(2) / length.gather(1, index)
    if variant == "paper":
        v = v / length

    begin = (torch.zeros_like(vectors[:, 0]), torch.zeros_like(masked[:, 0]))
    positions = tuple(t.transpose(0, 1).contiguous() for t in (unit, found, v, masked))
    _, _, *generated = _scan(functools.partial(_generate, variant), begin, positions)
    y, alpha, beta, total = (t.transpose(0, 1) for t in generated)
    output = torch.where(masked[..., None], y, vectors).transpose(1, 2).unflatten(2, size)
    alpha, beta, total = (torch.where(masked, t, 0).unflatten(1, size) for t in (alpha, beta, total))
    return output.to(x.dtype), torch.where(masked, index, -1).unflatten(1, size), alpha, beta, total


def _generate(
    variant: str, before: Tensor, begun: Tensor, unit: Tensor, k: Tensor, v: Tensor, masked: Tensor
) -> tuple[Tensor, ...]:
    """One position of all samples: y_i = alpha y_{i-1} + beta k_i, or k_i where the row (re)starts.

    Args:
        variant: of the op.
        before: [B, C], what was generated last.
        begun: bool [B], whether anything was.
        unit: [B, C], q_i / n(q_i).
        k: [B, C], the known vector found for q_i.
        v: [B], how much they resemble each other.
        masked: bool [B], whether this position is to be generated.

    Returns:
        ``before`` and ``begun`` for the next position; y_i, alpha, beta and a + v.
    """
    a = (unit * before).sum(1)
    if variant == "paper":
        a = a / norm(before)
    total = a + v
    goes_on = begun & (total != 0) & (total.abs() < math.inf)
    total = torch.where(goes_on, total, math.inf)
    alpha = torch.where(goes_on, a / total, 0)
    beta = torch.where(goes_on, v / total, 1)
    y = torch.where(goes_on[:, None], alpha[:, None] * before + beta[:, None] * k, k)
    return torch.where(masked[:, None], y, before), begun | masked, y, alpha, beta, total


def _scan(step: Callable[..., tuple[Tensor, ...]], begin: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> Any:
    """Torch's scan along dimension 0, which becomes ONNX's.

    Its operator is called, not the function around it: that one compiles the step, which cannot be done while a graph
    is traced. The operator has no public name (torch 2.10 to 2.13).
    """
    scan_op = importlib.import_module("torch._higher_order_ops.scan").scan_op
    return scan_op(lambda *tensors: list(step(*tensors)), list(begin), list(xs), ())


# Histograms of gradients ----------------------------------------------------------------------------------------------


def hog(
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
    """Bins by products with their borders, since ONNX has no arc tangent of two arguments.

    Gradients within float64's rounding of a border may fall into the neighbouring bin.
    """
    settings = Settings(orientations, tuple(cell), tuple(block), block_norm, transform_sqrt, cells)
    down, right = _gradient(images, transform_sqrt)
    magnitude, bins = (down.square() + right.square()).sqrt(), _bins_of(down, right, orientations)
    (rows, columns), (height, width) = settings.cells_of(images), settings.cell
    votes = torch.where(bins[..., None] == torch.arange(orientations), magnitude[..., None], 0)
    votes = votes[:, : rows * height, : columns * width]
    histograms = votes.reshape(-1, rows, height, columns, width, orientations).mean((2, 4))
    features = histograms if cells else reference_hog.normalised_blocks(histograms, settings.block, block_norm)
    dtype = feature_dtype(images)
    picture = _draw(histograms, settings.cell, images) if visualize else images.new_empty(0)
    return features.to(dtype), picture.to(dtype)


def _gradient(images: Tensor, transform_sqrt: bool) -> tuple[Tensor, Tensor]:
    """(down, right), two float64 [B, H, W], of the channel where the gradient is largest."""
    wide = images if images.is_floating_point() else images.double()
    if images.dtype in (torch.float16, torch.bfloat16):
        wide = images.float()
    if transform_sqrt:
        wide = reference_hog.rounded_sqrt(wide)
    down = F.pad(wide[:, :, 2:] - wide[:, :, :-2], (0, 0, 1, 1)).double()
    right = F.pad(wide[:, :, :, 2:] - wide[:, :, :, :-2], (1, 1)).double()
    largest = (down.square() + right.square()).sqrt().to(wide.dtype).argmax(1, keepdim=True)
    return down.gather(1, largest)[:, 0], right.gather(1, largest)[:, 0]


def _bins_of(down: Tensor, right: Tensor, orientations: int) -> Tensor:
    """How many borders the angle of each gradient, folded into [0, 180) degrees, has passed."""
    right = torch.where(down < 0, -right, torch.where(down == 0, right.abs(), right))
    down = down.abs()
    bins = torch.zeros_like(down, dtype=torch.int64)
    for cosine, sine in borders(orientations):
        bins = bins + (down * cosine >= right * sine).long()
    return bins


def _draw(histograms: Tensor, cell: tuple[int, int], images: Tensor) -> Tensor:
    """[B, H, W]: every bin's line in its cell, as bright as the bin is high."""
    batch, rows, columns, orientations = histograms.shape
    lines = _lines(orientations, cell).to(histograms.dtype)
    row, column = torch.arange(rows).clamp_max(lines.shape[0] - 1), torch.arange(columns).clamp_max(lines.shape[1] - 1)
    lines = lines[row[:, None], column] if lines.shape[:2] != (1, 1) else lines
    picture = (histograms[..., None, None] * lines).sum(3).transpose(2, 3)
    picture = picture.reshape(batch, rows * cell[0], columns * cell[1])
    return F.pad(picture, (0, images.shape[3] - picture.shape[2], 0, images.shape[2] - picture.shape[1]))


@functools.cache
def _lines(orientations: int, cell: tuple[int, int]) -> Tensor:
    """:func:`reference_hog.line_masks`, a constant of the graph: not traced."""
    with torch.utils._python_dispatch._disable_current_modes():
        return reference_hog.line_masks(orientations, *cell)


# --------------------------------------------------------------------------------------------------------------------


def table() -> dict[Any, Callable[..., Any]]:
    """The functions above by the torch ops that they replace."""
    composites = (
        coherent_semantic_attention,
        contextual_attention,
        dilated_conv2d,
        gated_conv2d,
        hog,
        partial_conv2d,
    )
    of_ops = {getattr(torch.ops.inpaint_kernels, composite.__name__): composite for composite in composites}
    return of_ops | {op.default: composite for op, composite in of_ops.items()}
