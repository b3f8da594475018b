"""Gradient-domain blending: the pixels of a hole whose differences are prescribed and whose border is given.

The equations are those of Perez et al., Poisson Image Editing, SIGGRAPH 2003, with a weight per difference. They are
solved by conjugate gradients with one multigrid cycle (Braess, Towards Algebraic Multigrid for Elliptic Problems of
Second Order, 1995: aggregates of 2x2 pixels) as preconditioner, for all channels at once and for the hole's box only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_TOLERANCE = 1e-4
_MAX_ITERATIONS = 100
_DAMPING = 0.7
_SWEEPS = 2
# Constant interpolation between aggregates makes the coarse operator twice too stiff (Braess, section 3).
_COARSE_STIFFNESS = 0.5


@dataclass(frozen=True)
class _Grid:
    """A weighted 5-point operator: (A u)_i = ground_i u_i + sum over neighbours j of w_ij (u_i - u_j).

    Attributes:
        right: [h, w - 1], weight of each pair of horizontal neighbours.
        below: [h - 1, w], weight of each pair of vertical neighbours.
        ground: [h, w], weight of each pixel's differences to known values.
        inverse_diagonal: [h, w]; 0 where a pixel is no unknown.
    """

    right: Tensor
    below: Tensor
    ground: Tensor
    inverse_diagonal: Tensor

    @staticmethod
    def of(right: Tensor, below: Tensor, ground: Tensor) -> _Grid:
        diagonal = ground.clone()
        diagonal[:, :-1] += right
        diagonal[:, 1:] += right
        diagonal[:-1] += below
        diagonal[1:] += below
        return _Grid(right, below, ground, torch.where(diagonal > 0, 1 / diagonal, 0.0))

    def apply(self, u: Tensor) -> Tensor:
        """A u, for u [C, h, w]."""
        out = self.ground * u
        across = self.right * (u[:, :, 1:] - u[:, :, :-1])
        out[:, :, 1:] += across
        out[:, :, :-1] -= across
        down = self.below * (u[:, 1:] - u[:, :-1])
        out[:, 1:] += down
        out[:, :-1] -= down
        return out

    def coarser(self) -> _Grid:
        """The operator between aggregates of 2x2 pixels."""
        height, width = self.ground.shape
        right = F.pad(self.right, (0, 1 + width % 2, 0, height % 2))
        below = F.pad(self.below, (0, width % 2, 0, 1 + height % 2))
        ground = F.pad(self.ground, (0, width % 2, 0, height % 2))
        right = (right[0::2] + right[1::2])[:, 1::2][:, :-1]
        below = (below[:, 0::2] + below[:, 1::2])[1::2][:-1]
        return _Grid.of(_COARSE_STIFFNESS * right, _COARSE_STIFFNESS * below, _sum_2x2(ground[None])[0])


def blend(
    hole: Tensor,
    known: Tensor,
    right: Tensor,
    below: Tensor,
    right_weight: Tensor | None = None,
    below_weight: Tensor | None = None,
    guess: Tensor | None = None,
) -> Tensor:
    """The pixels u of a hole that minimise the sum of w_ij |u_j - u_i - g_ij|^2 over neighbouring pixels.

    Args:
        hole: [h, w] bool, the pixels that are unknown.
        known: [C, h, w], the values outside the hole; what it holds inside is not looked at.
        right: [C, h, w - 1], g of horizontal neighbours: the wanted value of the right one minus the left one.
        below: [C, h - 1, w], g of vertical neighbours: the wanted value of the lower one minus the upper one.
        right_weight: [h, w - 1], at least 0; None: 1 everywhere.
        below_weight: [h - 1, w], the same.
        guess: [C, h, w] to start from; None: 0.

    Returns:
        [C, h, w], u in the hole and ``known`` outside.
    """
    fixed = torch.where(hole, 0.0, known)
    right_weight = torch.ones_like(right[0]) if right_weight is None else right_weight
    below_weight = torch.ones_like(below[0]) if below_weight is None else below_weight
    # Pairs of two unknowns are springs between them, pairs with one known pixel hold the other to the ground.
    right_pair, below_pair = hole[:, 1:] & hole[:, :-1], hole[1:] & hole[:-1]
    right_border, below_border = hole[:, 1:] ^ hole[:, :-1], hole[1:] ^ hole[:-1]
    ground = torch.zeros_like(fixed[0])
    ground[:, 1:] += right_weight * right_border
    ground[:, :-1] += right_weight * right_border
    ground[1:] += below_weight * below_border
    ground[:-1] += below_weight * below_border
    grid = _Grid.of(right_weight * right_pair, below_weight * below_pair, ground * hole)

    target = torch.zeros_like(fixed)
    across = right_weight * (right_pair | right_border)
    target[:, :, 1:] += across * (fixed[:, :, :-1] + right)
    target[:, :, :-1] += across * (fixed[:, :, 1:] - right)
    down = below_weight * (below_pair | below_border)
    target[:, 1:] += down * (fixed[:, :-1] + below)
    target[:, :-1] += down * (fixed[:, 1:] - below)
    start = torch.zeros_like(fixed) if guess is None else guess * hole
    return fixed + _solve(grid, target * hole, start)


def _solve(grid: _Grid, target: Tensor, u: Tensor) -> Tensor:
    """Preconditioned conjugate gradients, each channel with its own step lengths."""
    grids = [grid]
    while grids[-1].ground.numel() > 16:
        grids.append(grids[-1].coarser())
    residual = target - grid.apply(u)
    enough = _TOLERANCE * _norm(target).clamp_min(1e-12)
    direction, last = torch.zeros_like(u), None
    for _ in range(_MAX_ITERATIONS):
        if (_norm(residual) <= enough).all():
            break
        corrected = _cycle(grids, residual)
        product = _dot(residual, corrected)
        direction = corrected if last is None else corrected + product / last * direction
        image = grid.apply(direction)
        step = product / _dot(direction, image).clamp_min(1e-30)
        u = u + step * direction
        residual = residual - step * image
        last = product.clamp_min(1e-30)
    return u


def _cycle(grids: list[_Grid], target: Tensor) -> Tensor:
    """One symmetric V-cycle from zero: an approximate solution of A u = target."""
    grid, rest = grids[0], grids[1:]
    relax = _DAMPING * grid.inverse_diagonal
    u = relax * target
    for _ in range(_SWEEPS - 1):
        u = u + relax * (target - grid.apply(u))
    if rest:
        height, width = grid.ground.shape
        error = target - grid.apply(u)
        coarse = _cycle(rest, _sum_2x2(F.pad(error, (0, width % 2, 0, height % 2))))
        u = u + coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width] * (relax > 0)
    for _ in range(_SWEEPS):
        u = u + relax * (target - grid.apply(u))
    return u


def _sum_2x2(x: Tensor) -> Tensor:
    return x[:, 0::2, 0::2] + x[:, 1::2, 0::2] + x[:, 0::2, 1::2] + x[:, 1::2, 1::2]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each channel, [C, 1, 1]."""
    return (a * b).sum((1, 2), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()
