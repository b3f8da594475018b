"""Coarse-to-fine patch synthesis: a source pixel for every pixel of a hole, found by matching and voting in turn.

Patches of a level are compared by colour and by texture (mean absolute gradients of the full-size photo). Each round
matches every patch that touches the hole to the nearest known patch, then gives each hole pixel the weighted mean of
what the patches over it propose. The method follows Newson et al., Non-Local Patch-Based Image Inpainting, IPOL 2017,
with the confidence weights of Wexler et al., Space-Time Completion of Video, PAMI 2007.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels import PatchMatches, match_patches, patch_vote, patchmatch
from inpaint_kernels._checks import check_range

Report = Callable[[float, str], None]

# Mean change of colour, of a full scale of 1, below which a level has converged.
_CONVERGED = 4e-4
# A level needs this many known patches to be worth starting at.
_ENOUGH_PATCHES = 64
# Width in pixels up to which a hole is filled like a brush stroke. There small patches, which compare little but what
# is known on both sides, keep more of a photo's detail (mean gradient energy of four photos under strokes of 20 pixels:
# 0.59 of the truth with the patches for wide holes, 0.83 with these).
_NARROW = 40
_NARROW_PATCH, _NARROW_TEXTURE = 5, 12.0
# Comparisons of patches in one exhaustive round, about a second; a photo with more of them begins at a coarser level.
_EXHAUSTIVE_BUDGET = 2e8


@dataclass(frozen=True)
class Tunables:
    """What can be changed about the synthesis. The defaults are those for wide holes, see :func:`tunables_for`.

    Attributes:
        coarsest: longer side in pixels at which synthesis may begin, roughly (sides are halved from level to level).
        coarsest_hole: thickness of the hole in pixels at which synthesis begins, roughly, or at a coarser level if
            ``coarsest`` asks for it. Structures that end at the hole connect across a few patches, not across many.
        patch: side of the patches, odd.
        texture: weight of the texture features beside colour; larger is sharper, up to noisy.
        bandwidth: how fast a proposal loses weight with its patch's distance, relative to the mean distance of the
            patches over the pixel; small is sharp, large is smooth.
        gamma: a patch loses this factor of its weight per pixel of distance to what is known.
        coarsest_rounds: most rounds of matching and voting at the coarsest level.
        exhaustive_rounds: how many of them compare with all known patches; later ones search.
        rounds: most rounds at the levels between.
        finest_rounds: most rounds at the finest level.
        search: PatchMatch iterations in each round.
    """

    coarsest: int = 256
    coarsest_hole: int = 32
    patch: int = 9
    texture: float = 4.0
    bandwidth: float = 1.0
    gamma: float = 1.3
    coarsest_rounds: int = 12
    exhaustive_rounds: int = 2
    rounds: int = 6
    finest_rounds: int = 5
    search: int = 2

    def __post_init__(self) -> None:
        for name in (
            "coarsest",
            "coarsest_hole",
            "coarsest_rounds",
            "exhaustive_rounds",
            "rounds",
            "finest_rounds",
            "search",
        ):
            check_range(name, getattr(self, name), minimum=1, integer=True)
        check_range("patch", self.patch, minimum=3, integer=True)
        if self.patch % 2 == 0:
            raise ValueError(f"patch: expected an odd number, got {self.patch}")
        check_range("texture", self.texture, minimum=0)
        check_range("gamma", self.gamma, minimum=1)
        check_range("bandwidth", self.bandwidth, minimum=1e-3)


def tunables_for(hole: Tensor, **chosen: Any) -> Tunables:
    """The tunables that suit a hole [H, W] bool, but for those that are chosen."""
    # A band of width w has its pixels at w / 4 from the border, on the mean.
    width = 4 * float(city_block_distance(hole)[hole].mean())
    suited = {"patch": _NARROW_PATCH, "texture": _NARROW_TEXTURE} if width <= _NARROW else {}
    return Tunables(**{**suited, **chosen})


@dataclass(frozen=True)
class Level:
    """One level of the pyramid, with what matching and voting need of it.

    Attributes:
        features: [C, H, W] colour, then texture; 0 in the hole.
        colours: how many of the channels are colour.
        corner: row and column of the box that is synthesised: the hole and the patches over it.
        hole: [h, w] bool, the hole within the box.
        queries: [h, w] bool, centres of the patches that touch the hole.
        eligible: [H, W] bool, centres of the patches that lie inside the photo and are known entirely.
        confidence: [h, w], logarithm of a patch's weight by its distance to what is known.
    """

    features: Tensor
    colours: int
    corner: tuple[int, int]
    hole: Tensor
    queries: Tensor
    eligible: Tensor
    confidence: Tensor

    def box(self, x: Tensor) -> Tensor:
        """The box's part of [..., H, W]."""
        (top, left), (height, width) = self.corner, self.hole.shape
        return x[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class Synthesis:
    """What :func:`synthesise` returns.

    Attributes:
        corner: row and column of the box around the hole.
        hole: [h, w] bool, the hole within the box.
        source: [h, w] int64, flat position in the photo whose colour a hole pixel takes; the pixel itself elsewhere.
        difference: root mean square difference, per feature, between the patches over the hole and their matches.
    """

    corner: tuple[int, int]
    hole: Tensor
    source: Tensor
    difference: float

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The box's index into [C, H, W]."""
        (top, left), (height, width) = self.corner, self.hole.shape
        return slice(None), slice(top, top + height), slice(left, left + width)


def synthesise(image: Tensor, hole: Tensor, tunables: Tunables, seed: int, report: Report) -> Synthesis | None:
    """A source pixel for every pixel of a hole.

    Args:
        image: [C, H, W] float32, 0 in the hole.
        hole: [H, W] bool.
        tunables: see there.
        seed: of the random search.
        report: called with the share of the work that is done and the name of the stage.

    Returns:
        See :class:`Synthesis`; None if there is no patch that is known entirely.
    """
    levels = build_levels(image, hole, tunables)
    if not levels:
        return None
    costs = [_rounds(depth, len(levels), tunables) * int(level.hole.sum()) for depth, level in enumerate(levels)]
    state = field = None
    for depth, level in enumerate(levels):
        if state is None or field is None:
            state = _peel(level, tunables)
        else:
            field = _refined(field, levels[depth - 1], level)
            state = _vote(level, level.box(level.features), field, tunables, level.hole)
        rounds = _rounds(depth, len(levels), tunables)
        for turn in range(rounds):
            report((sum(costs[:depth]) + costs[depth] * turn / rounds) / sum(costs), f"level {depth + 1}/{len(levels)}")
            if field is None or (depth == 0 and turn < tunables.exhaustive_rounds):
                field = _match_all(level, state, level.queries, None, tunables)
            else:
                draw = (seed * 1009 + depth * 101 + turn) % 2**32
                field = _search(level, state, field, tunables, draw)
            before, state = state, _vote(level, state, field, tunables, level.hole)
            if _mean_change(level, before, state) < _CONVERGED:
                break
    assert field is not None
    return _sources(levels[-1], field, tunables)


def _rounds(depth: int, depths: int, tunables: Tunables) -> int:
    if depth == 0:
        return tunables.coarsest_rounds
    return tunables.finest_rounds if depth == depths - 1 else tunables.rounds


def _mean_change(level: Level, before: Tensor, after: Tensor) -> float:
    change = (after - before)[: level.colours].abs().sum() / (level.colours * level.hole.sum())
    return float(change)


# The pyramid ----------------------------------------------------------------------------------------------------------


def build_levels(image: Tensor, hole: Tensor, tunables: Tunables) -> list[Level]:
    """The levels, coarsest first; none if no patch of the photo is known entirely."""
    halvings = _halvings(hole, tunables)
    known = (~hole).float()
    texture, texture_known = _absolute_gradients(image, known)
    levels: list[Level] = []
    for step in range(halvings + 1):
        if step:
            image, known = _halve(image, known)
            texture, texture_known = _halve(texture, texture_known)
            hole = F.max_pool2d(_even(hole[None].float()), 2)[0] > 0
        smooth = box_mean(texture, texture_known, 2)
        level = _level(torch.cat([image, tunables.texture * smooth]) * ~hole, len(image), hole, tunables)
        if int(level.eligible.sum()) < (_ENOUGH_PATCHES if step else 1):
            break
        levels.insert(0, level)
    return levels


def _halvings(hole: Tensor, tunables: Tunables) -> int:
    """How often the photo is halved before synthesis begins."""
    thickness = 2 * float(city_block_distance(hole).max())
    by_size = round(math.log2(max(thickness / tunables.coarsest_hole, max(hole.shape) / tunables.coarsest)))
    # Halving once leaves a 16th of the comparisons.
    comparisons = float(dilate(hole, tunables.patch).sum()) * hole.numel()
    by_cost = math.ceil(math.log(comparisons / _EXHAUSTIVE_BUDGET, 16))
    return max(0, by_size, by_cost)


def _level(features: Tensor, colours: int, hole: Tensor, tunables: Tunables) -> Level:
    height, width = hole.shape
    half = tunables.patch // 2
    rows, columns = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
    top, bottom = max(0, int(rows[0]) - 2 * half), min(height, int(rows[-1]) + 2 * half + 1)
    left, right = max(0, int(columns[0]) - 2 * half), min(width, int(columns[-1]) + 2 * half + 1)
    box_hole = hole[top:bottom, left:right].contiguous()
    eligible = torch.zeros_like(hole)
    inner = (slice(half, height - half), slice(half, width - half))
    eligible[inner] = ~dilate(hole, half)[inner]
    return Level(
        features=features,
        colours=colours,
        corner=(top, left),
        hole=box_hole,
        queries=dilate(box_hole, half),
        eligible=eligible,
        confidence=-math.log(tunables.gamma) * city_block_distance(box_hole),
    )


def city_block_distance(mask: Tensor) -> Tensor:
    """[h, w] float32: the city-block distance of each pixel of a bool mask to the nearest one that is not in it."""
    distance = mask.float() * sum(mask.shape)
    for dim in (1, 0):
        place = torch.arange(mask.shape[dim], dtype=torch.float32, device=mask.device)
        place = place[None, :] if dim == 1 else place[:, None]
        from_before = torch.cummin(distance - place, dim).values + place
        from_behind = torch.cummin((distance + place).flip(dim), dim).values.flip(dim) - place
        distance = torch.minimum(from_before, from_behind)
    return distance


def dilate(mask: Tensor, radius: int) -> Tensor:
    """A bool mask grown by a square of side 2 radius + 1."""
    side = 2 * radius + 1
    grown = F.max_pool2d(mask[None].float(), (1, side), 1, (0, radius))
    return F.max_pool2d(grown, (side, 1), 1, (radius, 0))[0] > 0


def _absolute_gradients(image: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """|d/dx| and |d/dy| of the mean colour, [2, H, W], and where all pixels that they read are known, [H, W]."""
    gray = F.pad(image.mean(0)[None], (1, 1, 1, 1), mode="replicate")[0]
    across = (gray[1:-1, 2:] - gray[1:-1, :-2]).abs() / 2
    down = (gray[2:, 1:-1] - gray[:-2, 1:-1]).abs() / 2
    framed = F.pad(known, (1, 1, 1, 1), value=1.0)
    usable = known * framed[1:-1, 2:] * framed[1:-1, :-2] * framed[2:, 1:-1] * framed[:-2, 1:-1]
    return torch.stack([across, down]), usable


def _even(x: Tensor) -> Tensor:
    """[C, H, W] with a zero row and column more where H and W are odd."""
    return F.pad(x, (0, x.shape[2] % 2, 0, x.shape[1] % 2))


def _halve(x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Means of 2x2 pixels over what is known of them, and how much that is."""
    share = F.avg_pool2d(_even(known[None]), 2)
    return F.avg_pool2d(_even(x * known), 2) / share.clamp_min(1e-6), share[0]


def box_mean(x: Tensor, known: Tensor, radius: int) -> Tensor:
    """Mean over the known pixels of the square of side 2 radius + 1 around each pixel."""

    def box(y: Tensor) -> Tensor:
        side = 2 * radius + 1
        return F.avg_pool2d(F.avg_pool2d(y, (1, side), 1, (0, radius)), (side, 1), 1, (radius, 0))

    return box(x * known) / box(known[None]).clamp_min(1e-6)


# Matching -------------------------------------------------------------------------------------------------------------


def _match_all(level: Level, state: Tensor, queries: Tensor, weight: Tensor | None, tunables: Tunables) -> PatchMatches:
    """The nearest of all known patches, [h, w]; ``weight`` [h, w] says how much of each pixel of the box is known.

    Scores are minus the weighted squared distance, per unit of weight times the size of a patch.
    """
    weight = torch.ones_like(state[0]) if weight is None else weight
    query = torch.cat([2 * weight * state, -weight[None]])
    key = torch.cat([level.features, level.features.square().sum(0, keepdim=True)])
    found = match_patches(query[None], key[None], patch=tunables.patch, queries=queries, valid=level.eligible[None])
    own = _box_sum(weight * state.square().sum(0), tunables.patch)
    # The difference of two large numbers may come out below zero by rounding.
    distance = (own - found.score[0]).clamp_min(0) / _box_sum(weight, tunables.patch).clamp_min(1.0)
    score = torch.where(queries, -distance * tunables.patch**2, -math.inf)
    return PatchMatches(found.index[0], score)


def _search(level: Level, state: Tensor, field: PatchMatches, tunables: Tunables, seed: int) -> PatchMatches:
    """Known patches near to those over the hole, from the matches of the round before."""
    found = patchmatch(
        state[None],
        level.features[None],
        field.index[None],
        patch=tunables.patch,
        queries=level.queries,
        valid=level.eligible[None],
        iterations=tunables.search,
        seed=seed,
    )
    return PatchMatches(found.index[0], found.score[0])


def _box_sum(x: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(x[None, None], side, 1, side // 2, divisor_override=1)[0, 0]


def _refined(field: PatchMatches, coarse: Level, fine: Level) -> PatchMatches:
    """The matches of a level carried over to the next finer one, where a 2x2 block takes the place of a pixel."""
    height, width = fine.hole.shape
    row = torch.arange(fine.corner[0], fine.corner[0] + height, device=fine.hole.device)[:, None]
    column = torch.arange(fine.corner[1], fine.corner[1] + width, device=fine.hole.device)[None, :]
    parent_row = (row // 2 - coarse.corner[0]).clamp(0, coarse.hole.shape[0] - 1)
    parent_column = (column // 2 - coarse.corner[1]).clamp(0, coarse.hole.shape[1] - 1)
    parent = field.index[parent_row, parent_column]
    coarse_width = coarse.features.shape[2]
    match_row = 2 * (parent // coarse_width) + row % 2
    match_column = 2 * (parent % coarse_width) + column % 2
    fine_height, fine_width = fine.features.shape[1:]
    usable = fine.queries & (parent >= 0) & (match_row < fine_height) & (match_column < fine_width)
    index = torch.where(usable, match_row * fine_width + match_column, 0)
    usable &= fine.eligible.flatten()[index]
    score = torch.where(usable, field.score[parent_row, parent_column], -math.inf)
    return PatchMatches(torch.where(usable, index, -1), score)


# Voting ---------------------------------------------------------------------------------------------------------------


def _vote(level: Level, state: Tensor, field: PatchMatches, tunables: Tunables, pixels: Tensor) -> Tensor:
    """The state [C, h, w] with the weighted mean of the proposals in ``pixels`` [h, w]."""
    mean = patch_vote(
        level.features[None],
        field.index[None],
        field.score[None],
        patch=tunables.patch,
        confidence=level.confidence,
        targets=pixels,
        bandwidth=tunables.bandwidth,
    )
    return torch.where(pixels, mean[0], state)


def _sources(level: Level, field: PatchMatches, tunables: Tunables) -> Synthesis:
    """Each hole pixel takes the proposal of the nearest patch over it."""
    height, width = level.hole.shape
    photo_width = level.features.shape[2]
    row = torch.arange(height, device=level.hole.device)[:, None] + level.corner[0]
    column = torch.arange(width, device=level.hole.device)[None, :] + level.corner[1]
    itself = row * photo_width + column
    # A patch proposes the same shift for all its pixels, so the shift of the nearest patch over a pixel is looked up.
    half = tunables.patch // 2
    framed_score = F.pad(field.score, (half,) * 4, value=-math.inf)
    framed_shift = F.pad(field.index - itself, (half,) * 4)
    best, shift = torch.full_like(field.score, -math.inf), torch.zeros_like(itself)
    for dy in range(tunables.patch):
        for dx in range(tunables.patch):
            over = (slice(dy, dy + height), slice(dx, dx + width))
            nearer = framed_score[over] > best
            best = torch.where(nearer, framed_score[over], best)
            shift = torch.where(nearer, framed_shift[over], shift)
    mean = -field.score[level.queries].mean() / (tunables.patch**2 * level.features.shape[0])
    return Synthesis(level.corner, level.hole, torch.where(level.hole, itself + shift, itself), float(mean.sqrt()))


# The first guess ------------------------------------------------------------------------------------------------------


def _peel(level: Level, tunables: Tunables) -> Tensor:
    """The state [C, h, w] of the coarsest level: the hole filled ring by ring from patches that are known in part."""
    state, unknown = level.box(level.features).clone(), level.hole.clone()
    while unknown.any():
        ring = unknown & dilate(~unknown, 1)
        over = dilate(ring, tunables.patch // 2) & dilate(~unknown, 1)
        field = _match_all(level, state, over, (~unknown).float(), tunables)
        state = _vote(level, state, field, tunables, ring)
        unknown &= ~ring
    return state
