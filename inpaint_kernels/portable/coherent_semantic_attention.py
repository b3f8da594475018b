"""Coherent semantic attention in plain torch operations: tiles of scores, and blocks of rows generated at once.

The search multiplies tiles of masked and known vectors and keeps the running best of every masked one. The recurrences
run in blocks of consecutive rows, all blocks at once, each from a guess of the row before it; blocks whose guess was
not what the block before them arrived at are repeated until every block has seen exactly its predecessor's last row.
With the usual weights (alpha near 0.5) that takes two or three passes instead of one step per masked position.

The values of scores are those of torch's matrix product, which depend on its tiles in their last bits: equal scores may
be told apart by rounding, and the result may depend on the number of threads. The native kernels have neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE_BYTES = 16 << 20
"""Upper bound of one tile of scores, of the known vectors that belong to it, and of the columns of ``official``."""

QUERIES = 512
BLOCK = 32
"""Masked vectors per tile of scores; consecutive rows that one block generates one after the other."""

EPS = 1e-8


def forward(x: Tensor, flags: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`inpaint_kernels.reference.coherent_semantic_attention.forward`; memory grows with H * W only."""
    output = x.clone()
    index = x.new_full((x.shape[0], x.shape[2] * x.shape[3]), -1, dtype=torch.int64)
    alpha, beta, total = (x.new_zeros(index.shape) for _ in range(3))
    for sample in range(x.shape[0]):
        masked, known = _positions(flags, sample, x.device)
        if masked.numel() == 0:
            continue
        vectors = x[sample].flatten(1)
        q = vectors[:, masked].t().contiguous()
        found, v = _search(q, vectors, known)
        y, *weights = _generate(q, vectors[:, found].t(), v, variant)
        output[sample].flatten(1)[:, masked] = y.t()
        index[sample, masked] = found
        for to, weight in zip((alpha, beta, total), weights, strict=True):
            to[sample, masked] = weight
    shape = (x.shape[0], *x.shape[2:])
    return output, index.view(shape), alpha.view(shape), beta.view(shape), total.view(shape)


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
    """See :func:`inpaint_kernels.reference.coherent_semantic_attention.backward`."""
    dx = grad.clone()
    for sample in range(x.shape[0]):
        masked, known = _positions(flags, sample, x.device)
        if masked.numel() == 0:
            continue
        g, d = grad[sample].flatten(1), dx[sample].flatten(1)
        weights = _Weights(*(of[sample].flatten()[masked] for of in (index, alpha, beta, total)))
        if gradient == "exact":
            vectors = x[sample].flatten(1)
            dq, dk = _exact_gradients(
                g[:, masked].t(), vectors[:, masked].t(), vectors[:, weights.index].t(), weights, variant
            )
            d[:, masked] = dq.t()
            _add_rows(d, weights.index, dk)
            continue
        d[:, known] += triple_weight * g[:, known]
        if gradient == "straight":
            _add_rows(d, weights.index, triple_weight * _attended_gradients(g[:, masked].t(), weights))
        else:
            rows, columns, whole = _truncated_attention(weights)
            _add_rows(d, columns, triple_weight * whole[:, None] * g[:, masked[rows]].t())
    return dx


class _Weights:
    """What the forward found for the masked positions of a sample, in raster order: tensors [M]."""

    def __init__(self, index: Tensor, alpha: Tensor, beta: Tensor, total: Tensor) -> None:
        self.index, self.alpha, self.beta, self.total = index, alpha, beta, total
        self.restart = total.isinf()

    def alpha_of_next(self) -> Tensor:
        """How much of y_i goes into y_{i+1}, [M]."""
        return torch.cat((self.alpha[1:], self.alpha.new_zeros(1)))


def _positions(flags: Tensor, sample: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster indices of the masked and of the known positions."""
    flat = flags[sample if flags.shape[0] > 1 else 0].flatten()
    return flat.nonzero()[:, 0].to(device), (~flat).nonzero()[:, 0].to(device)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1) + EPS


def _add_rows(d: Tensor, positions: Tensor, rows: Tensor) -> None:
    """Add rows [n, C] to the columns ``positions`` of d [C, H * W], equal positions in their order."""
    if positions.numel() == 0:
        return
    order = positions.argsort(stable=True)
    unique, counts = positions[order].unique_consecutive(return_counts=True)
    d[:, unique] += torch.segment_reduce(rows[order].contiguous(), "sum", lengths=counts, axis=0).t()


# Search ---------------------------------------------------------------------------------------------------------------


def _search(q: Tensor, vectors: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Raster index and score of the best known position of every masked vector q [M, C]; vectors [C, H * W]."""
    count, channels = q.shape
    best = q.new_full((count,), -math.inf)
    index = known[0].expand(count).clone()
    keys_per_tile = max(1, TILE_BYTES // q.element_size() // max(channels, min(count, QUERIES)))
    for keys in known.split(keys_per_tile):
        tile = vectors[:, keys]
        inverse_norm = 1 / (torch.linalg.vector_norm(tile, dim=0) + EPS)
        for first in range(0, count, QUERIES):
            part = slice(first, first + QUERIES)
            score, position = (q[part] @ tile).mul_(inverse_norm).max(1)
            # Tiles come in order and "greater" is strict, so the lowest index wins a tie; the first NaN stays.
            better = (score > best[part]) | (score.isnan() & ~best[part].isnan())
            best[part] = torch.where(better, score, best[part])
            index[part] = torch.where(better, keys[position], index[part])
    return index, best


# Recurrences ----------------------------------------------------------------------------------------------------------

Step = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
"""(state [blocks, C], one row of every input) -> the next state and what is to be kept of this row."""


def _scan(step: Step, inputs: Sequence[Tensor], guess: Tensor) -> list[Tensor]:
    """Run ``step`` over the rows of the inputs [M, ...], starting from state 0, and return what it keeps, [M, ...].

    ``guess`` [M, C]: what the state before every row may be; only the first passes over the blocks read it.
    """
    count = guess.shape[0]
    depth = min(BLOCK, count)
    blocks = -(-count // depth)
    rows = [_in_blocks(x, blocks, depth) for x in inputs]
    state = _in_blocks(guess, blocks, depth)[0]
    state[0] = 0
    kept: list[Tensor] = []
    active = torch.arange(blocks, device=guess.device)
    while active.numel() > 0:
        now = state[active]
        taken = rows if active.numel() == blocks else [x[:, active] for x in rows]
        for r in range(depth):
            now, outputs = step(now, *(x[r] for x in taken))
            kept = kept or [x.new_empty(depth, blocks, *x.shape[1:]) for x in outputs]
            for to, out in zip(kept, outputs, strict=True):
                to[r, active] = out
        # Bits are compared, so that a NaN equals itself and the loop ends.
        following = active + 1
        inner = following < blocks
        following, now = following[inner], now[inner]
        changed = (_bits(state[following]) != _bits(now)).any(1)
        active = following[changed]
        state[active] = now[changed]
    return [x.transpose(0, 1).flatten(0, 1)[:count] for x in kept]


def _in_blocks(x: Tensor, blocks: int, depth: int) -> Tensor:
    """[M, ...] -> [depth, blocks, ...], zeros behind the last row."""
    framed = torch.cat((x, x.new_zeros(blocks * depth - x.shape[0], *x.shape[1:])))
    return framed.unflatten(0, (blocks, depth)).transpose(0, 1).contiguous()


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def _shifted(x: Tensor) -> Tensor:
    """Row i - 1 at i, zeros at 0."""
    return torch.cat((torch.zeros_like(x[:1]), x[:-1]))


def _generate(q: Tensor, k: Tensor, v: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`inpaint_kernels.reference.coherent_semantic_attention.generate`; ``v`` [M] is the score of k."""
    inverse_norm = 1 / _norm(q)
    if variant == "paper":
        v = v * inverse_norm
    v = torch.cat((v.new_full((1,), math.inf), v[1:]))  # the first row starts

    def step(y: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        a = torch.linalg.vecdot(u, y)
        if variant == "paper":
            a = a / _norm(y)
        s = a + v
        restart = (s == 0) | ~s.isfinite()
        alpha, beta = torch.where(restart, 0, a / s), torch.where(restart, 1, v / s)
        y = torch.where(restart[:, None], k, torch.addcmul(alpha[:, None] * y, beta[:, None], k))
        return y, (y, alpha, beta, torch.where(restart, math.inf, s))

    y, alpha, beta, total = _scan(step, (q * inverse_norm[:, None], k, v), _shifted(k))
    return y, alpha, beta, total


def _attended_gradients(g: Tensor, weights: _Weights) -> Tensor:
    """A^T g before it is added up by index: beta_i Z_i with Z_i = g_i + alpha_{i+1} Z_{i+1}; rows [M, C]."""

    def step(z: Tensor, g: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        alive = (alpha != 0)[:, None]
        z = torch.where(alive, torch.addcmul(g, alpha[:, None], z), g)
        return z, (beta[:, None] * z,)

    inputs = [x.flip(0) for x in (g, weights.alpha_of_next(), weights.beta)]
    return _scan(step, inputs, torch.zeros_like(g))[0].flip(0)


def _exact_gradients(g: Tensor, q: Tensor, k: Tensor, weights: _Weights, variant: str) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, rows [M, C], from those of y."""

    def generate(y: Tensor, k: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = torch.where((alpha != 0)[:, None], torch.addcmul(alpha[:, None] * y, beta[:, None], k), beta[:, None] * k)
        return y, (y,)

    # Again rather than from the output, which may be rounded to 16 bits.
    before = _shifted(_scan(generate, (k, weights.alpha, weights.beta), _shifted(k))[0])
    inverse_n = 1 / _norm(q)
    s = torch.where(weights.restart, 0, weights.total)
    a, v = weights.alpha * s, weights.beta * s
    direction = q * inverse_n[:, None]  # derivative of a by the row before
    if variant == "paper":
        inverse_before = 1 / _norm(before)
        direction = (direction - a[:, None] * _unit(before)) * inverse_before[:, None]
    inverse_s = torch.where(weights.restart, 0, 1 / weights.total)

    def step(
        z: Tensor, g: Tensor, d: Tensor, direction: Tensor, alpha: Tensor, beta: Tensor, inverse_s: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        ybar = g + z
        started = inverse_s == 0
        lam = torch.where(started, 0, torch.linalg.vecdot(d, ybar) * inverse_s)
        abar, vbar = beta * lam, -alpha * lam
        z = torch.where(started[:, None], 0, torch.addcmul(alpha[:, None] * ybar, abar[:, None], direction))
        return z, (ybar, abar, vbar)

    inputs = [x.flip(0) for x in (g, before - k, direction, weights.alpha, weights.beta, inverse_s)]
    ybar, abar, vbar = (x.flip(0) for x in _scan(step, inputs, torch.zeros_like(g)))
    ka, kb = 1 / _norm(k), inverse_n if variant == "paper" else torch.ones_like(inverse_n)
    towards_y = before if variant == "official" else before * inverse_before[:, None]
    dk = weights.beta[:, None] * ybar
    dk += vbar[:, None] * (q * kb[:, None] - v[:, None] * _unit(k)) * ka[:, None]
    dq = (abar * inverse_n)[:, None] * (towards_y - a[:, None] * _unit(q))
    if variant == "official":
        dq += (vbar * ka)[:, None] * k
    else:
        dq += (vbar * inverse_n)[:, None] * (k * ka[:, None] - v[:, None] * _unit(q))
    return dq, dk


def _unit(x: Tensor) -> Tensor:
    """X / |x|, 0 where that is 0."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length > 0, x / length, 0)


def _truncated_attention(weights: _Weights) -> tuple[Tensor, Tensor, Tensor]:
    """The attention weights that are not 0 after truncation: rows (0 to M - 1), positions and truncated values, [n].

    The columns of the distinct indices are run through t <- fl(fl(t alpha) + beta) row by row, a few rows at a time.
    """
    distinct, column = weights.index.unique(return_inverse=True)
    count, width = weights.index.numel(), distinct.numel()
    depth = max(1, TILE_BYTES // weights.alpha.element_size() // width)
    alphas, betas, columns = weights.alpha.tolist(), weights.beta.tolist(), column.tolist()
    last = weights.alpha.new_zeros(width)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, count, depth):
        tile = weights.alpha.new_empty(min(depth, count - first), width)
        for r, row in enumerate(tile):
            i = first + r
            if alphas[i] == 0:
                row.zero_()
            else:
                torch.mul(last, alphas[i], out=row)
            row[columns[i]] += betas[i]
            last = row
        tile, last = tile.trunc(), last.clone()
        rows, hits = tile.nonzero(as_tuple=True)
        found.append((rows + first, distinct[hits], tile[rows, hits]))
    rows, positions, whole = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, positions, whole
