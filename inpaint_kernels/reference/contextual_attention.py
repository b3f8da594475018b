"""Contextual attention written to be read beside the paper (Yu et al., CVPR 2018, section 4.1).

Dense and plain: it stores every score, so it is for small maps, for tests and for reading. Any floating dtype;
in float64 it is the judge of every other backend. Notation: query position p = (y, x), key position q = (v, u), both
flattened row by row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def patches(x: Tensor, size: int) -> Tensor:
    """The ``size`` x ``size`` zero-padded patch around every pixel: [B, C, H, W] -> [B, C * size^2, H * W]."""
    before = (size - 1) // 2
    after = size - 1 - before
    return F.unfold(F.pad(x, (before, after, before, after)), size)


def patch_norm(key: Tensor, size: int, rule: str, eps: float) -> Tensor:
    """The divisor n_q of every key patch: [B, C, H, W] -> [B, H * W].

    ``max``: max(|k_q|, eps). ``sum``: sqrt(sum(x^2 + eps)) over the patch's C * size^2 entries. ``add``: |k_q| + eps.
    ``none``: 1. The gradient at an all-zero patch is 0 (that of sqrt would be infinite).
    """
    squared = patches(key, size).square().sum(1)
    if rule == "none":
        return torch.ones_like(squared)
    if rule == "sum":
        return (squared + eps * key.shape[1] * size**2).sqrt()
    positive = squared > 0
    norm = torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
    return norm.clamp(min=eps) if rule == "max" else norm + eps


def row_neighbours(height: int, width: int, step: int) -> Tensor:
    """R_d: position i + d of the row-major order, -1 past its two ends. [H * W] int64."""
    i = torch.arange(height * width) + step
    return torch.where((i >= 0) & (i < height * width), i, -1)


def column_neighbours(height: int, width: int, step: int) -> Tensor:
    """C_e: position ``step`` further in column-major order, as a row-major index, -1 past its ends. [H * W] int64."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
    c = (x * height + y + step).flatten()
    inside = (c >= 0) & (c < height * width)
    return torch.where(inside, (c % height) * width + c.div(height, rounding_mode="floor"), -1)


def diagonal_sum(scores: Tensor, query_steps: list[Tensor], key_steps: list[Tensor]) -> Tensor:
    """sum_d scores[query_steps[d](p), key_steps[d](q)], terms with either side undefined being 0. [B, Lq, Lk]."""
    padded = F.pad(scores, (0, 1, 0, 1))  # index -1 reads the zero row / column
    return sum((padded[:, p][:, :, q] for p, q in zip(query_steps, key_steps, strict=True)), torch.zeros_like(scores))


def fuse_scores(scores: Tensor, size: int, query_size: tuple[int, int], key_size: tuple[int, int]) -> Tensor:
    """Neighbouring queries prefer neighbouring keys: two diagonal sums, along rows, then along columns (paper, 4.1).

    Both orders run on past the end of a line into the next one, as the published reshape does.
    """
    steps = range(-(size // 2), size // 2 + 1)
    for neighbours in (row_neighbours, column_neighbours):
        query_steps = [neighbours(*query_size, d).to(scores.device) for d in steps]
        key_steps = [neighbours(*key_size, d).to(scores.device) for d in steps]
        scores = diagonal_sum(scores, query_steps, key_steps)
    return scores


def attention_probabilities(
    logits: Tensor, valid: Tensor | None, masking: str, fill: float, floor: float | None
) -> Tensor:
    """Softmax over keys under a published rule for invalid keys. logits [B, Lq, Lk], valid [B, 1, Lk] bool."""
    if valid is None:
        probabilities = logits.softmax(-1)
    elif masking == "multiply":
        probabilities = (logits * valid).softmax(-1) * valid
    elif masking == "inf":
        masked = logits.masked_fill(~valid, -math.inf)
        nothing_valid = ~valid.any(-1, keepdim=True)
        probabilities = masked.masked_fill(nothing_valid, 0).softmax(-1).masked_fill(nothing_valid, 0)
    else:
        probabilities = logits.masked_fill(~valid, fill).softmax(-1)
    return probabilities if floor is None else probabilities.clamp(min=floor)


def contributions(length: int, rate: int, paste_size: int, pad: int, device: torch.device) -> Tensor:
    """How many pasted patches cover each of the ``rate * length`` output positions of one axis. [rate * length]."""
    t = torch.arange(rate * length, device=device)[:, None] + pad - rate * torch.arange(length, device=device)
    return ((t >= 0) & (t < paste_size)).sum(1)


def paste(
    probabilities: Tensor,
    value: Tensor,
    query_size: tuple[int, int],
    key_size: tuple[int, int],
    *,
    rate: int,
    paste_size: int,
    pad_cut: int,
    pad_put: int,
    divisor: float,
) -> Tensor:
    """Replace every query by the weighted mean of the value patches and add up where they overlap.

    The patch of key q starts at pixel ``rate * q - pad_cut`` of ``value``; that of query p lands at
    ``rate * p - pad_put``. ``divisor`` 0 divides by the number of patches that cover a pixel.
    Returns [B, Cv, rate * hq, rate * wq].
    """
    (hq, wq), (hk, wk) = query_size, key_size
    height, width = value.shape[2:]
    reach_y, reach_x = rate * (hk - 1) + paste_size, rate * (wk - 1) + paste_size
    framed = F.pad(value, (pad_cut, max(0, reach_x - pad_cut - width), pad_cut, max(0, reach_y - pad_cut - height)))
    cut = F.unfold(framed[:, :, :reach_y, :reach_x], paste_size, stride=rate)  # [B, Cv * K^2, Lk]
    put = torch.einsum("bpq,bcq->bcp", probabilities, cut)
    canvas = F.fold(put, (rate * (hq - 1) + paste_size, rate * (wq - 1) + paste_size), paste_size, stride=rate)
    canvas = F.pad(canvas[:, :, pad_put:, pad_put:], (0, max(0, rate + pad_put), 0, max(0, rate + pad_put)))
    output = canvas[:, :, : rate * hq, : rate * wq]
    if divisor:
        return output / divisor
    rows = contributions(hq, rate, paste_size, pad_put, value.device)
    columns = contributions(wq, rate, paste_size, pad_put, value.device)
    return output / (rows[:, None] * columns).clamp(min=1)


def contextual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    key_scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    patch: int = 3,
    norm: str = "max",
    eps: float = 1e-4,
    fuse: int = 3,
    scale: float = 10.0,
    masking: str = "multiply",
    fill: float = -1000.0,
    floor: float | None = None,
    rate: int = 2,
    paste_size: int = 4,
    pad_cut: int = 1,
    pad_put: int = 1,
    divisor: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """Dense contextual attention on maps that are already reduced to the matching grid.

    The keyword arguments are the fields of :class:`inpaint_kernels.ContextualAttentionPreset`.

    Args:
        query: [B, C, hq, wq], never normalised.
        key: [B, C, hk, wk].
        value: [B, Cv, Hv, Wv], about ``rate`` times the key map.
        valid: [B or 1, hk, wk] bool, keys outside the hole; None: all.
        key_scale: [B or 1, hk, wk]; logit = scale * (key_scale * fused score) + key_bias; None: 1.
        key_bias: [B or 1, hk, wk]; None: 0.
        patch: side of the patches that are compared.
        norm: rule of the key-patch divisor, see :func:`patch_norm`.
        eps: constant of that rule.
        fuse: side of the fuse sums, see :func:`fuse_scores`; 0 or 1: none.
        scale: softmax scale.
        masking: rule for invalid keys, see :func:`attention_probabilities`.
        fill: score of an invalid key with masking "fill".
        floor: lower bound of every probability; None: none.
        rate: value pixels per matching position.
        paste_size: side of the pasted patches.
        pad_cut: zero border in front of the value map.
        pad_put: crop in front of the output.
        divisor: what the pasted sums are divided by; 0: the number of patches that overlap.

    Returns:
        The output [B, Cv, rate * hq, rate * wq] and the probabilities [B, hq * wq, hk * wk].
    """
    query_size, key_size = (query.shape[2], query.shape[3]), (key.shape[2], key.shape[3])
    scores = patches(query, patch).transpose(1, 2) @ patches(key, patch)
    scores = scores / patch_norm(key, patch, norm, eps)[:, None]
    if fuse > 1:
        scores = fuse_scores(scores, fuse, query_size, key_size)
    if key_scale is not None:
        scores = scores * key_scale.flatten(1)[:, None]
    logits = scale * scores
    if key_bias is not None:
        logits = logits + key_bias.flatten(1)[:, None]
    if valid is not None:
        valid = valid.flatten(1)[:, None]
    probabilities = attention_probabilities(logits, valid, masking, scale * fill, floor)
    output = paste(
        probabilities,
        value,
        query_size,
        key_size,
        rate=rate,
        paste_size=paste_size,
        pad_cut=pad_cut,
        pad_put=pad_put,
        divisor=divisor,
    )
    return output, probabilities


def output_cells(selected: Tensor, rate: int) -> Tensor:
    """Output pixels that belong to selected queries: bool [hq, wq] -> bool [rate * hq, rate * wq]."""
    return selected.repeat_interleave(rate, 0).repeat_interleave(rate, 1)


SEMANTICS = (
    *("patch", "norm", "eps", "fuse", "scale", "masking", "fill", "floor"),
    *("rate", "paste_size", "pad_cut", "pad_put", "divisor"),
)
"""Keyword arguments of :func:`contextual_attention` in the order of the op's schema."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    selected: Tensor | None,
    *semantics_and_return_offsets: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward: output, argmax key of every query [B, hq, wq] (-1: not selected) and its probability."""
    *semantics, return_offsets = semantics_and_return_offsets
    options = dict(zip(SEMANTICS, semantics, strict=True))
    output, probabilities = contextual_attention(query, key, value, valid, key_scale, key_bias, **options)
    if selected is not None:
        selected = selected.to(output.device)
        output = torch.where(output_cells(selected, options["rate"]), output, 0)
    if not return_offsets:
        return output, query.new_empty(0, dtype=torch.int64), query.new_empty(0)
    maximum, index = (x.unflatten(1, query.shape[2:]) for x in probabilities.max(-1))
    if selected is not None:
        maximum, index = maximum.masked_fill(~selected, 0), index.masked_fill(~selected, -1)
    return output, index, maximum


def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's backward: gradients of query, key and value.

    ``torch.func`` differentiates also inside an op's own kernel, where torch records no graph.
    """
    gradient = torch.func.vjp(lambda *maps: forward(*maps, *rest, False)[0], query, key, value)[1]
    dquery, dkey, dvalue = gradient(grad)
    return dquery, dkey, dvalue
