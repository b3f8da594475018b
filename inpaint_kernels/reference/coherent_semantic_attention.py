"""Coherent semantic attention written to be read beside the paper (Liu et al., ICCV 2019, section 3.2).

One position after the other, as the layer is defined; it stores every score, so it is for small maps, for tests and for
reading. Any floating dtype; in float64 it is the judge of every other backend. Notation: the masked vectors
q_0, q_1, ... in raster order, k_i the known vector that resembles q_i most, y_i what is generated in the place of q_i.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-8


def norm(x: Tensor) -> Tensor:
    """n(z) = |z| + 1e-8 of vectors [..., C]; the gradient at 0 is 0."""
    return torch.linalg.vector_norm(x, dim=-1) + EPS


def positions(flags: Tensor, sample: int) -> tuple[Tensor, Tensor]:
    """Raster indices of the masked and of the known positions of one sample; ``flags`` [B or 1, H, W] bool."""
    flat = flags[sample if flags.shape[0] > 1 else 0].flatten()
    return flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]


def forward(x: Tensor, flags: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and what it was made of.

    Args:
        x: [B, C, H, W], any floating dtype.
        flags: [B or 1, H, W] bool, True = masked; every sample has a known position.
        variant: "official" or "paper".

    Returns:
        output [B, C, H, W]; index [B, H, W] int64, where k_i comes from (-1 at known positions); alpha, beta and
        total = a + v [B, H, W], 0 at known positions. Where a row restarts, alpha = 0, beta = 1 and total = inf.
    """
    output = x.clone()
    index = x.new_full((x.shape[0], x[0, 0].numel()), -1, dtype=torch.int64)
    alpha, beta, total = (x.new_zeros(index.shape) for _ in range(3))
    for sample in range(x.shape[0]):
        masked, known = positions(flags, sample)
        masked, known = masked.to(x.device), known.to(x.device)
        if masked.numel() == 0:
            continue
        vectors = x[sample].flatten(1).t()  # [H * W, C]
        scores = (vectors[masked] @ vectors[known].t()) / norm(vectors[known])
        found = known[scores.argmax(1)]
        generated, *weights = generate(vectors[masked], vectors[found], variant)
        output[sample].view(x.shape[1], -1)[:, masked] = generated.t()
        index[sample, masked] = found
        for to, weight in zip((alpha, beta, total), weights, strict=True):
            to[sample, masked] = weight
    shape = (x.shape[0], *x.shape[2:])
    return output, index.view(shape), alpha.view(shape), beta.view(shape), total.view(shape)


def generate(q: Tensor, k: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y [M, C], alpha, beta and total [M] of the masked vectors ``q`` [M, C] and their best known ones ``k`` [M, C].

    v_i = <q_i, k_i / n(k_i)> and a_i = <q_i / n(q_i), y_{i-1}>; in the paper both are cosines. Then
    alpha_i = a_i / s_i and beta_i = v_i / s_i with s_i = a_i + v_i, and y_i = alpha_i y_{i-1} + beta_i k_i. The first
    row, and one whose s_i is 0 or no finite number, starts again: y_i = k_i.
    """
    v = (q * k).sum(1) / norm(k)
    if variant == "paper":
        v = v / norm(q)
    unit = q / norm(q)[:, None]
    zero, one, infinity = (q.new_tensor(value) for value in (0.0, 1.0, math.inf))
    ys: list[Tensor] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(q.shape[0]):
        if ys:
            a = unit[i] @ ys[-1]
            if variant == "paper":
                a = a / norm(ys[-1])
            s = a + v[i]
        if not ys or s == 0 or not s.isfinite():
            ys.append(k[i])
            rows.append((zero, one, infinity))
            continue
        alpha, beta = a / s, v[i] / s
        ys.append(alpha * ys[-1] + beta * k[i])
        rows.append((alpha, beta, s))
    alphas, betas, totals = (torch.stack(column) for column in zip(*rows, strict=True))
    return torch.stack(ys), alphas, betas, totals


def attention_rows(index: Tensor, alpha: Tensor, beta: Tensor, count: int) -> Tensor:
    """A [M, count], the weight of every position in every y: A_i = alpha_i A_{i-1} + beta_i e_{index_i}.

    Product and sum are rounded one after the other, as the published layer's are.
    """
    rows = alpha.new_zeros(index.numel(), count)
    for i in range(index.numel()):
        if i > 0 and alpha[i] != 0:
            rows[i] = rows[i - 1] * alpha[i]
        rows[i, index[i]] += beta[i]
    return rows


def backward(
    grad: Tensor,
    x: Tensor,
    flags: Tensor,
    output: Tensor,
    index: Tensor,
    alpha: Tensor,
    beta: Tensor,
    total: Tensor,
    variant: str,
    gradient: str,
    triple_weight: float,
) -> Tensor:
    """Gradient of x.

    ``exact``: the derivative of :func:`forward` with the indices fixed. ``straight``: g + w A^T g, where A holds the
    attention rows, and one-hot rows on themselves at known positions. ``official``: the same with every weight of A
    truncated towards zero, as the published layer stores them in integers.
    """
    dx = grad.clone()
    for sample in range(x.shape[0]):
        masked, known = (part.to(x.device) for part in positions(flags, sample))
        if masked.numel() == 0:
            continue
        g, d = grad[sample].flatten(1).t(), dx[sample].view(x.shape[1], -1)
        found, a, b = (of[sample].flatten()[masked] for of in (index, alpha, beta))
        if gradient == "exact":
            vectors = x[sample].flatten(1).t()
            with torch.enable_grad():  # the op's kernel runs below autograd
                dq, dk = torch.func.vjp(lambda q, k: generate(q, k, variant)[0], vectors[masked], vectors[found])[1](
                    g[masked]
                )
            d[:, masked] = dq.t()
            d.index_add_(1, found, dk.t())
            continue
        rows = attention_rows(found, a, b, d.shape[1])
        if gradient == "official":
            rows = rows.trunc()
        weighted = rows.t() @ g[masked]
        weighted[known] += g[known]
        d += triple_weight * weighted.t()
    return dx
