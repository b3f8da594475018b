"""Fine structure for a hole that was painted small: the residual of known places is carried into it.

Contextual residual aggregation (Yi et al., Contextual Residual Aggregation for Ultra High-Resolution Image Inpainting,
CVPR 2020, section 3.2): what a photo has beyond its own reduced and enlarged copy is taken from where the network's
attention looked.

Deviations: of a position's attention the largest entry counts, not all of them, so that nothing is averaged away that
does not fit; patch matching moves it from the attention's grid of 8 pixels to the pixel where the painting resembles
the known most; and where neighbours looked at different places, the contrast of their mean is restored. It is
gathers of the hole's pixels alone: of a hole of 400 x 400 pixels 0.1 s on two cores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels.ops.patchmatch import patchmatch

PATCH = 7
"""Side of the patches that are compared, in pixels of the reduced photo."""


def match(image: Tensor, hole: Tensor, attention: Tensor | None = None, cell: int = 8) -> Tensor:
    """Which known pixel each painted one resembles.

    Args:
        image: [1, 3, H, W] floating, its hole painted.
        hole: bool [1, 1, H, W].
        attention: [1, 2, h, w] int64, offsets in positions, near which the search stays; None: it looks everywhere.
        cell: pixels of a position, along each axis; h and w are H / cell and W / cell, rounded up.

    Returns:
        Offsets [1, 2, H, W] int64, rows and columns; 0 where nothing is hole, or nothing known is there to resemble.
    """
    height, width = image.shape[2:]
    image = image.float()
    rows, columns = (torch.arange(side, device=image.device) for side in (height, width))
    # A patch that touches the hole holds what was painted, and would be found to resemble itself.
    valid = F.max_pool2d(hole.to(image.dtype), PATCH, 1, PATCH // 2)[:, 0] == 0
    start = radius = None
    if attention is not None:
        near = attention[:, :, rows // cell][..., columns // cell] * cell
        start = (rows[:, None] + near[:, 0]) * width + columns + near[:, 1]
        radius = cell
    found = patchmatch(image, image, start, patch=PATCH, queries=hole[0, 0], valid=valid, radius=radius).index
    offsets = torch.stack([found // width - rows[:, None], found % width - columns], 1)
    return offsets.masked_fill((found < 0)[:, None], 0)


def carried_residual(image: Tensor, base: Tensor, hole: Tensor, offsets: Tensor) -> Tensor:
    """What the hole's pixels lack of fine structure, from where the offsets point.

    Args:
        image: [1, C, H, W], the photo; what it holds in the hole is not looked at.
        base: [1, C, H, W], the reduced and painted photo, enlarged again.
        hole: bool [1, 1, H, W].
        offsets: [1, 2, h, w] int64, from each pixel of the reduced photo to the one that it resembles, in its pixels.

    Returns:
        [1, C, H, W] to be added to ``base``, 0 outside the hole and where no source is known.
    """
    height, width = image.shape[2:]
    scale = torch.tensor([height / offsets.shape[2], width / offsets.shape[3]])
    rows, columns = hole[0, 0].nonzero(as_tuple=True)
    residual = (image - base)[0].flatten(1)
    known = ~_beside(hole, 2 * int(scale.max()) + 1).flatten()

    shares, places = [], []
    for row_share, row in _pair_around(rows, offsets.shape[2], scale[0]):
        for column_share, column in _pair_around(columns, offsets.shape[3], scale[1]):
            down, right = ((offsets[0, axis, row, column] * scale[axis]).round().long() for axis in (0, 1))
            y, x = rows + down, columns + right
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            place = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            shares.append(row_share * column_share * (inside & known[place]))
            places.append(place)
    values = _mean_of_places(residual, torch.stack(shares), torch.stack(places))
    result = torch.zeros_like(residual)
    result[:, rows * width + columns] = values.to(result.dtype)
    return result.view_as(base)


def _beside(hole: Tensor, reach: int) -> Tensor:
    """The hole and what is so near that the enlarged photo has some of the painting there."""
    along_rows = F.max_pool2d(hole.float(), (1, 2 * reach + 1), 1, (0, reach))
    return F.max_pool2d(along_rows, (2 * reach + 1, 1), 1, (reach, 0)) > 0


def _pair_around(pixels: Tensor, positions: int, cell: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(share, position) of the two whose centres surround each pixel."""
    place = (pixels + 0.5) / cell.item() - 0.5
    first = place.floor()
    share = place - first
    low, high = (x.long().clamp(0, positions - 1) for x in (first, first + 1))
    return (1 - share, low), (share, high)


def _mean_of_places(values: Tensor, shares: Tensor, places: Tensor) -> Tensor:
    """Means [C, N] of values [C, P] over K places for each of N pixels, of the contrast of one place.

    The deviation of a mean of different places is that of one, times the root of the sum of their squared shares.
    """
    tiny = torch.finfo(shares.dtype).tiny
    shares = shares / shares.sum(0).clamp_min(tiny)
    squares = torch.zeros_like(shares[0])
    for place, share in zip(places, shares, strict=True):
        squares += share * ((places == place) * shares).sum(0)
    mean = sum(values[:, place] * share for place, share in zip(places, shares, strict=True))
    return mean / squares.sqrt().clamp_min(tiny)
